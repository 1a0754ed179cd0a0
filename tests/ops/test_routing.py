"""Selection, tail drop, the straight-through gate and the ratio loss."""

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokdyn import ops
from tokdyn.errors import InputError
from tokdyn.ops.routing import tail_kept

seeds = st.integers(0, 10_000)
fractions = st.floats(0, 1, width=32)


def probabilities(seed, batch=4, cells=30):
    return torch.rand(batch, cells, generator=torch.Generator().manual_seed(seed))


def test_a_half_is_not_kept_and_the_best_cell_always_is():
    p = torch.tensor([[0.5, 0.6, 0.1], [0.1, 0.3, 0.2]])
    same, keep = ops.select(p)
    assert torch.equal(same, p)
    assert keep.tolist() == [[False, True, False], [False, True, False]]


def test_forced_ends_are_certain_and_get_no_gradient():
    p = torch.full((2, 5), 0.2, requires_grad=True)
    forced, keep = ops.select(p, force_ends=True)
    assert keep.tolist() == [[True, False, False, False, True]] * 2
    assert forced[:, [0, -1]].eq(1).all()
    forced.sum().backward()
    assert p.grad[:, [0, -1]].eq(0).all()
    assert p.grad[:, 1:-1].eq(1).all()


@settings(deadline=None)
@given(seeds, fractions)
def test_tail_drop_keeps_the_most_probable(seed, fraction):
    p, keep = ops.select(probabilities(seed))
    kept = ops.tail_drop(p, keep, fraction)
    assert (keep | ~kept).all()
    for sample in range(len(p)):
        n = int(keep[sample].sum())
        expected = n - min(math.floor(torch.tensor(float(n)) * torch.tensor(fraction)), n - 1)
        assert int(kept[sample].sum()) == expected
        gone = keep[sample] & ~kept[sample]
        if gone.any():
            assert p[sample][gone].max() <= p[sample][kept[sample]].min()


@settings(deadline=None)
@given(seeds, fractions, fractions, st.booleans())
def test_tail_drop_is_nested_even_among_ties(seed, one, other, ties):
    p, keep = ops.select(probabilities(seed))
    if ties:
        p = (p * 4).round() / 4
        keep = p > 0.5
        keep[:, 0] = True
    small, large = sorted((one, other))
    assert (ops.tail_drop(p, keep, small) | ~ops.tail_drop(p, keep, large)).all()


def test_tail_drop_of_zero_and_for_each_sample():
    p, keep = ops.select(probabilities(1))
    assert ops.tail_drop(p, keep, 0.0) is keep
    per_sample = torch.tensor([0.0, 0.3, 0.6, 1.0])
    together = ops.tail_drop(p, keep, per_sample)
    for b, fraction in enumerate(per_sample.tolist()):
        assert torch.equal(together[b : b + 1], ops.tail_drop(p[b : b + 1], keep[b : b + 1], fraction))
    assert together[3].sum() == 1


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.6, 0.7, 0.9, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_and_a_tensor_drop_the_same_in_any_type(fraction, dtype):
    """0.9 in fp32 is below nine tenths, so that in fp64 it would drop 8 tokens of 10."""
    p = 0.5 + probabilities(2, batch=1, cells=400).to(dtype) / 2
    for n in range(1, 401):
        keep = torch.arange(400) < n
        number = ops.tail_drop(p, keep[None], fraction)
        assert number.sum() == n - min(math.floor(torch.tensor(n) * torch.tensor(float(fraction))), n - 1)
        assert torch.equal(number, ops.tail_drop(p, keep[None], numpy.float32(fraction)))
        for shape in ((), (1,)):
            assert torch.equal(number, ops.tail_drop(p, keep[None], torch.full(shape, float(fraction))))


@given(st.integers(1, 5000), st.one_of(st.floats(0, 1), st.integers(0, 1000).map(lambda k: k / 1000)))
def test_the_host_counts_what_tail_drop_keeps(count, fraction):
    keep = torch.ones(1, count, dtype=torch.bool)
    assert tail_kept(count, fraction) == int(ops.tail_drop(torch.rand(1, count), keep, fraction).sum())


def test_the_host_counts_within_a_graph():
    counted = torch.compile(lambda x: x * tail_kept(10, 0.9), fullgraph=True, backend="eager")
    assert counted(torch.ones(1)).item() == 1


@pytest.mark.parametrize("fraction", [-0.1, 1.5, math.nan])
def test_a_fraction_outside_its_range_raises(fraction):
    p, keep = ops.select(probabilities(0))
    for given_ in (fraction, torch.tensor(fraction), torch.tensor([0.0, 0.2, fraction, 1.0])):
        with pytest.raises(InputError, match=r"-0\.1|1\.5|nan"):
            ops.tail_drop(p, keep, given_)


@pytest.mark.parametrize("fraction", [None, "0.3", [0.1, 0.2, 0.3, 0.4], {"cond": 0.3}])
def test_a_fraction_of_another_type_raises(fraction):
    p, keep = ops.select(probabilities(0))
    with pytest.raises(InputError, match=r"\(4,\)"):
        ops.tail_drop(p, keep, fraction)


def test_a_wrong_number_of_fractions_raises():
    p, keep = ops.select(probabilities(0))
    with pytest.raises(InputError, match=r"\(4,\)"):
        ops.tail_drop(p, keep, torch.zeros(3))


def test_the_gate_is_one_forward_and_the_probability_backward():
    features = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    p = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    out = ops.straight_through(features, p)
    assert torch.equal(out, features)
    weight = torch.randn_like(features)
    (out * weight).sum().backward()
    torch.testing.assert_close(p.grad, (features * weight).sum(-1).detach())
    assert torch.equal(features.grad, weight)


def test_gradients_of_the_gate_are_exact_in_autocast():
    features, p = torch.randn(3, 64, requires_grad=True), torch.rand(3, requires_grad=True)
    weight = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        (slope,) = torch.autograd.grad((ops.straight_through(features, p) * weight).sum(), p)
    assert slope.dtype == torch.float32
    torch.testing.assert_close(slope, (features * weight).sum(-1).detach(), rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(seeds, st.floats(1.5, 20), st.integers(1, 9))
def test_the_ratio_loss_of_groups_is_their_weighted_mean(seed, target, size):
    p, keep = ops.select(probabilities(seed, batch=7))
    expected = 0.0
    for start in range(0, 7, size):
        f, g = keep[start : start + size].float().mean(), p[start : start + size].mean()
        loss = target / (target - 1) * ((1 - f) * (1 - g) + (target - 1) * f * g)
        expected += loss * len(p[start : start + size]) / 7
    torch.testing.assert_close(ops.ratio_loss(p, keep, target, size), torch.as_tensor(expected))


def test_the_ratio_loss_has_its_minimum_at_the_target():
    for share, sign in ((0.5, 1), (0.1, -1)):  # too many kept: the loss falls with p; too few: it rises
        keep = torch.zeros(2, 100, dtype=torch.bool)
        keep[:, : int(share * 100)] = True
        p = torch.full((2, 100), share, requires_grad=True)
        ops.ratio_loss(p, keep, 4.0).backward()
        assert (p.grad.sign() == sign).all()
    keep = torch.zeros(1, 100, dtype=torch.bool)
    keep[:, :25] = True
    torch.testing.assert_close(ops.ratio_loss(torch.full((1, 100), 0.25), keep, 4.0), torch.tensor(1.0))


def test_impossible_settings_of_the_ratio_loss_raise():
    p, keep = ops.select(probabilities(0))
    with pytest.raises(InputError, match="target is 1"):
        ops.ratio_loss(p, keep, 1.0)
    with pytest.raises(InputError, match="group_size is 0"):
        ops.ratio_loss(p, keep, 4.0, 0)
