"""``sweep.html``."""

from __future__ import annotations

from pathlib import Path

from tune_spaces.space import Space


def write_page(folder: Path, space: Space) -> Path | None:
    return None
