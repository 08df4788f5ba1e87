"""What every test shares. Ray reads its settings while it is imported, so they are set before anything else."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # before the folders of tests that mirror the packages' names

from pipelines import environment

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # the cluster of a test lives and dies with its process
environment.prepare()

import shutil  # noqa: E402
import tempfile  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Where the tiny miniatures live."""
    return tmp_path_factory.mktemp("miniatures")


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """The four splits of the tiny miniature of synthia2city: tests read them and leave them alone."""
    from pipelines.benchmarks import benchmark

    return benchmark("synthia2city").miniature("tiny", tiny_folder)


@pytest.fixture(scope="module")
def local_ray():
    """A Ray cluster of this machine for one module of slow tests."""
    import ray

    folder = tempfile.mkdtemp(prefix="t")  # short: the paths of Ray's sockets are limited
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200_000_000,
        _temp_dir=folder,
        log_to_driver=False,
    )
    yield ray
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def store(monkeypatch):
    """An object store of this machine with the bucket ``bucket``, and credentials for it."""
    from s3_server import served

    with served(monkeypatch) as server:
        yield server
