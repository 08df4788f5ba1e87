from pathlib import Path

import pytest

from actors.errors import RunError
from pipelines.options import AdaptOptions, write_options
from tune_spaces.options import CONFIG, METRICS, SweepOptions, read_sweep_options


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"metric": "accuracy"}, "--metric is 'accuracy'; choose one of"),
        ({"search": "magic"}, "search is 'magic'; choose one of"),
        ({"scheduler": "pbt"}, "scheduler is 'pbt'; choose one of"),
        ({"num_samples": 0}, "--num-samples is 0"),
        ({"max_concurrent": 0}, "--max-concurrent is 0"),
        ({"looks": 0}, "--looks is 0"),
        ({"metric": "miou", "oracle": "never"}, "--metric miou ranks trials by target labels"),
        ({"references": "always"}, "the trials of a sweep train no reference runs"),
        ({"students": 2, "dashboard": False}, "leave --no-dashboard out"),
        ({"max_teachers": 2}, "--max-teachers: what a trial needs is counted .* give --teachers"),
        ({"students": 2, "min_students": 1}, "--min-students: what a trial needs is counted .* give --students"),
    ],
)
def test_what_cannot_work_is_refused(given, said):
    with pytest.raises(RunError, match=said):
        SweepOptions(**given)


def test_trials_start_from_a_stage_that_is_trained_once(tmp_path):
    options = SweepOptions(name="s", runs=str(tmp_path), seed=3)
    first, trial = options.first_stage(), options.trial_options()
    assert (first.folder(), first.to_stage, first.seed) == (tmp_path / "s/stage-one", 1, 3)
    assert (trial.init, trial.from_stage) == (str(tmp_path / "s/stage-one"), 2)
    assert Path(trial.runs) == tmp_path / "s/trials"
    assert first.references == trial.references == "never"
    assert type(trial) is AdaptOptions


@pytest.mark.parametrize(
    "given",
    [{"warm_start": "never"}, {"recipe": "mrnet"}, {"init": "runs/one", "from_stage": 2}, {"to_stage": 1}],
    ids=["asked", "a recipe of one stage", "the user's weights", "only the first stage"],
)
def test_no_stage_is_shared_where_there_is_none_to_share(given):
    options = SweepOptions(name="s", **given)
    assert not options.shares_stage_one
    assert options.trial_options().init == given.get("init")
    assert options.trial_options().from_stage == given.get("from_stage", 1)


def test_target_labels_are_for_the_miniature_or_who_asks():
    assert SweepOptions().scores_target
    assert not SweepOptions(oracle="never").scores_target
    assert not SweepOptions(data_root="/data").scores_target
    assert SweepOptions(data_root="/data", oracle="always").scores_target
    assert SweepOptions(data_root="/data", metric="miou").scores_target
    assert METRICS[-1] == "miou"


def test_twenty_trials_and_every_point_of_a_grid():
    assert SweepOptions(name="s").trials(SweepOptions(name="s").read_space()[0]) == 20
    grid = SweepOptions(name="s", search="grid", only=("eplc.passes", "eplc.dropout"))
    assert grid.trials(grid.read_space()[0]) == 4 * 6


def test_a_grid_that_nobody_can_want_is_refused_with_its_sizes():
    options = SweepOptions(name="s", search="grid")
    with pytest.raises(RunError, match=r"points \(rate_scale 3, rare_weight 3, eplc.dropout 6.*--only"):
        options.trials(options.read_space()[0])
    few = SweepOptions(name="s", search="grid", only=("eplc.passes",), num_samples=3)
    with pytest.raises(RunError, match=r"this grid has 4 points .* more than 3: .* --num-samples 4"):
        few.trials(few.read_space()[0])


def test_a_sweep_is_read_as_it_was_written(tmp_path):
    options = SweepOptions(name="s", runs=str(tmp_path), only=("eplc.dropout",), metric="entropy", num_samples=3)
    write_options(options.folder() / CONFIG, options, "two\nlines")
    assert (tmp_path / "s" / CONFIG).read_text().startswith("# two\n# lines\n")
    assert read_sweep_options(tmp_path / "s") == options


def test_a_sweep_that_was_moved_is_refused_with_where_it_was(tmp_path):
    write_options(tmp_path / "new" / CONFIG, SweepOptions(name="old", runs=str(tmp_path)))
    with pytest.raises(RunError, match=rf"was moved from {tmp_path}/old.*move it back"):
        read_sweep_options(tmp_path / "new")


@pytest.mark.parametrize("given", [{"refresh": "once"}, {"faithful": True}])
def test_what_a_recipes_own_space_cannot_search_here_is_left_out_and_said(given):
    space, left_out = SweepOptions(name="s", **given).read_space()
    assert "eplc.max_label_age" not in space.names
    assert "eplc.dropout" in space.names
    assert len(left_out) == 1
    assert "labels of one round grow old by design" in left_out[0]
    with pytest.raises(RunError, match="labels of one round grow old by design"):
        SweepOptions(name="s", only=("eplc.max_label_age",), **given).read_space()


def test_with_the_first_stage_alone_its_own_options_are_searched(tmp_path):
    (tmp_path / "s.toml").write_text("[mrnet.memory]\nvalues = [0.0, 0.1]\n")
    first = SweepOptions(name="s", to_stage=1, space=str(tmp_path / "s.toml"))
    assert first.read_space()[0].names == ("mrnet.memory",)
    (tmp_path / "s.toml").write_text("[eplc.passes]\nvalues = [1, 5]\n")
    with pytest.raises(RunError, match=r"has no option 'eplc.passes'"):
        first.read_space()


def test_a_folder_that_is_no_sweep_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"is no sweep: it has no sweep.toml"):
        read_sweep_options(tmp_path)


def test_a_sweep_in_a_store_is_refused_in_one_sentence():
    with pytest.raises(RunError, match="--runs is s3://…, and a sweep keeps its trials and what Ray Tune goes on from"):
        SweepOptions(runs="s3://bucket/runs")
    with pytest.raises(RunError, match="--resume is s3://…"):
        read_sweep_options("s3://bucket/runs/sweep")
