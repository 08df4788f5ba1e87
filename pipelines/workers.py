"""Processes that work or rest as they are told, and tell what they do: what a measurement is made of."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from ray import cloudpickle

from actors.errors import RunError

NICENESS = 15
"""Of Ray's worker processes, its default: on a machine that others use, too, they wait like those of a run."""


@dataclass(frozen=True)
class Spent:
    """Something that a process did: when (``time.perf_counter``), and for how many images."""

    began: float
    ended: float
    images: int = 0
    kind: str = ""


@dataclass(frozen=True)
class Memory:
    """Bytes at most: of the process, and of its tensors on a GPU."""

    process: int = 0
    gpu: int = 0


def own_memory() -> Memory:
    """Of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    gpu = torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else 0
    return Memory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, gpu)


class Orders:
    """A worker's end of its connection: what it does goes up, and it works or rests as it is told."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.working = False

    def obey(self) -> None:
        """Take new orders, and wait while they are to rest.

        Raises:
            EOFError: whoever gives orders is gone.
        """
        while not self.working or self.connection.poll():
            self.working = self.connection.recv()
            self.connection.send(self.working)

    def tell(self, what: Any) -> None:
        """Send a picklable thing up."""
        self.connection.send(what)


class Worker:
    """A process that works or rests, and what it has told.

    Args:
        work: called in the process with its :class:`Orders` and the arguments.
        arguments: for cloudpickle.
    """

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        context = forked(work.__module__)
        self.connection, other = context.Pipe()
        payload = cloudpickle.dumps((work, arguments))
        self.process = context.Process(target=begin, args=(other, payload))
        self.process.start()
        other.close()
        self.told: list[Any] = []
        self.memory = Memory()
        self.acknowledged: bool | None = None
        self.first: Any = None
        self.kinds = 1
        """Kinds of things that it does in turn."""

    def end(self) -> None:
        """Kill it; there is nothing that it must save."""
        self.process.kill()
        self.process.join()
        self.connection.close()

    def take(self) -> None:
        """Read one message; only when there is one.

        Raises:
            RunError: the process failed.
        """
        try:
            what = self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            self.process.join(1)
            raise RunError(
                f"a process of the measurement died (exit code {self.process.exitcode}); that is mostly a lack of "
                "memory: plan fewer --teachers or --students, or a smaller --batch"
            ) from error
        if isinstance(what, bool):
            self.acknowledged = what
        elif isinstance(what, Memory):
            self.memory = what
        elif isinstance(what, str):
            raise RunError(what)
        elif isinstance(what, Spent):
            self.told.append(what)
        else:
            self.first = what


def forked(module: str) -> Any:
    """Where processes come from: a server that has imported a module, and has neither threads nor a GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", module])
    return context


def begin(connection: Connection, payload: bytes) -> None:
    """What a process does: take its place behind others, then its work, a pickled pair of call and arguments."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    os.nice(max(0, NICENESS - os.nice(0)))
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            work, arguments = cloudpickle.loads(payload)
            work(Orders(connection), *arguments)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:
            lines = str(error).strip().splitlines()
            connection.send(lines[-1] if isinstance(error, RunError) and lines else f"{type(error).__name__}: {error}")
