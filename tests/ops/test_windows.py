"""Matching within windows: their shape, decisions equal to a loop over tokens, and cost in proportion to the tokens."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.test_merging import Largest, case, grids, loop, plan_of, ratios, seeds, shares
from tokdyn import ops
from tokdyn.errors import InputError
from tokdyn.ops.destinations import destinations, grid_destinations, staying, widths
from tokdyn.ops.matching import some_channels
from tokdyn.ops.merging import match, merge, merged_away, unmerge
from tokdyn.ops.windows import AIMED, WHOLE, tiling

windows = st.sampled_from([1, 2, 3, 4, 6])


def window_of(cell, grid, window, bucket=2):
    """The window of a cell: along each axis, as few as hold `window` cells in whole buckets, of nearly equal length."""
    place = []
    for size in reversed(grid):
        buckets = -(-size // bucket)
        parts = -(-buckets // max(1, window // bucket))
        place.append(cell % size // bucket * parts // buckets)
        cell //= size
    return tuple(place)


@given(grids, windows)
def test_windows_are_of_whole_buckets_and_nearly_equal_and_hold_what_was_asked_for(grid, window):
    tiles = tiling(grid, widths(grid, 2), window)
    per_axis = [{} for _ in grid]
    for axis, size in enumerate(grid):
        for cell in range(size):
            per_axis[axis].setdefault(window_of(cell, (size,), window), []).append(cell)
    spans = [[len(cells) for cells in axis.values()] for axis in per_axis]
    assert all(max(lengths) <= max(2, window) for lengths in spans)
    buckets = [[-(-length // 2) for length in lengths] for lengths in spans]
    assert all(max(counts) - min(counts) <= 1 for counts in buckets)
    assert (tiles is None) == (math.prod(map(len, spans)) == 1)
    if tiles is not None:
        assert tiles.parts == tuple(map(len, spans))


@pytest.mark.parametrize("grid", [(32, 64), (64, 64), (21, 45, 80), (128, 128), (8192,), (3, 400, 400), (1, 90, 160)])
def test_only_grids_above_a_limit_are_divided_by_default(grid):
    tiles = tiling(grid, widths(grid, 2), None)
    assert (tiles is None) == (math.prod(grid) <= WHOLE)
    if tiles is not None:
        rows, places = tiles.room()
        assert AIMED / 4 < rows + places <= AIMED


@given(grids, shares, ratios, seeds, windows)
def test_equals_the_loop_within_each_window(grid, share, ratio, seed, window):
    packing, x = case(grid, share, seed)
    _, plan = plan_of(packing, x, ratio, tiling=tiling(grid, widths(grid, 2), window))
    expected = loop(packing, x, ratio, inside=lambda cell: window_of(cell, grid, window))
    torch.testing.assert_close(unmerge(merge(x, plan), plan), expected, rtol=0, atol=1e-12)


@given(grids, ratios, seeds, st.integers(30, 99))
def test_a_window_that_covers_the_grid_decides_as_no_window_does(grid, ratio, seed, window):
    packing, x = case(grid, 1.0, seed)
    plans = [
        plan_of(packing, x, ratio, tiling=tiling(grid, widths(grid, 2), size))[1]
        for size in (window, (window,) * len(grid))
    ]
    assert all(torch.equal(plan.slot, plan_of(packing, x, ratio)[1].slot) for plan in plans)


@given(grids, seeds, windows, st.sampled_from([None, 5]))
def test_windows_of_full_grids_are_those_of_their_rows(grid, seed, window, choice):
    _packing, _ = case(grid, 1.0, seed)
    tiles = tiling(grid, widths(grid, 2), window)
    found = grid_destinations(3, grid, torch.device("cpu"), seed=choice, step=2, tiling=tiles)
    keep = ops.pack(torch.ones(3, math.prod(grid), dtype=torch.bool), grid)
    expected = destinations(keep.cell, keep.sample, 3, grid, seed=choice, step=2, tiling=tiles)
    assert (found.windows is None) == (tiles is None)
    if tiles is not None:
        assert torch.equal(found.windows.rows, expected.windows.rows)
        assert torch.equal(found.windows.table, expected.windows.table)


@given(grids, shares, seeds, windows)
def test_a_sample_does_not_depend_on_the_rest_of_its_batch_within_windows(grid, share, seed, window):
    packing, x = case(grid, share, seed)
    tiles = tiling(grid, widths(grid, 2), window)
    _, plan = plan_of(packing, x, 0.5, tiling=tiles)
    for place, rows in enumerate(x.split(packing.lengths)):
        cell = packing.cell[packing.sample == place]
        into = destinations(cell, torch.zeros_like(cell), 1, grid, tiling=tiles)
        assert torch.equal(match(rows, [len(rows)], into, 0.5).slot, plan.sample(place).slot)


@pytest.mark.parametrize("full", [True, False])
def test_products_and_memory_grow_in_proportion_to_the_tokens(full):
    """Of the default windows; counted, so that no clock decides."""
    found = []
    for frames in (8, 16, 32):
        grid = (frames, 32, 32)
        tiles, count = tiling(grid, widths(grid, 2), None), math.prod(grid)
        rows = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
        if full:
            into = grid_destinations(1, grid, rows.device, tiling=tiles)
        else:
            cell = torch.arange(0, count, 2)
            into, rows = destinations(cell, torch.zeros_like(cell), 1, grid, tiling=tiles), rows[::2]
        with Largest() as made, FlopCounterMode(display=False) as counter:
            plan = match(rows, [len(rows)], into, 0.5)
        assert len(plan.source) == len(rows) // 2
        assert counter.get_total_flops() == 2 * 4 * into.pairs(len(rows), alike=True)
        found.append((count, counter.get_total_flops(), made.elements))
    (first, flops, elements), *later = found
    for count, more, largest in later:
        assert more / flops <= 1.05 * count / first
        assert largest / elements <= 1.05 * count / first


@given(grids, shares, ratios, seeds, windows, st.sampled_from(["raster", "seed", "importance"]))
def test_kept_rows_stand_for_themselves_alone(grid, share, ratio, seed, window, how):
    packing, x = case(grid, share, seed)
    keep = torch.rand(packing.total, generator=torch.Generator().manual_seed(seed + 1)) < 0.4
    choices = {"raster": {}, "seed": {"seed": seed, "step": 3}, "importance": {"importance": x[:, 0]}}[how]
    tiles = tiling(grid, widths(grid, 2), window)
    into, plan = plan_of(packing, x, ratio, keep=keep, tiling=tiles, **choices)
    assert (plan.size[plan.slot[keep]] == 1).all()
    assert torch.equal(merge(x, plan)[plan.slot[keep]], x[keep])
    away = [merged_away(*each, ratio) for each in zip(packing.lengths, into.stay, strict=True)]
    assert plan.lengths == tuple(n - count for n, count in zip(packing.lengths, away, strict=True))
    assert not set(into.table.flatten().tolist()) & set(keep.nonzero().flatten().tolist())
    if how == "raster":
        expected = loop(
            packing,
            x,
            away,
            inside=lambda cell: window_of(cell, grid, window),
            keep=set(keep.nonzero().flatten().tolist()),
        )
        torch.testing.assert_close(unmerge(merge(x, plan), plan), expected, rtol=0, atol=1e-12)


@given(grids, seeds)
def test_rows_that_stay_are_counted_on_the_host(grid, seed):
    keep = torch.rand(3, math.prod(grid), generator=torch.Generator().manual_seed(seed)) < 0.5
    packing = ops.pack(torch.ones_like(keep), grid)
    into = destinations(packing.cell, packing.sample, 3, grid, keep=keep.flatten())
    assert tuple(staying(keep, grid)) == into.stay
    assert all(most >= least for most, least in zip(staying(keep, grid, full=False), into.stay, strict=True))


@pytest.mark.parametrize(("count", "width"), [(None, 100), (100, 100), (1000, 100), (64, 64), (40, 32), (7, 7), (1, 1)])
def test_some_channels_are_spread_over_all(count, width):
    x = torch.arange(300.0).view(3, 100)
    some = some_channels(x, count)
    assert some.shape == (3, width)
    assert torch.equal(some[1] - some[0], torch.full((width,), 100.0))
    assert len(set(some[0].tolist())) == width
    if 32 < width < 100:
        assert some[0, 0] == 0
        assert some[0, -1] >= 75


@pytest.mark.parametrize("window", [0, (4, 0), (4,), (2, 2, 2)])
def test_a_window_that_does_not_fit_the_grid_raises(window):
    with pytest.raises(InputError, match="window is"):
        tiling((8, 8), (2, 2), window)
