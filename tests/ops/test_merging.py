"""Token merging: equal to a loop over tokens, a projection, and independent of the rest of the batch."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tokdyn import ops
from tokdyn.errors import InputError
from tokdyn.ops.destinations import destinations, grid_destinations
from tokdyn.ops.dropping import mix
from tokdyn.ops.merging import joined, match, match_parts, merge, merged_away, unmerge

grids = st.one_of(
    st.tuples(st.integers(1, 30)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
)
shares = st.sampled_from([0.2, 0.6, 1.0])
ratios = st.sampled_from([0.0, 0.1, 0.5, 0.9])
seeds = st.integers(0, 1000)


def case(grid, share, seed, batch=3, width=6):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(batch, math.prod(grid), generator=generator) < share
    keep[:, 0] = True
    packing = ops.pack(keep, grid)
    return packing, torch.randn(packing.total, width, generator=generator, dtype=torch.float64)


def plan_of(packing, x, ratio, **choices):
    into = destinations(packing.cell, packing.sample, len(packing.lengths), packing.grid, **choices)
    return into, match(x, packing.lengths, into, ratio)


def loop(packing, x, ratio, bucket=2, inside=lambda cell: None, keep=frozenset()):
    """Merge token by token as ToMe for diffusion does; return what every row becomes.

    `ratio` is a share, or the number of tokens of each sample; `inside` says in which window a cell is.
    """
    out, first = x.clone(), 0
    for sample, length in enumerate(packing.lengths):
        rows, places = x[first : first + length], packing.cell[first : first + length]
        corners = {}
        for row, cell in enumerate(places.tolist()):
            rest, corner = cell, []
            for size in reversed(packing.grid):
                corner.append(rest % size // bucket)
                rest //= size
            if first + row not in keep:
                corners.setdefault(tuple(corner), row)
        every = sorted(corners.values())
        sources = [row for row in range(length) if row not in every and first + row not in keep]
        buckets = math.prod(-(-size // bucket) for size in packing.grid)
        unit = rows / rows.norm(dim=1, keepdim=True)
        best = []
        for source in sources:
            into = [row for row in every if inside(int(places[row])) == inside(int(places[source]))]
            alike = unit[into] @ unit[source]
            best.append((float(alike.max()), source, into[int(alike.argmax())]))
        groups = {row: [row] for row in every}
        count = min(int(length * ratio), max(0, length - buckets)) if isinstance(ratio, float) else ratio[sample]
        for _, source, target in sorted(best, reverse=True)[:count]:
            groups[target].append(source)
        for group in groups.values():
            out[[first + row for row in group]] = rows[group].mean(0)
        first += length
    return out


@given(grids, shares, ratios, seeds)
def test_equals_the_loop(grid, share, ratio, seed):
    packing, x = case(grid, share, seed)
    _, plan = plan_of(packing, x, ratio)
    torch.testing.assert_close(unmerge(merge(x, plan), plan), loop(packing, x, ratio), rtol=0, atol=1e-12)


@given(grids, shares, ratios, seeds, st.sampled_from(["raster", "seed", "importance"]))
def test_merging_is_a_projection_that_keeps_means_and_sizes(grid, share, ratio, seed, how):
    packing, x = case(grid, share, seed)
    choices = {"raster": {}, "seed": {"seed": seed, "step": 3}, "importance": {"importance": x[:, 0]}}[how]
    into, plan = plan_of(packing, x, ratio, **choices)
    once = unmerge(merge(x, plan), plan)
    torch.testing.assert_close(unmerge(merge(once, plan), plan), once, rtol=0, atol=1e-12)
    assert plan.lengths == tuple(n - merged_away(n, into.table.shape[1], ratio) for n in packing.lengths)
    sums = [part.sum().item() for part in plan.size.split(plan.lengths)]
    assert sums == list(packing.lengths)
    for before, after in zip(x.split(packing.lengths), once.split(packing.lengths), strict=True):
        torch.testing.assert_close(after.mean(0), before.mean(0), rtol=0, atol=1e-12)
    assert torch.equal(plan.slot[plan.keep], torch.arange(len(plan.keep)))  # kept rows are their own merged rows
    assert not into.mask[plan.source].any()
    assert (plan.slot[plan.source] == plan.slot[into.table[into.table >= 0]][:, None]).any(0).all()


@given(grids, shares, seeds)
def test_a_sample_does_not_depend_on_the_rest_of_its_batch(grid, share, seed):
    packing, x = case(grid, share, seed)
    _, plan = plan_of(packing, x, 0.5, seed=1)
    together = unmerge(merge(x, plan), plan)
    keep = torch.zeros(3, math.prod(grid), dtype=torch.bool)
    keep.view(-1)[packing.index] = True
    for b, rows in enumerate(x.split(packing.lengths)):
        _, alone = plan_of(ops.pack(keep[b : b + 1], grid), rows, 0.5, seed=1)
        torch.testing.assert_close(
            unmerge(merge(rows, alone), alone), together.split(packing.lengths)[b], rtol=0, atol=1e-12
        )


@given(grids, shares, seeds, st.sampled_from([1, 2, 3, "axes"]), st.sampled_from(["raster", "seed", "importance"]))
def test_every_bucket_has_the_destination_that_was_asked_for(grid, share, seed, bucket, how):
    packing, x = case(grid, share, seed)
    widths = [2, 1, 3][: len(grid)] if bucket == "axes" else [bucket] * len(grid)
    importance, step = (x[:, 0] * 2).round(), torch.tensor([3, 5, 8])
    choices = {"raster": {}, "seed": {"seed": seed, "step": step}, "importance": {"importance": importance}}[how]
    into = destinations(packing.cell, packing.sample, 3, grid, bucket=widths if bucket == "axes" else bucket, **choices)
    rows = {}
    for row, (cell, sample) in enumerate(zip(packing.cell.tolist(), packing.sample.tolist(), strict=True)):
        place, rest, count = 0, cell, 1
        for size, width in zip(reversed(grid), reversed(widths), strict=True):
            place += rest % size // width * count
            rest, count = rest // size, count * -(-size // width)
        rows.setdefault((sample, place), []).append(row)
    noise = mix(mix(mix(torch.tensor(seed)) + step[packing.sample]) + packing.cell)
    best = {
        "raster": lambda row: row,
        "seed": lambda row: (noise[row].item(), row),
        "importance": lambda row: (-importance[row].item(), row),
    }[how]
    assert into.table.shape == (3, count)
    for sample in range(3):
        for place in range(count):
            inside = rows.get((sample, place))
            assert into.table[sample, place] == (-1 if inside is None else min(inside, key=best))
    chosen = into.table[into.table >= 0]
    assert torch.equal(into.mask.nonzero().flatten(), chosen.sort().values)
    assert into.full == (packing.total == 3 * math.prod(grid))
    if into.full:
        assert into.others.flatten().tolist() == [
            row for row in range(packing.total) if row not in set(chosen.tolist())
        ]


@given(grids, seeds, st.sampled_from([1, 2, 3, "axes"]), st.sampled_from([None, 0, 7]), st.booleans())
def test_destinations_of_full_grids_are_those_of_their_rows(grid, seed, bucket, choice, per_sample):
    packing, _ = case(grid, 1.0, seed)
    bucket = [2, 1, 3][: len(grid)] if bucket == "axes" else bucket
    step = torch.tensor([3, 5, 8]) if per_sample else torch.tensor([4])
    given_bucket = () if bucket == 2 else (bucket,)  # buckets of 2 cells are the default
    found = grid_destinations(3, grid, torch.device("cpu"), *given_bucket, seed=choice, step=step)
    keep = torch.ones(3, math.prod(grid), dtype=torch.bool)
    packing = ops.pack(keep, grid)
    expected = destinations(packing.cell, packing.sample, 3, grid, bucket, choice, step)
    assert torch.equal(found.table, expected.table)
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.others, expected.others)


@given(grids, shares, ratios, seeds)
def test_a_plan_is_that_of_its_samples_joined(grid, share, ratio, seed):
    packing, x = case(grid, share, seed)
    _, plan = plan_of(packing, x, ratio)
    alone = [plan.sample(place) for place in range(3)]
    whole = unmerge(merge(x, plan), plan).split(packing.lengths)
    for rows, own, length, everything in zip(x.split(packing.lengths), alone, plan.lengths, whole, strict=True):
        assert own.lengths == (length,)
        assert own.before == (len(rows),)
        torch.testing.assert_close(
            unmerge(merge(rows, own), own),
            everything,
        )
    again = joined(alone)
    for field in dataclasses.fields(plan):
        one, other = getattr(plan, field.name), getattr(again, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    back = joined([alone[2], alone[0]])
    parts = x.split(packing.lengths)
    expected = [unmerge(merge(parts[place], alone[place]), alone[place]) for place in (2, 0)]
    rows = torch.cat([parts[2], parts[0]])
    torch.testing.assert_close(unmerge(merge(rows, back), back), torch.cat(expected), rtol=0, atol=1e-12)


def test_ratios_may_differ_between_samples():
    packing, x = case((6, 6), 1.0, 3)
    into = destinations(packing.cell, packing.sample, 3, packing.grid)
    wanted = (0.0, 0.3, 0.7)
    plan = match(x, packing.lengths, into, wanted)
    assert plan.lengths == tuple(36 - merged_away(36, 9, ratio) for ratio in wanted)
    for place, (rows, ratio) in enumerate(zip(x.split(packing.lengths), wanted, strict=True)):
        one = ops.pack(torch.ones(1, 36, dtype=torch.bool), (6, 6))
        _, alone = plan_of(one, rows, ratio)
        assert torch.equal(plan.sample(place).slot, alone.slot)


@pytest.mark.parametrize(
    ("length", "buckets", "ratio", "merged"), [(36, 9, 0.5, 18), (36, 9, 0.9, 27), (5, 9, 0.9, 0), (7, 2, 0.5, 3)]
)
def test_a_share_is_merged_away_but_no_destination(length, buckets, ratio, merged):
    assert merged_away(length, buckets, ratio) == merged


def test_sizes_weigh_rows_like_repetitions():
    packing, x = case((6, 6), 1.0, 5)
    size = torch.randint(1, 4, (packing.total,)).double()
    into = destinations(packing.cell, packing.sample, 3, packing.grid)
    plan = match(x, packing.lengths, into, 0.5, size)
    merged = merge(x, plan, size)
    for row in range(len(merged)):
        members = plan.slot == row
        expected = (x[members] * size[members, None]).sum(0) / size[members].sum()
        torch.testing.assert_close(merged[row], expected)
        assert plan.size[row] == size[members].sum()


class Largest(TorchDispatchMode):
    """Records the largest number of elements of a tensor that is computed."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else (out,)
        self.elements = max(self.elements, *(each.numel() for each in made if isinstance(each, torch.Tensor)))
        return out


@pytest.mark.parametrize("batch", [(1.0,), (1.0, 0.3)], ids=["equal", "ragged"])
def test_many_tokens_are_matched_without_a_table_of_all_pairs(batch):
    """Of rows in a plane, the most similar destination is the one with the next angle."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.stack([torch.rand(20_000, generator=generator) < share for share in batch])
    packing = ops.pack(keep, (100, 200))
    angle = torch.rand(packing.total, generator=generator, dtype=torch.float64) * 6
    into = destinations(packing.cell, packing.sample, len(batch), packing.grid)
    with Largest() as made:
        plan = match(torch.stack([angle.cos(), angle.sin()], dim=1).float(), packing.lengths, into, 0.7)
    length, buckets = packing.lengths[0], into.table.shape[1]
    assert made.elements < (length - buckets) * buckets
    source = plan.source[plan.source < length]
    assert len(source) == int(length * 0.7)
    places, target = angle[into.table[0]].sort().values, angle[plan.keep[plan.slot[source]]]
    after = torch.searchsorted(places, angle[source]).clamp(1, buckets - 1)
    nearest = torch.minimum((places[after] - angle[source]).abs(), (places[after - 1] - angle[source]).abs())
    assert ((target - angle[source]).abs() - nearest).max() < 2e-3  # fp32 cannot tell smaller angles by their cosine


def test_parts_are_matched_among_themselves():
    """The plan of a sequence with two parts is made of the plans of both, and other rows stay."""
    torch.manual_seed(0)
    batch, before, grids = 2, 3, ((4, 4), (2, 5))
    sizes = [math.prod(grid) for grid in grids]
    room = before + sum(sizes)
    x = torch.randn(batch, room, 6)
    parts, expected, first = [], [x[:, :before]], before
    for grid, size in zip(grids, sizes, strict=True):
        place = (torch.arange(batch)[:, None] * room + torch.arange(first, first + size)).flatten()
        into = grid_destinations(batch, grid, x.device)
        parts.append((place, into))
        own = x[:, first : first + size].reshape(-1, 6)
        plan = match(own, [size] * batch, into, 0.5)
        expected.append(merge(own, plan).view(batch, -1, 6))
        first += size
    rows = x.reshape(-1, 6)
    plan = match_parts(rows, (room,) * batch, parts, 0.5)
    left = before + sum(size - size // 2 for size in sizes)
    assert plan.lengths == (left,) * batch
    torch.testing.assert_close(merge(rows, plan).view(batch, left, 6), torch.cat(expected, dim=1))
    restored = unmerge(torch.arange(float(batch * left))[:, None], plan).view(batch, room)
    assert torch.equal(restored[0, :before], torch.arange(float(before)))
    assert int(plan.size.sum()) == batch * room
    alone = plan.sample(1)
    assert torch.equal(merge(x[1], alone), merge(rows, plan)[left:])


def test_destinations_depend_on_the_step_and_not_on_the_sample():
    packing, _ = case((8, 8), 1.0, 0)
    tables = [destinations(packing.cell, packing.sample, 3, (8, 8), seed=4, step=step).table for step in (0, 1)]
    assert not torch.equal(tables[0], tables[1])
    assert torch.equal(tables[0][1] - 64, tables[0][0])


def test_a_zero_token_does_not_disturb_the_matching():
    packing, x = case((4, 4), 1.0, 1)
    x[5] = 0
    _, plan = plan_of(packing, x, 0.5)
    assert unmerge(merge(x, plan), plan).isfinite().all()


def test_gradients_reach_every_row():
    packing, x = case((4, 4), 0.6, 2)
    x.requires_grad_()
    _, plan = plan_of(packing, x.detach(), 0.5)
    assert torch.autograd.gradcheck(lambda rows: unmerge(merge(rows, plan), plan), x)


@pytest.mark.parametrize(("bucket", "ratio", "words"), [(0, 0.5, "bucket is 0"), (2, 1.0, r"1\.0.*\[0, 1\)")])
def test_wrong_settings_raise(bucket, ratio, words):
    packing, x = case((4, 4), 1.0, 0)
    with pytest.raises(InputError, match=words):
        plan_of(packing, x, ratio, bucket=bucket)
