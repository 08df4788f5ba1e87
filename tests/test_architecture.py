"""The arrows between the rooms, and the habits that the design asks for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.recipes import RECIPES

ROOT = Path(__file__).parent.parent
ROOMS = ("models", "actors", "pipelines", "tune_spaces", "run")
"""Each may import those before it, and itself."""


def files(room):
    return [ROOT / "run.py"] if room == "run" else sorted((ROOT / room).rglob("*.py"))


def name_of(path):
    return str(path.relative_to(ROOT))


def imports(path):
    """Every module that a file imports anywhere: in functions and for type checking, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
                yield ".".join([*package, *(node.module or "").split(".")]).rstrip(".")
            else:
                yield node.module
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


SOURCES = [path for room in ROOMS for path in files(room)]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_run_one_way(path):
    room = "run" if path.name == "run.py" and path.parent == ROOT else path.relative_to(ROOT).parts[0]
    later = set(ROOMS[ROOMS.index(room) + 1 :]) | {"tests", "bench"}
    wrong = sorted(name for name in imports(path) if name.split(".")[0] in later)
    assert not wrong, f"{name_of(path)} imports {', '.join(wrong)}"


@pytest.mark.parametrize("path", files("models"), ids=name_of)
def test_models_know_no_ray_no_files_and_no_printing(path):
    outside = {"ray", "os", "io", "pathlib", "shutil", "tempfile", "pyarrow", "PIL", "rich", "json", "logging"}
    wrong = sorted(name for name in imports(path) if name.split(".")[0] in outside)
    assert not wrong, f"{name_of(path)} imports {', '.join(wrong)}"
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"open", "print", "input"}


def test_actors_import_no_dataset_and_no_recipe():
    for path in files("actors"):
        assert not [name for name in imports(path) if name.startswith("pipelines")], name_of(path)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_there_is_no_drawer_for_everything(path):
    parts = {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
    assert not parts & {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_branches_on_a_recipes_name(path):
    if path.parent.name == "recipes" and path.stem in RECIPES:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            compared = [node.value]
        else:
            continue
        named = {c.value for part in compared for c in ast.walk(part) if isinstance(c, ast.Constant)}
        assert not named & set(RECIPES), f"{name_of(path)}:{node.lineno} branches on {named & set(RECIPES)}"


def loaded_by(*modules):
    """Top-level modules in memory after importing some modules in a fresh process."""
    code = f"import sys, {', '.join(modules)}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_boards_start_without_torch():
    loaded = loaded_by("actors.label_bank", "actors.weight_board", "actors.run_log", "actors.desk", "actors.teacher")
    assert "torch" not in loaded
    assert "ray" in loaded


def test_a_wrong_option_costs_neither_ray_nor_its_seconds():
    assert "ray" not in loaded_by("run")
