"""Runs of ``run.py`` as measurements: each in a process of its own, kept under its name, written to a results file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def run(name: str, runs: Path, arguments: list[str]) -> Path:
    """One run, if it is not there yet; its directory."""
    folder = runs / name
    if not (folder / "results.json").is_file():
        command = [sys.executable, "run.py", "--no-dashboard", "--runs", str(runs), "--name", name, *arguments]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder


def keep(results: Path, key: str, folder: Path, arguments: list[str], **more: Any) -> None:
    """Add what a run came to, under a key.

    Args:
        results: JSON file.
        key: of the run.
        folder: run directory.
        arguments: of the command, as others would repeat it.
        more: what else shall be kept.
    """
    found = json.loads((folder / "results.json").read_text())
    if found["run"]["init"] is not None:
        found["run"]["init"] = Path(found["run"]["init"]).name  # of no use on another machine
    known: dict[str, Any] = json.loads(results.read_text()) if results.is_file() else {}
    known[key] = {
        "command": " ".join(["python run.py", *arguments]),
        "benchmark": found["benchmark"],
        "seed": found["seed"],
        "stages": found["stages"],
        "scores": {name: score and score["miou"] for name, score in found["scores"].items()},
        "gap_closed": found["gap_closed"],
        "seconds": found["seconds"],
        "student": found["student"],
        "label_age_steps": found["label_age_steps"],
        "run": found["run"],
        "versions": found["versions"],
        **more,
    }
    results.write_text(json.dumps(known, indent=1) + "\n")
