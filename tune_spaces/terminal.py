"""What a sweep looks like in a terminal."""

from __future__ import annotations

from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tune_spaces.record import SweepRecord, TrialRecord


def print_sweep(record: SweepRecord, console: Console) -> None:
    """The trials of a sweep, the best first."""
    console.print(sweep_table(record))
    for trial in record.trials.values():
        if trial.status == "failed":
            console.print(f"trial {trial.number} failed: {trial.error}", highlight=False, markup=False, style="red")


def sweep_table(record: SweepRecord) -> Table:
    """A row a trial: what it tried, how it stands."""
    about, best, trials = record.about, record.best(), list(record.trials.values())
    oracle = ", oracle" if about["oracle_metric"] else ""
    table = Table(
        title=f"{about['benchmark']} ({about['data']}), recipe {about['recipe']}: by {about['metric']}{oracle}"
    )
    scored = any(trial.miou is not None for trial in trials)
    names = list(trials[0].point) if trials else []
    for name in ["trial", "", "step", f"{about['metric']}{oracle}", *(["mIoU (oracle)"] if scored else [])]:
        table.add_column(name, justify="right")
    for name in names:
        table.add_column(name.split(".")[-1].replace("_", " "), justify="right")
    for trial in sorted(trials, key=lambda t: (t.score is None, -(t.score or 0.0), t.number)):
        words = {"stopped": "ended early", "running": "runs" if trial.attempts < 2 else "runs again"}
        row = [str(trial.number), words.get(trial.status, trial.status), str(trial.step)]
        row.append("–" if trial.score is None else f"{trial.score:.4f}")
        if scored:
            row.append("–" if trial.miou is None else f"{trial.miou:.1f}")
        values = (trial.point.get(name) for name in names)
        row += [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
        table.add_row(*row, style="bold" if best is not None and trial.id == best.id else None)
    return table


class RunScreen(Protocol):
    """What a single run looks like."""

    def __call__(self, kind: str, what: dict[str, Any]) -> None:
        """Told by a run what happens."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was."""
        ...


class SweepScreen:
    """What a sweep looks like in a terminal: the shared stage as a run, then a table that lives.

    Args:
        console: the terminal; one that is none gets a line for every look.
        run: shows the shared stage.
    """

    def __init__(self, console: Console, run: RunScreen) -> None:
        self.console, self.run = console, run
        self.live: Live | None = None
        self.seen: dict[str, tuple[str, int, str | None]] = {}

    def __call__(self, kind: str, what: dict[str, Any]) -> None:
        """Told by the sweep what happens."""
        if kind == "trials":
            self._trials(what["record"], what["trial"])
        elif kind == "phase" and what["name"] == "trials":
            self.run.close()
            self.console.print(f"[dim]{what['text']} …[/dim]")
        else:
            self.run(kind, what)

    def _trials(self, record: SweepRecord, trial: TrialRecord) -> None:
        if self.console.is_terminal:
            if self.live is None:
                self.live = Live(console=self.console, refresh_per_second=2, transient=True)
                self.live.start()
            self.live.update(sweep_table(record))
            return
        now = trial.status, trial.step, trial.error
        if self.seen.get(trial.id) == now:
            return
        self.seen[trial.id] = now
        score = "" if trial.score is None else f", {record.about['metric']} {trial.score:.4f}"
        error = f": {trial.error}" if trial.error else ""
        line = f"trial {trial.number} {trial.status}, step {trial.step}{score}{error}"
        self.console.print(line, highlight=False, markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.run.close()
        if self.live is not None:
            self.live.stop()
