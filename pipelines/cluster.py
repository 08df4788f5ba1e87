"""Start a Ray cluster on this machine, or join one.

What is started here listens on localhost only and asks for a token; docs/cluster.md has a table of its ports.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants

from actors.errors import RunError
from pipelines.environment import token_source
from pipelines.options import AdaptOptions

OBJECT_STORE_BYTES = 1_000_000_000
KNOCK_SECONDS = 10.0
"""How long a cluster's address may take to answer at all."""
GCS_WAIT = "RAY_gcs_server_port_wait_time_s"
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


@dataclass(frozen=True)
class Cluster:
    """The Ray that a run uses.

    Attributes:
        dashboard: its URL; None without one.
        sentence: for the user: whose Ray it is, and the way into its dashboard. Empty when it ran before.
    """

    dashboard: str | None = None
    sentence: str = ""


def start(options: AdaptOptions) -> Cluster:
    """Join the cluster of ``options.address`` or of ``RAY_ADDRESS``, as a Ray job has it; else start one here.

    Raises:
        RunError: the cluster cannot be joined: its address or the token is wrong.
    """
    if ray.is_initialized():
        return Cluster()
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if path and not os.environ.get("RAY_AUTH_TOKEN") and not Path(path).is_file():
        raise RunError(f"RAY_AUTH_TOKEN_PATH is {path}, and there is no such file; give the file that holds the token")
    given = "--address" if options.address is not None else "RAY_ADDRESS"
    address = options.address if options.address is not None else os.environ.get("RAY_ADDRESS", "")
    return _start(options) if address in ("", "local") else _join(address, given)


def _start(options: AdaptOptions) -> Cluster:
    """Start Ray on this machine.

    CPUs are bookkeeping to Ray: a local cluster declares two for every core, so that one student, its teachers, the
    readers and the evaluator fit on two cores.
    """
    asks = os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"
    fresh = asks and token_source() is None
    if fresh:  # or Ray would write one into the home directory
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    with _on_localhost():
        context = ray.init(
            address="local",  # or Ray joins whatever cluster was started on this machine last
            num_cpus=max(4, 2 * (os.cpu_count() or 1)),
            include_dashboard=options.dashboard,
            dashboard_host="127.0.0.1",
            object_store_memory=OBJECT_STORE_BYTES if options.resolved_preset != "full" else None,
            **QUIET,
        )
    if not options.dashboard:
        return Cluster(None, "Ray runs on this machine alone")
    url = f"http://{context.dashboard_url}"
    way_in = ""
    if fresh:
        way_in = f", which asks for the token in {_leave_token(Path(context.address_info['session_dir']))}"
    elif asks:
        way_in = f", which asks for your token ({token_source()})"
    return Cluster(url, f"Ray runs on this machine alone. Its dashboard is {url}{way_in}")


def _join(address: str, given: str) -> Cluster:
    """Join a cluster.

    Args:
        address: host:port of its head, or auto for the one on this machine.
        given: where the address is from, for messages.
    """
    if "://" in address:
        raise RunError(
            f"{given} is {address}, and a run joins a cluster by host:port of its head (6379 is Ray's port), not by a "
            "URL; to send it there from outside, use ray job submit"
        )
    if address != "auto":
        _knock(address, given)
    before = os.environ.get(GCS_WAIT)
    # One attempt, of up to 45 s. With Ray's own 20, someone else's port is an error after a quarter of an hour.
    os.environ.setdefault(GCS_WAIT, "1")
    try:
        context = ray.init(address=address, **QUIET)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise RunError(_why_not(address, given, error)) from error
    finally:
        if before is None:
            del os.environ[GCS_WAIT]
    dashboard = f"http://{context.dashboard_url}" if context.dashboard_url else None
    at = context.address_info["gcs_address"]
    sentence = f"joined the Ray cluster at {at} ({given})"
    return Cluster(dashboard, sentence if dashboard is None else f"{sentence}. Its dashboard is {dashboard}")


def _knock(address: str, given: str) -> None:
    """Refuse an address where nobody answers: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise RunError(f"{given} is {address!r}; give host:port of the cluster's head, such as 10.0.0.4:6379, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS).close()
    except OSError as error:
        raise RunError(
            f"no Ray cluster answers at {address} ({given}): {error.strerror or error}. Give host:port of its head, "
            "and see that it runs and that no firewall is in between"
        ) from error


def _why_not(address: str, given: str, error: BaseException) -> str:
    """A sentence about a cluster that could not be joined."""
    said = f"{error} {error.__cause__ or ''}"
    if "Unauthenticated" in said or "InvalidAuthToken" in said or isinstance(error, ray.exceptions.AuthenticationError):
        source = token_source()
        refused = "asks for a token, and none was given" if source is None else f"refuses the token in {source}"
        if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
            refused = "asks for a token, and RAY_AUTH_MODE switches tokens off"
        return f"the Ray cluster at {address} ({given}) {refused}; set RAY_AUTH_TOKEN to the cluster's token"
    if address == "auto":
        return f"{given} is auto, and no Ray cluster runs on this machine; start one with ray start, or leave it out"
    return (
        f"{address} ({given}) answers, and is no Ray cluster that this machine is a node of: {error}. A run must be "
        "started on a node of the cluster, by its interpreter and its version of Ray, or sent there by ray job submit"
    )


@contextmanager
def _on_localhost() -> Iterator[None]:
    """Let Ray take the loopback address for this machine's, so that all it starts listens there and nowhere else.

    It does where no other machine may join, as on macOS, and then binds its metrics ports to it, too, which know no
    token. An option has no such effect: Ray turns ``_node_ip_address="127.0.0.1"`` into an address others can reach.
    The processes that are started must know it as well, or the dashboard looks for its cluster at that other address.
    """
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    variable = os.environ.get(name)
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if variable is None:
            del os.environ[name]
        else:
            os.environ[name] = variable


def _leave_token(session: Path) -> Path:
    """Write the token of this process where only its user can read it; it opens nothing once Ray has ended."""
    path = session / "auth_token"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(os.environ["RAY_AUTH_TOKEN"])
    return path
