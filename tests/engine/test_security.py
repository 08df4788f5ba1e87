"""A cluster that a run starts: who may ask it what, and where it listens.

It lives in a process of its own, since Ray reads its settings at import and the other tests have tokens switched off.
"""

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
FIXED = {8265, 44217, 44227, 52365}
PUBLIC = {
    "/",  # the static page, and what it needs to ask for the token
    "/favicon.ico",
    "/static/x",
    "/api/authentication_mode",
    "/api/healthz",
    "/api/gcs_healthz",
    "/api/local_raylet_healthz",
    "/-/healthz",
}
"""What answers without a token: Ray's own list. /api/authenticate is on it, and itself answers 401 without one."""
SAFE_TO_ASK = (
    "/api/version",
    "/api/cluster_status",
    "/nodes?view=summary",
    "/api/jobs/",
    "/api/v0/actors",
    "/api/v0/logs?node_id={node}",
    "/api/train/v2/runs/v1",
    "/api/data/datasets/01000000",
)

CHILD = r'''
import http.client, json, os, sys, time
from pipelines import environment

environment.prepare()
from pipelines import cluster
from pipelines.options import AdaptOptions

import grpc, psutil, ray

SERVICES = (
    "CoreWorkerService/GetCoreWorkerStats", "InternalKVGcsService/InternalKVKeys", "NodeManagerService/GetNodeStats",
    "ObjectManagerService/Push", "ReporterService/HealthCheck", "ReporterService/GetTraceback",
)


def ask(port, method, path, token=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, headers={} if token is None else {"Authorization": f"Bearer {token}"})
    return connection.getresponse().status


def speaks(port):
    """What a port speaks, and whether it asks for a token."""
    try:
        status = ask(port, "GET", "/metrics")
        return "HTTP", "no" if status == 200 else "yes" if status == 401 else str(status)
    except (http.client.HTTPException, OSError):
        channel, codes = grpc.insecure_channel(f"127.0.0.1:{port}"), set()
        for name in SERVICES:
            try:
                channel.unary_unary(f"/ray.rpc.{name}")(b"", timeout=10)
                codes.add("answered")
            except grpc.RpcError as error:
                codes.add(error.code().name)
        return "gRPC", "yes" if codes == {"UNIMPLEMENTED", "UNAUTHENTICATED"} else str(sorted(codes))


def name(process, me):
    line = " ".join(process.cmdline())
    if process == me:
        return "driver"
    for part, called in (
        ("dashboard/dashboard.py", "dashboard"), ("monitor.py", "monitor"), ("gcs_server", "gcs_server"),
        ("ray::DashboardAgent", "dashboard agent"), ("ray::RuntimeEnvAgent", "runtime environment agent"),
        ("ray::", "worker"), ("raylet/raylet", "raylet"),
    ):
        if part in line:
            return called
    return line


def routes():
    import ray.dashboard.http_server_head
    from ray.dashboard.optional_utils import DashboardAgentRouteTable, DashboardHeadRouteTable
    from ray.dashboard.subprocesses.module import SubprocessModule
    from ray.dashboard.subprocesses.routes import SubprocessRouteTable
    from ray.dashboard.utils import DashboardAgentModule, DashboardHeadModule, get_all_modules

    for kind in (DashboardHeadModule, SubprocessModule, DashboardAgentModule):
        get_all_modules(kind)
    head = [*DashboardHeadRouteTable.routes(), *SubprocessRouteTable.routes()]
    return {"head": [(r.method, r.path) for r in head if hasattr(r, "method")],
            "agent": [(r.method, r.path) for r in DashboardAgentRouteTable.routes() if hasattr(r, "method")]}


class Sleeper:
    def ready(self):
        return True


def settled(path, seconds=30):
    """What a path answers with the token; logs are an error until the node's agent has registered."""
    end = time.monotonic() + seconds
    while (status := ask(port, "GET", path.format(node=node), token)) == 500 and "logs" in path:
        if time.monotonic() > end:
            break
        time.sleep(0.5)
    return status


used = cluster.start(AdaptOptions(preset="tiny"))
worker = ray.remote(num_cpus=0)(Sleeper).remote()
ray.get(worker.ready.remote())
info = ray._private.worker._global_node.address_info
me, listening = psutil.Process(), []
for process in [me, *me.children(recursive=True)]:
    try:
        found = [c.laddr for c in process.net_connections("inet") if c.status == "LISTEN"]
        called = name(process, me)
    except psutil.Error:  # a process that has just ended
        continue
    listening += [(called, *speaks(at.port), at.port, at.ip) for at in found]
token = os.environ["RAY_AUTH_TOKEN"]
port = int(used.dashboard.rpartition(":")[2])
safe = json.loads(sys.argv[1])
node = ray.get_runtime_context().get_node_id()
print(json.dumps({
    "used": [used.dashboard, used.sentence], "token": token, "gcs": info["gcs_address"],
    "session": info["session_dir"], "agent": info["dashboard_agent_listen_port"],
    "routes": routes(), "listening": listening,
    "with": {path: settled(path) for path in safe},
    "login": ask(port, "POST", "/api/authenticate", token),
}), flush=True)
sys.stdin.read()
'''

JOIN = """
from pipelines import environment

environment.prepare()
from actors.errors import RunError
from pipelines import cluster
from pipelines.options import AdaptOptions

try:
    print(cluster.start(AdaptOptions(preset="tiny")).sentence)
except RunError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The home directory of a user who has no token."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def surroundings(home):
    """What such a user's processes see."""
    free = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return free | {"HOME": str(home), "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def started(surroundings, tmp_path_factory):
    """What a run's own cluster told of itself; it lives as long as these tests."""
    taken = {port for port in FIXED if _answers(port)}  # another cluster on this machine has them
    command = [sys.executable, "-c", CHILD, json.dumps(SAFE_TO_ASK)]
    log = tmp_path_factory.mktemp("child") / "errors"
    with log.open("w") as errors:
        child = subprocess.Popen(
            command, cwd=ROOT, env=surroundings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    line = next((line for line in child.stdout if line.startswith("{")), None)
    assert line is not None, log.read_text()[-3000:]
    yield json.loads(line) | {"taken": taken}
    child.communicate(timeout=30)


def _answers(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def ask(port, method, path, token=None):
    """The status of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, headers={} if token is None else {"Authorization": f"Bearer {token}"})
    return connection.getresponse().status


def _paths(routes):
    return [(method if method != "*" else "GET", re.sub(r"\{[^}]*\}", "x", path)) for method, path in routes]


def test_without_a_token_every_route_of_the_dashboard_but_its_page_and_health_checks_answers_401(started):
    port = int(started["used"][0].rpartition(":")[2])
    asked = {(method, path): ask(port, method, path) for method, path in _paths(started["routes"]["head"])}
    assert {"/api/jobs/", "/api/version", "/nodes", "/api/v0/logs", "/api/v0/actors", "/api/train/v2/runs/v1"} <= {
        path for _, path in asked
    }
    assert ("POST", "/api/jobs/") in asked
    assert len(asked) > 60
    assert {key: status for key, status in asked.items() if key[1] not in PUBLIC and status != 401} == {}
    assert ask(port, "GET", "/logs/raylet.out") == 401
    for path in PUBLIC:
        assert ask(port, "GET", path) != 401, path


def test_a_wrong_token_is_forbidden_and_the_right_one_opens_everything_and_logs_a_browser_in(started):
    port = int(started["used"][0].rpartition(":")[2])
    for path in SAFE_TO_ASK:
        assert ask(port, "GET", path, "f" * 64) == 403
    expected = dict.fromkeys(SAFE_TO_ASK, 200) | {"/api/train/v2/runs/v1": 500}  # nothing has trained here yet
    assert started["with"] == expected
    assert ask(port, "POST", "/api/jobs/", started["token"]) not in (401, 403)  # a job without a command is wrong
    assert started["login"] == 200


def test_without_a_token_the_agent_of_a_node_answers_401_but_for_its_health_check(started):
    asked = {path: ask(started["agent"], method, path) for method, path in _paths(started["routes"]["agent"])}
    assert "/api/job_agent/jobs/" in asked
    assert {path: status for path, status in asked.items() if path not in PUBLIC and status != 401} == {}


def _table():
    """Rows of the table of ports: process, what it speaks, port, address, token."""
    text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    section = text.split("## Ports and firewall", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (.+?) \| .+? \| (gRPC|HTTP) \| (\S+) \| (\S+) \| \*{0,2}(yes|no)\*{0,2} \|$", section, re.M)
    return Counter((name.split(" (")[0], speaks, port, ip, token) for name, speaks, port, ip, token in rows)


def test_what_a_cluster_of_a_run_listens_on_is_the_table_of_the_documentation(started):
    listening = Counter()
    for name, speaks, token, port, ip in started["listening"]:
        moved = name == "dashboard" and token == "yes" and 8265 in started["taken"]  # it takes the next free one
        shown = "8265" if moved else str(port) if port in FIXED else "random"
        listening[name, speaks, shown, ip.removeprefix("::ffff:"), token] += 1
    workers = [key for key in listening if key[0] == "worker"]
    assert len(workers) == 1, workers
    listening[workers[0]] = 1  # a row stands for them all
    missing = {key for key in _table() if key[2].isdecimal() and int(key[2]) in started["taken"]} - set(listening)
    assert listening + Counter(missing) == _table()


def test_the_token_stands_in_one_file_for_its_user_and_nowhere_else(started, home):
    session = Path(started["session"])
    assert (session / "auth_token").read_text() == started["token"]
    assert (session / "auth_token").stat().st_mode & 0o777 == 0o600
    assert str(session / "auth_token") in started["used"][1]
    files = [path for path in session.rglob("*") if path.is_file() and path.name != "auth_token"]
    assert len(files) > 10
    assert [path for path in files if started["token"].encode() in path.read_bytes()] == []
    assert not (home / ".ray").exists()


def joining(started):
    """Of somebody on this machine: the cluster is on localhost alone, and Ray would look at this machine's address."""
    return {"RAY_ADDRESS": started["gcs"], "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@pytest.mark.parametrize(
    ("token", "sentence"),
    [("f" * 64, "refuses the token in RAY_AUTH_TOKEN"), (None, "asks for a token, and none was given")],
)
def test_who_has_not_the_clusters_token_cannot_join_it_and_reads_one_sentence_within_a_minute(
    started, surroundings, token, sentence
):
    given = surroundings | joining(started) | ({} if token is None else {"RAY_AUTH_TOKEN": token})
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", JOIN], cwd=ROOT, env=given, capture_output=True, text=True, timeout=60, check=False
    )
    assert time.monotonic() - began < 60
    wanted = f"the Ray cluster at {started['gcs']} (RAY_ADDRESS) {sentence}; set RAY_AUTH_TOKEN to the cluster's token"
    assert wanted in done.stdout, done.stderr[-3000:]


def test_who_has_the_token_joins_and_is_told_so(started, surroundings):
    given = surroundings | joining(started) | {"RAY_AUTH_TOKEN": started["token"]}
    done = subprocess.run(
        [sys.executable, "-c", JOIN], cwd=ROOT, env=given, capture_output=True, text=True, timeout=60, check=False
    )
    assert f"joined the Ray cluster at {started['gcs']} (RAY_ADDRESS)" in done.stdout, done.stderr[-3000:]
