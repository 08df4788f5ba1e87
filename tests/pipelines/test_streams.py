import math
import os
import pickle
import queue
import stat
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from actors.errors import RunError, UnreadableImage
from pipelines import streams
from pipelines.blocks import SPARES, ReadPlan, SampleFile, SegmentReader, read_block
from pipelines.datasets.dataset import DataError, read_image, read_label
from pipelines.decode_cache import DecodeCache
from pipelines.streams import DRAWS, ClassAwareOrder, SampleOrder, SampleStream, SplitReader, rank_positions
from pipelines.views import Whole

SIZE = (32, 18)
NO_CACHE = DecodeCache(None)


@given(st.integers(1, 50), st.integers(0, 5), st.integers(0, 3))
def test_every_epoch_shows_every_image_once(images, seed, epoch):
    order = SampleOrder(images, seed, "source")
    positions = np.arange(epoch * images, (epoch + 1) * images)
    assert sorted(order.indices(positions)) == list(range(images))


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=20))
def test_the_image_at_a_position_depends_on_nothing_else(positions):
    order = SampleOrder(17, 3, "target")
    together = order.indices(np.array(positions))
    alone = [int(order.indices(np.array([p]))[0]) for p in positions]
    assert together.tolist() == alone


def test_epochs_seeds_and_streams_are_shuffled_apart():
    first = SampleOrder(40, 0, "source").indices(np.arange(80))
    assert first[:40].tolist() != first[40:].tolist()
    for other in (SampleOrder(40, 1, "source"), SampleOrder(40, 0, "target")):
        assert other.indices(np.arange(40)).tolist() != first[:40].tolist()


# Class-aware sampling.


def presence(images, shares, seed=0):
    """Which classes an image shows, of so many images in a hundred."""
    return np.random.default_rng(seed).random((images, len(shares))) < np.array(shares)


def class_aware_by_hand(shown, seed, name, block):
    """Draw after draw, as the published code does, with the random numbers of the order."""
    images, classes = shown.shape
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), block])
    label_to_file = {c: [i for i in range(images) if shown[i, c]] for c in range(classes)}
    file_to_label = {i: [c for c in range(classes) if shown[i, c]] for i in range(images)}
    waiting = {c: list(rng.permutation(label_to_file[c])) for c in range(classes)}
    order = {c: list(waiting[c]) for c in range(classes)}
    count = [0] * classes
    drawn = []
    for uniform in list(rng.random(DRAWS)):
        share = [n / sum(count) if sum(count) else 0.0 for n in count]
        weight = [1 / math.log(1.01 + share[c]) if label_to_file[c] else 0.0 for c in range(classes)]
        left = uniform * sum(weight)
        for c in range(classes):
            if left < weight[c]:
                break
            left -= weight[c]
        if not waiting[c]:
            order[c] = list(rng.permutation(order[c]))
            waiting[c] = list(order[c])
        file = int(waiting[c].pop(0))
        drawn.append(file)
        for other in file_to_label[file]:
            count[other] += 1
    return [drawn[k] for k in rng.permutation(DRAWS)]


@pytest.mark.parametrize("block", [0, 3])
def test_a_block_is_drawn_class_by_class_as_published(block):
    shown = presence(60, (0.9, 0.0, 0.5, 0.02, 0.1))
    order = ClassAwareOrder.of(shown, 5, "source")
    found = order.indices(np.arange(block * DRAWS, (block + 1) * DRAWS))
    assert found.dtype == np.int64
    assert found.tolist() == class_aware_by_hand(shown, 5, "source", block)


def test_a_rare_class_is_drawn_far_more_often_than_it_occurs():
    shown = presence(400, (1.0, 1.0, 0.8, 0.05))
    drawn = ClassAwareOrder.of(shown, 0, "source").indices(np.arange(DRAWS))
    assert shown[:, 3].mean() < 0.07
    assert shown[drawn, 3].mean() > 0.25
    assert 0.7 < shown[drawn, 2].mean() < 0.9


def test_a_class_begins_anew_only_when_all_of_its_images_had_their_turn():
    shown = np.zeros((40, 2), bool)
    shown[:30, 0] = shown[30:, 1] = True
    times = np.bincount(ClassAwareOrder.of(shown, 1, "source").indices(np.arange(DRAWS)))
    for turns in (times[:30], times[30:]):
        assert turns.max() - turns.min() <= 1
    assert times[30:].sum() == pytest.approx(DRAWS / 2, rel=0.1)


def test_classes_that_no_image_shows_and_images_without_a_class_are_never_drawn():
    shown = presence(30, (0.5, 0.0, 0.3))
    shown[::4] = False
    drawn = ClassAwareOrder.of(shown, 2, "source").indices(np.arange(2 * DRAWS))
    assert set(drawn.tolist()) == set(np.flatnonzero(shown.any(1)).tolist())


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=2))
@settings(deadline=None, max_examples=5)
def test_a_class_aware_position_depends_on_nothing_before_it(positions):
    order = ClassAwareOrder.of(presence(17, (0.7, 0.1)), 3, "source")
    together = order.indices(np.array(positions))
    again = pickle.loads(pickle.dumps(order))
    streams._class_aware_block.cache_clear()
    assert together.tolist() == [int(again.indices(np.array([p]))[0]) for p in positions]


def test_class_aware_blocks_seeds_and_streams_are_drawn_apart():
    shown = presence(50, (0.7, 0.2, 0.1))
    drawn = ClassAwareOrder.of(shown, 0, "source").indices(np.arange(2 * DRAWS))
    assert drawn[:DRAWS].tolist() != drawn[DRAWS:].tolist()
    for other in (ClassAwareOrder.of(shown, 1, "source"), ClassAwareOrder.of(shown, 0, "few")):
        assert other.indices(np.arange(DRAWS)).tolist() != drawn[:DRAWS].tolist()


def test_a_block_of_a_published_source_is_drawn_fast_and_travels_light():
    order = ClassAwareOrder.of(presence(24_966, np.linspace(0.02, 1.0, 19)), 0, "source")
    assert len(pickle.dumps(order)) < 70_000
    started = time.perf_counter()
    order.indices(np.arange(DRAWS))
    assert time.perf_counter() - started < 1


def test_a_split_whose_labels_show_no_class_cannot_be_drawn_by_class():
    with pytest.raises(DataError, match="source: none of the 7 labels has a pixel of any class"):
        ClassAwareOrder.of(np.zeros((7, 3), bool), 0, "source")


def test_a_stream_plays_images_by_class(tiny):
    shown = np.zeros((len(tiny.source), 2), bool)
    shown[[2, 5], [0, 1]] = True
    order = ClassAwareOrder.of(shown, 0, "source")
    stream = SampleStream(tiny.source, SIZE, order, Whole(), NO_CACHE)
    assert {file.index for file in files_of(stream, DRAWS - 8, 16)} == {2, 5}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_ranks_share_the_same_global_sequence(world):
    parts = [rank_positions(100, 5, 8, rank, world) for rank in range(world)]
    assert all(part.shape == (5, 8 // world) for part in parts)
    assert np.concatenate(parts, axis=1).tolist() == np.arange(100, 140).reshape(5, 8).tolist()


@given(st.integers(0, 6), st.sampled_from([1, 2, 4]))
def test_positions_after_a_resume_are_the_rest_of_those_before(done, world):
    for rank in range(world):
        whole = rank_positions(40, 6, 8, rank, world)
        rest = rank_positions(40 + done * 8, 6 - done, 8, rank, world)
        assert rest.tolist() == whole[done:].tolist()


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="batch of 9 cannot be shared evenly by 2"):
        rank_positions(0, 1, 9, 0, 2)


def sample_stream(split, seed=0, **more):
    return SampleStream(split, SIZE, SampleOrder(len(split), seed, "source"), Whole(), NO_CACHE, **more)


def files_of(stream, first, count):
    return stream._files(np.arange(first, first + count))


def broken_copy(files, bad, folder):
    """The same files with some images replaced by rubbish."""
    path = folder / "rubbish.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return [
        SampleFile(f.position, f.index, str(path) if f.position in bad else f.image, f.label, f.spare) for f in files
    ]


def pixels(table, name, shape):
    return np.stack([np.frombuffer(cell.as_py(), np.uint8).reshape(shape) for cell in table.column(name)])


def test_a_block_holds_images_and_labels_of_its_positions(tiny):
    stream = sample_stream(tiny.source)
    table = read_block(files_of(stream, 5, 3), SIZE, tiny.source.label_encoding, NO_CACHE)
    indices = stream.order.indices(np.arange(5, 8))
    assert table.column("position").to_pylist() == [5, 6, 7]
    assert table.column("index").to_pylist() == indices.tolist()
    for row, index in enumerate(indices):
        image = read_image(tiny.source.image_paths[index], SIZE)
        label = read_label(tiny.source.label_paths[index], tiny.source.label_encoding, SIZE)
        np.testing.assert_array_equal(pixels(table, "image", (18, 32, 3))[row], image)
        np.testing.assert_array_equal(pixels(table, "label", (18, 32))[row], label)
    assert table.column("skipped").to_pylist() == ["", "", ""]


def test_a_stream_without_labels_reads_none(tiny):
    stream = sample_stream(tiny.target)
    files = files_of(stream, 0, 2)
    assert all(file.label is None for file in files)
    assert "label" not in read_block(files, SIZE, None, NO_CACHE).column_names


def test_a_corrupt_image_is_replaced_and_named(tiny, tmp_path):
    files = broken_copy(files_of(sample_stream(tiny.source), 0, 4), {1}, tmp_path)
    table = read_block(files, SIZE, tiny.source.label_encoding, NO_CACHE)
    again = read_block(files, SIZE, tiny.source.label_encoding, NO_CACHE)
    assert table.equals(again)
    assert table.column("position").to_pylist() == [0, 1, 2, 3]
    skipped = table.column("skipped").to_pylist()
    assert [bool(s) for s in skipped] == [False, True, False, False]
    assert skipped[1].endswith("rubbish.png")
    index = table.column("index").to_pylist()[1]
    np.testing.assert_array_equal(
        pixels(table, "image", (18, 32, 3))[1], read_image(tiny.source.image_paths[index], SIZE)
    )
    np.testing.assert_array_equal(
        pixels(table, "label", (18, 32))[1],
        read_label(tiny.source.label_paths[index], tiny.source.label_encoding, SIZE),
    )


def test_a_corrupt_label_skips_its_image(tiny, tmp_path):
    files = files_of(sample_stream(tiny.source), 0, 2)
    rubbish = tmp_path / "label.png"
    rubbish.write_bytes(b"x")
    files[0] = SampleFile(0, files[0].index, files[0].image, str(rubbish))
    table = read_block(files, SIZE, tiny.source.label_encoding, NO_CACHE)
    assert table.column("skipped").to_pylist()[0].endswith("label.png")


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_what_replaces_a_corrupt_image_does_not_depend_on_where_the_block_begins(tiny, tmp_path, first):
    """A resumed run begins its blocks elsewhere and must see the same samples."""
    stream = sample_stream(tiny.source)
    reference = read_block(
        broken_copy(files_of(stream, 0, 8), {3}, tmp_path), SIZE, tiny.source.label_encoding, NO_CACHE
    )
    shifted = read_block(
        broken_copy(files_of(stream, first, 4), {3}, tmp_path), SIZE, tiny.source.label_encoding, NO_CACHE
    )
    assert shifted.column("index").to_pylist()[3 - first] == reference.column("index").to_pylist()[3]


@pytest.mark.parametrize("bad", [{2}, {1, 2}, {3, 4, 5, 6}, {0, 7}])
@pytest.mark.parametrize("world", [2, 4])
def test_what_replaces_a_corrupt_image_does_not_depend_on_the_number_of_students(tiny, tmp_path, world, bad):
    """The positions of one of several students have gaps; what replaces a sample may lie in another's share."""
    stream = sample_stream(tiny.source)

    def read(positions):
        table = read_block(broken_copy(stream._files(positions), bad, tmp_path), SIZE, None, NO_CACHE)
        return dict(zip(*(table.column(name).to_pylist() for name in ("position", "index")), strict=True))

    whole = read(np.arange(8))
    assert sum(whole[p] != i for p, i in enumerate(stream.order.indices(np.arange(8)))) == len(bad)
    for rank in range(world):
        positions = rank_positions(0, 2, 4, rank, world).reshape(-1)
        assert read(positions) == {position: whole[position] for position in positions}


def test_more_corrupt_images_than_spares_end_the_run_by_name(tiny, tmp_path):
    files = broken_copy(files_of(sample_stream(tiny.source), 0, 6), set(range(6)), tmp_path)
    with pytest.raises(RunError, match=rf"more than {SPARES} images of one block of 6 .*rubbish\.png"):
        read_block(files, SIZE, tiny.source.label_encoding, NO_CACHE)


def test_a_batch_is_a_copy_that_pins_no_block(tiny):
    stream = sample_stream(tiny.source)
    table = read_block(files_of(stream, 0, 4), SIZE, tiny.source.label_encoding, NO_CACHE)
    before = pa.total_allocated_bytes()
    batch = streams.collate(table.slice(1, 2), SIZE)
    assert pa.total_allocated_bytes() <= before + 4096
    np.testing.assert_array_equal(batch.images.numpy(), pixels(table, "image", (18, 32, 3))[1:3])
    np.testing.assert_array_equal(batch.labels.numpy(), pixels(table, "label", (18, 32))[1:3])
    assert batch.positions.tolist() == [1, 2]
    for name, array in (("position", batch.positions), ("index", batch.indices)):
        block = np.frombuffer(table.column(name).chunk(0).buffers()[1], np.uint8)
        assert not np.shares_memory(array, block), "a view into the block keeps all of it in the object store"


def test_skipped_files_of_a_batch_are_listed(tiny, tmp_path):
    files = broken_copy(files_of(sample_stream(tiny.target), 0, 4), {2}, tmp_path)
    batch = streams.collate(read_block(files, SIZE, None, NO_CACHE), SIZE)
    assert batch.labels is None
    assert [Path(p).name for p in batch.skipped] == ["rubbish.png"]


class Reader:
    """A handle of a segment reader that decodes at once; remembers the segments that it was asked for."""

    def __init__(self, tamper=lambda tables: tables):
        self.segments, self.tamper = [], tamper
        self.read = self

    def options(self, **_):
        return self

    def remote(self, plan, blocks):
        self.segments.append([file.position for block in blocks for file in block if not file.spare])
        return self.tamper(read_block(block, plan.size, plan.encoding, plan.cache) for block in blocks)


@pytest.fixture
def reader(monkeypatch):
    made = Reader()
    monkeypatch.setattr(
        ray, "remote", lambda kind: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: made))
    )
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(streams, "on_this_node", lambda: "here")
    return made


def in_time(work, seconds=20.0):
    """What some work returns or raises; a hanging one fails instead of holding up the tests."""
    box = queue.Queue()

    def target():
        try:
            box.put((work(), None))
        except BaseException as error:
            box.put((None, error))

    threading.Thread(target=target, daemon=True).start()
    try:
        value, error = box.get(timeout=seconds)
    except queue.Empty:
        pytest.fail("it hangs")
    if error is not None:
        raise error
    return value


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2)])
@pytest.mark.parametrize("split", ["source", "target"])
def test_segments_play_as_one_sequence(tiny, reader, split, rank, world):
    """Two blocks of up to two batches to a segment: seven batches are two segments, the second one shorter."""
    data = getattr(tiny, split)
    stream = sample_stream(data, block_rows=5, segment_blocks=2)
    found = in_time(lambda: list(stream.batches(6, 7, 2 * world, rank, world)))
    positions = rank_positions(6, 7, 2 * world, rank, world)
    assert [batch.positions.tolist() for batch in found] == positions.tolist()
    assert reader.segments == [positions[:4].reshape(-1).tolist(), positions[4:].reshape(-1).tolist()]
    for batch, at in zip(found, positions, strict=True):
        expected = streams.collate(
            read_block(stream._files(at), SIZE, data.label_encoding if data.labelled else None, NO_CACHE), SIZE
        )
        assert batch.indices.tolist() == expected.indices.tolist() == stream.indices(at).tolist()
        np.testing.assert_array_equal(batch.images.numpy(), expected.images.numpy())
        assert (batch.labels is None) == (expected.labels is None) == (not data.labelled)
        if data.labelled:
            np.testing.assert_array_equal(batch.labels.numpy(), expected.labels.numpy())


def test_the_next_segment_opens_in_the_middle_of_this_one(tiny, reader):
    batches = sample_stream(tiny.target, block_rows=4, segment_blocks=2).batches(0, 12, 2, 0, 1)
    asked = []
    for _ in range(12):
        in_time(lambda: next(batches))
        asked.append(len(batches.open) + batches.current)
    assert asked == [1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    with pytest.raises(StopIteration):
        next(batches)


def test_a_stream_that_is_closed_in_the_middle_leaves_no_thread_and_no_reader(tiny, reader, monkeypatch):
    """In a process that goes on, its thread would wait for room in the queue for ever."""
    gone = []
    monkeypatch.setattr(ray, "kill", gone.append)
    batches = sample_stream(tiny.target, block_rows=2, segment_blocks=64).batches(0, 40, 2, 0, 1)
    in_time(lambda: next(batches))
    threads = [segment.thread for segment in batches.open.values()]
    in_time(batches.close)
    assert gone == [reader]
    assert threads
    assert not any(thread.is_alive() for thread in threads)
    with pytest.raises(StopIteration):
        next(batches)
    in_time(batches.close)


def test_no_steps_need_no_reader(tiny, reader):
    assert list(sample_stream(tiny.target).batches(0, 0, 2, 0, 1)) == []
    assert reader.segments == []


@pytest.mark.parametrize("whole", [0, 1, 3])
def test_a_segment_that_ends_early_raises_instead_of_hanging(tiny, reader, whole):
    reader.tamper = lambda tables: (table for table, _ in zip(tables, range(whole), strict=False))
    batches = sample_stream(tiny.target, block_rows=2, segment_blocks=4).batches(0, 4, 2, 0, 1)
    assert [in_time(lambda: next(batches)).positions.tolist() for _ in range(whole)] == [
        [2 * step, 2 * step + 1] for step in range(whole)
    ]
    with pytest.raises(RuntimeError, match="ended before its last batch"):
        in_time(lambda: next(batches))


@pytest.mark.parametrize("error", [RunError("more than 4 images cannot be read"), ray.exceptions.RayActorError()])
def test_what_goes_wrong_while_reading_is_raised_at_the_student(tiny, reader, error):
    def tamper(tables):
        yield next(tables)
        raise error

    reader.tamper = tamper
    batches = sample_stream(tiny.target, block_rows=2).batches(0, 4, 2, 0, 1)
    assert in_time(lambda: next(batches)).positions.tolist() == [0, 1]
    with pytest.raises(type(error)):
        in_time(lambda: next(batches))


def test_a_student_that_is_slow_holds_the_reader_back(tiny, reader):
    """Or a segment of large images would fill the memory."""
    taken = []

    def tamper(tables):
        for table in tables:
            taken.append(table)
            yield table

    reader.tamper = tamper
    batches = sample_stream(tiny.target, block_rows=2, segment_blocks=64).batches(0, 40, 2, 0, 1)
    in_time(lambda: next(batches))
    threading.Event().wait(0.3)
    assert len(taken) <= streams.QUEUE_BATCHES + 2


def test_a_reader_is_sent_the_files_of_a_segment_and_not_the_list_of_all(tiny, reader):
    sent = []
    read = reader.remote
    reader.remote = lambda plan, blocks: sent.append(plan) or read(plan, blocks)
    in_time(lambda: list(sample_stream(tiny.source).batches(0, 2, 2, 0, 1)))
    assert sent == [ReadPlan(SIZE, tiny.source.label_encoding, NO_CACHE, 0.25)]


class FakeDataset:
    def __init__(self, tables, asked):
        self.tables, self.asked = tables, asked

    def iter_batches(self, **how):
        self.asked.append(how)
        yield from self.tables


def read_plan(asked):
    """A read plan whose Ray Data delivers names of blocks, and notes what it was asked for."""

    def dataset(blocks):
        asked.append(blocks)
        return FakeDataset([f"block at {block[0].position}" for block in blocks], asked)

    return SimpleNamespace(dataset=dataset, size=SIZE, encoding=None, cache=NO_CACHE)


def test_the_first_blocks_are_read_at_once_and_ray_data_reads_the_others_without_their_spares(tiny):
    asked = []
    blocks = sample_stream(tiny.target).blocks(np.arange(15), 3)
    *direct, fourth, fifth = SegmentReader().read(read_plan(asked), blocks)
    for table, block in zip(direct, blocks[:3], strict=True):
        assert table.equals(read_block(block, SIZE, None, NO_CACHE))
    assert (fourth, fifth) == ("block at 9", "block at 12")
    assert asked[0] == blocks[3:]
    assert (asked[1]["batch_size"], asked[1]["batch_format"]) == (3, "pyarrow")


def test_ray_data_does_not_start_beside_the_first_step_but_runs_ahead_of_later_segments(tiny):
    asked, reader = [], SegmentReader()
    blocks = sample_stream(tiny.target).blocks(np.arange(15), 3)
    first = reader.read(read_plan(asked), blocks)
    for _ in range(3):
        next(first)
        time.sleep(0.02)
        assert asked == []
    assert list(first) == ["block at 9", "block at 12"]
    asked.clear()
    next(reader.read(read_plan(asked), blocks))
    deadline = time.monotonic() + 5
    while len(asked) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_segment_of_one_block_needs_no_ray_data(tiny):
    def dataset(blocks):
        raise AssertionError("Ray Data was started")

    blocks = sample_stream(tiny.target).blocks(np.arange(3), 3)
    given = SimpleNamespace(dataset=dataset, size=SIZE, encoding=None, cache=NO_CACHE)
    assert [table.num_rows for table in SegmentReader().read(given, blocks)] == [3]


def test_blocks_hold_about_eight_megabytes(tiny):
    full = SampleStream(tiny.source, (1280, 720), SampleOrder(24, 0, "s"), Whole(), NO_CACHE)
    assert full.block_rows == 2
    assert sample_stream(tiny.source).block_rows == 32
    assert sample_stream(tiny.source).images == 24


def test_a_reader_gives_images_at_a_size_and_labels_as_they_are(tiny, tmp_path):
    reader = SplitReader(tiny.validation, DecodeCache(tmp_path))
    assert len(reader) == len(reader.image_ids) == 8
    np.testing.assert_array_equal(reader.read(2, SIZE), read_image(tiny.validation.image_paths[2], SIZE))
    np.testing.assert_array_equal(reader.label(2), tiny.validation.label(2))
    with pytest.raises(DataError, match="no labels"):
        SplitReader(tiny.target, NO_CACHE).label(0)


def picture(path, seed=0):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(path)
    return str(path)


def counting(path, size=(8, 6)):
    calls = []

    def decode():
        calls.append(path)
        return read_image(path, size)

    return decode, calls


def test_the_cache_decodes_once_and_a_hit_equals_the_miss(tmp_path):
    path = picture(tmp_path / "a.png")
    decode, calls = counting(path)
    cache = DecodeCache(tmp_path / "cache")
    miss, hit = (cache.get(path, (8, 6), "image", decode) for _ in range(2))
    other = DecodeCache(tmp_path / "cache").get(path, (8, 6), "image", decode)
    assert len(calls) == 1
    np.testing.assert_array_equal(miss, hit)
    np.testing.assert_array_equal(miss, other)
    assert hit.shape == (6, 8, 3)


def test_sizes_and_decoders_are_kept_apart(tmp_path):
    path = picture(tmp_path / "a.png")
    cache = DecodeCache(tmp_path / "cache")
    assert cache.get(path, (8, 6), "image", lambda: read_image(path, (8, 6))).shape == (6, 8, 3)
    assert cache.get(path, (4, 3), "image", lambda: read_image(path, (4, 3))).shape == (3, 4, 3)
    assert cache.get(path, (8, 6), "label", lambda: np.zeros((6, 8), np.uint8)).shape == (6, 8)


def test_a_changed_file_is_read_again(tmp_path):
    path = picture(tmp_path / "a.png", 0)
    cache = DecodeCache(tmp_path / "cache")
    cache.get(path, (8, 6), "image", lambda: read_image(path))
    picture(tmp_path / "a.png", 1)
    os.utime(path, ns=(1, 1))
    np.testing.assert_array_equal(cache.get(path, (8, 6), "image", lambda: read_image(path)), read_image(path))


def test_a_damaged_entry_is_made_again(tmp_path):
    path = picture(tmp_path / "a.png")
    cache = DecodeCache(tmp_path / "cache")
    cache.get(path, (8, 6), "image", lambda: read_image(path))
    (entry,) = (tmp_path / "cache").rglob("*.arrow")
    for damage in (b"", b"rubbish", entry.read_bytes()[:200]):
        entry.write_bytes(damage)
        np.testing.assert_array_equal(cache.get(path, (8, 6), "image", lambda: read_image(path)), read_image(path))


def test_a_cache_that_cannot_be_written_costs_speed_only(tmp_path):
    path = picture(tmp_path / "a.png")
    (tmp_path / "cache").write_text("a file where the folder should be")
    decode, calls = counting(path)
    cache = DecodeCache(tmp_path / "cache")
    for _ in range(2):
        np.testing.assert_array_equal(cache.get(path, (8, 6), "image", decode), read_image(path))
    assert len(calls) == 2


def test_a_full_disk_still_serves_what_was_cached_before(tmp_path, monkeypatch):
    first, second = picture(tmp_path / "a.png", 0), picture(tmp_path / "b.png", 1)
    cache = DecodeCache(tmp_path / "cache")
    decode, calls = counting(first)
    cache.get(first, (8, 6), "image", decode)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pa, "OSFile", full)
    cache.get(second, (8, 6), "image", lambda: read_image(second))
    cache.get(first, (8, 6), "image", decode)
    assert len(calls) == 1
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_errors_of_the_decoder_pass_through(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"rubbish")
    for cached in (str(path), str(tmp_path / "missing.png")):
        with pytest.raises(UnreadableImage):
            DecodeCache(tmp_path / "cache").get(cached, (8, 6), "image", lambda p=cached: read_image(p))


def test_entries_can_be_read_by_others(tmp_path):
    path = picture(tmp_path / "a.png")
    DecodeCache(tmp_path / "cache").get(path, (8, 6), "image", lambda: read_image(path))
    (entry,) = (tmp_path / "cache").rglob("*.arrow")
    assert entry.stat().st_mode & stat.S_IRUSR
