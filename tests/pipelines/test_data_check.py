import numpy as np
import pytest
from PIL import Image

from actors.errors import RunError
from pipelines.data_check import check
from pipelines.datasets import DataError
from pipelines.options import DataOptions
from tests.own_data import write_own_data


def run_check(tmp_path, source, target, **more):
    told = []
    options = DataOptions(source=source, target=target, **more)
    return check(options, tmp_path / "out", lambda *what: told.append(what)), told


def test_sound_data_are_counted_and_shown(tmp_path):
    report, told = run_check(tmp_path, *write_own_data(tmp_path, classes=2, sizes=((64, 48), (48, 64))))
    source, target = report.domains
    assert (source.images, target.images) == (8, 8)
    assert source.sizes == {(64, 48): 4, (48, 64): 4}
    np.testing.assert_allclose(source.shares(2), [0.5, 0.5])
    assert source.present[:2].tolist() == [8, 8]
    assert source.ignored_share == 0
    assert report.mistakes == []
    assert told[-1] == ("target", 8, 8)


def test_four_overlays_come_from_both_domains(tmp_path):
    report, _ = run_check(tmp_path, *write_own_data(tmp_path))
    assert len(report.overlays) == 4
    for path in report.overlays:
        with Image.open(path) as image:
            image.load()
    assert {path.name.split("-")[1] for path in report.overlays} == {"source.png", "target.png"}


def test_an_unlabelled_target_is_counted_all_the_same(tmp_path):
    report, _ = run_check(tmp_path, *write_own_data(tmp_path, target_labels=False))
    assert [(domain.name, domain.labelled, domain.images) for domain in report.domains] == [
        ("source", 8, 8),
        ("target", 0, 8),
    ]


def test_everything_that_is_wrong_is_named_at_once(tmp_path):
    source, target = write_own_data(tmp_path)
    masks, photos = tmp_path / "source" / "masks", tmp_path / "source" / "photos"
    Image.fromarray(np.full((48, 64), 7, np.uint8)).save(masks / "0.png")
    Image.fromarray(np.zeros((10, 12), np.uint8)).save(masks / "1.png")
    (photos / "2.jpg").write_bytes((photos / "2.jpg").read_bytes()[:200])
    (masks / "3.png").write_bytes(b"")
    report, _ = run_check(tmp_path, source, target)
    said = "\n".join(report.mistakes)
    assert len(report.mistakes) == 4
    assert "id 7 occurs in 1 label files and belongs to no class" in said
    assert "1.png is 12×10 and its image" in said
    assert "2.jpg" in said
    assert "3.png" in said


def test_ids_that_a_published_dataset_leaves_unused_are_no_mistake(tmp_path, tiny_folder):
    options = DataOptions(benchmark="synthia2city", preset="tiny", data=str(tiny_folder / "data"))
    report = check(options, tmp_path, lambda *_: None)
    assert report.mistakes == []
    assert [domain.name for domain in report.domains] == ["source", "target", "validation"]
    assert all(domain.ignored_share > 0 for domain in report.domains)


def test_an_unknown_colour_is_named_as_one(tmp_path):
    source, target = write_own_data(tmp_path, classes=2, target_labels=False)
    colours = 'encoding = "colours"\nclasses = [{name = "a", colour = "#000000"}, {name = "b", colour = "#010101"}]'
    with open(source, "w") as file:
        file.write(f'images = "photos/*.jpg"\nlabels = "masks/*.png"\n{colours}')
    Image.new("RGB", (64, 48), (255, 0, 16)).save(tmp_path / "source" / "masks" / "0.png")
    report, _ = run_check(tmp_path, source, target)
    assert any("colour #ff0010 occurs in 1 label" in said for said in report.mistakes)


def test_black_is_named_as_a_colour_too(tmp_path):
    source, target = write_own_data(tmp_path, classes=2, target_labels=False)
    colours = 'encoding = "colours"\nclasses = [{name = "a", colour = "#0a0000"}, {name = "b", colour = "#010101"}]'
    with open(source, "w") as file:
        file.write(f'images = "photos/*.jpg"\nlabels = "masks/*.png"\n{colours}')
    report, _ = run_check(tmp_path, source, target)
    assert any("colour #000000 occurs in 8 label" in said for said in report.mistakes)


def test_every_target_image_is_read_whether_it_has_a_label_or_not(tmp_path):
    source, target = write_own_data(tmp_path)
    for number in range(1, 8):
        (tmp_path / "target" / "masks" / f"{number}.png").unlink()
    (tmp_path / "target" / "photos" / "5.jpg").write_bytes(b"no photo")
    write_own_data(tmp_path / "more")
    (tmp_path / "more" / "target" / "target.toml").rename(tmp_path / "more" / "target" / "scored.toml")
    for validation in (None, str(tmp_path / "more" / "target" / "scored.toml")):
        report = check(
            DataOptions(source=source, target=target, validation=validation), tmp_path / "out", lambda *_: None
        )
        found = next(domain for domain in report.domains if domain.name == "target")
        assert (found.images, found.labelled) == (8, 1)
        (said,) = report.mistakes
        assert "5.jpg" in said


def test_labels_that_are_learned_from_are_checked_though_only_some_of_them_are_scored_on(tmp_path):
    source, target = write_own_data(tmp_path)
    part = tmp_path / "target" / "part.toml"
    part.write_text('images = "photos/1*.jpg"\nlabels = "masks/1*.png"\n')
    Image.new("L", (9, 7), 200).save(tmp_path / "target" / "masks" / "5.png")
    options = DataOptions(source=source, target=target, validation=str(part))
    report = check(options, tmp_path / "out", lambda *_: None)
    assert [domain.name for domain in report.domains] == ["source", "target"]
    assert report.domains[1].labelled == 8
    assert len(report.mistakes) == 2


def test_overlays_that_cannot_be_written_are_a_sentence(tmp_path):
    source, target = write_own_data(tmp_path)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RunError, match=r"overlays cannot be written to .*taken"):
        check(DataOptions(source=source, target=target), tmp_path / "taken", lambda *_: None)


def test_half_a_pair_is_refused():
    with pytest.raises(RunError, match="--source is given without --target"):
        DataOptions(source="a.toml")
    with pytest.raises(RunError, match="--data-root belongs to the published"):
        DataOptions(source="a.toml", target="b.toml", data_root="/data")
    with pytest.raises(RunError, match="--validation belongs to images of your own"):
        DataOptions(validation="a.toml")


def test_a_missing_folder_is_a_sentence(tmp_path):
    source, target = write_own_data(tmp_path)
    (tmp_path / "target" / "photos").rename(tmp_path / "target" / "moved")
    with pytest.raises(DataError, match=r"target\.toml: images = .* but the folder .*photos does not exist"):
        run_check(tmp_path, source, target)
