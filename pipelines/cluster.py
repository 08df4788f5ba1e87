"""Start a Ray cluster on this machine, or join one."""

from __future__ import annotations

import logging
import os

import ray

from pipelines.options import AdaptOptions

OBJECT_STORE_BYTES = 1_000_000_000


def start(options: AdaptOptions) -> str | None:
    """Start Ray on this machine, or join ``options.address``; returns the dashboard's URL.

    CPUs are bookkeeping to Ray: a local cluster declares two for every core, so that one student, its teachers, the
    readers and the evaluator fit on two cores.
    """
    if ray.is_initialized():
        return None
    if options.address is not None:
        context = ray.init(address=options.address, log_to_driver=False, logging_level=logging.ERROR)
        return str(context.dashboard_url)
    context = ray.init(
        address="local",  # or Ray joins whatever cluster was started on this machine last
        num_cpus=max(4, 2 * (os.cpu_count() or 1)),
        include_dashboard=options.dashboard,
        dashboard_host="127.0.0.1",
        object_store_memory=OBJECT_STORE_BYTES if options.resolved_preset != "full" else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    return f"http://{context.dashboard_url}" if options.dashboard else None
