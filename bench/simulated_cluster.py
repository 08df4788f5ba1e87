"""A cluster of several Ray nodes on this machine, with Ray's autoscaler: a head, and nodes for students and teachers.

Every node is a raylet with an object store and workers of its own. Nodes are started by Ray's autoscaler through its
provider for tests, and lost by killing every process of one. No `ray stop` is involved: nobody else's Ray is touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import yaml

from pipelines.environment import SETTINGS
from pipelines.placement import BOOTSTRAP, STUDENT_NODE, TEACHER_NODE

STORE_BYTES = 1_000_000_000
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "AUTOSCALER_HEARTBEAT_TIMEOUT_S": "10",
}
"""A lost node is noticed after about three seconds; the autoscaler, which waits for ten, then starts another."""
STARTS_NODES = """
import json, os, subprocess, sys, threading
for line in sys.stdin:
    node = subprocess.Popen(json.loads(line), stdin=subprocess.DEVNULL, stdout=sys.stderr)
    threading.Thread(target=node.wait, daemon=True).start()  # none stays as a zombie
    print(node.pid, flush=True)
for other in map(int, filter(str.isdigit, os.listdir("/proc"))):  # whoever wanted nodes is gone, however it ended
    try:
        if other != os.getpid() and os.getsid(other) == os.getsid(0):
            os.kill(other, 9)
    except OSError:
        pass
"""


@dataclass(frozen=True)
class Nodes:
    """Of one kind.

    Attributes:
        cpus: that Ray counts on one.
        least, most: how many there are, and may be.
    """

    cpus: int
    least: int
    most: int


@dataclass
class SimulatedCluster:
    """A head, whose CPU nobody with a node of its own asks for, and nodes for students and teachers.

    Attributes:
        students, teachers: nodes.
        idle_minutes: after which the autoscaler takes an idle node away.
        folder: of the cluster's sessions; short, because the paths of sockets are limited.
    """

    students: Nodes = Nodes(cpus=2, least=1, most=2)
    teachers: Nodes = Nodes(cpus=1, least=2, most=4)
    idle_minutes: float = 5.0
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="t")))
    port: int = field(default_factory=lambda: free_port())
    dashboard_port: int = field(default_factory=lambda: free_port())
    process: subprocess.Popen[str] | None = None
    """Starts the nodes."""

    @property
    def address(self) -> str:
        """For ``--address``."""
        return f"127.0.0.1:{self.port}"

    @property
    def dashboard(self) -> str:
        """URL of Ray's dashboard."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    def config(self) -> dict[str, Any]:
        """What ``ray up`` would read."""

        def kind(nodes: Nodes, resource: str) -> dict[str, Any]:
            resources = {"CPU": nodes.cpus, resource: 1, "object_store_memory": STORE_BYTES}
            return {
                "resources": resources,
                "node_config": {},
                "min_workers": nodes.least,
                "max_workers": nodes.most,
            }

        commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        return {
            "cluster_name": "simulated",
            # Ray fills these in for real providers; of this one it does not ship the defaults.
            **{name: {} for name in ("auth", "docker", "file_mounts", "head_node", "worker_nodes")},
            **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
            **{f"{name}_commands": [] for name in commands},
            "file_mounts_sync_continuously": False,
            "upscaling_speed": 10.0,
            "max_workers": self.students.most + self.teachers.most,
            "idle_timeout_minutes": self.idle_minutes,
            "provider": {
                "type": "fake_multinode",
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "gcs_address": self.address,
            },
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
                "student": kind(self.students, STUDENT_NODE),
                "teacher": kind(self.teachers, TEACHER_NODE),
            },
            "head_node_type": "ray.head.default",
        }

    def environment(self) -> dict[str, str]:
        """Of every process that belongs to the cluster; a driver finds the configuration in its home, as on a head."""
        settings = {**SETTINGS, **QUICK, "RAY_AUTH_MODE": "disabled", "RAY_FAKE_CLUSTER": "1"}
        return {**os.environ, **settings, "HOME": str(self.folder)}

    def start(self, seconds: float = 120.0) -> None:
        """Start the head, and wait until the least nodes are there.

        Raises:
            RuntimeError: they do not come.
        """
        config = self.folder / BOOTSTRAP.name
        config.write_text(yaml.safe_dump(self.config()))
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTS_NODES],
            env=self.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said.open("ab"),
            start_new_session=True,
            text=True,
        )
        head = self._start(
            *("--head", f"--port={self.port}", f"--temp-dir={self.folder}", "--node-ip-address=127.0.0.1"),
            *("--num-cpus=1", f"--autoscaling-config={config}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard_port}"),
        )
        connected = time.monotonic() + seconds
        while not self._answers():
            if time.monotonic() > connected or not _read(head, "cmdline"):
                raise RuntimeError(f"the simulated cluster did not start: {self.said.read_text()[-3000:]}")
            time.sleep(0.2)
        ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
        self.until(lambda: len(self.alive()) >= 1 + self.students.least + self.teachers.least, seconds)

    def _start(self, *arguments: str) -> int:
        """Start a node in the session of the others; its process id.

        Linux weighs sessions against each other before it looks at nice values: in one of its own, a node would take
        as much of this machine as all others, and what must start first would wait for what may wait.
        """
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        ray_command = str(Path(sys.executable).parent / "ray")
        command = [ray_command, "start", "--block", f"--object-store-memory={STORE_BYTES}", *arguments]
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    @property
    def said(self) -> Path:
        """What the nodes say that are started here."""
        return self.folder / "nodes.log"

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def until(self, condition: Callable[[], bool], seconds: float = 120.0) -> float:
        """Wait for something; how long it took.

        Raises:
            RuntimeError: it does not happen.
        """
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > seconds:
                raise RuntimeError(f"it did not happen within {seconds} s")
            time.sleep(0.1)
        return time.monotonic() - began

    def alive(self, resource: str | None = None) -> list[str]:
        """Ids of the nodes, or of those of one kind."""
        nodes = [node for node in ray.nodes() if node["Alive"]]
        return [node["NodeID"] for node in nodes if resource is None or resource in node["Resources"]]

    def add_node(self, resource: str, nodes: Nodes) -> None:
        """Start a node as a cloud would put one in the place of one that was lost; it joins seconds later.

        Ray's provider for tests goes on believing in a node that was killed, so the autoscaler does not do it.
        """
        before = set(self.alive(resource))
        for _ in range(3):  # it sometimes gives up while the head is still busy with the loss
            node = self._start(
                f"--address={self.address}",
                f"--num-cpus={nodes.cpus}",
                f"--resources={json.dumps({resource: 1})}",
            )
            while _read(node, "cmdline"):
                if set(self.alive(resource)) - before:
                    return
                time.sleep(0.1)
        raise RuntimeError(f"no node with {resource} could be started: {self.said.read_text()[-3000:]}")

    def kill_node(self, node: str) -> float:
        """Kill every process of a node at once; the time of day."""
        raylets = [pid for pid in _processes() if _is_raylet_of(pid, node)]
        if not raylets:
            raise RuntimeError(f"no raylet of node {node} runs here")
        # The raylet first, or it would tell the head of its workers' deaths.
        doomed = [pid for raylet in raylets for pid in (raylet, *_descendants(raylet))]
        now = time.time()
        for pid in doomed:
            _signal(pid, signal.SIGKILL)
        return now

    def stop(self) -> None:
        """End all of it."""
        ray.shutdown()
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.communicate(timeout=10)
            for pid in _of_home(self.folder):  # drivers, which whoever uses the cluster has started
                _signal(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def simulated(**given: Any) -> Iterator[SimulatedCluster]:
    """A simulated cluster that is gone afterwards."""
    cluster = SimulatedCluster(**given)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _read(pid: int, what: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:  # it has just ended, or is somebody else's
        return b""


def _is_raylet_of(pid: int, node: str) -> bool:
    command = _read(pid, "cmdline")
    known = command + _read(pid, "environ")  # the autoscaler's nodes are told their ids there
    return command.split(b"\0")[0].endswith(b"raylet/raylet") and node.encode() in known


def _of_home(folder: Path) -> list[int]:
    """Processes that were started for a cluster: its folder is their home."""
    home = f"HOME={folder}\0".encode()
    return [pid for pid in _processes() if home in _read(pid, "environ")]


def _descendants(pid: int) -> list[int]:
    parents = {
        other: int(stat.rsplit(b")", 1)[1].split()[1]) for other in _processes() if (stat := _read(other, "stat"))
    }
    found, queue = [], [pid]
    while queue:
        parent = queue.pop()
        children = [child for child, its in parents.items() if its == parent]
        found += children
        queue += children
    return found


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
