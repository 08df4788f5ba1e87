"""What helps a small, fast student most: BiSeNet-18 on a miniature, row by row, all of the same number of steps.

    python -m bench.light_student rows --seeds 0 1 2           every row but the asynchronous one, in this process
    python -m bench.light_student asynchronous --seeds 0 1 2   that one, through the whole engine, after the others
    python -m bench.light_student page                         the table in docs/bisenet.md, from the results

Rows are 600 steps of the scored network. Meta pseudo labels start both ways of teaching from the same second stage. The
heavy teacher is EPLC's network, trained for 600 steps on labels 8 steps old before its student is. What labels are made
of does not depend on time in any row but the asynchronous one, so the student runs alone (``bench.alone``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from pipelines import environment

environment.prepare()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from actors.checkpoints import kept_stages  # noqa: E402
from actors.evaluator import Scorer  # noqa: E402
from actors.protocols import RunPlan  # noqa: E402
from bench.alone import Weights, run_alone  # noqa: E402
from bench.command_runs import ROOT, keep, run  # noqa: E402
from bench.marked import write_between  # noqa: E402
from pipelines.options import AdaptOptions  # noqa: E402
from pipelines.results import versions  # noqa: E402
from pipelines.setup import Setup, resolve  # noqa: E402

RESULTS = ROOT / "docs/results/light-student.json"
PAGE = ROOT / "docs/bisenet.md"
STEPS, AGE = 600, 8
MPL = ["--recipe", "meta_pseudo_labels", "--refresh", "once"]
ADVERSARIAL = ["--to-stage", "1", "--steps", str(round(STEPS / 0.4))]
ALTERNATING, ASYNCHRONOUS = "+ meta pseudo labels, alternating", "+ meta pseudo labels, asynchronous"
HEAVY = "labels of a heavy EPLC teacher"
ROWS: dict[str, list[str]] = {
    "adversarial, FCD": [*MPL, *ADVERSARIAL, "--meta-pseudo-labels.discriminator", "fcd"],
    "adversarial, DSC": [*MPL, *ADVERSARIAL],
    "+ median labels": [*MPL, "--to-stage", "2", "--steps", str(round(STEPS / 0.7))],
    ALTERNATING: [*MPL, "--steps", str(STEPS)],
    ASYNCHRONOUS: ["--recipe", "meta_pseudo_labels", "--steps", str(STEPS), "--from-stage", "3"],
    HEAVY: ["--recipe", "eplc", "--student-network", "bisenet18", "--steps", str(STEPS)],
}
REFERENCES = {"source_only": "source-only", "oracle": "supervised on target labels"}
ADABN = "source-only, AdaBN"


def prepared(arguments: list[str], folder: Path, references: str = "never") -> Setup:
    """A run, resolved, in a folder of its own."""
    more = ["--references", references, "--runs", str(folder.parent), "--name", folder.name]
    return resolve(tyro.cli(AdaptOptions, args=[*arguments, *more]))


def trained(setup: Setup, plan: RunPlan, age: int | None = None) -> tuple[Weights, float]:
    """Published weights of a plan's last step, and the seconds it took."""
    began = time.perf_counter()
    link = run_alone(dataclasses.replace(setup, plan=plan), age)
    return link.publisher.newest, time.perf_counter() - began


def scorer_of(setup: Setup, plan: RunPlan) -> Scorer:
    """Scores the networks of a plan."""
    return dataclasses.replace(setup, plan=plan).make_scorer()(torch.device("cpu"))


def write(name: str, benchmark: str, seed: int, arguments: list[str], **found: Any) -> None:
    """Add a row to the results; other processes may add theirs meanwhile."""
    key = f"{name}, {benchmark}, seed {seed}"
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    known[key] = {"options": " ".join(arguments), "seed": seed, **found, "versions": versions()}
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    print(f"{key}: {found['miou']:.2f}", flush=True)


def references(benchmark: str, seed: int, folder: Path) -> None:
    """Source-only, AdaBN and the network that learns from target labels."""
    arguments = ["--benchmark", benchmark, "--seed", str(seed), *MPL, "--steps", str(STEPS)]
    setup = prepared(arguments, folder / "references", "always")
    for key, plan in setup.references.items():
        weights, seconds = trained(setup, plan)
        scorer = scorer_of(setup, plan)
        miou = scorer.score(weights)["miou"]
        write(REFERENCES[key], benchmark, seed, arguments, miou=miou, seconds=seconds)
        if key == "source_only":
            reader = setup.target_reader
            adapted = scorer.with_statistics_of(weights, reader, range(len(reader)))
            write(ADABN, benchmark, seed, arguments, miou=scorer.score(adapted)["miou"])


def row(name: str, benchmark: str, seed: int, folder: Path) -> None:
    """One row for one seed."""
    arguments = ["--benchmark", benchmark, "--seed", str(seed), *ROWS[name]]
    teacher = None
    if name == HEAVY:  # its own stages on labels of an age, then the student on labels that were made once
        first = prepared([*arguments, "--to-stage", "2"], folder / "heavy")
        weights, _ = trained(first, first.plan, AGE)
        teacher = scorer_of(first, first.plan).score(weights)["miou"]
        save_file(
            {key: torch.from_numpy(np.array(array)) for key, array in weights.items()}, folder / "heavy.safetensors"
        )
        begun = ["--from-stage", "3", "--init", str(folder / "heavy.safetensors")]
        setup = prepared([*arguments, *begun], folder / "light")
    else:
        setup = prepared(arguments, folder / slug(name))
    weights, seconds = trained(setup, setup.plan)
    stages = {
        path.stem: scorer_of(setup, setup.plan).score(_read(str(path)))["miou"]
        for _, path in kept_stages(setup.plan.folder)
    }
    miou = scorer_of(setup, setup.plan).score(weights)["miou"]
    write(name, benchmark, seed, arguments, miou=miou, seconds=seconds, stages=stages, teacher=teacher)


def _read(path: str) -> Weights:
    from safetensors.numpy import load_file

    return load_file(path)


def asynchronous(benchmark: str, seeds: list[int], runs: Path) -> None:
    """The row that needs the engine."""
    for seed in seeds:
        _, start = kept_stages(runs / f"{benchmark}-s{seed}" / slug(ALTERNATING))[-1]
        common = ["--benchmark", benchmark, "--seed", str(seed), "--references", "never", *ROWS[ASYNCHRONOUS]]
        folder = run(f"{benchmark}-s{seed}-{slug(ASYNCHRONOUS)}", runs, [*common, "--init", str(start)])
        miou = json.loads((folder / "results.json").read_text())["scores"]["adapted"]["miou"]
        told = [*common, "--init", start.name]
        keep(RESULTS, f"{ASYNCHRONOUS}, {benchmark}, seed {seed}", folder, told, miou=miou)
        print(f"{ASYNCHRONOUS}, {benchmark}, seed {seed}: {miou:.2f}", flush=True)


def slug(name: str) -> str:
    """A name for a folder."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")


def table(results: dict[str, Any], benchmark: str) -> str:
    """Scores of every row, seed by seed, and the share of the gap between the means that it closes."""
    names = [REFERENCES["source_only"], ADABN, *ROWS, REFERENCES["oracle"]]
    shown = {
        name: [
            value["miou"]
            for key, value in sorted(results.items(), key=lambda item: item[1]["seed"])
            if key.startswith(f"{name}, {benchmark}, seed ")
        ]
        for name in names
    }
    source, oracle = (statistics.mean(shown[REFERENCES[key]]) for key in ("source_only", "oracle"))
    lines = ["| BiSeNet-18 | mIoU, seed by seed | mean | spread | gap closed |", "|---|---|---|---|---|"]
    for name, scores in shown.items():
        if scores:
            mean, spread = statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else float("nan")
            each = ", ".join(f"{score:.1f}" for score in scores)
            lines.append(f"| {name} | {each} | {mean:.1f} | {spread:.1f} | {(mean - source) / (oracle - source):.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rows", "asynchronous", "page"))
    parser.add_argument("--benchmark", default="synthia2city")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], choices=("references", *ROWS))
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "light-student")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "asynchronous":
        asynchronous(given.benchmark, given.seeds, given.runs.absolute())
    elif given.what == "page":
        write_between(PAGE, "rows", table(json.loads(RESULTS.read_text()), given.benchmark))
    else:
        for seed in given.seeds:
            folder = given.runs.absolute() / f"{given.benchmark}-s{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            if not given.only or "references" in given.only:
                references(given.benchmark, seed, folder)
            for name in ROWS:
                if name != ASYNCHRONOUS and (not given.only or name in given.only):
                    row(name, given.benchmark, seed, folder)


if __name__ == "__main__":
    main()
