"""The charts of a sweep's page, as SVG text."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import optuna
from matplotlib.figure import Figure
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

from pipelines.report.charts import INK, STYLE, svg
from tune_spaces.record import TrialRecord, ranks
from tune_spaces.space import Parameter, Space, Value

FEWEST = 8
"""Finished trials below which an importance would say nothing."""
RAMP = mpl.colors.LinearSegmentedColormap.from_list("ramp", ["#cbd5e1", "#93c5fd", "#2563eb", "#172554"])


def parallel_coordinates(trials: Sequence[TrialRecord], space: Space, unit: str) -> str | None:
    """A line a trial through its values, darker the better it scored; the best one is orange.

    Args:
        trials: those with a score are drawn.
        space: the axes, in its order.
        unit: name of the score, the last axis.

    Returns:
        An SVG element; None when fewer than two trials have a score.
    """
    drawn = sorted((t for t in trials if ranks(t.score)), key=lambda t: t.score or 0.0)
    if len(drawn) < 2:
        return None
    scores = np.array([t.score for t in drawn], float)
    spread = max(1e-12, scores.max() - scores.min())
    columns = [[place(p, t.point.get(p.name)) for t in drawn] for p in space.parameters]
    columns.append(list((scores - scores.min()) / spread))
    names = [*(p.name for p in space.parameters), unit]
    with mpl.rc_context(STYLE):
        figure = Figure((max(4.7, 1.05 * len(names)), 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(visible=False)
        for k, (trial, *values) in enumerate(zip(drawn, *columns, strict=True)):
            best = k == len(drawn) - 1
            shade = "#ea7317" if best else RAMP(float((scores[k] - scores.min()) / spread))
            style = "-" if trial.status == "finished" else ":"
            axes.plot(range(len(names)), values, style, color=shade, linewidth=2.2 if best else 1.1, zorder=2 + k)
        for at, parameter in enumerate(space.parameters):
            for value in axis_values(parameter):
                axes.text(at + 0.04, place(parameter, value), _short(value), fontsize=6.5, va="center", alpha=0.75)
        for value, at_height in ((scores.min(), 0.0), (scores.max(), 1.0)):
            axes.text(len(names) - 0.96, at_height, _short(float(value)), fontsize=6.5, va="center")
        for at in range(len(names)):
            axes.axvline(at, color=INK, linewidth=0.5, alpha=0.5)
        axes.set_xticks(range(len(names)), [name.replace(".", ".\n") for name in names], fontsize=7)
        axes.set_yticks([])
        axes.set_xlim(-0.1, len(names) - 0.5)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return svg(figure, "values of every trial, and its score")


def place(parameter: Parameter, value: Value) -> float:
    """Where a value stands on its parameter's axis, from 0 to 1; the nearest end for what lies outside."""
    if parameter.values:
        listed = list(parameter.values)
        return listed.index(value) / max(1, len(listed) - 1) if value in listed else 0.0
    low, high, number = parameter.low, parameter.high, float(value)  # type: ignore[arg-type]
    if parameter.log:
        low, high, number = math.log(low), math.log(high), math.log(max(number, 1e-300))
    return min(1.0, max(0.0, (number - low) / (high - low)))


def axis_values(parameter: Parameter) -> list[Value]:
    """What is written beside an axis: every value of a short list, else the ends and the middle."""
    if parameter.values and len(parameter.values) <= 6:
        return list(parameter.values)
    grid = parameter.grid()
    return [grid[0], grid[len(grid) // 2], grid[-1]]


def importances(trials: Sequence[TrialRecord], space: Space) -> dict[str, float]:
    """How much each parameter has to do with being among the better trials, as shares of 1, the largest first.

    PED-ANOVA (Watanabe et al., IJCAI 2023), as Optuna computes it. Empty with less than :data:`FEWEST` finished trials.
    """
    done = [
        t
        for t in trials
        if t.status == "finished" and ranks(t.score) and all(p.contains(t.point.get(p.name)) for p in space.parameters)
    ]
    if len(done) < FEWEST or len({t.score for t in done}) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    named = {p.name: p.distribution() for p in space.parameters}
    for trial in done:
        study.add_trial(optuna.create_trial(params=dict(trial.point), distributions=named, value=trial.score))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this evaluator is experimental
        return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())


def importance_bars(shares: dict[str, float]) -> str | None:
    """A bar a parameter; None where there is none."""
    if not shares:
        return None
    names, values = list(shares)[::-1], list(shares.values())[::-1]
    with mpl.rc_context(STYLE):
        figure = Figure((4.7, 0.8 + 0.26 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(visible=False, axis="y")
        axes.barh(names, values, color="#2563eb", height=0.6)
        axes.set_xlabel("share of the importance")
        return svg(figure, "importance of every parameter")


def _short(value: Value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower() if value is None else str(value)
