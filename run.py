"""The command. It parses, prints and calls the pipelines; nothing else lives here."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Annotated, Any

from pipelines import environment

environment.prepare()

import tyro  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn  # noqa: E402
from rich.table import Table  # noqa: E402

from actors.errors import RunError, UnreadableImage  # noqa: E402
from pipelines.datasets.dataset import DataError  # noqa: E402
from pipelines.options import AdaptOptions, read_config  # noqa: E402

ROW_NAMES = {"source_only": "source-only", "adabn": "AdaBN", "adapted": "adapted", "oracle": "oracle"}
COMMANDS = ("adapt", "evaluate")


@dataclass(frozen=True)
class ResumeOptions:
    """Continue a run from its newest checkpoint."""

    resume: str
    """Run directory."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Score the newest checkpoint of a run again, without training."""

    run: Annotated[str, tyro.conf.Positional]
    """Run directory."""


class Screen:
    """What a run looks like in a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("[bold]{task.description:<14}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:>6.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
        )
        self.task: TaskID | None = None
        self.kinds: tuple[str, ...] = ("train",)

    def __call__(self, kind: str, what: dict[str, Any]) -> None:
        """Told by the pipeline what happens."""
        if kind == "message":
            self.console.print(what["text"], highlight=False, markup=False)
        elif kind == "phase":
            self._phase(what)
        elif self.task is not None:
            self._progress(self.task, what)

    def _phase(self, what: dict[str, Any]) -> None:
        if self.task is not None:
            self.bar.stop_task(self.task)
        self.task = None
        if "folder" in what:
            self.console.print(f"run directory: {what['folder']}", highlight=False, markup=False)
        if "steps" not in what:
            self.console.print(f"[dim]{what['text']} …[/dim]")
            return
        self.kinds = ("train",) if what["name"] == "adapt" else ("train:source_only", "train:oracle")
        self.bar.start()
        self.task = self.bar.add_task(what["text"], total=what["steps"], numbers="starting processes")

    def _progress(self, task: TaskID, newest: dict[str, Any]) -> None:
        lines = [newest[kind] for kind in self.kinds if kind in newest]
        if not lines:
            return
        line = min(lines, key=lambda item: item["step"])
        parts = [f"loss {line['loss']:.3f}", f"{sum(item['images_per_s'] for item in lines):.1f} images/s"]
        teachers = newest.get("teachers") or {}
        if self.kinds == ("train",):
            parts.insert(0, line["stage"])
            if teachers:
                parts.append(f"{teachers['labels_made']} labels, {teachers['coverage']:.0%} covered")
            if "label_age_steps_p50" in line:
                parts.append(f"age {line['label_age_steps_p50']}/{line['label_age_steps_p95']} steps")
            if "score" in newest:
                parts.append(
                    f"target mIoU {newest['score']['miou']:.1f} (step {newest['score']['step']}, oracle metric)"
                )
        self.bar.update(task, completed=line["step"], numbers=" · ".join(parts))

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.bar.stop()


def main(arguments: list[str]) -> int:
    """Run a command line.

    Returns:
        0 when it did what was asked, 2 when something given cannot work, 130 when the user stopped it.
    """
    console = Console(soft_wrap=True)
    try:
        if arguments[:1] == ["evaluate"]:
            return _evaluate(tyro.cli(EvaluateOptions, prog="run.py evaluate", args=arguments[1:]), console)
        given = arguments[1:] if arguments[:1] == ["adapt"] else arguments
        if any(item == "--resume" or item.startswith("--resume=") for item in given):
            resume = tyro.cli(ResumeOptions, prog="run.py", args=given)
            return _adapt(read_config(resume.resume), console, resume=True)
        if given and not given[0].startswith("-"):
            raise RunError(f"unknown command {given[0]!r}; known are {', '.join(COMMANDS)}")
        description = (
            f"{AdaptOptions.__doc__}\n\nOther commands: `run.py --resume RUN` continues a stopped run, "
            "`run.py evaluate RUN` scores its newest checkpoint again."
        )
        return _adapt(tyro.cli(AdaptOptions, prog="run.py", description=description, args=given), console)
    except (RunError, DataError, UnreadableImage) as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", highlight=False, markup=False, style="red")
        return 2
    except KeyboardInterrupt:
        console.print("aborted; the last checkpoint is what a resume continues from")
        return 130


def _adapt(options: AdaptOptions, console: Console, *, resume: bool = False) -> int:
    from pipelines.adapt import adapt  # Ray and torch take seconds that a wrong option should not cost

    began = time.monotonic()
    screen = Screen(console)
    try:
        outcome = adapt(options, screen, resume=resume)
    finally:
        screen.close()
    if outcome.stopped:
        console.print(f"stopped. Continue with:\n  python run.py --resume {outcome.folder}", highlight=False)
        return 130
    assert outcome.results is not None
    print_table(outcome.results, console)
    console.print(
        f"{time.monotonic() - began:.0f} s in all, adaptation {outcome.seconds['adapt']:.0f} s. "
        f"Everything is in {outcome.folder}",
        highlight=False,
    )
    return 0


def _evaluate(options: EvaluateOptions, console: Console) -> int:
    from pipelines.rescore import rescore

    print_table(rescore(read_config(options.run)), console)
    return 0


def print_table(results: dict[str, Any], console: Console) -> None:
    """The final table: every score with its protocol, per class."""
    protocol = results["protocol"]
    rows = [(ROW_NAMES[key], value) for key, value in results["scores"].items() if value]
    if rows:
        _print_scores(results, protocol, rows, console)
    else:
        console.print("no target image has a label, so nothing was scored; look at the pictures: run.py predict")
    _print_labels(results, console)


def _print_scores(
    results: dict[str, Any], protocol: dict[str, Any], rows: list[tuple[str, Any]], console: Console
) -> None:
    label = "×".join(map(str, protocol["label_size"]))
    views = ", ".join(f"{w}×{h}{' mirrored' if m else ''}" for w, h, m in protocol["views"])
    table = Table(
        title=f"{results['benchmark']} ({results['data']}), recipe {results['recipe']}, seed {results['seed']}: "
        f"IoU in % over {protocol['classes']} classes",
        caption=f"adapted = {protocol['network']} network at the last step; views {views}; labels {label}",
    )
    table.add_column("")
    for name, _ in rows:
        table.add_column(name, justify="right")
    for name in rows[0][1]["protocols"]:
        table.add_row(f"mIoU{name}", *(f"{row['protocols'][name]:.1f}" for _, row in rows), style="bold")
    table.add_section()
    for index, name in enumerate(results["class_names"]):
        cells = [row["per_class"][index] for _, row in rows]
        if any(cell is not None for cell in cells):
            table.add_row(name, *("–" if cell is None else f"{cell:.1f}" for cell in cells))
    console.print(table)
    if results.get("gap_closed") is not None:
        console.print(f"gap closed: {results['gap_closed']:.2f} of (oracle − source-only)", highlight=False)


def _print_labels(results: dict[str, Any], console: Console) -> None:
    ages = results.get("label_age_steps")
    if ages and ages["p50"] is not None:
        wait = results["student"]["wait_share"]
        console.print(
            f"label age in steps: p50 {ages['p50']}, p95 {ages['p95']}, max {ages['max']}; "
            f"the student waited for labels {wait:.2%} of its time",
            highlight=False,
        )
    if results.get("skipped"):
        console.print(f"{len(results['skipped'])} unreadable images were skipped: {results['skipped'][0]} …")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
