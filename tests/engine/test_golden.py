"""The first twenty steps of every recipe, term by term: a number that changes unnoticed becomes loud.

python -m tests.engine.test_golden        writes tests/golden/first_steps.json anew, after a change that was meant
"""

import json
import tempfile
from pathlib import Path

import pytest

from pipelines import environment
from pipelines.recipes.eplc import EplcOptions
from pipelines.recipes.rectified import RectifiedOptions
from tests.engine.engine_runs import losses, start_run

GOLDEN = Path(__file__).parent.parent / "golden" / "first_steps.json"
STEPS = 20
RUNS = {
    "mrnet": {"recipe": "mrnet"},
    "rectified": {"recipe": "rectified"},
    "plain, published": {"recipe": "rectified", "faithful": True, "rectified": RectifiedOptions(loss="plain")},
    "eplc": {"recipe": "eplc"},
    "eplc, published, min": {"recipe": "eplc", "faithful": True, "eplc": EplcOptions(selection="min")},
}


def first_steps(name, folder, data):
    """Losses of every step, to six digits. One round of labels: when teachers label is the machine's own business."""
    run = start_run(folder, data, name="golden", steps=STEPS, refresh="once", **RUNS[name])
    found = losses(run.go().folder)
    return {str(step): {term: float(f"{value:.6g}") for term, value in terms.items()} for step, terms in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_first_steps_of_a_recipe_are_what_they_were(name, local_ray, tmp_path, tiny_folder):
    expected = json.loads(GOLDEN.read_text())[name]
    found = first_steps(name, tmp_path / "runs", tiny_folder / "data")
    assert found.keys() == expected.keys()
    assert len(found) == STEPS
    for step, terms in expected.items():
        # Other processors sum in another order, and twenty steps enlarge what that makes of the last digits.
        assert found[step] == pytest.approx(terms, rel=1e-4, abs=1e-6), f"step {step}"


def main():
    """Write the golden file."""
    environment.prepare()
    import ray

    ray.init(num_cpus=4, include_dashboard=False, logging_level="error", object_store_memory=200_000_000)
    with tempfile.TemporaryDirectory() as folder:
        found = {name: first_steps(name, Path(folder) / str(i), Path(folder) / "data") for i, name in enumerate(RUNS)}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
