"""The charts of a report as SVG text, drawn by matplotlib.

Every chart is about as wide as a phone, so that its letters are legible wherever it stands. Ink that should follow the
page's own text colour is drawn in :data:`INK` and becomes ``currentColor``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from pipelines.report.history import Curve

INK = "#010203"
COLOURS = ("#2563eb", "#ea7317", "#0d9488", "#a855f7", "#db2777", "#65a30d", "#64748b", "#ca8a04")
WIDTH = 4.7
"""Inches; 72 of an inch's points are as many CSS pixels."""
HEAT = LinearSegmentedColormap.from_list("heat", ["#f1f5f9", "#93c5fd", "#2563eb", "#172554"])
MOST_COLUMNS = 48
LONGEST_TICK = 18
NAMED_CLASSES = 48
"""More classes than this get no name beside a matrix: the letters would lie on top of each other."""

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": "#94a3b8",
    "grid.alpha": 0.35,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def curves(
    lines: Mapping[str, Curve],
    unit: str,
    *,
    levels: Mapping[str, float] | None = None,
    marks: Mapping[str, int] | None = None,
    stages: Sequence[tuple[str, int]] = (),
) -> str | None:
    """Numbers over the student's steps.

    Args:
        lines: (step, value) by name.
        unit: what the numbers are, above the axis.
        levels: horizontal lines by name.
        marks: vertical lines by name, at a step.
        stages: name and first step of the stages; all but the first get a vertical line.

    Returns:
        An SVG element; None when there is nothing to draw.
    """
    drawn = {name: curve for name, curve in lines.items() if curve}
    if not drawn:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure((WIDTH, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for (name, curve), colour in zip(drawn.items(), cycle(len(drawn)), strict=True):
            steps, values = zip(*curve, strict=True)
            finite = [value if np.isfinite(value) else np.nan for value in values]
            axes.plot(steps, finite, color=colour, label=name, marker="o" if len(steps) < 20 else None, markersize=3)
        for (name, level), dashes in zip((levels or {}).items(), ("--", ":", "-.", "--"), strict=False):
            axes.axhline(level, color=INK, linewidth=0.8, linestyle=dashes, alpha=0.6, label=name)
        for name, step in (marks or {}).items():
            axes.axvline(step, color="#16a34a", linewidth=1, linestyle=":", label=name)
        for _, step in stages[1:]:
            axes.axvline(step, color=INK, linewidth=0.6, alpha=0.4)
        axes.set_title(unit, loc="left", fontsize=9)
        axes.set_xlabel("step")
        figure.legend(loc="outside lower left", ncols=3)
        return svg(figure, ", ".join(drawn) + " over steps")


def class_heat(
    steps: Sequence[int],
    rows: Sequence[Sequence[float | None]],
    names: Sequence[str],
    unit: str,
    *,
    gamma: float = 1.0,
) -> str | None:
    """A number for every class (downwards) at every step (to the right), as shades.

    Args:
        steps: of the student.
        rows: one list a step, one number in [0, 1] a class, None where there is none.
        names: of the classes; those that never have a number are left out, and the rest beyond 48.
        unit: what the shades are.
        gamma: below 1 tells small numbers apart.

    Returns:
        An SVG element; None when there is nothing to draw.
    """
    if not steps:
        return None
    values = np.array([[np.nan if cell is None else cell for cell in row] for row in rows], np.float64).T
    seen = [i for i in range(len(values)) if np.nanmax(np.append(values[i], 0.0)) > 0]
    if not seen:
        return None
    if len(seen) > NAMED_CLASSES:
        seen, unit = seen[:NAMED_CLASSES], f"{unit} (the first {NAMED_CLASSES} of {len(seen)})"
    columns = np.unique(np.linspace(0, len(steps) - 1, min(MOST_COLUMNS, len(steps))).round().astype(int))
    shown, at = values[seen][:, columns], [steps[i] for i in columns]
    with mpl.rc_context(STYLE):
        figure = Figure((WIDTH, 0.95 + 0.17 * len(seen)), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(visible=False)
        image = axes.imshow(
            np.ma.masked_invalid(shown), aspect="auto", cmap=HEAT, norm=PowerNorm(gamma, 0, max(1e-9, np.nanmax(shown)))
        )
        axes.set_yticks(range(len(seen)), [_tick(names[i]) for i in seen], fontsize=8)
        ticks = np.unique(np.linspace(0, len(at) - 1, min(5, len(at))).round().astype(int))
        axes.set_xticks(ticks, [str(at[i]) for i in ticks])
        axes.set_xlabel("step")
        axes.set_title(unit, loc="left", fontsize=9)
        figure.colorbar(image, ax=axes, format=PercentFormatter(1.0, decimals=0), pad=0.02, aspect=30)
        return svg(figure, unit)


def confusion_matrix(matrix: NDArray[np.int64], names: Sequence[str]) -> str | None:
    """What the pixels of every class (a row) were taken for, in shares of the row; classes without a pixel left out.

    Returns:
        An SVG element; None when no label holds a class.
    """
    present = [int(i) for i in np.flatnonzero(matrix.sum(0) + matrix.sum(1))]
    if not matrix.sum():
        return None
    part = matrix[np.ix_(present, present)].astype(np.float64)
    shares = part / np.maximum(1, part.sum(1, keepdims=True))
    with mpl.rc_context(STYLE):
        figure = Figure((WIDTH, WIDTH * 0.98), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(visible=False)
        axes.imshow(shares, cmap=HEAT, vmin=0, vmax=1)
        if len(present) <= NAMED_CLASSES:
            size = 8 if len(present) <= 24 else 5
            ticks = [_tick(names[i]) for i in present]
            axes.set_xticks(range(len(present)), ticks, rotation=90, fontsize=size)
            axes.set_yticks(range(len(present)), ticks, fontsize=size)
        if len(present) <= 24:
            for row, column in np.argwhere(shares >= 0.05):
                ink = "white" if shares[row, column] > 0.45 else "#0f172a"
                text = f"{100 * shares[row, column]:.0f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=6, color=ink)
        axes.set_title("label (rows) taken for (columns), % of the row", loc="left", fontsize=9)
        return svg(figure, "confusion matrix")


def _tick(name: str) -> str:
    """A class's name beside a matrix: cut, and with its dollars as they are."""
    return (name if len(name) <= LONGEST_TICK else name[: LONGEST_TICK - 1] + "…").replace("$", r"\$")


def cycle(count: int) -> list[str]:
    """As many colours, those of the lines of a chart."""
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def svg(figure: Figure, what: str) -> str:
    """The figure as an SVG element without fixed size, fonts or ink of its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text)
    text = re.sub(r' id="[A-Za-z0-9]+_\d+"', "", text)  # the same in every chart of the page
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{what}" ', 1)
