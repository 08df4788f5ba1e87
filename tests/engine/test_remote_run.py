"""A whole run whose directory and whose data are in an object store."""

import json
import os

import pytest
from s3_server import CREDENTIALS, S3Server

from actors.checkpoints import CheckpointStore
from pipelines.datasets.miniature.write import write_miniature
from pipelines.options import read_config
from pipelines.report.page import write_report
from pipelines.rescore import rescore
from tests.engine.engine_runs import losses, start_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server():
    """In the environment before Ray starts, so that every process of the run finds its credentials."""
    before = {name: os.environ.get(name) for name in CREDENTIALS}
    os.environ.update(CREDENTIALS)
    server = S3Server("bucket")
    yield server
    server.close()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def test_a_run_in_a_store_on_data_in_a_store_is_stopped_resumed_scored_and_reported(
    server, local_ray, tmp_path, tiny_folder
):
    server.upload_folder(write_miniature("synthia2city", "tiny", tiny_folder), "data")
    options = {
        "preset": "tiny",
        "steps": 40,
        "refresh": "once",
        "data_root": server.uri("bucket/data"),
    }
    runs = server.uri("bucket/runs")
    first = start_run(runs, tmp_path / "data", **options).go(at_step=22, do=lambda run: run.interrupt())
    assert first.stopped
    assert str(first.folder) == server.uri("bucket/runs/run")
    stopped_at = CheckpointStore(first.folder / "checkpoints").newest()["step"]
    assert 22 <= stopped_at < 40
    assert max(losses(first.folder)) == stopped_at, "what was said before the stop was copied before the log was ended"

    outcome = start_run(runs, tmp_path / "data", **options).go()
    assert set(losses(outcome.folder)) == set(range(1, 41)), "the log of the first run was continued"
    kept = server.files()
    for name in ("config.toml", "network.json", "results.json", "confusion.csv", "report.html", "pictures/index.json"):
        assert f"runs/run/{name}" in kept
    assert any(name.startswith("runs/run/labels/") and name.endswith(".parquet") for name in kept)
    assert any(name.startswith("runs/run/events/") for name in kept)
    assert any(name.startswith("runs/run/stages/") for name in kept)
    assert sum(name.endswith("state.pt") and "/checkpoints/" in name for name in kept) == 2
    results = json.loads((outcome.folder / "results.json").read_text())
    assert results["data"] == "real"

    again = rescore(read_config(str(outcome.folder)))
    assert again["scores"]["adapted"]["miou"] == pytest.approx(results["scores"]["adapted"]["miou"], abs=1e-6)
    assert (outcome.folder / "evaluation" / "per_image.csv").is_file()
    page = write_report(str(outcome.folder)).read_text()
    assert "data:image/jpeg;base64" in page
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in page
    written = [content for name, (content, _) in server.buckets["bucket"].items() if name.startswith("runs/")]
    assert not any(CREDENTIALS["AWS_SECRET_ACCESS_KEY"].encode() in content for content in written)
    assert not list(tmp_path.glob("runs*"))
