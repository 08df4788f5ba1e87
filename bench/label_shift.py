"""What class frequencies are worth: estimates of the target's, and what adjusting to them does to scores and labels.

    python -m bench.label_shift rows --benchmark shift_only --seeds 0 1 2     a pair that differs in nothing else
    python -m bench.label_shift rows --benchmark synthia2city --seeds 0 1 2   FADA's stages, and EPLC with and without
    python -m bench.label_shift page                                          the tables in docs/label_shift.md

Everything of a seed begins with the same network: the source stage on ``shift_only``, source and adversarial stage
elsewhere. Estimates ask it; inference adjustment (IA) scores it; classifier refinement (CR) and self-distillation go on
from it. Self-distillation is as long on all labels. The student runs alone (``bench.alone``); labels that are made
without end are 8 steps old.
"""

from __future__ import annotations

import argparse
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
from safetensors.numpy import load_file, save_file  # noqa: E402

from actors.checkpoints import kept_stages  # noqa: E402
from actors.evaluator import Scorer  # noqa: E402
from actors.prior_estimate import METHODS  # noqa: E402
from bench.alone import AloneLink, Weights, run_alone  # noqa: E402
from bench.command_runs import ROOT  # noqa: E402
from bench.marked import write_between  # noqa: E402
from models.priors import shares  # noqa: E402
from pipelines.benchmarks import benchmark  # noqa: E402
from pipelines.class_frequencies import statistics_folder  # noqa: E402
from pipelines.options import AdaptOptions  # noqa: E402
from pipelines.priors import Prior, write_prior  # noqa: E402
from pipelines.results import versions  # noqa: E402
from pipelines.run_prior import estimate_with  # noqa: E402
from pipelines.setup import Setup, resolve  # noqa: E402
from pipelines.source_statistics import class_pixels  # noqa: E402

RESULTS = ROOT / "docs/results/label-shift.json"
PAGE = ROOT / "docs/label_shift.md"
AGE = 8
SHIFT_ONLY = "shift_only"
ESTIMATORS = METHODS
ONCE, LIVE = ["--refresh", "once"], ["--refresh", "continuous"]
PLAIN, ESTIMATED = ["--adjust-prior", "none"], ["--adjust-prior", "estimated"]
REFINED = ["--prior.refine-steps", "200"]
UNSHIFTED = "unshifted"
"""Stands for a file of class frequencies that says the target is as the source."""
BASE_STEPS = "2200"
"""Of the recipe, half of which are its source stage: as many as a run of any other recipe has."""
DISTILLED: dict[str, list[str]] = {
    "self-distilled, labels as they are": [*ONCE, *PLAIN],
    "self-distilled, IA on labels": [*ONCE, *ESTIMATED],
    "self-distilled, labels after CR": [*ONCE, *ESTIMATED, *REFINED],
    "self-distilled, labels after the control": [*ONCE, "--adjust-prior", UNSHIFTED, *REFINED],
    "self-distilled, IAST's thresholds": [*ONCE, *PLAIN, "--label-shift.selection", "instance"],
    "self-distilled, IAST's thresholds, IA on labels": [*ONCE, *ESTIMATED, "--label-shift.selection", "instance"],
    "its own labels, made without end": [*LIVE, *PLAIN],
    "its own labels, made without end, IA live": [*LIVE, *ESTIMATED],
}
EPLC: dict[str, list[str]] = {"EPLC": PLAIN, "EPLC, IA live": ESTIMATED}
CR, CONTROL = "CR", "classifier trained as long without an offset"


def prepared(arguments: list[str], folder: Path) -> Setup:
    """A run, resolved, in a folder of its own."""
    more = ["--references", "never", "--runs", str(folder.parent), "--name", folder.name]
    return resolve(tyro.cli(AdaptOptions, args=[*arguments, *more]))


def trained(setup: Setup) -> tuple[AloneLink, Weights]:
    """Run a plan to its end; its published weights."""
    once = setup.options.resolved_refresh == "once"
    link = run_alone(setup, None if once else AGE)
    return link, link.publisher.newest


class Seed:
    """All rows of a benchmark and a seed.

    Args:
        benchmark, seed: which.
        folder: of the runs.
        common: options of all runs.
        results: file.
    """

    def __init__(self, benchmark: str, seed: int, folder: Path, common: list[str], results: Path) -> None:
        self.benchmark, self.seed, self.folder, self.results = benchmark, seed, folder, results
        self.data = ["--benchmark", benchmark, "--seed", str(seed), *common]
        self.fada = [*self.data, "--recipe", "label_shift"]
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, arguments: list[str], **found: Any) -> None:
        """Add a row to the results; other processes may add theirs meanwhile."""
        key = f"{name}, {self.benchmark}, seed {self.seed}"
        known: dict[str, Any] = json.loads(self.results.read_text()) if self.results.is_file() else {}
        known[key] = {"options": " ".join(arguments), "seed": self.seed, **found, "versions": versions()}
        self.results.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{key}: {found.get('miou', found.get('error', float('nan'))):.3f}", flush=True)

    def score(self, setup: Setup, weights: Weights, offset: np.ndarray | None = None) -> dict[str, Any]:
        """Score weights on the validation images, adjusted or not."""
        scorer: Scorer = setup.make_scorer()(torch.device("cpu"))
        if offset is not None:
            scorer.offset = torch.from_numpy(np.array(offset, np.float32))
        found = scorer.score(weights)
        return {"miou": found["miou"], "per_class": found["per_class"]}

    def base(self) -> tuple[Path, Setup, Weights]:
        """The network that all rows share, trained if it is not there yet."""
        last = "1" if self.benchmark == SHIFT_ONLY else "2"
        arguments = [*self.fada, *PLAIN, "--to-stage", last]
        if self.benchmark == SHIFT_ONLY:
            arguments += ["--steps", BASE_STEPS]
        setup, path = prepared(arguments, self.folder / "base"), self.folder / "base.safetensors"
        if not path.is_file():
            began = time.perf_counter()
            _, weights = trained(setup)
            seconds = time.perf_counter() - began
            for _, kept in kept_stages(setup.plan.folder):
                self.write("source stage", arguments, **self.score(setup, load_file(str(kept))))
            name = "source stage" if last == "1" else "adversarial stage"
            self.write(name, arguments, **self.score(setup, weights), seconds=seconds)
            save_file({key: np.array(array, order="C") for key, array in weights.items()}, path)
        return path, setup, load_file(path)

    def estimates(self, setup: Setup, weights: Weights) -> None:
        """Every estimator's frequencies, the true ones, and the base network adjusted to each."""
        labelled = setup.domains.target_labelled
        assert labelled is not None
        classes, folder = len(setup.benchmark.classes), statistics_folder(setup.options)
        pixels = [
            np.pad(counts, (0, classes - len(counts)))
            for counts in (
                class_pixels(split, folder, ignore_bottom=setup.benchmark.bonnet).pixel_counts
                for split in (setup.domains.source, labelled)
            )
        ]
        source, truth = (shares(counts) for counts in pixels)
        known = (source > 0) & (truth > 0)
        exact = np.where(known, np.log(np.maximum(truth, 1e-12) / np.maximum(source, 1e-12)), 0.0)
        names = list(setup.benchmark.classes.names)
        self.write(
            "IA, true frequencies",
            self.fada,
            **self.score(setup, weights, exact),
            names=names,
            source=source.tolist(),
            target=truth.tolist(),
            offset=exact.tolist(),
        )
        for method in ESTIMATORS:
            began = time.perf_counter()
            prior = estimate_with(setup, weights, method, torch.device("cpu"))
            off = np.abs(prior.offset - exact)[known]
            self.write(
                f"IA, {method}",
                self.fada,
                **self.score(setup, weights, prior.offset),
                seconds=time.perf_counter() - began,
                target=list(prior.target),
                offset=prior.offset.tolist(),
                error=float(off.mean()),
                no_estimate_error=float(np.abs(exact[known]).mean()),
            )

    def distilled(self, name: str, path: Path) -> None:
        """One row of self-distillation; that after refinement also gives a row of refinement."""
        arguments = [*self.fada, "--from-stage", "3", *DISTILLED[name]]
        given = [str(self.unshifted()) if item == UNSHIFTED else item for item in arguments]
        setup = prepared([*given, "--init", str(path)], self.folder / slug(name))
        began = time.perf_counter()
        link, weights = trained(setup)
        seconds = time.perf_counter() - began
        for _, kept in kept_stages(setup.plan.folder):
            self.write(CONTROL if UNSHIFTED in arguments else CR, arguments, **self.score(setup, load_file(str(kept))))
        prior = None if link.made is None or link.made.prior is None else link.made.prior.target.tolist()
        self.write(name, arguments, **self.score(setup, weights), seconds=seconds, target=prior)

    def unshifted(self) -> Path:
        """A file of class frequencies that are the same on source and target."""
        names = benchmark(self.benchmark).classes.names
        flat = tuple([1.0 / len(names)] * len(names))
        write_prior(self.folder / "unshifted.toml", Prior(names, flat, flat))
        return self.folder / "unshifted.toml"

    def eplc(self) -> None:
        """EPLC's second stage from one first stage, with and without adjusted labels."""
        common = [*self.data, "--recipe", "eplc"]
        first = prepared([*common, *PLAIN, "--to-stage", "1"], self.folder / "eplc-one")
        _, weights = trained(first)
        path = self.folder / "eplc.safetensors"
        save_file({key: np.array(array, order="C") for key, array in weights.items()}, path)
        for name, more in EPLC.items():
            arguments = [*common, "--from-stage", "2", *more]
            setup = prepared([*arguments, "--init", str(path)], self.folder / slug(name))
            began = time.perf_counter()
            link, weights = trained(setup)
            prior = None if link.made is None or link.made.prior is None else link.made.prior.target.tolist()
            seconds = time.perf_counter() - began
            self.write(name, arguments, **self.score(setup, weights), seconds=seconds, target=prior)


def slug(name: str) -> str:
    """A name for a folder."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")


def values(results: dict[str, Any], name: str, pair: str, key: str = "miou") -> list[float]:
    """A number of a row, seed by seed."""
    rows = sorted((value["seed"], value) for at, value in results.items() if at.startswith(f"{name}, {pair}, "))
    return [row[key] for _, row in rows]


def score_table(results: dict[str, Any], pair: str) -> str:
    """Scores of every row, seed by seed, and the mean difference from the network that all begin with."""
    names = ["source stage", "adversarial stage", "IA, true frequencies", *(f"IA, {name}" for name in ESTIMATORS)]
    base = values(results, names[0] if pair == SHIFT_ONLY else names[1], pair)
    lines = ["| | mIoU, seed by seed | mean | spread | against the shared network |", "|---|---|---|---|---|"]
    for name in (*names, CR, CONTROL, *DISTILLED, *EPLC):
        found = values(results, name, pair)
        if not found:
            continue
        spread = f"{statistics.stdev(found):.1f}" if len(found) > 1 else "–"
        gain = statistics.mean(found) - statistics.mean(base)
        each = ", ".join(f"{score:.1f}" for score in found)
        lines.append(f"| {name} | {each} | {statistics.mean(found):.1f} | {spread} | {gain:+.1f} |")
    return "\n".join(lines)


def estimate_table(results: dict[str, Any], pair: str) -> str:
    """True ln π_T / π_S of every class, and the mean over seeds of what every estimator says."""
    truth = next(value for key, value in results.items() if key.startswith(f"IA, true frequencies, {pair}"))
    rows = {name: np.array(values(results, f"IA, {name}", pair, "offset")) for name in ESTIMATORS}
    lines = [f"| | source | target | ln ratio | {' | '.join(ESTIMATORS)} |", "|---|---|---|---|" + "---|" * len(rows)]
    for index, name in enumerate(truth["names"]):
        if truth["source"][index] == 0 or truth["target"][index] == 0:
            continue
        cells = [f"{offsets[:, index].mean():+.2f} ± {offsets[:, index].std():.2f}" for offsets in rows.values()]
        shown = f"{truth['source'][index]:.2%} | {truth['target'][index]:.2%} | {truth['offset'][index]:+.2f}"
        lines.append(f"| {name} | {shown} | {' | '.join(cells)} |")
    errors = [f"{np.mean(values(results, f'IA, {name}', pair, 'error')):.2f}" for name in ESTIMATORS]
    none = np.mean(values(results, "IA, em", pair, "no_estimate_error"))
    lines.append(f"| mean error (without an estimate {none:.2f}) | | | | {' | '.join(errors)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rows", "page"))
    parser.add_argument("--benchmark", default=SHIFT_ONLY)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], choices=("estimates", "eplc", *DISTILLED))
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "label-shift")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given, common = parser.parse_known_args()
    torch.set_num_threads(1)
    if given.what == "page":
        results = json.loads(given.results.read_text())
        for pair in (SHIFT_ONLY, "synthia2city", "gta2city"):
            if values(results, "IA, em", pair):
                write_between(PAGE, f"{pair} scores", score_table(results, pair))
                write_between(PAGE, f"{pair} estimates", estimate_table(results, pair))
        return
    for seed in given.seeds:
        place = given.runs.absolute() / f"{given.benchmark}-s{seed}"
        rows = Seed(given.benchmark, seed, place, common, given.results)
        path, setup, weights = rows.base()
        if not given.only or "estimates" in given.only:
            rows.estimates(setup, weights)
        for name in DISTILLED:
            if not given.only or name in given.only:
                rows.distilled(name, path)
        if given.benchmark != SHIFT_ONLY and (not given.only or "eplc" in given.only):
            rows.eplc()


if __name__ == "__main__":
    main()
