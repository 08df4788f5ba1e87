import ast
import dataclasses
import inspect
import itertools
import shlex
from dataclasses import replace

import pytest
import tomli_w
import tyro

from actors.errors import RunError
from pipelines.choices import decided
from pipelines.options import GROUPS, AdaptOptions, PriorOptions, command_line, read_config, write_config
from pipelines.recipes.eplc import EplcOptions
from pipelines.recipes.label_shift import LabelShiftOptions
from pipelines.recipes.mrnet import MrnetOptions


def test_a_config_is_read_as_it_was_written(tmp_path):
    options = AdaptOptions(
        benchmark="gta2city",
        recipe="mrnet",
        classes=13,
        steps=50,
        seed=4,
        faithful=True,
        name="run",
        runs=str(tmp_path),
        eplc=EplcOptions(selection="std", passes=3),
        mrnet=MrnetOptions(memory=0.2),
        adjust_prior="gta5-original",
        prior=PriorOptions(method="counts", damping=0.2, floor=0.3, temperature=1.8, refine_steps=40, refine_rate=0.01),
        label_shift=LabelShiftOptions(aspp="modified"),
    )
    write_config(options)
    assert read_config(tmp_path / "run") == options


def test_a_config_from_before_class_frequencies_has_their_defaults(tmp_path):
    (tmp_path / "config.toml").write_text("seed = 4\n")
    found = read_config(tmp_path)
    assert found.prior == PriorOptions()
    assert found.adjust_prior == "auto"


def test_every_group_of_options_is_a_field_of_its_type():
    fields = {item.name: item.default_factory for item in dataclasses.fields(AdaptOptions)}
    assert {name: fields[name] for name in GROUPS} == GROUPS
    assert "prior" in GROUPS


def test_a_run_that_was_moved_is_where_it_is_now(tmp_path):
    write_config(AdaptOptions(name="run", runs=str(tmp_path)))
    (tmp_path / "run").rename(tmp_path / "moved")
    assert read_config(tmp_path / "moved").folder() == tmp_path / "moved"


def test_a_folder_without_a_config_is_no_run(tmp_path):
    with pytest.raises(RunError, match="is no run directory"):
        read_config(tmp_path)


def test_the_published_runs_compute_in_single_precision_unless_asked_otherwise():
    assert AdaptOptions().resolved_precision == "auto"
    assert AdaptOptions(faithful=True).resolved_precision == "float32"
    assert AdaptOptions(faithful=True, precision="bfloat16").resolved_precision == "bfloat16"


def test_given_labels_are_one_round():
    assert AdaptOptions(pseudo_labels="labels.parquet").resolved_refresh == "once"


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"hard_pixels": 100.0}, "--hard-pixels is 100; give a percentile"),
        ({"hard_pixels": float("nan")}, "--hard-pixels is nan"),
        ({"rate_scale": 0.0}, "--rate-scale is 0.0; give a factor"),
        ({"norm_images": 0}, "--norm-images is 0; batch norm needs"),
        ({"label_scale": 9.0}, "--label-scale is 9.0; give a factor"),
        ({"rare_weight": 0.5}, "--rare-weight is 0.5; give a factor"),
        ({"norm_affine": "maybe"}, "norm_affine is 'maybe'; choose one of"),
    ],
)
def test_a_switch_of_the_published_code_that_cannot_work_is_refused(bad, text):
    with pytest.raises(RunError, match=text):
        AdaptOptions(**bad)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"magic": 1}, "magic"),
        ({"eplc": {"magic": 1}}, "magic"),
        ({"eplc": {"passes": 0}}, "passes is 0"),
        ({"students": 0}, "--students is 0"),
        ({"students": "two"}, "cannot be read"),
        ({"prior": {"magic": 1}}, "magic"),
        ({"prior": {"floor": 0.0}}, "--prior.floor is 0"),
    ],
)
def test_a_config_that_this_version_does_not_know_is_refused(tmp_path, changes, text):
    (tmp_path / "config.toml").write_bytes(tomli_w.dumps(changes).encode())
    with pytest.raises(RunError, match=text):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [b"this is = not [ toml", b"\xff\xfe\x00"])
def test_a_damaged_config_is_refused(tmp_path, content):
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(RunError, match=r"config\.toml cannot be read"):
        read_config(tmp_path)


@pytest.mark.parametrize("changes", [{"refresh": "sometimes"}, {"preset": "huge"}, {"references": "maybe"}])
def test_a_config_with_a_value_that_the_command_line_refuses_is_refused(tmp_path, changes):
    (tmp_path / "config.toml").write_bytes(tomli_w.dumps(changes).encode())
    with pytest.raises(RunError):
        read_config(tmp_path)


@pytest.mark.parametrize("bad", [{"students": 0}, {"teachers": 0}, {"threads": 0}, {"seed": -1}])
def test_impossible_numbers_are_refused_by_the_options_name(bad):
    with pytest.raises(RunError, match=f"--{next(iter(bad))} is"):
        AdaptOptions(**bad)


@pytest.mark.parametrize(
    ("bad", "known"),
    [
        ({"preset": "huge"}, "auto, full, mini, tiny"),
        ({"refresh": "sometimes"}, "auto, continuous, once"),
        ({"references": "maybe"}, "auto, always, never"),
    ],
    ids=str,
)
def test_a_choice_that_there_is_not_is_refused_with_those_there_are(bad, known):
    ((name, value),) = bad.items()
    with pytest.raises(RunError, match=f"{name} is '{value}'; choose one of {known}"):
        AdaptOptions(**bad)


@pytest.mark.parametrize("name", ["selection", "mixing", "teacher", "statistics"])
def test_a_choice_of_a_recipe_that_there_is_not_is_refused(name):
    with pytest.raises(RunError, match=f"{name} is 'magic'"):
        EplcOptions(**{name: "magic"})


@pytest.mark.parametrize(
    ("given", "faithful", "resolved"),
    [
        ("auto", False, "continuous"),
        ("auto", True, "once"),
        ("continuous", True, "continuous"),
        ("once", False, "once"),
    ],
)
def test_labels_are_made_again_without_end_unless_the_published_system_is_asked_for(given, faithful, resolved):
    assert AdaptOptions(refresh=given, faithful=faithful).resolved_refresh == resolved


def test_classes_of_images_of_ones_own_are_those_of_their_files():
    with pytest.raises(RunError, match=r"--classes 16 belongs to the published benchmarks; .* leave it out"):
        AdaptOptions(classes=16, source="a.toml", target="b.toml")


def test_the_preset_follows_the_data():
    assert AdaptOptions().resolved_preset == "mini"
    assert AdaptOptions(data_root="/data").resolved_preset == "full"
    assert AdaptOptions(data_root="/data", preset="tiny").resolved_preset == "tiny"


def test_a_run_without_a_name_has_no_folder():
    with pytest.raises(RunError, match="no name yet"):
        AdaptOptions().folder()


def test_every_option_has_a_sentence_of_help():
    for kind in (AdaptOptions, PriorOptions, EplcOptions, MrnetOptions, LabelShiftOptions):
        body = ast.parse(inspect.getsource(kind)).body[0].body
        fields = {field.name for field in dataclasses.fields(kind)}
        for here, behind in itertools.pairwise(body):
            if isinstance(here, ast.AnnAssign) and here.target.id in fields:
                assert isinstance(behind, ast.Expr), f"{kind.__name__}.{here.target.id} has no help"


@pytest.mark.parametrize(
    "options",
    [
        AdaptOptions(),
        AdaptOptions(classes=16, recipe="proda"),
        AdaptOptions(benchmark="gta2city", steps=400, seed=3, faithful=True, cache=False, data_root="/a folder/x"),
        AdaptOptions(source="a.toml", target="b.toml", eplc=EplcOptions(keep_share=0.4, class_weights="published")),
        AdaptOptions(
            recipe="mrnet",
            mrnet=MrnetOptions(memory=0.2),
        ),
        AdaptOptions(recipe="label_shift", adjust_prior="none"),
        AdaptOptions(adjust_prior="/a folder/x.toml", prior=PriorOptions(refine_steps=40, refine_over="labelled")),
        AdaptOptions(recipe="label_shift", prior=PriorOptions(method="counts", floor=0.3, temperature=1.8)),
    ],
)
def test_the_command_line_of_a_run_parses_to_its_options(options):
    words = shlex.split(command_line(replace(options, name="run", runs="elsewhere")))
    assert words[:2] == ["python", "run.py"]
    assert tyro.cli(AdaptOptions, args=words[2:]) == options


@pytest.mark.parametrize(("name", "published"), [("eplc", (80.0, 7.0)), ("proda", (0.0, 1.0))])
def test_what_is_left_open_stands_for_the_published_system_of_the_recipe(name, published):
    ours, theirs = (decided(AdaptOptions(recipe=name), faithful) for faithful in (False, True))
    assert (theirs.hard_pixels, theirs.rare_weight) == published
    assert (ours.hard_pixels, ours.rare_weight) == (0.0, 2.5)


def test_the_command_line_names_options_of_class_frequencies():
    given = AdaptOptions(adjust_prior="estimated", prior=PriorOptions(refine_steps=40))
    assert command_line(given).endswith("--adjust-prior estimated --prior.refine-steps 40")


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"floor": 0.0}, "--prior.floor is 0.0; give a share above 0 and at most 1"),
        ({"floor": 1.1}, "--prior.floor is 1.1"),
        ({"floor": float("nan")}, "--prior.floor is nan"),
        ({"damping": 1.0}, "--prior.damping is 1.0; give a share from 0 to less than 1"),
        ({"damping": -0.1}, "--prior.damping is -0.1"),
        ({"temperature": 0.0}, "--prior.temperature is 0.0; give a number above 0"),
        ({"temperature": float("nan")}, "--prior.temperature is nan"),
        ({"refine_steps": -1}, "--prior.refine-steps is -1; give a number of steps, or 0"),
        ({"refine_rate": 0.0}, "--prior.refine-rate is 0.0; give a rate above 0"),
        ({"method": "guess"}, "method is 'guess'; choose one of confusion, em, counts"),
        ({"refine_over": "some"}, "refine_over is 'some'; choose one of all, labelled"),
    ],
)
def test_class_frequencies_that_cannot_be_found_so_are_refused(bad, text):
    with pytest.raises(RunError, match=text):
        PriorOptions(**bad)


@pytest.mark.parametrize(
    ("recipe", "given", "resolved"),
    [
        ("label_shift", "auto", "estimated"),
        ("eplc", "auto", None),
        ("proda", "auto", None),
        ("label_shift", "none", None),
        ("eplc", "estimated", "estimated"),
        ("eplc", "mine.toml", "mine.toml"),
    ],
)
def test_labels_are_adjusted_by_default_where_the_system_does_so(recipe, given, resolved):
    assert AdaptOptions(recipe=recipe, adjust_prior=given).resolved_adjust_prior == resolved


@pytest.mark.parametrize("given", [{}, {"recipe": "label_shift", "adjust_prior": "none"}])
def test_refinement_without_class_frequencies_is_refused(given):
    with pytest.raises(RunError, match=r"--prior.refine-steps refines classifiers .* give --adjust-prior estimated"):
        AdaptOptions(**given, prior=PriorOptions(refine_steps=40))


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"min_students": 0}, "--min-students is 0 and --students 1"),
        ({"min_students": 3, "students": 2}, "--min-students is 3 and --students 2; give at least 1 and at most"),
        ({"max_teachers": 1, "teachers": 2}, "--max-teachers is 1, fewer than --teachers 2"),
        ({"label_age": 0}, "--label-age is 0; give a number of steps"),
    ],
)
def test_numbers_of_processes_that_cannot_change_so_are_refused(bad, text):
    with pytest.raises(RunError, match=text):
        AdaptOptions(**bad)


def test_there_are_never_more_teachers_than_the_most():
    assert AdaptOptions(teachers=2).most_teachers == 2
    assert AdaptOptions(teachers=2, max_teachers=5).most_teachers == 5


def test_a_run_in_a_store_has_an_address_for_its_folder(store):
    options = AdaptOptions(runs=store.uri("bucket/runs"), name="one", recipe="mrnet")
    assert str(options.folder()) == store.uri("bucket/runs/one")
    write_config(options)
    assert store.files() == ["runs/one/config.toml"]
    assert read_config(store.uri("bucket/runs/one")) == options


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"data": "s3://bucket/data"}, "--data is s3://…, and miniatures and decoded images are mapped into memory"),
        ({"runs": "s3://me:secret@bucket/runs"}, "leave them out: every node finds its own"),
        ({"data_root": "gs://me:secret@bucket/data"}, "leave them out: every node finds its own"),
        ({"runs": "azure://bucket/runs"}, "azure://… is no address that can be read and written"),
        ({"source": "s3://bucket/a.toml?key=secret", "target": "b.toml"}, "has a setting that is not known"),
    ],
)
def test_an_address_that_cannot_work_is_refused_before_anything_starts(given, said):
    with pytest.raises(RunError, match=said) as caught:
        AdaptOptions(**given)
    assert "secret" not in str(caught.value)


def test_a_run_that_cannot_be_written_or_opened_is_a_sentence(store):
    options = AdaptOptions(runs=store.uri("nowhere/runs"), name="one")
    with pytest.raises(RunError, match=r"the run directory cannot be written: .* the bucket nowhere does not exist"):
        write_config(options)
    with pytest.raises(RunError, match="is no run directory"):
        read_config(store.uri("nowhere/runs/one"))
    store.refuse = lambda operation, key: (403, "AccessDenied")
    with pytest.raises(RunError, match=r"the run cannot be opened: .* is denied to the credentials of this machine"):
        read_config(store.uri("bucket/runs/one"))
