"""Checkpoints that are complete or not there at all.

The student writes into its run directory itself, in a thread, and makes the checkpoint appear at once: by rename, or
with an upload's end. One code path finds the newest one after a crash, a Ctrl-C or a reboot, and a full disk or a store
that cannot be reached leaves the previous one untouched.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import nn

from actors.errors import RunError
from actors.storage import Place, RemotePath, StorageError, place, readable, remove_tree, whole

FORMAT = 1
STAGES = "stages"


class CheckpointStore:
    """The checkpoints of one run, newest last.

    Args:
        folder: ``<run>/checkpoints``, of this machine or of a store.
        keep: how many stay.
    """

    def __init__(self, folder: str | Place, keep: int = 2) -> None:
        self.folder, self.keep = place(folder), keep
        self._thread: threading.Thread | None = None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        names = self.folder.glob("step_*/state.pt")
        steps = (path.parent.name.removeprefix("step_") for path in names)
        return sorted(int(step) for step in steps if step.isdigit())

    def path(self, step: int) -> Place:
        """Folder of the checkpoint of a step."""
        return self.folder / f"step_{step:08d}"

    def newest(self) -> dict[str, Any] | None:
        """State of the newest complete checkpoint, on the CPU, or None.

        Raises:
            RunError: it is damaged, or was written in a format that this version does not read; or the store cannot be
                reached.
        """
        try:
            steps = self.steps()
            if not steps:
                return None
            path = self.path(steps[-1]) / "state.pt"
            file = readable(path)
        except StorageError as error:
            raise RunError(f"the newest checkpoint cannot be read: {error}") from error
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise RunError(f"{path} is damaged ({error}); remove its folder to go on from the one before") from error
        if state.get("format") != FORMAT:
            raise RunError(
                f"{self.path(steps[-1])} has format {state.get('format')}, this version reads {FORMAT}; "
                "resume it with the version that wrote it, or start a run with another --name"
            )
        return state

    def save(self, step: int, state: dict[str, Any]) -> str | None:
        """Write a checkpoint now.

        Returns:
            None, or the sentence that says why it could not be written; the previous checkpoint is then still good.
        """
        final = self.path(step)
        try:
            final.mkdir(parents=True, exist_ok=True)
            with whole(final / "state.pt", durable=True) as file:
                torch.save({"format": FORMAT, **state}, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            if isinstance(final, Path):
                with contextlib.suppress(OSError):  # unless an older one of this step is in it
                    final.rmdir()
            cause = str(error).splitlines()[0]
            if isinstance(error, StorageError):
                return f"checkpoint of step {step} could not be written ({cause}); the one before it stays good."
            previous = self.steps()
            kept = f"the one of step {previous[-1]} stays good" if previous else "there is none before it"
            return f"checkpoint of step {step} could not be written ({cause}); {kept}. Free space in {self.folder}."
        with contextlib.suppress(StorageError):  # old ones that cannot be removed now go with the next one
            others = [other for other in self.steps() if other != step]  # whatever their steps, the new one stays
            for old in others[: len(others) + 1 - self.keep]:
                remove_tree(self.path(old))
        return None

    def save_later(self, step: int, state: dict[str, Any], tell: Any) -> None:
        """Write a checkpoint in a thread; one at a time, so a second one first waits for the first.

        Args:
            step: its step.
            state: tensors in it must not change any more (see :func:`snapshot`).
            tell: called with the sentence of :meth:`save` if there is one.
        """
        self.wait()

        def write() -> None:
            sentence = self.save(step, state)
            if sentence is not None:
                tell(sentence)

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def keep_stage(folder: str | Place, step: int, name: str, network: nn.Module) -> str | None:
    """Write the published weights of a stage that has ended, for whoever starts from them or scores them.

    Args:
        folder: run directory.
        step: the stage's last.
        name: the stage's.
        network: published.

    Returns:
        None, or the sentence that says why it could not be written.
    """
    path = place(folder) / STAGES / f"step_{step:08d}-{re.sub('[^a-z0-9]+', '-', name.lower())}.safetensors"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in snapshot(network.state_dict()).items()}
        with whole(path) as file:
            file.write(save(weights))
    except (OSError, SafetensorError) as error:
        hint = "" if isinstance(error, StorageError) else f" Free space in {path.parent}."
        return f"the weights of stage {name} could not be written ({error}).{hint}"
    return None


def kept_stages(folder: str | Place) -> list[tuple[int, Place]]:
    """Last step and file of every stage that has ended, but for the last one, whose weights are the run's."""
    found = (place(folder) / STAGES).glob("step_*.safetensors")
    return sorted((int(path.name.split("-")[0].removeprefix("step_")), path) for path in found)


def read_stage(path: Place) -> dict[str, torch.Tensor]:
    """Weights that :func:`keep_stage` wrote."""
    return load(path.read_bytes()) if isinstance(path, RemotePath) else load_file(path)


def snapshot(value: Any) -> Any:
    """A deep copy of nested dicts, lists and tensors, with every tensor on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(item) for item in value)
    return value
