"""Procedural shapes, their detail masks, and the score of kept tokens."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tokdyn.data import DataConfig, ShapesDataset, detail_area, detail_score, detail_shares, open_data
from tokdyn.errors import DataError


@settings(max_examples=20)
@given(
    index=st.integers(0, 2**62),
    seed=st.integers(-5, 2**40),
    rows=st.integers(16, 40),
    columns=st.integers(16, 40),
    channels=st.sampled_from([1, 3, 4]),
)
def test_an_image_depends_on_seed_and_index_only(index, seed, rows, columns, channels):
    data = ShapesDataset((rows, columns), channels, seed=seed)
    sample, label = data[index]
    again, labels = ShapesDataset((rows, columns), channels, seed=seed).batch([3, index, 8])
    assert torch.equal(again[1], sample)
    assert labels.tolist() == [3, label, 8]
    assert sample.shape == data.shape == (channels, rows, columns)
    assert sample.dtype == torch.float32
    assert sample.min() >= -1
    assert sample.max() <= 1
    assert label == index % 10


def test_images_and_seeds_differ():
    data = ShapesDataset((32, 32))
    assert len({data[index][0].numpy().tobytes() for index in range(100)}) == 100
    assert not torch.equal(data[0][0], ShapesDataset((32, 32), seed=1)[0][0])


def test_a_large_batch_equals_single_images():
    data = ShapesDataset((48, 20))
    samples, _ = data.batch(range(300))
    for index in (0, 137, 299):
        assert torch.equal(samples[index], data[index][0])


def test_flips_mirror_the_image():
    data = ShapesDataset((16, 24))
    samples, _ = data.batch([4, 5], [True, False])
    assert torch.equal(samples[0], data[4][0].flip(-1))
    assert torch.equal(samples[1], data[5][0])


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (96, 64)])
def test_every_channel_separates_object_and_background(size):
    data = ShapesDataset(size, 4)
    indices = range(100)
    masks = data.detail_masks(indices).float()[:, None]
    inside = 1 - F.max_pool2d(1 - F.pad(masks, (1, 1, 1, 1)), 3, 1)  # without the edge, where colours are mixed
    outside = 1 - masks
    for image, on, off in zip(torch.from_numpy(data.pixels(indices)), inside, outside, strict=True):
        for channel in image:
            on_values, off_values = channel[on[0] > 0], channel[off[0] > 0]
            assert on_values.min() > off_values.max() or on_values.max() < off_values.min()


def test_detail_is_on_the_object_and_the_background_is_smooth():
    data = ShapesDataset((32, 32), 1)
    indices = range(200)
    images = torch.from_numpy(data.pixels(indices)).float()[:, 0]
    masks = data.detail_masks(indices)
    step = (images[:, :, 1:] - images[:, :, :-1]).abs()
    on, off = masks[:, :, 1:] & masks[:, :, :-1], ~(masks[:, :, 1:] | masks[:, :, :-1])
    # 0.9 periods of two waves of amplitude 0.07 on 32 pixels: 2 * 0.07 * 2 pi * 0.9 / 32 * 255 = 6.3 levels.
    assert step[off].max() <= 7
    assert step[on].mean() > 10 * step[off].mean()
    share = masks.float().mean((1, 2))
    assert share.min() > 0.03
    assert share.max() < 0.6


def normalised(masks: torch.Tensor) -> torch.Tensor:
    """Crop objects to their masks and resize them to 16x16."""
    cut = []
    for mask in masks:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        box = mask[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
        cut.append(F.interpolate(box[None, None].float(), (16, 16), mode="bilinear", antialias=True).flatten())
    return torch.stack(cut)


def test_the_shape_of_the_object_is_its_class():
    data = ShapesDataset((32, 32))
    known, unknown = normalised(data.detail_masks(range(1000))), normalised(data.detail_masks(range(5000, 5500)))
    nearest = torch.cdist(unknown, known).argmin(1)
    assert torch.equal(nearest % 10, torch.arange(5000, 5500) % 10)


def test_one_mask_is_a_row_of_many():
    data = ShapesDataset((32, 24))
    mask = data.detail_mask(7)
    assert mask.shape == (32, 24)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, data.detail_masks([5, 7])[1])


def test_names_and_length():
    data = open_data(DataConfig(num_classes=4, length=12))
    assert data.class_names == ("circle", "square", "triangle", "star")
    assert data.num_classes == 4
    assert [label for _, label in data] == [0, 1, 2, 3] * 3
    assert len(open_data(DataConfig())) == 50_000
    assert open_data(DataConfig(size="20x40")).shape == (3, 20, 40)


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ({"num_classes": 11}, "num_classes=11.* 10 "),
        ({"size": 8}, "size=8x8.* 16 "),
        ({"size": (64, 15)}, "size=64x15.* 16 "),
    ],
)
def test_impossible_settings_are_refused(settings, values):
    with pytest.raises(DataError, match=values):
        open_data(DataConfig(**settings))


def test_negative_indices_are_refused():
    with pytest.raises(IndexError, match="-1"):
        ShapesDataset((16, 16))[-1]


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), rows=st.sampled_from([1, 2, 4]), columns=st.sampled_from([1, 3, 6]))
def test_the_score_equals_counting_by_hand(seed, rows, columns):
    random = np.random.default_rng(seed)
    masks = random.random((5, 8, 12)) < 0.3
    keep = random.random((5, rows * columns)) < 0.5
    tall, wide = 8 // rows, 12 // columns
    recalls, bests, shares = [], [], []
    for mask, kept in zip(masks, keep, strict=True):
        cells = [(r * tall, c * wide) for r in range(rows) for c in range(columns)]
        counts = [mask[top : top + tall, left : left + wide].sum() for top, left in cells]
        recalls.append(sum(count for count, own in zip(counts, kept, strict=True) if own) / mask.sum())
        bests.append(sum(sorted(counts)[::-1][: kept.sum()]) / mask.sum())
        shares.append(kept.mean())
    score = detail_score(torch.from_numpy(keep), (rows, columns), torch.from_numpy(masks))
    assert score.recall == pytest.approx(np.mean(recalls))
    assert score.best == pytest.approx(np.mean(bests))
    assert score.kept == pytest.approx(np.mean(shares))
    assert score.recall <= score.best + 1e-12


def test_true_detail_scores_above_chance_and_random_tokens_do_not():
    masks = ShapesDataset((32, 32)).detail_masks(range(400))
    truth = F.max_pool2d(masks[:, None].float(), 4).flatten(1) > 0
    score = detail_score(truth, (8, 8), masks)
    assert score.recall == score.best == 1.0
    assert score.lift > 1.5
    guess = torch.rand(400, 64, generator=torch.Generator().manual_seed(0)) < 0.25
    assert detail_score(guess, (8, 8), masks).lift == pytest.approx(1.0, abs=0.05)
    assert detail_score(torch.zeros(400, 64, dtype=torch.bool), (8, 8), masks).lift == 0.0


@pytest.mark.parametrize(
    ("keep", "grid", "masks", "values"),
    [
        (torch.ones(2, 5, dtype=torch.bool), (2, 2), torch.ones(2, 4, 4, dtype=torch.bool), r"\(2, 5\).*\(2, 4\)"),
        (torch.ones(1, 9, dtype=torch.bool), (3, 3), torch.ones(1, 4, 4, dtype=torch.bool), "4x4 .*3x3"),
        (torch.ones(1, 4, dtype=torch.bool), (2, 2), torch.zeros(1, 4, 4, dtype=torch.bool), "masks"),
    ],
)
def test_tokens_and_masks_that_do_not_fit_are_refused(keep, grid, masks, values):
    with pytest.raises(DataError, match=values):
        detail_score(keep, grid, masks)


@pytest.mark.parametrize("grid", [(2, 3), (8, 12)])
def test_area_is_the_share_of_pairs_of_pixels_in_the_right_order(grid):
    random = np.random.default_rng(1)
    masks = random.random((4, 8, 12)) < 0.3
    masks[2] = True  # has no pixels without detail, so it does not count
    scores = random.integers(0, 5, (4, grid[0] * grid[1]))  # with ties
    areas = []
    for mask, score in zip(masks, scores, strict=True):
        pixels = score.reshape(grid).repeat(8 // grid[0], 0).repeat(12 // grid[1], 1)
        above = np.subtract.outer(pixels[mask], pixels[~mask])
        if above.size:
            areas.append(np.mean((above > 0) + 0.5 * (above == 0)))
    assert len(areas) == 3
    found = detail_area(torch.from_numpy(scores), grid, torch.from_numpy(masks))
    assert found == pytest.approx(np.mean(areas))
    best = detail_area(detail_shares(grid, torch.from_numpy(masks)), grid, torch.from_numpy(masks))
    assert found < best <= 1.0
    assert (best == 1.0) == (grid == (8, 12))  # tokens of one pixel each


def test_area_of_scores_that_know_nothing():
    masks = ShapesDataset((32, 32)).detail_masks(range(200))
    assert detail_area(torch.zeros(200, 64), (8, 8), masks) == 0.5
    guess = torch.rand(200, 64, generator=torch.Generator().manual_seed(0))
    assert detail_area(guess, (8, 8), masks) == pytest.approx(0.5, abs=0.02)
    with pytest.raises(DataError, match="masks"):
        detail_area(torch.zeros(1, 64), (8, 8), torch.ones(1, 32, 32, dtype=torch.bool))
    with pytest.raises(DataError, match=r"\(3, 64\).*\(200, 64\)"):
        detail_area(torch.zeros(3, 64), (8, 8), masks)
