"""Dropping tokens: counts, subsets of any length, their way back, and the hash they are drawn by."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokdyn.errors import InputError
from tokdyn.ops.dropping import drop_guidance, kept_count, mix, put_back, subset, take

samples = st.lists(st.tuples(st.integers(1, 9), st.floats(0, 0.99)), min_size=1, max_size=4)


def wang(number):
    """Multiply-xorshift of 32-bit numbers (Wellons, "Prospecting for hash functions", lowbias32), one at a time."""
    number %= 2**32
    number ^= number >> 16
    number = number * 0x7FEB352D % 2**32
    number ^= number >> 15
    number = number * 0x846CA68B % 2**32
    return number ^ number >> 16


@given(st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=20))
def test_the_hash_is_lowbias32(numbers):
    assert mix(torch.tensor(numbers)).tolist() == [wang(number) for number in numbers]


@pytest.mark.parametrize(
    ("count", "rate", "kept"), [(10, 0.0, 10), (10, 0.5, 5), (10, 0.29, 8), (3, 0.99, 1), (1, 0.9, 1), (100, 0.99, 1)]
)
def test_a_share_of_the_tokens_goes_rounded_down_and_never_all(count, rate, kept):
    assert kept_count(count, rate) == kept


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_a_rate_outside_its_range_raises(rate):
    with pytest.raises(InputError, match=str(rate)):
        kept_count(10, rate)


@given(samples)
def test_a_subset_is_the_tokens_of_least_noise_of_each_sample(samples):
    lengths = [length for length, _ in samples]
    kept = [kept_count(length, rate) for length, rate in samples]
    noise = torch.rand(len(samples), max(lengths) + 1)
    index = subset(noise, lengths, kept)
    assert index.shape == (len(samples), max(kept))
    for row, (length, count) in enumerate(zip(lengths, kept, strict=True)):
        ranked = sorted(range(length), key=lambda cell, row=row: noise[row, cell].item())
        assert index[row, :count].tolist() == sorted(ranked[:count])
        assert set(index[row, count:].tolist()).isdisjoint(ranked[:count])  # what only fills up is never taken twice
        assert (index[row] < noise.shape[1]).all()


def test_equal_noise_keeps_the_first_tokens():
    """A sort that is not stable mixes equal numbers from 17 on."""
    index = subset(torch.zeros(1, 500), (500,), (200,))
    assert index.tolist() == [list(range(200))]


@given(samples)
def test_only_the_rows_that_count_are_put_back(samples):
    lengths = [length for length, _ in samples]
    kept = [kept_count(length, rate) for length, rate in samples]
    full = torch.randn(len(samples), max(lengths), 2, 3, dtype=torch.float64)
    index = subset(torch.rand(full.shape[:2]), lengths, kept)
    new = torch.randn(*index.shape, 2, 3)
    out = put_back(new, full, index, kept)
    assert out.dtype == full.dtype
    expected = full.clone()
    for row, count in enumerate(kept):
        for place in range(count):
            expected[row, index[row, place]] = new[row, place].double()
    assert torch.equal(out, expected)
    assert torch.equal(take(out, index)[0, : kept[0]], new[0, : kept[0]].double())


def test_guidance_by_dropping_goes_from_the_weak_prediction_through_the_strong():
    strong, weak = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    assert torch.equal(drop_guidance(strong, weak, 1.0), strong)
    torch.testing.assert_close(drop_guidance(strong, weak, 3.0), weak + 3 * (strong - weak))
    torch.testing.assert_close(drop_guidance(strong, weak), weak + 1.5 * (strong - weak))  # the scale of the docs
