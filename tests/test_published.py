import json
import statistics
from pathlib import Path

import pytest

from bench.published_table import page, read
from pipelines.benchmarks import benchmark

ROOT = Path(__file__).parent.parent
ROWS = read()["row"]
FAITHFUL = {"preset": "full", "faithful": True, "init": "/weights/DeepLab.pth"}
INCONSISTENT = {("city2robot", "source"), ("city2robot", "AdaptSegNet"), ("city2robot", "PatchAlign")}
"""Published means that do not belong to the published classes (methods §8.3); and one of BiSeNet's (§8.1)."""


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['benchmark']} {row['model']}")
def test_the_classes_of_a_row_average_to_its_published_mean(row):
    known = {*INCONSISTENT, ("gta2city", "BiSeNet, DSC + MPL")}
    fits = abs(statistics.mean(row["iou"]) - row["miou"]) < 0.06
    assert fits is ((row["benchmark"], row["model"]) not in known)
    if "miou13" in row:
        names = read()["classes"]["synthia2city"]
        kept = [iou for name, iou in zip(names, row["iou"], strict=True) if name not in ("wall", "fence", "pole")]
        assert statistics.mean(kept) == pytest.approx(row["miou13"], abs=0.1)


@pytest.mark.parametrize("name", ["gta2city", "synthia2city", "city2robot"])
def test_the_classes_are_those_of_the_benchmarks_first_protocol(name):
    pair = benchmark(name)
    scored = {pair.classes.names[i] for i in pair.protocols[pair.primary_protocol]}
    assert set(read()["classes"][name]) == scored
    assert all(len(row["iou"]) == len(scored) for row in ROWS if row["benchmark"] == name)


def test_the_page_is_the_one_that_the_data_make():
    assert (ROOT / "docs/published.md").read_text() == page(read())


def test_a_run_of_ours_finds_its_cell(tmp_path):
    for seed, miou in enumerate((45.0, 46.0)):
        run = {"data": "real", "run": FAITHFUL, "scores": {"adapted": {"miou": miou}}}
        (tmp_path / f"real-gta2city-mrnet-s{seed}.json").write_text(json.dumps(run))
    lines = page(read(), tmp_path).splitlines()
    (line,) = (line for line in lines if line.startswith("| MRNet stage I | paper | 45.5 |"))
    assert line.endswith("| 45.5 ± 0.7 (2) |")


@pytest.mark.parametrize(
    ("data", "odd", "said"),
    [
        ("miniature", {}, "of miniature data"),
        ("real", {"faithful": False}, "not faithful"),
        ("real", {"init": None}, "from random weights"),
        ("real", {"preset": "mini"}, "preset mini"),
    ],
)
def test_a_run_that_cannot_be_compared_is_refused(tmp_path, data, odd, said):
    run = {"data": data, "run": {**FAITHFUL, **odd}, "scores": {"adapted": {"miou": 50.0}}}
    (tmp_path / "real-gta2city-mrnet-s0.json").write_text(json.dumps(run))
    with pytest.raises(SystemExit, match=said):
        page(read(), tmp_path)
