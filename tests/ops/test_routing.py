"""Selection, tail drop, the straight-through gate and the ratio loss."""

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokdyn import ops
from tokdyn.errors import InputError

seeds = st.integers(0, 10_000)
fractions = st.floats(0, 1, width=32)


def probabilities(seed, batch=4, cells=30):
    return torch.rand(batch, cells, generator=torch.Generator().manual_seed(seed))


def test_half_is_not_kept_and_nothing_kept_keeps_the_best():
    p = torch.tensor([[0.5, 0.6, 0.1], [0.1, 0.3, 0.2]])
    same, keep = ops.select(p)
    assert torch.equal(same, p)
    assert keep.tolist() == [[False, True, False], [False, True, False]]


def test_forced_ends_are_kept_with_certainty_and_take_no_gradient():
    p = torch.full((2, 5), 0.2, requires_grad=True)
    forced, keep = ops.select(p, force_ends=True)
    assert keep.tolist() == [[True, False, False, False, True]] * 2
    assert forced[:, [0, -1]].eq(1).all()
    forced.sum().backward()
    assert p.grad[:, [0, -1]].eq(0).all()
    assert p.grad[:, 1:-1].eq(1).all()


@settings(deadline=None)
@given(seeds, fractions)
def test_tail_drop_keeps_n_minus_floor_of_the_most_probable(seed, fraction):
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
def test_tail_drop_is_nested_also_among_ties(seed, one, other, ties):
    p, keep = ops.select(probabilities(seed))
    if ties:
        p = (p * 4).round() / 4
        keep = p > 0.5
        keep[:, 0] = True
    small, large = sorted((one, other))
    assert (ops.tail_drop(p, keep, small) | ~ops.tail_drop(p, keep, large)).all()


def test_no_drop_is_the_same_object_and_per_sample_equals_one_by_one():
    p, keep = ops.select(probabilities(1))
    assert ops.tail_drop(p, keep, 0.0) is keep
    per_sample = torch.tensor([0.0, 0.3, 0.6, 1.0])
    together = ops.tail_drop(p, keep, per_sample)
    for b, fraction in enumerate(per_sample.tolist()):
        assert torch.equal(together[b : b + 1], ops.tail_drop(p[b : b + 1], keep[b : b + 1], fraction))
    assert together[3].sum() == 1


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.6, 0.7, 0.9, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_drops_what_a_tensor_with_it_drops_in_any_precision(fraction, dtype):
    """0.9 in fp32 is less than nine tenths, so in fp64 it would drop 8 tokens of 10."""
    p = 0.5 + probabilities(2, batch=1, cells=400).to(dtype) / 2
    for n in range(1, 401):
        keep = torch.arange(400) < n
        number = ops.tail_drop(p, keep[None], fraction)
        assert number.sum() == n - min(math.floor(torch.tensor(n) * torch.tensor(float(fraction))), n - 1)
        assert torch.equal(number, ops.tail_drop(p, keep[None], numpy.float32(fraction)))
        for shape in ((), (1,)):
            assert torch.equal(number, ops.tail_drop(p, keep[None], torch.full(shape, float(fraction))))


@pytest.mark.parametrize("fraction", [-0.1, 1.5, math.nan])
def test_a_fraction_outside_its_range_is_refused(fraction):
    p, keep = ops.select(probabilities(0))
    for given_ in (fraction, torch.tensor(fraction), torch.tensor([0.0, 0.2, fraction, 1.0])):
        with pytest.raises(InputError, match="between 0 and 1"):
            ops.tail_drop(p, keep, given_)


@pytest.mark.parametrize("fraction", [None, "0.3", [0.1, 0.2, 0.3, 0.4], {"cond": 0.3}])
def test_what_is_neither_a_number_nor_a_tensor_is_refused(fraction):
    p, keep = ops.select(probabilities(0))
    with pytest.raises(InputError, match=r"expected a number or a \(4,\) tensor"):
        ops.tail_drop(p, keep, fraction)


def test_a_wrong_number_of_fractions_is_refused():
    p, keep = ops.select(probabilities(0))
    with pytest.raises(InputError, match=r"expected a float or \(4,\)"):
        ops.tail_drop(p, keep, torch.zeros(3))


def test_gate_is_one_forward_and_the_probability_backward():
    features = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    p = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    out = ops.straight_through(features, p)
    assert torch.equal(out, features)
    weight = torch.randn_like(features)
    (out * weight).sum().backward()
    torch.testing.assert_close(p.grad, (features * weight).sum(-1).detach())
    assert torch.equal(features.grad, weight)


@settings(deadline=None)
@given(seeds, st.floats(1.5, 20), st.integers(1, 9))
def test_ratio_loss_in_groups_is_the_mean_over_samples_of_their_group(seed, target, size):
    p, keep = ops.select(probabilities(seed, batch=7))
    expected = 0.0
    for start in range(0, 7, size):
        f, g = keep[start : start + size].float().mean(), p[start : start + size].mean()
        loss = target / (target - 1) * ((1 - f) * (1 - g) + (target - 1) * f * g)
        expected += loss * len(p[start : start + size]) / 7
    torch.testing.assert_close(ops.ratio_loss(p, keep, target, size), torch.as_tensor(expected))


def test_ratio_loss_pushes_towards_the_target_and_is_one_there():
    for share, sign in ((0.5, 1), (0.1, -1)):  # too many kept: the loss falls with p; too few: it rises
        keep = torch.zeros(2, 100, dtype=torch.bool)
        keep[:, : int(share * 100)] = True
        p = torch.full((2, 100), share, requires_grad=True)
        ops.ratio_loss(p, keep, 4.0).backward()
        assert (p.grad.sign() == sign).all()
    keep = torch.zeros(1, 100, dtype=torch.bool)
    keep[:, :25] = True
    torch.testing.assert_close(ops.ratio_loss(torch.full((1, 100), 0.25), keep, 4.0), torch.tensor(1.0))


def test_ratio_loss_refuses_impossible_settings():
    p, keep = ops.select(probabilities(0))
    with pytest.raises(InputError, match="more than 1"):
        ops.ratio_loss(p, keep, 1.0)
    with pytest.raises(InputError, match="at least 1"):
        ops.ratio_loss(p, keep, 4.0, 0)
