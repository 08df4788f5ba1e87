"""What `ray job submit` uploads: the code, and nothing that a checkout gathers around it."""

import shutil
import zipfile
from pathlib import Path

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.runtime_env import RuntimeEnv

from pipelines.environment import SETTINGS

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy/runtime_env.yaml"


def packed(folder, target, *, gitignore):
    """The package that Ray would upload, by Ray's own rules, as {path: bytes}."""
    create_package(
        str(folder), target, include_gitignore=gitignore, excludes=yaml.safe_load(FILE.read_text())["excludes"]
    )
    with zipfile.ZipFile(target) as archive:
        return {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """This checkout's own files, and all that work leaves around them."""
    folder = tmp_path_factory.mktemp("checkout")
    around = shutil.ignore_patterns(
        ".git", ".venv", "runs", "data", "*.egg-info", ".*_cache", ".hypothesis", "__pycache__"
    )
    shutil.copytree(ROOT, folder, ignore=around, dirs_exist_ok=True)
    gathered = [
        "runs/first/checkpoints/weights.safetensors",
        "data/miniature/image.png",
        ".venv/lib/torch.so",
        ".git/objects/pack/pack.pack",
        "tutelage.egg-info/PKG-INFO",
        "models/__pycache__/losses.pyc",
        ".mypy_cache/cache.json",
    ]
    for name in gathered:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * 1_000_000)
    return folder


@pytest.mark.parametrize("gitignore", [True, False])
def test_a_job_uploads_code_and_no_runs_data_or_caches(checkout, tmp_path, gitignore):
    files = packed(checkout, tmp_path / "package.zip", gitignore=gitignore)
    assert {
        "run.py",
        "constraints.txt",
        "models/losses.py",
        "pipelines/report/page.py",
        "tune_spaces/eplc.toml",
    } <= set(files)
    gathered = {"runs", "data", "docs", "tests", "bench", ".git", ".venv", "tutelage.egg-info", ".mypy_cache"}
    assert not gathered & {name.split("/")[0] for name in files}
    assert not [name for name in files if "__pycache__" in name]
    assert (tmp_path / "package.zip").stat().st_size < 2_500_000  # 1.3 MB when written


def test_a_folder_of_the_code_that_is_called_data_would_still_travel(checkout, tmp_path):
    inner = checkout / "pipelines" / "data"
    inner.mkdir(exist_ok=True)
    (inner / "part.py").write_text("")
    try:
        assert "pipelines/data/part.py" in packed(checkout, tmp_path / "package.zip", gitignore=False)
    finally:
        shutil.rmtree(inner)


def test_ray_accepts_the_runtime_environment_and_it_has_the_settings_of_ours():
    content = yaml.safe_load(FILE.read_text())
    RuntimeEnv(**{**content, "working_dir": str(ROOT)})  # raises where a field or a type is not Ray's
    node_level = {"RAY_USAGE_STATS_ENABLED", "RAY_BACKEND_LOG_LEVEL"}
    settings = {name: value for name, value in SETTINGS.items() if name not in node_level}
    assert content["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60", **settings}
    assert content["working_dir"] == "."
