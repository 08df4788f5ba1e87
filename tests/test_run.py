import dataclasses
import re
import shlex
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import tyro
from rich.console import Console

import run
from pipelines.capacity import Course, Measured, Pace, StageShape, StreamShape
from pipelines.load_trial import Findings
from pipelines.options import AdaptOptions, PriorOptions, write_config, write_options
from pipelines.priors import Prior
from pipelines.recipes.eplc import EplcOptions
from pipelines.run_prior import Found
from pipelines.workers import Memory
from tests.own_data import write_own_data
from tune_spaces.options import SweepOptions

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """What cannot work is refused before a process is started."""
    import ray

    def started(*_, **__):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", started)


def called(arguments):
    """Exit code of the command."""
    try:
        return run.main(arguments)
    except SystemExit as error:
        return error.code


def refused(arguments, tmp_path, capsys):
    """What a command says that must end with code 2 and leave nothing on the disk."""
    before = sorted(tmp_path.rglob("*"))
    places = ["--runs", str(tmp_path / "runs"), "--data", str(tmp_path / "data")]
    assert called([*arguments, *places]) == 2
    assert sorted(tmp_path.rglob("*")) == before
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (["--benchmark", "gta2moon"], "gta2city, synthia2city, city2robot"),
        (["--recipe", "magic"], "eplc, rectified, mrnet"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(arguments, known, tmp_path, capsys):
    said = refused(arguments, tmp_path, capsys)
    assert repr(arguments[1]) in said
    assert known in said
    assert said.count("\n") == 1
    assert "Traceback" not in said


def test_an_unknown_command_is_refused_with_the_known_ones(capsys):
    assert called(["fly"]) == 2
    assert (
        "unknown command 'fly'; known are adapt, tune, evaluate, predict, report, export, labels, prior, plan, data"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["predict"], "at least one picture"),
        (["predict", "x.png", "--passes", "1"], "--passes is 1"),
        (["predict", "x.png", "--threads", "0"], "--threads is 0"),
        (["predict", "nowhere.png"], "nowhere.png is no file or folder"),
        (["data"], "sample, check, prepare"),
        (["data", "fly"], "sample, check, prepare"),
        (["data", "check", "--benchmark", "gta2moon"], "gta2city, synthia2city, city2robot"),
        (["data", "check", "--source", "a.toml"], "--target"),
        (["data", "prepare", "--source", "a.toml", "--target", "b.toml"], "a.toml does not exist"),
        (["data", "prepare", "--recipe", "magic"], "eplc, rectified, mrnet"),
        (["prior"], "Missing from run.py prior"),
        (["prior", "nowhere"], "is no run directory"),
        (["prior", "nowhere", "--method", "guess"], "guess"),
        (["prior", "nowhere", "--weights", "best"], "best"),
    ],
)
def test_the_other_commands_refuse_what_cannot_work(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert called(arguments) == 2
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_data_check_exits_with_one_and_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source, target = write_own_data(tmp_path)
    given = ["data", "check", "--source", source, "--target", target]
    assert called(given) == 0
    said = capsys.readouterr().out
    assert "nothing is wrong" in said
    assert "64×48 and 2 others" in said
    (tmp_path / "source" / "masks" / "1.png").write_bytes(b"")
    assert called(given) == 1
    said = capsys.readouterr().out
    assert "wrong:" in said
    assert "1 things are wrong" in said


def test_data_prepare_says_what_it_did(tmp_path, capsys):
    source, target = write_own_data(tmp_path)
    (tmp_path / "target" / "photos" / "0.jpg").write_bytes(b"")
    given = ["--source", source, "--target", target, "--preset", "tiny", "--data", str(tmp_path / "data")]
    assert called(["data", "prepare", *given]) == 1
    said = capsys.readouterr().out
    assert "unreadable:" in said
    assert "1 files are unreadable" in said


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--students", "0"], "--students is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--steps", "1"], "--steps 1 leaves no step"),
        (["--batch", "0"], "--batch is 0"),
        (["--scale", "0"], "--scale is 0"),
        (["--scale", "0.1"], "leaves crops 10 pixels"),
        (["--source", "a.toml"], "--source is given without --target"),
        (["--source", "a.toml", "--target", "b.toml"], "a.toml does not exist"),
        (["--eplc.passes", "0"], "passes is 0"),
        (["--eplc.keep-share", "2"], "keep_share is 2.0"),
        (["--preset", "huge"], "huge"),
        (["--refresh", "sometimes"], "sometimes"),
        (["--eplc.mixing", "magic"], "magic"),
        (["--eplc.rounds", "2"], "add --refresh once"),
        (["--refresh", "once", "--eplc.max-label-age", "9"], "max_label_age is 9, but labels of one round"),
        (["--prior.floor", "0"], "--prior.floor is 0.0"),
        (["--prior.damping", "1"], "--prior.damping is 1.0"),
        (["--prior.temperature", "0"], "--prior.temperature is 0.0"),
        (["--prior.method", "guess"], "guess"),
        (["--prior.refine-steps", "9"], "--prior.refine-steps refines classifiers"),
        (["--bogus", "1"], "bogus"),
    ],
)
def test_an_option_that_cannot_work_is_refused(arguments, text, tmp_path, capsys):
    assert text in refused(arguments, tmp_path, capsys)


def test_a_run_and_a_file_of_weights_are_scored_each_on_what_is_theirs(tmp_path, capsys):
    assert called(["evaluate", str(tmp_path), "--benchmark", "gta2city"]) == 2
    assert "--benchmark belongs to a file of weights" in capsys.readouterr().err
    file = tmp_path / "GTA5_1.pth"
    file.write_bytes(b"no weights")
    assert called(["evaluate", str(file), "--validation", "mine.toml"]) == 2
    assert "this is a file of weights" in capsys.readouterr().err
    data = ["--preset", "tiny", "--out", str(tmp_path / "out")]
    assert called(["evaluate", str(file), *data]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_the_class_frequencies_of_a_command_reach_what_it_calls(tmp_path, monkeypatch):
    """Whether of a run, of a file of weights, or for pictures."""
    from pipelines import predict, rescore

    class HeardError(Exception):
        pass

    heard = {}

    def listening(name):
        def call(*given, **more):
            heard[name] = (given, more)
            raise HeardError

        return call

    for module, name in ((rescore, "rescore"), (rescore, "score_file"), (predict, "predict")):
        monkeypatch.setattr(module, name, listening(name))
    write_config(AdaptOptions(name="run", runs=str(tmp_path)))
    (tmp_path / "x.pth").write_bytes(b"")
    for command in (["evaluate", str(tmp_path / "run")], ["evaluate", str(tmp_path / "x.pth")], ["predict", "x.png"]):
        with pytest.raises(HeardError):
            called([*command, "--adjust-prior", "mine.toml"])
    assert heard["rescore"][0][1] == heard["score_file"][0][4] == heard["predict"][1]["adjust_prior"] == "mine.toml"
    with pytest.raises(HeardError):
        called(["predict", "x.png"])
    assert heard["predict"][1]["adjust_prior"] == "none"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--adjust-prior", "nowhere.toml"], "there is no file nowhere.toml with class frequencies"),
        (["--adjust-prior", "synthia-original"], "the classes of synthia-original are not those of the run"),
        (["--recipe", "mrnet", "--adjust-prior", "estimated"], "recipe mrnet makes no pseudo labels"),
        (["--pseudo-labels", "x", "--adjust-prior", "estimated"], "--pseudo-labels are taken as they are"),
    ],
    ids=["no file", "other classes", "no labels", "given labels"],
)
def test_class_frequencies_that_cannot_work_are_refused_before_anything_starts(
    arguments, text, tmp_path, tiny_folder, capsys
):
    places = ["--preset", "tiny", "--data", str(tiny_folder / "data"), "--runs", str(tmp_path / "runs")]
    assert called([*arguments, *places]) == 2
    said = capsys.readouterr().err
    assert text in said
    assert said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("truth", [np.array([0.65, 0.35]), None])
def test_prior_shows_what_was_found_and_where_it_is(truth, tmp_path, monkeypatch, capsys):
    from pipelines import run_prior

    asked = []

    def estimate_of_run(folder, method, progress, **more):
        progress(1, 2)
        asked.append((folder, method, more))
        prior = Prior(("road", "car [old]"), (0.9, 0.1), (0.6, 0.4), method, "estimated from 2 images")
        return Found(tmp_path / "prior.toml", prior, 2 * prior.offset, truth, 7)

    monkeypatch.setattr(run_prior, "estimate_of_run", estimate_of_run)
    monkeypatch.setenv("COLUMNS", "160")
    assert called(["prior", "here", "--method", "counts", "--out", "there.toml", "--threads", "1"]) == 0
    assert asked == [("here", "counts", {"out": "there.toml", "weights": "last", "threads": 1})]
    said = " ".join(capsys.readouterr().out.split())
    assert "shares of the classes (images that show it), counts, step 7" in said
    assert f"estimated from 2 images; written to {tmp_path / 'prior.toml'}" in said
    for part in ("road", "90.000%", "60.000%", "-0.81", "car [old]", "10.000%", "40.000%", "+2.77"):
        assert part in said, "what is added counts as many times as the run's temperature"
    assert ("target's labels (pixels)" in said) == ("35.000%" in said) == (truth is not None)


def test_by_default_prior_asks_as_a_run_does(monkeypatch):
    assert run.EstimatePriorOptions("here").method == PriorOptions().method


def test_students_that_cannot_share_a_batch_are_refused_before_anything_starts(tmp_path, tiny_folder, capsys):
    data = tiny_folder / "data"
    arguments = ["--preset", "tiny", "--students", "3", "--data", str(data), "--runs", str(tmp_path / "runs")]
    assert called(arguments) == 2
    assert "3 students" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_wrong_data_root_is_refused(tmp_path, capsys):
    said = refused(["--data-root", str(tmp_path / "nowhere")], tmp_path, capsys)
    assert "does not exist or is not a folder" in said


def test_a_data_root_without_the_dataset_says_what_is_expected(tmp_path, capsys):
    (tmp_path / "root" / "photos").mkdir(parents=True)
    said = refused(["--data-root", str(tmp_path / "root")], tmp_path, capsys)
    assert "SYNTHIA was not found under" in said
    assert "photos" in said


@pytest.mark.parametrize(
    "arguments", [["--resume", "{}"], ["evaluate", "{}"], ["--resume={}"], ["adapt", "--resume", "{}"]], ids=" ".join
)
def test_a_folder_that_is_no_run_is_refused(arguments, tmp_path, capsys):
    filled = [item.format(tmp_path / "nothing") for item in arguments]
    assert called(filled) == 2
    assert "is no run directory" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--resume", "{}"], ["adapt", "--resume", "{}"], ["adapt", "--resume={}"]])
def test_a_resume_goes_on_with_the_options_of_the_run(arguments, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(run, "_adapt", lambda options, console, resume=False: begun.append((options, resume)) or 0)
    options = AdaptOptions(recipe="mrnet", seed=4, name="old", runs=str(tmp_path))
    write_config(options)
    assert called([item.format(tmp_path / "old") for item in arguments]) == 0
    assert begun == [(options, True)]


def test_adapt_may_be_said_or_left_out(monkeypatch):
    begun = []
    monkeypatch.setattr(run, "_adapt", lambda options, console, resume=False: begun.append((options, resume)) or 0)
    assert called(["--seed", "4"]) == called(["adapt", "--seed", "4"]) == 0
    assert begun == [(AdaptOptions(seed=4), False)] * 2


@pytest.mark.parametrize("flag", [["--config", "{}"], ["--config={}"]])
def test_options_in_a_file_are_a_runs_and_those_beside_it_win(flag, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(run, "_adapt", lambda options, console, resume=False: begun.append(options) or 0)
    kept = AdaptOptions(seed=4, steps=90, init="old", from_stage=2, eplc=EplcOptions(dropout=0.3))
    write_options(tmp_path / "best.toml", kept, "the best one")
    filled = [item.format(tmp_path / "best.toml") for item in flag]
    assert called(filled) == called([*filled, "--from-stage", "1", "--init", "None", "--eplc.passes", "3"]) == 0
    changed = dataclasses.replace(kept, from_stage=1, init=None, eplc=EplcOptions(dropout=0.3, passes=3))
    assert begun == [kept, changed]


def test_a_file_of_options_that_cannot_be_read_is_refused(tmp_path, capsys):
    assert called(["--config"]) == 2
    assert "--config needs a file" in capsys.readouterr().err
    assert called(["--config", str(tmp_path / "none.toml")]) == 2
    assert "none.toml cannot be read" in capsys.readouterr().err
    (tmp_path / "old.toml").write_text("sped = 4\n")
    assert called(["--config", str(tmp_path / "old.toml")]) == 2
    assert "sped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--space", "none.toml"], "the search space none.toml cannot be read"),
        (["--only", "eplc.drop"], "has no parameter 'eplc.drop'; it has rate_scale"),
        (["--search", "grid"], "this grid has"),
        (["--metric", "accuracy"], "--metric is 'accuracy'"),
        (["--refresh", "once", "--only", "eplc.max-label-age"], "labels of one round grow old by design"),
        (["--recipe", "magic"], "unknown recipe 'magic'"),
        (["--source", "a.toml", "--target", "b.toml"], "a.toml does not exist"),
        (["--scheduler", "pbt"], "pbt"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused(arguments, text, tmp_path, capsys):
    assert text in refused(["tune", *arguments], tmp_path, capsys)


def test_a_folder_that_is_no_sweep_is_not_resumed(tmp_path, capsys):
    assert called(["tune", "--resume", str(tmp_path)]) == 2
    assert "is no sweep" in capsys.readouterr().err


def test_a_path_in_brackets_is_printed_as_it_is(tmp_path, capsys):
    """Brackets mean markup to the terminal library."""
    assert called(["evaluate", str(tmp_path / "[old]" / "[/x]")]) == 2
    assert "[old]/[/x]" in capsys.readouterr().err


def test_help_names_every_command(capsys):
    assert called(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "--resume" in shown
    assert "evaluate" in shown
    assert "prior RUN" in shown
    assert "tune --resume SWEEP" in shown


def test_the_commands_of_the_readme_parse():
    commands = re.findall(r"python run\.py([^\n`#]*)", README.read_text())
    assert len(commands) > 10
    options = {
        "evaluate": run.EvaluateOptions,
        "predict": run.PredictOptions,
        "report": run.ReportOptions,
        "export": run.ExportOptions,
        "plan": run.PlanOptions,
        "prior": run.EstimatePriorOptions,
        "labels export": run.ExportLabelsOptions,
        "labels import": run.ImportLabelsOptions,
        "data sample": run.SampleOptions,
        "data check": run.CheckOptions,
        "data prepare": run.PrepareOptions,
    }
    for command in commands:
        given = shlex.split(command)
        words = next((n for n in (2, 1) if " ".join(given[:n]) in options), 0)
        if words:
            kind = options[" ".join(given[:words])]
            kind = run.CapacityOptions if kind is run.PlanOptions and run.plans_a_run(given) else kind
            tyro.cli(kind, args=given[words:])
        elif "--help" in given:
            assert called(given) == 0
        elif given[:1] == ["tune"]:
            kind = run.ResumeSweepOptions if "--resume" in given else SweepOptions
            tyro.cli(kind, args=given[1:])
        elif "--config" in given:
            at = given.index("--config")
            tyro.cli(AdaptOptions, args=[*given[:at], *given[at + 2 :]])
        elif "--resume" in given:
            tyro.cli(run.ResumeOptions, args=given)
        else:
            tyro.cli(AdaptOptions, args=given)


def results(**more):
    row = {"miou": 30.0, "per_class": [30.0, None], "protocols": {"16": 30.0}}
    return {
        "benchmark": "synthia2city",
        "recipe": "eplc",
        "data": "miniature",
        "seed": 0,
        "protocol": {"classes": 16, "label_size": [8, 4], "network": "ema", "views": [[8, 4, False]]},
        "class_names": ["road", "wall"],
        "scores": {"source_only": None, "adabn": None, "adapted": row, "oracle": None},
        **more,
    }


def test_the_table_says_miniature_and_names_the_protocol(capsys):
    run.print_table(results(gap_closed=0.61), Console(width=160))
    shown = capsys.readouterr().out
    assert "miniature" in shown
    assert "16 classes" in shown
    assert "mIoU16" in shown
    assert "0.61" in shown
    assert "wall" not in shown, "a class that no row has a score for"


@pytest.mark.parametrize(
    ("recommended", "said"),
    [
        (100, "without labels, the last step (100) also looks best"),
        (90, "without labels, step 90 of 100 looks best: mIoU 31.0, the last step has 30.0"),
        (None, None),
    ],
)
def test_the_step_that_looks_best_stands_beside_the_last_one(recommended, said, capsys):
    label_free = {"recommended": recommended, "recommended_score": {"miou": 31.0}}
    run.print_table(results(steps=100, label_free=label_free), Console(soft_wrap=True))
    printed = capsys.readouterr().out
    assert "adapted" in printed
    assert said in printed if said else "without labels" not in printed


def test_without_target_labels_the_command_says_that_nothing_was_scored(capsys):
    unscored = {"source_only": None, "adabn": None, "adapted": None, "oracle": None}
    label_free = {"recommended": 90, "recommended_score": None}
    run.print_table(results(scores=unscored, steps=100, label_free=label_free), Console(soft_wrap=True))
    printed = capsys.readouterr().out
    assert "no target image has a label" in printed
    assert "step 90 of 100 looks best" in printed
    assert "mIoU" not in printed


def test_a_class_name_in_brackets_is_printed_as_it_is(capsys):
    row = {"miou": 30.0, "per_class": [30.0, 20.0], "protocols": {"16": 30.0}}
    run.print_table(results(class_names=["[void]", "car [/old]"], scores={"adapted": row}), Console(width=160))
    printed = capsys.readouterr().out
    assert "[void]" in printed
    assert "car [/old]" in printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "x.jpg", "--out", "s3://bucket/out"],
        ["predict", "x.jpg", "--model", "s3://bucket/model.onnx"],
        ["predict", "s3://bucket/photos"],
        ["export", "runs/one", "--out", "s3://bucket/out"],
        ["labels", "export", "runs/one", "--out", "s3://bucket/out.parquet"],
        ["labels", "import", "s3://bucket/labels", "--out", "x.parquet", "--layout", "proda"],
        ["data", "check", "--out", "s3://bucket/out"],
        ["data", "sample", "s3://bucket/sample"],
        ["--data", "s3://bucket/data"],
        ["tune", "--runs", "s3://bucket/runs"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_in_a_store_says_so_at_once(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jpg").write_bytes(b"x")
    assert run.main(arguments) == 2
    said = capsys.readouterr().err
    assert "s3://" in said
    assert "this machine" in said
    assert list(tmp_path.iterdir()) == [tmp_path / "x.jpg"]


def capacity_found(load=0.0):
    """Figures of a student, one and two teachers and the evaluator on two cores."""
    stages = (StageShape("alignment", 200, 4), StageShape("self-training", 900, 4, (StreamShape(4_000_000, 8, 16, 3),)))
    course = Course(256, stages, 1, 25, 100, 100, {1: 64, 2: 32}, 57_803.0, 7_391_856, 32, 64)
    beside = {0: Pace(0.2), 1: Pace(0.25), 2: Pace(0.3), 3: Pace(0.35)}
    whole = Pace(0.3), Pace(0.4)
    image_seconds, alone = {1: 0.07, 2: 0.15, 3: 0.2}, (Pace(0.5), Pace(0.2))
    figures = Measured(beside, image_seconds, 0.1, 0.1, alone, 0.07, 1, whole, "2 threads")
    memory = {"student": Memory(730_000_000, 2_000_000_000), "teacher": Memory(360_000_000)}
    return Findings(course, figures, (1, 2), memory, load, "2 CPU cores", shared=False, seconds=30.0)


def test_a_plan_fits_a_terminal_and_ends_with_its_advice():
    console = Console(width=100, record=True, file=StringIO(), soft_wrap=True)
    run.print_capacity(run.CapacityOptions(), "mini", capacity_found(), console)
    lines = console.export_text().rstrip().splitlines()
    assert max(map(len, (line for line in lines if line[:1] in "┏┃┡│├└"))) <= 100
    assert any(line.startswith("│ 1 ") for line in lines)
    assert any("in turns, 4 rounds" in line for line in lines)
    assert any("730 MB and 2,000 MB of a GPU" in line for line in lines)
    assert "take 1 teacher: labels" in lines[-1]
    assert "up to 128" in lines[-1]
    assert not any("not idle" in line for line in lines)


def test_a_plan_of_a_busy_machine_says_so():
    console = Console(width=100, record=True, file=StringIO(), soft_wrap=True)
    run.print_capacity(run.CapacityOptions(label_age=5), "mini", capacity_found(load=0.8), console)
    shown = console.export_text()
    assert "80% of its cores were busy before" in shown
    assert "take turns" in shown.rstrip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--students", "0"], "--students is 0"),
        (["--teachers=0"], "--teachers is 0"),
        (["--teachers", "1", "--label-age", "0"], "--label-age is 0"),
    ],
)
def test_a_plan_of_nobody_is_refused(arguments, said, capsys):
    assert called(["plan", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_plan_shows_costs_unless_it_is_asked_for_a_run():
    assert not run.plans_a_run(["--batch", "2"])
    assert run.plans_a_run(["--students", "2"])
    assert run.plans_a_run(["--teachers=2"])
