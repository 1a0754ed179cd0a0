"""Curves over the noise level, cache decisions, block skipping and token dropping."""

import math

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokdyn.errors import InputError
from tokdyn.ops.caching import accumulate, fit_rescaling, relative_change, rescale
from tokdyn.ops.dropping import kept_count, put_back, random_subset, take
from tokdyn.ops.schedules import at, check_curve
from tokdyn.ops.skipping import block_influence, choose_skips, gate, gumbel_difference

FLUX = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)  # published for TeaCache


def test_a_curve_is_interpolated_linearly():
    curve = ((0.2, 0.0), (0.6, 0.8), (1.0, 0.4))
    assert [at(curve, level) for level in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)] == pytest.approx([0, 0, 0.4, 0.8, 0.6, 0.4])
    assert at(0.3, 0.7) == 0.3
    check_curve(curve, 0, 1)


@pytest.mark.parametrize(
    ("curve", "words"),
    [
        ((), "no point"),
        (((0.5, 0.1), (0.5, 0.2)), "rise"),
        (((0.5, 2.0),), r"within \[0, 1\]"),
        (((1.5, 0.0),), "rise"),
    ],
)
def test_wrong_curves_raise(curve, words):
    with pytest.raises(InputError, match=words):
        check_curve(curve, 0, 1)


def test_relative_change_of_each_sample():
    before = torch.tensor([[[2.0, -2.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    now = torch.tensor([[[3.0, -2.0]], [[0.0, 0.0]], [[1.0, 0.0]]])
    assert relative_change(now, before).tolist() == [0.25, 0.0, math.inf]


def test_the_polynomial_is_clamped():
    change = torch.tensor([0.0, 0.05, 0.2])
    expected = [max(0.0, sum(c * x ** (4 - k) for k, c in enumerate(FLUX))) for x in change.tolist()]
    torch.testing.assert_close(rescale(change, FLUX), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert rescale(torch.tensor([3.0]), (-1.0, 0.0)).item() == 0.0
    assert rescale(torch.tensor([0.3]), (1.0, 0.0)).item() == pytest.approx(0.3)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.01, 2))
def test_outputs_are_reused_until_the_threshold_is_reached(changes, threshold):
    total, since = torch.zeros(1), 0.0
    for change in changes:
        reuse, total = accumulate(total, torch.tensor([change]), threshold)
        since = float(torch.tensor(since) + torch.tensor(change))
        assert bool(reuse) == (since < torch.tensor(threshold))
        since = since if reuse else 0.0


def test_thresholds_of_zero_and_infinity():
    total = torch.zeros(3)
    change = torch.tensor([0.0, 5.0, math.nan])
    assert accumulate(total, change, 0.0)[0].tolist() == [False] * 3
    assert accumulate(total, change, -1.0)[0].tolist() == [False] * 3
    assert accumulate(total, change, math.inf)[0].tolist() == [True, True, False]


def test_the_fit_recovers_a_polynomial():
    x = torch.linspace(0.01, 0.3, 40)
    y = sum(c * x.double() ** (4 - k) for k, c in enumerate(FLUX))
    assert fit_rescaling(x, y) == pytest.approx(FLUX, rel=1e-3)
    assert fit_rescaling(torch.tensor([0.1, 0.2]), torch.tensor([0.2, 0.4])) == pytest.approx((2.0, 0.0), abs=1e-6)
    with pytest.raises(InputError, match="finite"):
        fit_rescaling(torch.tensor([math.inf]), torch.tensor([1.0]))


@given(st.integers(1, 4), st.integers(1, 20), st.sampled_from([0.0, 0.3, 0.5, 0.99]))
def test_dropped_tokens_are_put_back_unchanged(batch, count, rate):
    x = torch.randn(batch, count, 3)
    index = random_subset(batch, count, rate, generator=torch.Generator().manual_seed(0))
    assert index.shape == (batch, kept_count(count, rate))
    assert (index.diff(dim=1) > 0).all()
    kept = take(x, index)
    assert torch.equal(kept, x.gather(1, index[..., None].expand(-1, -1, 3)))
    out = put_back(kept + 1, x, index)
    there = torch.zeros(batch, count, dtype=torch.bool).scatter(1, index, True)
    assert torch.equal(out[there], (x + 1)[there])
    assert torch.equal(out[~there], x[~there])
    assert kept_count(count, 0.0) == count


def test_influence_depends_on_direction_alone():
    x = torch.randn(2, 5, 4)
    torch.testing.assert_close(block_influence(x, 3 * x), torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(block_influence(x, -x), torch.full((2,), 2.0))


def test_influence_is_one_minus_the_mean_cosine_of_the_tokens():
    before, after = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    for sample, found in enumerate(block_influence(before, after).tolist()):
        pairs = zip(before[sample], after[sample], strict=True)
        cosines = [float(x @ y / (x.norm() * y.norm())) for x, y in pairs]
        assert found == pytest.approx(1 - sum(cosines) / 5, abs=1e-6)
    assert block_influence(before.bfloat16(), after.bfloat16()).dtype == torch.float32


def test_blocks_of_least_influence_per_flop_are_skipped_until_the_target():
    influence = torch.tensor([[9.0, 1.0, 5.0, 2.0], [9.0, 3.0, 0.5, 4.0]])
    assert choose_skips(influence, (1, 1, 1, 1), 0, 1.0) == ((), ())
    assert choose_skips(influence, (1, 1, 1, 1), 0, 0.75) == ((1,), (2,))
    assert choose_skips(influence, (1, 1, 10, 1), 0, 0.62) == ((), (2,))
    assert choose_skips(influence, (1, 1, 1, 1), 0, 0.25, protected=(0,)) == ((1, 2, 3), (1, 2, 3))
    with pytest.raises(InputError, match=r"0\.6"):
        choose_skips(influence, (1, 1, 1, 1), 1, 0.5, protected=(0, 1))


@given(
    st.integers(1, 3), st.integers(1, 5), st.sampled_from([0.2, 0.5, 0.8, 1.0]), st.booleans(), st.integers(0, 10_000)
)
def test_skips_are_the_shortest_beginning_of_the_order_that_meets_the_target(levels, blocks, flops, by_level, seed):
    generator = torch.Generator().manual_seed(seed)
    influence = torch.randint(0, 4, (levels, blocks), generator=generator).float()
    cost = torch.randint(0, 3, (levels, blocks) if by_level else (blocks,), generator=generator).double()
    other = torch.randint(0, 3, (levels,), generator=generator).double()
    protected = [block for block in range(blocks) if torch.rand((), generator=generator) < 0.3]
    table = cost.expand(levels, blocks)
    whole = float(other.sum() + table.sum())
    cells = [(v, b) for v in range(levels) for b in range(blocks) if table[v, b] > 0 and b not in protected]
    cells.sort(key=lambda cell: (float(influence[cell] / table[cell]), *cell))
    least = whole - sum(float(table[cell]) for cell in cells)
    if flops * whole < least:
        with pytest.raises(InputError, match=f"{flops:g}"):
            choose_skips(influence, cost, other, flops, protected)
        return
    count = 0
    while whole - sum(float(table[cell]) for cell in cells[:count]) > flops * whole:
        count += 1
    chosen = cells[:count]
    expected = tuple(tuple(sorted(b for v, b in chosen if v == level)) for level in range(levels))
    assert choose_skips(influence, cost, other, flops, protected) == expected


@pytest.mark.parametrize(("cost", "flops"), [((1, 1), 0.5), (((1, 1, 1), (1, 1, 1)), 0.0), ((1, 1, 1), 1.1)])
def test_costs_and_shares_that_cannot_be_raise(cost, flops):
    with pytest.raises(InputError, match=f"{len(cost) if cost == (1, 1) else 3} costs for 3 blocks.*{flops}"):
        choose_skips(torch.ones(2, 3), torch.tensor(cost), 0, flops)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_noise_of_gates_is_logistic_and_within_bounds(dtype):
    """At most logit(1 - 1e-6) = 13.8 either way: gates that start at 14 stay open."""
    torch.manual_seed(0)
    noise = gumbel_difference(torch.zeros(4_000_000, dtype=dtype))
    assert noise.dtype == dtype
    assert noise.abs().max() < 13.9
    shares = [(noise < level).double().mean().item() for level in (-2.0, 0.0, 2.0)]
    assert shares == pytest.approx([1 / (1 + math.exp(-level)) for level in (-2.0, 0.0, 2.0)], abs=2e-3)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5, unique_by=lambda p: p[0]),
    st.floats(0, 1),
)
def test_a_curve_is_that_of_numpy(points, level):
    points = sorted(points)
    expected = numpy.interp(level, [x for x, _ in points], [y for _, y in points])
    assert at(tuple(points), level) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("good", [0.0, 1.0, ((0.0, 0.0), (1.0, 1.0)), ((0.5, 0.3),)])
def test_the_ends_of_the_ranges_are_allowed(good):
    check_curve(good, 0.0, 1.0)


@pytest.mark.parametrize("bad", [-0.1, 1.1, ((0.0, -0.1),), ((-0.1, 0.0),), ((0.0, 0.0), (0.5, 0.0), (0.4, 0.0))])
def test_curves_just_outside_the_ranges_raise(bad):
    with pytest.raises(InputError, match=r"0\.\d|1\.1"):
        check_curve(bad, 0.0, 1.0)


def test_changes_are_relative_and_in_fp32():
    before = torch.full((2, 3), 2.0, dtype=torch.bfloat16)
    change = relative_change(before + torch.tensor([[1.0], [-1.0]]).bfloat16(), before)
    assert change.dtype == torch.float32
    assert change.tolist() == [0.5, 0.5]


def test_the_fit_of_few_changes_is_of_a_lower_degree_and_of_large_ones_exact():
    x = torch.tensor([1e3, 2e3, 3e3, 4e3, 5e3])
    assert fit_rescaling(x, 3 * x + 1, degree=2) == pytest.approx((0.0, 3.0, 1.0), abs=1e-6)
    assert fit_rescaling(x[:1], x[:1] * 2) == pytest.approx((2e3,))
    assert len(fit_rescaling(x, x)) == 5
    noisy = torch.cat([x, torch.tensor([math.nan])])
    assert fit_rescaling(noisy, torch.cat([2 * x, torch.ones(1)]), degree=1) == pytest.approx((2.0, 0.0), abs=1e-6)
    assert fit_rescaling(torch.zeros(2), torch.zeros(2)) == pytest.approx((0.0,))


def test_a_gate_is_hard_forward_and_a_sigmoid_backward():
    logit = torch.tensor([-1.0, 2.0], requires_grad=True)
    assert gate(logit, training=False).tolist() == [0.0, 1.0]
    open_ = gate(logit, training=True, noise=torch.tensor([3.0, -3.0]))
    assert open_.tolist() == [1.0, 0.0]
    (slope,) = torch.autograd.grad(open_.sum(), logit)
    soft = torch.sigmoid(torch.tensor([2.0, -1.0]) / 5)
    torch.testing.assert_close(slope, soft * (1 - soft) / 5)
    share = gate(torch.full((20_000,), 1.0), training=True).mean().item()
    assert share == pytest.approx(1 / (1 + math.exp(-1.0)), abs=0.02)
