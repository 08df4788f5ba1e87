"""The first twenty steps of every recipe, term by term: a number that changes unnoticed becomes loud.

python -m tests.pipelines.test_golden     writes tests/golden/first_steps.json anew, after a change that was meant
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch

from bench.alone import run_alone
from pipelines.options import AdaptOptions, PriorOptions
from pipelines.recipes.eplc import EplcOptions
from pipelines.recipes.proda import ProdaOptions
from pipelines.recipes.rectified import RectifiedOptions
from pipelines.setup import resolve

pytestmark = pytest.mark.slow
GOLDEN = Path(__file__).parent.parent / "golden" / "first_steps.json"
STEPS = 20
SURE_STEPS = 3
"""Other processors sum in another order, and further steps enlarge what that makes of the last digits."""
FURTHER = {"meta pseudo labels": 0.15, "meta pseudo labels, published": 0.15}
"""As far as two processors differed. A BiSeNet normalises two 1x1 maps by each other: all that is left is a sign."""
RUNS = {
    "mrnet": {"recipe": "mrnet"},
    "rectified": {"recipe": "rectified"},
    "plain, published": {"recipe": "rectified", "faithful": True, "rectified": RectifiedOptions(loss="plain")},
    "eplc": {"recipe": "eplc"},
    "proda": {"recipe": "proda", "proda": ProdaOptions(denoise="student")},
    "proda, published": {"recipe": "proda", "faithful": True},
    "meta pseudo labels": {"recipe": "meta_pseudo_labels"},
    "meta pseudo labels, published": {"recipe": "meta_pseudo_labels", "faithful": True},
    "light student": {"recipe": "mrnet", "student_network": "bisenet18", "steps": STEPS // 2},
    "label shift": {"recipe": "label_shift"},
    "label shift, published": {"recipe": "label_shift", "faithful": True},
    "eplc, refined": {"recipe": "eplc", "adjust_prior": "estimated", "prior": PriorOptions(refine_steps=5)},
    "eplc, published, min": {"recipe": "eplc", "faithful": True, "eplc": EplcOptions(selection="min")},
}


def first_steps(name, folder, data):
    """Losses of every step, to six digits. One round of labels: when teachers label is the machine's own business."""
    options = {"preset": "tiny", "steps": STEPS, "refresh": "once", "references": "never", **RUNS[name]}
    setup = resolve(AdaptOptions(name="golden", runs=str(folder), data=str(data), **options))
    lines = [line for kind, *line in run_alone(setup, None, log_every=1).lines if kind == "train"]
    return {str(step): {term: float(f"{numbers[term]:.6g}") for term in terms(numbers)} for step, numbers in lines}


def terms(numbers):
    return [name for name in numbers if name.startswith(("loss/", "discriminator/"))]


@pytest.fixture
def one_thread():
    """As in a student; two add in another order, and a pixel of a pseudo label may change sides."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", RUNS)
def test_the_first_steps_of_a_recipe_are_what_they_were(name, tmp_path, tiny_folder):
    expected = json.loads(GOLDEN.read_text())[name]
    found = first_steps(name, tmp_path, tiny_folder / "data")
    assert found.keys() == expected.keys()
    assert len(found) == STEPS + (5 if "refined" in name else 0)
    for step, wanted in expected.items():
        within = 1e-4 if int(step) <= SURE_STEPS else FURTHER.get(name, 3e-3)
        assert found[step] == pytest.approx(wanted, rel=within, abs=1e-6), f"step {step}"


def main():
    """Write the golden file."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {name: first_steps(name, Path(folder) / str(i), Path(folder) / "data") for i, name in enumerate(RUNS)}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
