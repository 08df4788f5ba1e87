"""A run as Prometheus and Ray's dashboard see it."""

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections import defaultdict
from contextlib import contextmanager

import pytest
from engine_runs import lines, start_run, until
from prometheus_client.parser import text_string_to_metric_families

from actors.metrics import METRICS, Export, find
from actors.run_log import RunLog
from deploy.monitoring.dashboard import FILE
from pipelines.datasets import CITYSCAPES_19

pytestmark = pytest.mark.slow

PROMETHEUS = shutil.which("prometheus")
FOLDER = FILE.parent
DISCOVERY = "/tmp/ray/prom_metrics_service_discovery.json"
"""What the scrape config names: where Ray writes it by default."""
ELSEWHERE = {"gpu_memory_bytes": "a GPU", "trainable_teacher": "a recipe whose teacher learns"}
"""Parts of names that this run does not export, and what they need."""
LEFT_OUT = {
    "student": {"rank", "pid", "device"},
    "teachers": {"fatal", "prior_offset", "refresh"},
    "signals": {"class_shares"},
    "score": {"oracle_metric"},
}
"""Numbers of a run's lines that are not exported: one a process, words without end, or said by another number."""
SECONDS_TO_FORGET = 15


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def get(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


class Cluster:
    """A Ray of its own, with the dashboard and its agent."""

    def __init__(self, ray, folder):
        self.folder = folder
        context = ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=True,
            object_store_memory=200_000_000,
            _temp_dir=folder,
            _metrics_export_port=free_port(),
            log_to_driver=False,
        )
        self.dashboard = f"http://{context.dashboard_url}"
        node = ray.nodes()[0]
        self.metrics = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def series(self):
        """Our numbers as they are exported now: name → list of (labels, value)."""
        found = defaultdict(list)
        for family in text_string_to_metric_families(get(self.metrics)):
            for sample in family.samples:
                if sample.name.startswith("ray_tutelage_"):
                    found[sample.name].append((sample.labels, sample.value))
        return found


@pytest.fixture(scope="module")
def cluster():
    import ray

    folder = tempfile.mkdtemp(prefix="t")
    with pytest.MonkeyPatch.context() as patch:
        # Every second instead of every ten, in all of Ray's processes.
        patch.setitem(os.environ, "RAY_metrics_report_interval_ms", "1000")
        yield Cluster(ray, folder)
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


class Prometheus:
    """The real one, with our scrape config."""

    def __init__(self, url):
        self.url = url

    def values(self, expression, begin, end):
        """What a panel would draw: for every series its labels and its values."""
        asked = {"query": expression, "start": begin, "end": end, "step": 1}
        answer = json.loads(get(f"{self.url}/api/v1/query_range?{urllib.parse.urlencode(asked)}"))
        return [(one["metric"], [float(v) for _, v in one["values"]]) for one in answer["data"]["result"]]


@contextmanager
def prometheus(discovery, folder):
    if PROMETHEUS is None:
        yield None
        return
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    config = folder / "prometheus.yml"
    text = config.read_text()
    assert text.count(DISCOVERY) == text.count("scrape_interval: 10s") == 1
    config.write_text(text.replace(DISCOVERY, discovery).replace(": 10s", ": 1s"))
    port = free_port()
    command = [PROMETHEUS, f"--config.file={config}", f"--web.listen-address=127.0.0.1:{port}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", "--log.level=error"]
    with subprocess.Popen(command) as process:
        try:
            yield Prometheus(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()


@dataclasses.dataclass
class Watched:
    """What was seen of a run."""

    folder: object
    begin: float
    end: float
    exported: dict
    """Name → label sets that were exported at any time."""
    forgotten_after: float
    """Seconds from the run's end until nothing of it was exported."""
    prometheus: Prometheus | None
    trains: list


def follow(folder, cluster):
    """What a run log writes of a reference run, without the half minute that one takes."""
    import ray

    export = Export({"run": "run", "recipe": "eplc", "benchmark": "synthia2city"}, ())
    log = ray.remote(RunLog).options(num_cpus=0).remote(str(folder), events=False, export=export)
    log.write.remote("train:oracle", 1, {"loss": 2.5, "stage": "supervised"})
    until(lambda: any(labels["reference"] for labels, _ in cluster.series()["ray_tutelage_train_loss"]))
    time.sleep(2)  # or Prometheus has not come by
    ray.kill(log)


@pytest.fixture(scope="module")
def watched(cluster, tmp_path_factory, tiny_folder):
    """A run, seen by Prometheus and by somebody who reads what Prometheus reads."""
    folder, seen, stop = tmp_path_factory.mktemp("run"), defaultdict(list), threading.Event()

    def look():
        while not stop.wait(0.5):
            for name, found in cluster.series().items():
                seen[name] += [labels for labels, _ in found if labels not in seen[name]]

    discovery = f"{cluster.folder}/prom_metrics_service_discovery.json"
    with prometheus(discovery, tmp_path_factory.mktemp("prometheus") / "config") as server:
        run = start_run(folder, tiny_folder, steps=60, refresh="continuous")
        run.setup = dataclasses.replace(run.setup, plan=dataclasses.replace(run.setup.plan, evaluate_every=10))
        begin, watcher = time.time(), threading.Thread(target=look, daemon=True)
        watcher.start()
        outcome = run.go()
        follow(outcome.folder, cluster)
        end = time.time()
        while cluster.series() and time.time() < end + SECONDS_TO_FORGET:
            time.sleep(0.2)
        forgotten = time.time() - end
        stop.set()
        watcher.join()
        trains = json.loads(get(f"{cluster.dashboard}/api/train/v2/runs/v1"))["train_runs"]
        yield Watched(outcome.folder, begin, end, seen, forgotten, server, trains)


@pytest.fixture(scope="module")
def asked():
    """(title, expression) of every query of the dashboard that this run can answer, for this run."""
    board = json.loads(FILE.read_text(encoding="utf-8"))
    queries = [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel["targets"]]
    filled = [(title, text.replace("$run", "run").replace("$__rate_interval", "20s")) for title, text in queries]
    assert not [text for _, text in filled if "$" in text]
    return [(title, text) for title, text in filled if not any(part in text for part in ELSEWHERE)]


def names(expression):
    return set(re.findall(r"ray_tutelage_\w+", expression))


def test_every_number_that_the_dashboard_asks_for_is_exported(watched, asked):
    wanted = set().union(*(names(text) for _, text in asked))
    assert len(wanted) > 30
    assert wanted - set(watched.exported) == set()


def test_every_line_of_the_run_is_exported_but_for_what_is_left_out(watched):
    for kind in ("student", "train", "teachers", "signals", "score"):
        numbers = set().union(*map(set, lines(watched.folder, kind))) - {"kind", "step", "time"}
        assert numbers, kind
        assert {name for name in numbers if find(kind, name) is None} == LEFT_OUT.get(kind, set()) & numbers


def labelled(acceptances):
    """Classes that some label has."""
    return {
        name for one in acceptances for name, share in zip(CITYSCAPES_19.names, one, strict=True) if share is not None
    }


def test_every_number_carries_the_tags_of_its_run(watched):
    known = {metric.prometheus: metric for metric in METRICS}
    for name, found in watched.exported.items():
        for labels in found:
            assert (labels["run"], labels["recipe"], labels["benchmark"]) == ("run", "eplc", "synthia2city")
            assert known[name].tag in {"", *labels}
    references = {labels["reference"] for labels in watched.exported["ray_tutelage_train_loss"]}
    assert references == {"", "oracle"}
    stages = {labels["stage"] for labels in watched.exported["ray_tutelage_train_stage"]}
    assert {line["stage"] for line in lines(watched.folder, "train")} <= stages
    classes = {labels["class"] for labels in watched.exported["ray_tutelage_teachers_acceptance"]}
    told = [(line["time"], line["acceptance"]) for line in lines(watched.folder, "teachers") if "acceptance" in line]
    seen_by_then = max(time for time, _ in told) - 3  # what is told last, Ray may not have exported any more
    long_told = [acceptance for time, acceptance in told if time < seen_by_then]
    assert long_told
    assert "road" in classes
    assert labelled(long_told) <= classes <= labelled(acceptance for _, acceptance in told)


def test_a_run_that_has_ended_is_exported_no_more(watched):
    assert watched.forgotten_after < SECONDS_TO_FORGET


def test_the_train_tab_knows_the_run(watched):
    assert [run["status"] for run in watched.trains] == ["FINISHED"]


needs_prometheus = pytest.mark.skipif(PROMETHEUS is None, reason="there is no prometheus on the PATH")


@needs_prometheus
def test_every_query_of_the_dashboard_returns_data(watched, asked):
    empty = [
        (title, text) for title, text in asked if not watched.prometheus.values(text, watched.begin, watched.end + 2)
    ]
    assert empty == []


@needs_prometheus
def test_prometheus_has_the_very_numbers_of_the_runs_lines(watched):
    for kind, name in (("train", "loss"), ("train", "wait_share"), ("teachers", "coverage"), ("score", "miou")):
        query = f'{find(kind, name).prometheus}{{reference=""}}'
        ((_, values),) = watched.prometheus.values(query, watched.begin, watched.end)
        assert set(values) <= {float(line[name]) for line in lines(watched.folder, kind)}
        assert values


@needs_prometheus
def test_the_run_can_be_chosen(watched):
    board = json.loads(FILE.read_text(encoding="utf-8"))
    query = next(v for v in board["templating"]["list"] if v["name"] == "run")["query"]["query"]
    selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", query).groups()
    asked = urllib.parse.urlencode({"match[]": selector, "start": watched.begin, "end": watched.end})
    answer = json.loads(get(f"{watched.prometheus.url}/api/v1/label/{label}/values?{asked}"))
    assert answer["data"] == ["run"]
