import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.networks.segmenter import upsample
from pipelines import views
from pipelines.autoaugment import autoaugment
from pipelines.views import CROP_DRAWS, MEAN_BGR, PIXELS, RandomCrop, Whole, class_mix, network_input, normalised, rgb

WIDTH, HEIGHT = 40, 24
POSITIONS = np.array([0, 7, 123_456])


def raw(n=3, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (n, HEIGHT, WIDTH, 3), dtype=np.uint8))


def painted(n=3, cell=8):
    """Images whose colour says which cell of the label they show: label = red / 10."""
    rng = np.random.default_rng(4)
    coarse = rng.integers(0, 20, (n, HEIGHT // cell, WIDTH // cell))
    label = coarse.repeat(cell, 1).repeat(cell, 2).astype(np.uint8)
    image = np.stack([10 * label] * 3, -1).astype(np.uint8)
    return torch.from_numpy(image), torch.from_numpy(label)


def colours(inputs):
    """Network input back to RGB."""
    return (inputs + torch.tensor(MEAN_BGR).view(1, 3, 1, 1)).flip(1)


def test_network_input_is_bgr_minus_the_mean():
    image = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 1, 1, 3)
    expected = [30 - 104.00698793, 20 - 116.66876762, 10 - 122.67891434]
    torch.testing.assert_close(network_input(image).flatten(), torch.tensor(expected))


def test_the_other_input_is_rgb_from_0_to_1():
    image = torch.tensor([10, 20, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    expected = torch.tensor([10 / 255, 20 / 255, 1.0])
    torch.testing.assert_close(network_input(image, "rgb_unit").flatten(), expected)


def test_published_vgg_reads_bgr_minus_its_own_mean():
    image = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 1, 1, 3)
    expected = [30 - 103.939, 20 - 116.779, 10 - 123.68]
    torch.testing.assert_close(network_input(image, "bgr_vgg").flatten(), torch.tensor(expected))


@pytest.mark.parametrize("pixels", PIXELS)
def test_inputs_of_every_kind_can_be_turned_back(pixels):
    images = raw()
    planes = images.permute(0, 3, 1, 2).float()
    inputs = network_input(images, pixels)
    assert inputs.dtype == torch.float32
    assert inputs.is_contiguous()
    assert torch.equal(normalised(planes, pixels), inputs)
    torch.testing.assert_close(rgb(inputs, pixels), planes, atol=1e-4, rtol=0)
    torch.testing.assert_close(normalised(rgb(inputs, pixels), pixels), inputs, atol=1e-4, rtol=0)


def test_views_make_the_input_that_their_network_reads():
    images, label = raw(), torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    for view in (Whole, lambda pixels: RandomCrop(3, (16, 12), colour=0.3, pixels=pixels)):
        (bgr, (one,)), (unit, (other,)) = (view(kind)(images, (label,), POSITIONS) for kind in ("bgr_mean", "rgb_unit"))
        torch.testing.assert_close(unit, colours(bgr) / 255, atol=1e-6, rtol=1e-5)
        assert torch.equal(one, other)


def test_the_whole_view_changes_nothing_and_brings_labels_to_the_images_size():
    images, labels = raw(), torch.arange(3 * 12 * 20).view(3, 12, 20).to(torch.uint8)
    inputs, (same, resized) = Whole()(images, (labels.repeat(1, 2, 2), labels), POSITIONS)
    torch.testing.assert_close(inputs, network_input(images))
    assert torch.equal(same, labels.repeat(1, 2, 2))
    assert torch.equal(resized, labels.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_the_same_position_gets_the_same_crop_wherever_it_stands_in_a_batch():
    view = RandomCrop(3, (16, 12), colour=0.3, hue=0.2)
    images = raw()
    together, _ = view(images, (), POSITIONS)
    for row in range(3):
        alone, _ = view(images[row : row + 1], (), POSITIONS[row : row + 1])
        torch.testing.assert_close(alone[0], together[row])
    again, _ = view(images.flip(0), (), POSITIONS[::-1].copy())
    torch.testing.assert_close(again.flip(0), together)


def test_other_positions_and_seeds_get_other_crops():
    images = raw(1).expand(20, -1, -1, -1)
    first, _ = RandomCrop(3, (16, 12))(images, (), np.arange(20))
    second, _ = RandomCrop(4, (16, 12))(images, (), np.arange(20))
    assert len({tuple(x.flatten()[:50].tolist()) for x in first}) == 20
    assert not torch.allclose(first, second)


def test_without_jitter_and_flip_a_crop_is_a_window_of_the_image():
    view = RandomCrop(0, (16, 12), jitter=(1.0, 1.0), flip=0.0)
    images = raw(1).expand(30, -1, -1, -1)
    label = torch.arange(HEIGHT * WIDTH).view(1, HEIGHT, WIDTH).expand(30, -1, -1)
    inputs, (cropped,) = view(images, (label,), np.arange(30))
    whole, corners = network_input(raw(1))[0], set()
    for crop, shown in zip(inputs, cropped, strict=True):
        top, left = divmod(int(shown[0, 0]), WIDTH)
        corners.add((top, left))
        assert torch.equal(shown, label[0, top : top + 12, left : left + 16])
        torch.testing.assert_close(crop, whole[:, top : top + 12, left : left + 16], atol=1e-2, rtol=0)
    tops, lefts = zip(*corners, strict=True)
    assert min(tops) >= 0
    assert max(tops) <= HEIGHT - 12
    assert min(lefts) >= 0
    assert max(lefts) <= WIDTH - 16
    assert len(corners) > 20


def test_flipping_always_mirrors_the_window():
    images = raw(1).expand(10, -1, -1, -1)
    plain, _ = RandomCrop(0, (16, 12), jitter=(1.0, 1.0), flip=0.0)(images, (), np.arange(10))
    flipped, _ = RandomCrop(0, (16, 12), jitter=(1.0, 1.0), flip=1.0)(images, (), np.arange(10))
    torch.testing.assert_close(flipped, plain.flip(3), atol=1e-2, rtol=0)


def test_about_half_of_the_samples_are_mirrored():
    images = torch.arange(WIDTH).view(1, 1, WIDTH, 1).expand(400, HEIGHT, WIDTH, 3).to(torch.uint8)
    inputs, _ = RandomCrop(0, (16, 12))(images, (), np.arange(400))
    mirrored = (inputs[:, 0, 0, 0] > inputs[:, 0, 0, -1]).float().mean()
    assert 0.4 < mirrored < 0.6


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(48, 36), (96, 64), (60, 50)]))
def test_image_and_label_stay_aligned(position, crop):
    coarse = np.random.default_rng(4).integers(0, 20, (3, 4, 6))
    label = coarse.repeat(16, 1).repeat(16, 2).astype(np.uint8)
    images, labels = torch.from_numpy(np.stack([10 * label] * 3, -1).astype(np.uint8)), torch.from_numpy(label)
    inputs, (shown,) = RandomCrop(1, crop)(images, (labels,), np.arange(position, position + 3))
    colour, values = colours(inputs)[:, 0], shown[:, None].float()
    # Within three pixels of a border between cells, or of the crop, the bicubic filter mixes colours.
    pool = torch.nn.functional.max_pool2d
    inside = (pool(values, 7, 1) + pool(-values, 7, 1))[:, 0] == 0
    off = (colour - 10 * shown.float()).abs()[:, 3:-3, 3:-3]
    assert inside.float().mean() > 0.2
    assert off[inside].max() < 1.0


def test_a_label_of_another_size_covers_the_same_field_of_view():
    images, labels = painted()
    view = RandomCrop(1, (16, 12))
    _, (full, half) = view(images, (labels, labels[:, ::2, ::2]), POSITIONS)
    assert torch.equal(full, half)


def test_the_jitter_stays_within_its_bounds():
    ramp = torch.arange(WIDTH).view(1, 1, WIDTH, 1) * 6
    images = ramp.expand(200, HEIGHT, WIDTH, 3).to(torch.uint8)
    inputs, _ = RandomCrop(0, (16, 12), jitter=(0.8, 1.25), flip=0.0)(images, (), np.arange(200))
    row = colours(inputs)[:, 0, 6, 4:12]
    scale = 6 / (row[:, 1:] - row[:, :-1]).mean(1)
    assert scale.min() >= 0.79
    assert scale.max() <= 1.27
    assert scale.max() - scale.min() > 0.35


def test_a_small_image_is_never_shrunk_below_the_crop():
    ramp = torch.arange(WIDTH).view(1, 1, WIDTH, 1) * 6
    images = ramp.expand(50, HEIGHT, WIDTH, 3).to(torch.uint8)
    inputs, _ = RandomCrop(0, (36, 12), jitter=(0.5, 0.6), flip=0.0)(images, (), np.arange(50))
    row = colours(inputs)[:, 0, 6, 8:28]
    torch.testing.assert_close((row[:, 1:] - row[:, :-1]).mean(1), torch.full((50,), 6 / 0.9), atol=0.1, rtol=0)


@pytest.mark.parametrize("crop", [(WIDTH + 1, 4), (4, HEIGHT + 1)])
def test_a_crop_larger_than_the_image_is_refused(crop):
    with pytest.raises(ValueError, match=r"does not fit into images of \(40, 24\)"):
        RandomCrop(0, crop)(raw(), (), POSITIONS)


def test_colour_stays_in_range_and_changes_no_geometry():
    images, labels = painted()
    view = RandomCrop(1, (16, 12), colour=0.5)
    inputs, (shown,) = view(images, (labels,), POSITIONS)
    _, (plain,) = RandomCrop(1, (16, 12))(images, (labels,), POSITIONS)
    assert torch.equal(shown, plain)
    assert colours(inputs).min() >= -1e-3
    assert colours(inputs).max() <= 255 + 1e-3


def turned_by_hand(image, turn):
    """RGB 0–255, 3×H×W float64, hue after hue."""
    found = np.empty(image.shape)
    for i, j in np.ndindex(image.shape[1:]):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[:, i, j] / 255)
        found[:, i, j] = 255 * np.array(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value))
    return found


@pytest.mark.parametrize("colour", [0.0, 0.5])
def test_hues_turn_by_a_share_of_the_colour_circle_that_the_position_decides(colour):
    images = raw()
    images[:, :6] = images[:, :6, :, :1]  # gray
    images[:, 6:9, :, 1:] = 0
    images[:, 9:12] = images[:, 9:12].amax(-1, keepdim=True)
    images[:, 9:12, :, 2] = 7  # two channels share the highest value
    view = RandomCrop(3, (30, 20), colour=colour, hue=0.2)
    plain = colours(RandomCrop(3, (30, 20), colour=colour)(images, (), POSITIONS)[0]).double().numpy()
    found = colours(view(images, (), POSITIONS)[0]).numpy()
    turns = [np.random.default_rng([3, 10, position]).uniform(-0.2, 0.2) for position in POSITIONS]
    expected = np.stack([turned_by_hand(image, turn) for image, turn in zip(plain, turns, strict=True)])
    np.testing.assert_allclose(found, expected, atol=255 * 1e-5)
    assert np.abs(found - plain).max() > 20


@pytest.mark.parametrize("turn", [0.0, 1 / 3, -1 / 3, 0.5])
def test_a_third_of_the_circle_hands_the_colours_on(turn):
    image = raw(1).permute(0, 3, 1, 2).float()
    expected = {0.0: image, 1 / 3: image.roll(1, 1), -1 / 3: image.roll(-1, 1)}.get(turn)
    if expected is None:
        expected = image.amax(1, keepdim=True) + image.amin(1, keepdim=True) - image
    found = views._hue_turned(image, np.array([turn], np.float32))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_hues_turn_within_their_bound_and_both_ways():
    turns = RandomCrop(0, (16, 12), hue=0.2)._turns(np.arange(500))
    assert -0.2 <= turns.min() < -0.19
    assert 0.19 < turns.max() <= 0.2
    assert abs(turns.mean()) < 0.02


def test_turning_hues_changes_nothing_else_that_is_drawn():
    images, labels = painted()
    _, (before,) = RandomCrop(1, (16, 12), colour=0.5)(images, (labels,), POSITIONS)
    inputs, (after,) = RandomCrop(1, (16, 12), colour=0.5, hue=0.2)(images, (labels,), POSITIONS)
    assert torch.equal(before, after)
    gray, _ = RandomCrop(1, (16, 12), colour=0.5)(images, (labels,), POSITIONS)
    torch.testing.assert_close(inputs, gray, atol=1e-2, rtol=0)  # painted images are gray


def slow_hard_crop(view, label, position, more_than):
    """Draw after draw, pixel after pixel."""
    u = np.random.default_rng([view.seed, 7, position]).random(2 + 2 * CROP_DRAWS + 3, np.float32)
    low = max(view.jitter[0], view.crop[0] / WIDTH, view.crop[1] / HEIGHT)
    scale = low + (max(low, view.jitter[1]) - low) * u[0]
    for draw in range(CROP_DRAWS):
        left = np.floor(u[2 + 2 * draw] * (WIDTH * scale - view.crop[0] + 1)) / scale
        top = np.floor(u[3 + 2 * draw] * (HEIGHT * scale - view.crop[1] + 1)) / scale
        shown = np.empty((view.crop[1], view.crop[0]), np.uint8)
        for i in range(view.crop[1]):
            for j in range(view.crop[0]):
                column = view.crop[0] - 1 - j if u[1] < view.flip else j
                x, y = left + (column + 0.5) / scale, top + (i + 0.5) / scale
                shown[i, j] = label[min(int(y), HEIGHT - 1), min(int(x), WIDTH - 1)]
        if len(np.unique(shown)) > more_than:
            break
    return shown, draw


@pytest.mark.parametrize("more_than", [2, 4, 6, 30])
def test_the_first_crop_with_enough_values_is_taken_or_else_the_last(more_than):
    rng = np.random.default_rng(2)
    label = np.zeros((HEIGHT, WIDTH), np.uint8)
    label[:, 25:] = rng.integers(1, 8, (HEIGHT, 15))
    label[0, 0] = 255
    view = RandomCrop(5, (12, 8), more_than_values=more_than)
    positions = np.arange(12)
    images = torch.zeros(12, HEIGHT, WIDTH, 3, dtype=torch.uint8)
    _, (found,) = view(images, (torch.from_numpy(label).expand(12, -1, -1),), positions)
    draws = set()
    for position, shown in zip(positions, found.numpy(), strict=True):
        expected, draw = slow_hard_crop(view, label, int(position), more_than)
        draws.add(draw)
        assert (shown == expected).mean() > 0.97, "a pixel centre may fall on a border"
    assert len(draws) > 1 or more_than == 30


def mixed_case(seed, n=2, classes=5):
    rng = np.random.default_rng(seed)
    source_label = torch.from_numpy(rng.choice([0, 1, 2, 4, 255], (n, 6, 7)))
    target_label = torch.from_numpy(rng.choice([0, 3, 255], (n, 6, 7)))
    return torch.ones(n, 3, 6, 7), source_label, -torch.ones(n, 3, 6, 7), target_label, classes


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 100))
def test_half_of_the_classes_of_a_source_image_are_pasted(seed, case):
    source, source_label, target, target_label, classes = mixed_case(case)
    images, labels, mask = class_mix(source, source_label, target, target_label, classes, seed)
    for n in range(len(source)):
        present = set(source_label[n].unique().tolist()) - {255}
        pasted = set(source_label[n][mask[n]].unique().tolist())
        assert pasted <= present
        assert len(pasted) == (len(present) + 1) // 2
        for c in pasted:
            assert mask[n][source_label[n] == c].all()
    assert torch.equal(labels, torch.where(mask, source_label, target_label))
    assert torch.equal(images, torch.where(mask[:, None], source, target))
    assert not mask[source_label == 255].any()


def test_which_classes_are_pasted_is_decided_by_the_seed():
    case = mixed_case(1)
    again = [class_mix(*case, seed=9)[2] for _ in range(2)]
    assert torch.equal(*again)
    assert len({tuple(class_mix(*case, seed=s)[2].flatten().tolist()) for s in range(20)}) > 3


def test_a_source_image_without_labels_pastes_nothing():
    source, source_label, target, target_label, classes = mixed_case(1)
    images, labels, mask = class_mix(source, torch.full_like(source_label, 255), target, target_label, classes, 0)
    assert not mask.any()
    assert torch.equal(images, target)
    assert torch.equal(labels, target_label)


def test_autoaugment_changes_colours_alone_and_nothing_that_was_drawn_before():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (6, 40, 60, 3), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, 5, (6, 40, 60), dtype=np.uint8))
    positions = np.arange(6)
    plain, (before,) = RandomCrop(3, (30, 20))(images, (labels,), positions)
    view = RandomCrop(3, (30, 20), autoaugment=True)
    found, (after,) = view(images, (labels,), positions)
    assert torch.equal(before, after)
    assert 0 < sum(not torch.equal(one, other) for one, other in zip(plain, found, strict=True)) < 6
    again, _ = RandomCrop(3, (30, 20))(autoaugment(images, view._policies(positions)), (labels,), positions)
    torch.testing.assert_close(found, again)


# What maps of the whole image show inside a crop.


def slow_sample(view, maps, positions, base, grid):
    """Point after point, in float64: corners of map, image, crop and grid aligned."""
    maps, (width, height) = maps.double().numpy(), base
    found = np.empty((len(maps), maps.shape[1], grid[1], grid[0]))
    for n, position in enumerate(positions):
        u = np.random.default_rng([view.seed, 7, int(position)]).random(2 + 2 * CROP_DRAWS + 3, np.float32)
        low = max(view.jitter[0], view.crop[0] / width, view.crop[1] / height)
        scale = low + (max(low, view.jitter[1]) - low) * float(u[0])
        left = np.floor(u[2] * (width * scale - view.crop[0] + 1)) / scale
        top = np.floor(u[3] * (height * scale - view.crop[1] + 1)) / scale
        for i in range(grid[1]):
            for j in range(grid[0]):
                column = j * (view.crop[0] - 1) / (grid[0] - 1)
                column = view.crop[0] - 1 - column if u[1] < view.flip else column
                row = i * (view.crop[1] - 1) / (grid[1] - 1)
                # The middle of the image's first pixel is the map's first cell, that of its last one the last.
                x = (left + (column + 0.5) / scale - 0.5) * (maps.shape[3] - 1) / (width - 1)
                y = (top + (row + 0.5) / scale - 0.5) * (maps.shape[2] - 1) / (height - 1)
                x, y = np.clip(x, 0, maps.shape[3] - 1), np.clip(y, 0, maps.shape[2] - 1)
                x0, y0 = min(int(x), maps.shape[3] - 2), min(int(y), maps.shape[2] - 2)
                dx, dy = x - x0, y - y0
                upper = (1 - dx) * maps[n, :, y0, x0] + dx * maps[n, :, y0, x0 + 1]
                lower = (1 - dx) * maps[n, :, y0 + 1, x0] + dx * maps[n, :, y0 + 1, x0 + 1]
                found[n, :, i, j] = (1 - dy) * upper + dy * lower
    return found


@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("crop", "jitter"), [((21, 13), (1.0, 1.0)), ((21, 13), (0.5, 1.6)), ((64, 38), (1.6, 1.6))])
def test_a_crop_samples_maps_of_the_whole_image_at_its_points(crop, jitter, flip):
    """A crop of an enlarged image reaches half of a pixel over its first and its last."""
    view = RandomCrop(5, crop, jitter=jitter, flip=flip)
    positions = np.array([0, 3, 8, 123_456])
    maps = torch.from_numpy(np.random.default_rng(0).random((4, 2, 7, 9), np.float32))
    found = view.sample(maps, positions, (WIDTH, HEIGHT), (6, 4))
    assert found.shape == (4, 2, 4, 6)
    expected = slow_sample(view, maps, positions, (WIDTH, HEIGHT), (6, 4))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("cells", [(WIDTH, HEIGHT), (14, 24)])
def test_what_is_sampled_is_what_the_crop_shows(cells, flip):
    """Of a ramp, which interpolation leaves a ramp; the outermost points may lie where the crop sees its border."""
    x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    image = torch.from_numpy(np.stack([4 * x, 5 * y, 2 * x + 3 * y], -1).astype(np.uint8)).expand(30, -1, -1, -1)
    columns, rows = (np.linspace(0, size - 1, count) for size, count in zip((WIDTH, HEIGHT), cells, strict=True))
    x, y = np.meshgrid(columns, rows)
    maps = torch.from_numpy(np.stack([4 * x, 5 * y, 2 * x + 3 * y]).astype(np.float32)).expand(30, -1, -1, -1)
    view, positions = RandomCrop(2, (25, 16), flip=flip), np.arange(30)
    crops, _ = view(image, (), positions)
    found = view.sample(maps, positions, (WIDTH, HEIGHT), (9, 6))
    shown = colours(crops)[:, :, ::3, ::3]
    torch.testing.assert_close(found[:, :, 1:-1, 1:-1], shown[:, :, 1:-1, 1:-1], atol=0.5, rtol=0)
    assert (found[:, 0, 0, 0] != found[0, 0, 0, 0]).any(), "30 crops of different places"


def test_the_sample_of_a_whole_image_is_its_map_enlarged():
    view = RandomCrop(0, (WIDTH, HEIGHT), jitter=(1.0, 1.0), flip=0.0)
    maps = torch.randn(3, 2, 4, 6)
    found = view.sample(maps, POSITIONS, (WIDTH, HEIGHT), (20, 12))
    torch.testing.assert_close(found, upsample(maps, (12, 20)), atol=1e-4, rtol=0)
    torch.testing.assert_close(view.sample(maps, POSITIONS, (WIDTH, HEIGHT), (6, 4)), maps, atol=1e-4, rtol=0)
    mirrored = RandomCrop(0, (WIDTH, HEIGHT), jitter=(1.0, 1.0), flip=1.0)
    found = mirrored.sample(maps, POSITIONS, (WIDTH, HEIGHT), (6, 4))
    torch.testing.assert_close(found, maps.flip(-1), atol=1e-4, rtol=0)


def test_boxes_that_depend_on_a_label_cannot_be_had_again():
    with pytest.raises(AssertionError):
        RandomCrop(0, (16, 12), more_than_values=2).sample(torch.zeros(3, 1, 4, 4), POSITIONS, (WIDTH, HEIGHT), (4, 4))


@pytest.mark.parametrize(
    "view", [Whole(), RandomCrop(5, (24, 16)), RandomCrop(5, (24, 16), jitter=(1.0, 1.0), flip=0.0)]
)
def test_maps_alone_go_where_they_go_with_their_images(view):
    torch.manual_seed(0)
    images, positions = torch.randint(0, 256, (3, 32, 48, 3), dtype=torch.uint8), np.array([4, 7, 11])
    maps = torch.randint(0, 19, (3, 32, 48)), torch.randint(0, 19, (3, 16, 24))
    for alone, expected in zip(view.maps(maps, positions, (48, 32)), view(images, maps, positions)[1], strict=True):
        assert torch.equal(alone, expected)
