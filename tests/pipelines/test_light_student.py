"""Networks by name, and a student of another network than its teacher's, in any recipe."""

from dataclasses import replace

import pytest
import torch

from actors.errors import RunError
from models.networks.bisenet import BiSeNet, BiSeNetConfig
from models.networks.build import SMALL, Build
from models.networks.deeplab import DeepLab, DeepLabConfig
from pipelines.label_rules import MonteCarloRule
from pipelines.options import AdaptOptions
from pipelines.recipes.self_training import SelfTrainingObjective
from pipelines.setup import resolve
from pipelines.views import input_of, network_input


def setup(folder, tmp_path, **more):
    options = {"preset": "tiny", "steps": 20, "data": str(folder / "data"), "runs": str(tmp_path), "name": "x"}
    return resolve(AdaptOptions(**{**options, **more}))


@pytest.mark.parametrize(("recipe", "before"), [("eplc", 2), ("mrnet", 1), ("proda", 4)])
def test_any_recipe_may_have_a_light_student(tiny_folder, tmp_path, recipe, before):
    made = setup(tiny_folder, tmp_path, recipe=recipe, student_network="bisenet18")
    *own, last = made.plan.stages
    assert len(own) == before
    assert last.name == "light student"
    assert last.steps == sum(stage.steps for stage in own)
    assert last.network == Build(replace(SMALL["bisenet18"], num_classes=19))
    assert (last.labelled_by, last.keeps_before, last.labels.policy.refresh) == ("before", True, "once")
    assert isinstance(last.labels.rule, MonteCarloRule)
    assert last.objective.func is SelfTrainingObjective
    assert last.learning_rate(last.steps - 1) > 0
    assert last.streams["target"].view.pixels == "rgb_imagenet"


def test_it_is_labelled_by_the_recipes_own_rule_and_selection(tiny_folder, tmp_path):
    _, second, last = setup(tiny_folder, tmp_path, student_network="bisenet18").plan.stages
    assert last.labels.rule == second.labels.rule
    assert last.labels.selection == second.labels.selection is not None
    assert second.labels.rule.passes == 5


def test_it_is_scored_with_references_of_its_own_network_and_length(tiny_folder, tmp_path):
    made = setup(tiny_folder, tmp_path, student_network="bisenet18", references="always")
    for plan in made.references.values():
        assert isinstance(plan.network(), BiSeNet)
        assert plan.total_steps == made.plan.stages[-1].steps == 20
        (stage,) = plan.stages
        assert next(iter(stage.streams.values())).view.pixels == "rgb_imagenet"
    assert [type(build.config) for build in made.plan.networks] == [DeepLabConfig, BiSeNetConfig]


def test_references_are_of_the_network_that_the_run_ends_with(tiny_folder, tmp_path):
    backbone = Build(SMALL["bisenet18"])().context_path
    torch.save(backbone.state_dict(), tmp_path / "resnet.pth")
    more = {"student_network": "bisenet18", "student_init": str(tmp_path / "resnet.pth"), "references": "always"}
    teacher = setup(tiny_folder, tmp_path, **more, to_stage=2).references["source_only"]
    assert isinstance(teacher.network(), DeepLab)
    assert teacher.stages[0].streams["source"].view.pixels == "bgr_mean"
    assert teacher.initial is None
    student = setup(tiny_folder, tmp_path, **more).references["source_only"]
    network = student.network()
    student.initial(network)
    assert torch.equal(network.context_path.conv1.weight, backbone.conv1.weight), "it begins where the student does"


def test_a_few_target_labels_are_shown_to_each_network_as_it_reads(tiny_folder, tmp_path):
    whole = setup(tiny_folder, tmp_path, student_network="bisenet18")
    names = whole.domains.target_labelled.image_ids[:3]
    (tmp_path / "few.txt").write_text("\n".join(names))
    made = setup(tiny_folder, tmp_path, student_network="bisenet18", target_labels=str(tmp_path / "few.txt"))
    read = [stage.streams["labelled"].view.pixels for stage in made.plan.stages]
    assert read == ["bgr_mean", "bgr_mean", "rgb_imagenet"]


def test_a_faithful_student_of_the_same_family_reads_what_its_teacher_does(tiny_folder, tmp_path):
    more = {"recipe": "meta_pseudo_labels", "faithful": True, "teacher_network": "bisenet101"}
    made = setup(tiny_folder, tmp_path, student_network="bisenet18", **more)
    assert {build.config.pixels for build in made.plan.networks} == {"bgr_city"}


def test_stages_that_begin_anew_need_a_backbone_beside_a_whole_network(tiny_folder, tmp_path):
    given = {"recipe": "meta_pseudo_labels", "faithful": True, "from_stage": 2, "references": "never"}
    torch.save(
        setup(tiny_folder, tmp_path, recipe="meta_pseudo_labels").plan.network().state_dict(), tmp_path / "s.pth"
    )
    given["init"] = str(tmp_path / "s.pth")
    with pytest.raises(RunError, match=r"random weights; give the backbone .* as --student-init"):
        setup(tiny_folder, tmp_path, **given)
    torch.save(Build(SMALL["bisenet18"])().context_path.state_dict(), tmp_path / "resnet.pth")
    made = setup(tiny_folder, tmp_path, **given, student_init=str(tmp_path / "resnet.pth"))
    made.plan.stages[0].initial(made.plan.stages[0].network())


def test_given_labels_leave_the_last_stage_without_a_teacher(tiny_folder, tmp_path):
    given = {"recipe": "meta_pseudo_labels", "pseudo_labels": "labels.parquet", "references": "never"}
    weights = setup(tiny_folder, tmp_path, recipe="meta_pseudo_labels").plan.network().state_dict()
    torch.save(weights, tmp_path / "s.pth")
    (stage,) = setup(tiny_folder, tmp_path, **given, from_stage=3, init=str(tmp_path / "s.pth")).plan.stages
    assert (stage.teacher, stage.labelled_by, stage.labels.policy.refresh) == (None, "teaching", "once")
    with pytest.raises(RunError, match="the recipe is to run 2"):
        setup(tiny_folder, tmp_path, **given)


def test_it_may_be_trained_alone_from_its_teachers_weights(tiny_folder, tmp_path):
    first = setup(tiny_folder, tmp_path, student_network="bisenet18")
    torch.save(first.plan.network().state_dict(), tmp_path / "teacher.pth")
    weights = {"init": str(tmp_path / "teacher.pth"), "from_stage": 3, "references": "never"}
    (stage,) = setup(tiny_folder, tmp_path, student_network="bisenet18", **weights).plan.stages
    assert stage.name == "light student"
    with pytest.raises(RunError, match="--from-stage is 4, but recipe eplc has 3 stages"):
        setup(tiny_folder, tmp_path, student_network="bisenet18", **{**weights, "from_stage": 4})


def test_its_own_backbone_fills_it(tiny_folder, tmp_path):
    backbone = Build(SMALL["bisenet18"])().context_path
    torch.save(backbone.state_dict(), tmp_path / "resnet.pth")
    made = setup(tiny_folder, tmp_path, student_network="bisenet18", student_init=str(tmp_path / "resnet.pth"))
    network = made.plan.stages[-1].network()
    made.plan.stages[-1].initial(network)
    assert torch.equal(network.context_path.layer4[0].conv1.weight, backbone.layer4[0].conv1.weight)


def test_meta_pseudo_labels_has_a_student_of_its_own(tiny_folder, tmp_path):
    networks = {"teacher_network": "bisenet101", "student_network": "bisenet18"}
    made = setup(tiny_folder, tmp_path, recipe="meta_pseudo_labels", **networks)
    assert [stage.name for stage in made.plan.stages] == ["adversarial", "median labels", "meta pseudo labels"]
    assert made.plan.network().config.layers == (2, 2, 3, 2)
    assert made.plan.stages[2].network().config.layers == (1, 1, 1, 1)
    assert made.learners == 1


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"student_network": "vgg"}, "--student-network: there is no network 'vgg'; known are deeplab101"),
        ({"teacher_network": "vgg"}, "--teacher-network: there is no network 'vgg'"),
        ({"teacher_network": "bisenet18"}, "--teacher-network bisenet18 .* cannot train; give deeplab101"),
        ({"recipe": "proda", "teacher_network": "deeplab101"}, "cannot train; give proda101"),
        ({"student_init": "x.pth"}, "--student-init belongs to --student-network"),
        ({"student_network": "bisenet18", "student_init": "x.pth"}, r"x.pth cannot be read"),
        ({"recipe": "meta_pseudo_labels", "scale": 0.5}, "networks of recipe meta_pseudo_labels need 32"),
        ({"recipe": "meta_pseudo_labels", "batch": 1}, "a student 1 images at a time .* need 2; give a larger --batch"),
        ({"recipe": "meta_pseudo_labels", "norm_images": 1}, "normalises 1 together, .* need 2"),
        ({"recipe": "meta_pseudo_labels", "students": 2}, "gives a student 1 images .* or fewer --students"),
    ],
)
def test_networks_that_cannot_be_are_refused(tiny_folder, tmp_path, more, sentence):
    with pytest.raises(RunError, match=sentence):
        setup(tiny_folder, tmp_path, **more)


def test_every_network_is_shown_what_it_reads():
    images = torch.randint(0, 256, (1, 8, 8, 3), dtype=torch.uint8)
    for config in SMALL.values():
        assert torch.equal(input_of(images, Build(config)()), network_input(images, config.pixels))
