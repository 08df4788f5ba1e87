import numpy as np
import pytest

from actors.errors import RunError
from pipelines.benchmarks import own_benchmark
from pipelines.data_check import check
from pipelines.data_sample import NAMES, write_sample
from pipelines.options import DataOptions


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("sample") / "pictures", "tiny")


def test_the_sample_is_a_benchmark_of_nine_classes(sample):
    source, target, validation = map(str, sample)
    pair, domains = own_benchmark(source, target, validation)
    assert (pair.name, pair.classes.names) == ("game2city", NAMES)
    assert not domains.target.labelled
    assert len(domains.source) > len(domains.validation) > 0
    assert set(np.unique(domains.source.label(0)).tolist()) <= {*range(9), 255}


def test_every_id_of_the_sample_is_accounted_for(sample, tmp_path):
    source, target, validation = map(str, sample)
    options = DataOptions(source=source, target=target, validation=validation)
    assert check(options, tmp_path, lambda *_: None).mistakes == []


def test_nothing_is_written_over(sample, tmp_path):
    with pytest.raises(RunError, match="is not empty"):
        write_sample(sample[0].parent, "tiny")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is not empty"):
        write_sample(tmp_path / "file", "tiny")
