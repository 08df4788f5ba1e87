"""Whole runs on folders of one's own: few classes and many, images of mixed sizes, one image a batch."""

import json
import shlex
from pathlib import Path

import pytest

import run as command
from pipelines.options import DataOptions
from pipelines.pseudo_labels.exchange import export_labels, import_labels
from tests.engine.engine_runs import start_run
from tests.own_data import write_own_data

pytestmark = pytest.mark.slow
README = Path(__file__).parent.parent.parent / "README.md"


@pytest.mark.parametrize(
    ("classes", "sizes"),
    [
        (2, ((64, 48), (48, 64), (80, 40))),
        (3, ((200, 150), (120, 300))),
        (40, ((33, 33), (400, 64))),
    ],
)
def test_a_benchmark_of_ones_own_runs_from_two_files_to_a_score(local_ray, tmp_path, classes, sizes):
    source, target = write_own_data(tmp_path, classes=classes, sizes=sizes)
    run = start_run(
        tmp_path / "runs", tmp_path / "data", source=source, target=target, batch=1, steps=8, refresh="once"
    )
    outcome = run.go()
    results = json.loads((outcome.folder / "results.json").read_text())
    assert (results["benchmark"], results["data"]) == ("source2target", "real")
    assert len(results["scores"]["adapted"]["per_class"]) == classes
    assert results["scores"]["adapted"]["images"] == 8
    assert results["teachers"]["labels_made"] >= 8
    assert results["labels"]["read"] > 0
    assert results["skipped"] == []


def test_a_target_without_labels_is_adapted_to_and_not_scored(local_ray, tmp_path):
    source, target = write_own_data(tmp_path, target_labels=False)
    run = start_run(
        tmp_path / "runs", tmp_path / "data", source=source, target=target, batch=1, steps=8, refresh="once"
    )
    outcome = run.go()
    assert set(outcome.results["scores"].values()) == {None}
    assert outcome.results["gap_closed"] is None
    assert outcome.results["protocol"]["label_size"] is None


def test_a_few_target_labels_are_learned_from_and_left_out_of_the_score(local_ray, tmp_path):
    source, target = write_own_data(tmp_path)
    (tmp_path / "few.txt").write_text("1.jpg\n6.jpg\n")
    run = start_run(
        tmp_path / "runs",
        tmp_path / "data",
        source=source,
        target=target,
        target_labels=str(tmp_path / "few.txt"),
        batch=2,
        steps=8,
        refresh="once",
    )
    outcome = run.go()
    assert outcome.results["target_labels"] == 2
    assert outcome.results["scores"]["adapted"]["images"] == 6
    lines = [json.loads(line) for line in (outcome.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss/target_labels"] > 0 for line in lines if line["kind"] == "train")
    assert "2 target labels" in outcome.report.read_text()


def test_the_labels_of_one_run_teach_another_without_teachers(local_ray, tmp_path):
    source, target = write_own_data(tmp_path)
    common = {"source": source, "target": target, "batch": 2, "steps": 8}
    first = start_run(tmp_path / "runs", tmp_path / "data", name="first", refresh="once", **common)
    folder = first.go().folder
    export_labels(str(folder), str(tmp_path / "folder"), "proda", lambda *_: None)
    own = DataOptions(source=source, target=target)
    given = str(tmp_path / "given.parquet")
    assert import_labels(own, str(tmp_path / "folder"), "proda", given, lambda *_: None).images == 8
    second = start_run(tmp_path / "runs", tmp_path / "data", name="second", pseudo_labels=given, **common)
    results = second.go().results
    assert second.run.teachers == []
    assert results["labels"]["read"] > 0
    assert results["labels"]["missing"] == 0
    assert results["scores"]["adapted"]["images"] == 8


def test_the_first_hour_of_the_readme_works_when_pasted(local_ray, tmp_path, monkeypatch, capsys):
    block = README.read_text().split("<!-- first-hour -->")[1].split("```")[1]
    commands = [shlex.split(line) for line in block.strip().splitlines()]
    assert len(commands) == 5
    monkeypatch.chdir(tmp_path)
    for python, script, *arguments in commands:
        assert (python, script) == ("python", "run.py")
        arguments = ["12" if item == "400" else item for item in arguments]
        if arguments[:2] == ["data", "sample"]:
            arguments += ["--size", "tiny"]
        elif arguments[0] == "--source":
            arguments += ["--preset", "tiny", "--no-dashboard"]
        assert command.main(arguments) == 0, arguments
        capsys.readouterr()
    assert (tmp_path / "runs/first/results.json").is_file()
    assert (tmp_path / "runs/first/evaluation/per_image.csv").is_file()
    assert len(list((tmp_path / "data-check").glob("*.png"))) == 4
    assert list((tmp_path / "predictions").glob("*_uncertainty.png"))
