"""Fill the decode cache ahead of a run, which would do so itself on first use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from actors.errors import RunError, UnreadableImage
from pipelines.blocks import decode_image, decode_label
from pipelines.datasets.dataset import LabelEncoding, Size, Split
from pipelines.decode_cache import DecodeCache
from pipelines.options import AdaptOptions
from pipelines.setup import Setup, resolve
from pipelines.streams import SampleStream

IN_FLIGHT = 64


@dataclass
class Prepared:
    """What was decoded."""

    entries: int = 0
    bytes: int = 0
    """Decoded bytes, which is what they take on disk."""
    unreadable: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """One file at one size."""

    path: str
    size: Size
    encoding: LabelEncoding | None


def prepare(options: AdaptOptions, progress: Callable[[int, int], None]) -> Prepared:
    """Decode every file that a run with these options reads, at every size that it reads it at.

    Args:
        options: of the run.
        progress: told (files done, files in all).

    Raises:
        RunError: the options cannot work, or the cache cannot be written.
        DataError: the data are not as expected.
    """
    setup = resolve(options)
    jobs = list(dict.fromkeys(needed(setup)))
    done = Prepared()
    todo = iter(jobs)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        while chunk := list(islice(todo, IN_FLIGHT)):
            for job, size in zip(chunk, pool.map(lambda job: _decode(setup.cache, job), chunk), strict=True):
                if size is None:
                    done.unreadable.append(job.path)
                else:
                    done.entries, done.bytes = done.entries + 1, done.bytes + size
            if setup.cache.problem is not None:
                raise RunError(f"decoded images cannot be written to {setup.cache.folder}: {setup.cache.problem}")
            progress(done.entries + len(done.unreadable), len(jobs))
    done.unreadable = list(dict.fromkeys(done.unreadable))
    return done


def needed(setup: Setup) -> Iterator[Job]:
    """What students, teachers, the evaluator and the reference runs of a run read."""
    plans = (setup.plan, *setup.references.values())
    for stage in (stage for plan in plans for stage in plan.stages):
        for stream in stage.streams.values():
            assert isinstance(stream, SampleStream)
            yield from _jobs(stream.split, stream.size, labels=True)
        for size in stage.labels.rule.view_sizes if stage.labels is not None else ():
            yield from _jobs(setup.domains.target, size)
    if setup.domains.validation is not None:
        for size in setup.preset.score_views:
            yield from _jobs(setup.domains.validation, size)


def _jobs(split: Split, size: Size, *, labels: bool = False) -> Iterator[Job]:
    for path in split.image_paths:
        yield Job(path, size, None)
    for path in (split.label_paths or ()) if labels else ():
        yield Job(path, size, split.label_encoding)


def _decode(cache: DecodeCache, job: Job) -> int | None:
    try:
        if job.encoding is None:
            return decode_image(cache, job.path, job.size).nbytes
        return decode_label(cache, job.path, job.size, job.encoding).nbytes
    except UnreadableImage:
        return None
