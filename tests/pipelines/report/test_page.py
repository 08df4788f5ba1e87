import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from test_gallery import shown

from actors.errors import RunError
from actors.storage import place
from pipelines.options import AdaptOptions, read_config, write_config
from pipelines.report.gallery import write_gallery
from pipelines.report.page import write_report
from pipelines.results import CONFUSION, write_confusion, write_json
from pipelines.setup import resolve
from pipelines.trained import describe, read_description

SCORE = {"miou": 30.25, "per_class": [30.0, None, *[31.5] * 17], "protocols": {"16": 30.25, "13": 35.5}, "images": 8}
RESULTS = {
    "benchmark": "synthia2city",
    "recipe": "eplc",
    "protocol": {"classes": 16, "label_size": [128, 64], "network": "ema", "views": [[128, 64, False]]},
    "scores": {
        "source_only": {**SCORE, "miou": 20.5, "per_class": [20.0, None, *[33.5] * 17]},
        "adabn": None,
        "adapted": SCORE,
        "oracle": {**SCORE, "miou": 40.0},
    },
    "gap_closed": 0.5,
    "steps": 40,
    "seconds": {"adapt": 21.4},
    "student": {"images_per_s": 35.4, "wait_share": 0.0063},
    "teachers": {"images_per_s": 36.0, "idle_share": 0.01, "labels_made": 6272, "teacher_failures": 0},
    "labels": {"read": 3479, "missing": 121},
    "label_age_steps": {"p50": 52, "p95": 76, "max": 105},
    "label_free": {"entropy": 0.1, "recommended": 30, "recommended_score": {"miou": 29.0}},
    "versions": {"torch": "2.13"},
}
LINES = [
    {"kind": "train", "step": 10, "stage": "alignment", "loss/segmentation": 2.0},
    {"kind": "train", "step": 30, "stage": "self-training", "loss/segmentation": 1.0, "label_age_steps_p50": 9},
    {"kind": "teachers", "step": 30, "acceptance": [0.5] * 19, "class_shares": [0.05] * 19},
    {"kind": "score", "step": 30, "miou": 29.0},
    {"kind": "signals", "step": 30, "entropy": 0.2},
    {"kind": "event", "step": 30, "message": "skipped <b>an</b> image"},
]


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A run directory as a finished run leaves it."""
    options = AdaptOptions(preset="tiny", name="run", runs=str(tmp_path), data=str(tiny_folder / "data"), seed=3)
    write_config(options)
    describe(resolve(options))
    run = options.folder()
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    write_json(run / "results.json", RESULTS)
    classes = read_description(run).classes
    write_confusion(run / CONFUSION, classes.names, np.eye(19, dtype=int).tolist())
    write_gallery(run, [shown("frankfurt/one")], classes)
    return run


class Page(HTMLParser):
    """Text, pictures and unclosed tags of a page."""

    EMPTY = ("meta", "img", "br", "link", "path", "use", "image", "rect")

    def __init__(self, text):
        super().__init__()
        self.text, self.images, self.links, self.open = "", [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.images += [found["src"]] if tag == "img" else []
        self.links += [
            v for k, v in attributes if k in ("src", "href", "xlink:href") and not v.startswith(("#", "data:"))
        ]
        self.text += " " if tag == "td" else ""
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def written(folder):
    return Page(write_report(folder).read_text())


def spaced(page):
    return re.sub(r"\s+", " ", page.text)


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(folder):
    page = written(folder)
    assert not page.open
    assert page.links == []
    assert len(page.images) == 6
    assert all(source.startswith("data:image/") for source in page.images)
    assert not list(folder.glob("*.partial"))


def test_scores_stand_beside_their_protocol_and_their_data(folder):
    text = spaced(written(folder))
    for part in (
        "30.2",
        "20.5",
        "40.0",
        "50 %",
        "16 classes; adapted = ema network at the last step",
        "data: miniature",
    ):
        assert part in text
    assert "mean over 13 classes: 35.5" in text
    assert "cannot be put beside published ones" in text


def test_every_scored_class_has_its_line_and_its_change(folder):
    text = spaced(written(folder))
    assert "road 20.0 30.0 30.0 +10.0" in text
    assert "building 33.5 31.5 31.5 -2.0" in text
    assert "sidewalk –" not in text


def test_the_step_that_looks_best_without_labels_stands_beside_the_last(folder):
    assert "Without labels, step 30 looks best; it scores 29.0." in spaced(written(folder))


def test_the_page_tells_how_to_repeat_the_run_and_what_it_said(folder):
    page = written(folder)
    assert "python run.py --benchmark synthia2city --preset tiny" in page.text
    assert "--seed 3" in page.text
    assert "skipped <b>an</b> image" in page.text  # escaped, or the parser would have taken the tags away
    assert "keep_share = 0.6" in page.text


def test_given_labels_are_named_and_no_teacher_is_spoken_of(folder):
    assert "labels made 6,272" in spaced(written(folder))
    write_config(replace(read_config(folder), pseudo_labels="/data/labels.parquet"))
    text = spaced(written(folder))
    assert "given by the user /data/labels.parquet" in text
    assert "teachers idle" not in text
    assert "Age of the pseudo labels" not in text
    assert "Of the pixels that the teachers take" not in text


def test_a_run_that_was_resumed_after_its_last_step_has_no_words_of_its_teachers(folder):
    write_json(folder / "results.json", {**RESULTS, "teachers": dict.fromkeys(RESULTS["teachers"])})
    text = spaced(written(folder))
    assert "p50 52, p95 76, max 105" in text
    assert "labels made" not in text


def test_a_run_that_was_stopped_has_curves_and_says_that_nothing_is_scored(folder):
    for name in ("results.json", CONFUSION):
        (folder / name).unlink()
    page = written(folder)
    assert "Not finished: its last recorded step is 30." in page.text
    assert "Mean IoU" not in page.text
    assert "loss terms" in page.text


def test_a_run_without_target_labels_says_so(folder):
    scores = dict.fromkeys(RESULTS["scores"])
    write_json(folder / "results.json", {**RESULTS, "scores": scores, "gap_closed": None})
    text = spaced(written(folder))
    assert "No target image has a label, so nothing was scored." in text
    assert "step 30 of 40 looks best" in text


def test_without_references_the_page_does_not_speak_of_a_gap(folder):
    scores = {**dict.fromkeys(RESULTS["scores"]), "adapted": SCORE}
    write_json(folder / "results.json", {**RESULTS, "scores": scores, "gap_closed": None})
    text = spaced(written(folder))
    assert "Gap closed" not in text
    assert "--references always" in text
    assert "change" not in text


def test_without_an_oracle_the_page_gives_the_gain_and_says_why_there_is_no_gap(folder):
    scores = {**RESULTS["scores"], "oracle": None}
    write_json(folder / "results.json", {**RESULTS, "scores": scores, "gap_closed": None})
    text = spaced(written(folder))
    assert "+9.8 points against training on the source alone. There is no oracle" in text
    assert "--references always" not in text


def test_a_run_that_has_only_begun_has_a_page(folder):
    for name in ("results.json", CONFUSION, "metrics.jsonl"):
        (folder / name).unlink()
    assert "its last recorded step is 0" in written(folder).text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="is no run directory"):
        write_report(tmp_path)


def test_a_chart_shows_how_the_estimate_of_class_frequencies_moved_where_there_is_one(folder):
    note = "How frequent classes are held to be on the target"
    assert note not in spaced(written(folder))
    offsets = [[0.1 * index * moved for index in range(19)] for moved in (0, -1)]
    lines = [
        {"kind": "teachers", "step": step, "prior_offset": found, "target_prior": [1 / 19] * 19}
        for step, found in zip((40, 50), offsets, strict=True)
    ]
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    page = written(folder)
    text = spaced(page)
    assert not page.open
    assert note in text
    assert "added to class scores, at most" in text
    chart = text[text.index("added to class scores") : text.index(note)]
    assert "bicycle" in chart, "of the classes that differ most"
    assert "sidewalk" not in chart


def test_a_class_without_an_offset_does_not_break_the_chart(folder):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "teachers", "step": 40, "prior_offset": [None, 0.5, *[0.0] * 17]}) + "\n")
    assert "How frequent classes are held to be" in spaced(written(folder))


def test_the_report_of_a_run_in_a_store_is_that_of_one_in_a_folder(folder, store):
    near = write_report(folder).read_text()
    for name in ("config.toml", "network.json", "metrics.jsonl"):
        store.buckets["bucket"][f"runs/{folder.name}/{name}"] = ((folder / name).read_bytes(), 1e9)
    far = place(store.uri(f"bucket/runs/{folder.name}"))
    classes = read_description(far).classes
    write_json(far / "results.json", RESULTS)
    write_confusion(far / CONFUSION, classes.names, np.eye(19, dtype=int).tolist())
    for image_id in ("frankfurt/before", "frankfurt/one"):  # pictures of an earlier time go
        write_gallery(far, [shown(image_id)], classes)
    path = write_report(str(far))
    assert str(path) == store.uri(f"bucket/runs/{folder.name}/report.html")
    assert path.read_text() == near
    assert "data:image/" in near
    assert store.files() == sorted(
        f"runs/{folder.name}/{item.relative_to(folder).as_posix()}" for item in folder.rglob("*") if item.is_file()
    )
