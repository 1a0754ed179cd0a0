"""Laws of the batch stream and of its counter-based random numbers."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokdyn.data import BatchStream, ShapesDataset
from tokdyn.data.hashing import Purpose, generators, hashed, permutation, uniform
from tokdyn.errors import DataError


def shapes(length: int) -> ShapesDataset:
    return ShapesDataset((16, 16), 1, length=length)


sizes = st.integers(1, 40)
seeds = st.integers(-(2**40), 2**70)


@given(length=sizes, batch=st.integers(1, 17), seed=seeds, epochs=st.integers(1, 3))
def test_every_epoch_is_a_permutation(length, batch, seed, epochs):
    stream = BatchStream(shapes(length), batch, seed)
    steps = -(-epochs * length // batch)
    drawn = np.concatenate([stream.indices(step) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(drawn[epoch * length : (epoch + 1) * length]) == list(range(length))


@given(length=sizes, batch=st.integers(1, 6), world=st.integers(1, 6), seed=seeds, step=st.integers(0, 30))
def test_union_over_ranks_does_not_depend_on_the_world_size(length, batch, world, seed, step):
    data = shapes(length)
    alone = BatchStream(data, batch * world, seed, flip=True)
    ranks = [BatchStream(data, batch, seed, rank, world, flip=True) for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate([r.indices(step) for r in ranks]), alone.indices(step))
    np.testing.assert_array_equal(np.concatenate([r.flips(step) for r in ranks]), alone.flips(step))


@settings(max_examples=25)
@given(length=sizes, batch=st.integers(1, 9), seed=seeds, start=st.integers(0, 50))
def test_a_resumed_stream_gives_the_batches_of_an_uninterrupted_one(length, batch, seed, start):
    through = BatchStream(shapes(length), batch, seed, flip=True)
    for step in range(start):
        through.indices(step)
    resumed = BatchStream(shapes(length), batch, seed, flip=True)
    for one, other in zip(through[start], resumed[start], strict=True):
        assert torch.equal(one, other)


def test_any_order_of_access_gives_the_same_batches():
    stream = BatchStream(shapes(7), 3, seed=5)
    forward = [stream.indices(step).tolist() for step in range(20)]
    backward = [stream.indices(step).tolist() for step in reversed(range(20))][::-1]
    assert forward == backward


def test_every_epoch_and_seed_has_an_order_of_its_own():
    """One batch is one epoch here, so that the steps are the epochs."""
    streams = [BatchStream(shapes(30), 30, seed, flip=True) for seed in range(3)]
    assert len({tuple(stream.indices(epoch)) for stream in streams for epoch in range(3)}) == 9
    assert len({tuple(stream.flips(epoch)) for stream in streams for epoch in range(3)}) == 9


def test_permutations_differ_by_epoch_and_seed():
    orders = {tuple(permutation(seed, epoch, 30)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_order_of_older_runs_is_unchanged():
    # SplitMix64's published first output for the state 0 is 0xE220A8397B1DCDAF; one key runs the mixer three times.
    def mix(state: int) -> int:
        mask = (1 << 64) - 1
        state = (state + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        return state ^ (state >> 31)

    assert mix(0) == 0xE220A8397B1DCDAF
    assert hashed(3, Purpose.FLIP, 9).tolist() == [mix(mix(mix(3) ^ 3) ^ 9)]
    keys = [mix(mix(mix(mix(7) ^ 2) ^ 4) ^ place) for place in range(12)]
    assert permutation(7, 4, 12).tolist() == sorted(range(12), key=lambda place: keys[place])


def test_flips_are_fair_and_reach_the_samples():
    stream = BatchStream(shapes(64), 64, seed=1, flip=True)
    flips = np.concatenate([stream.flips(step) for step in range(200)])
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / np.sqrt(flips.size)  # four standard deviations
    samples, labels = stream[3]
    plain, _ = stream.dataset.batch(stream.indices(3).tolist())
    for sample, original, flip in zip(samples, plain, stream.flips(3), strict=True):
        assert torch.equal(sample, original.flip(-1) if flip else original)
    assert labels.tolist() == (stream.indices(3) % 10).tolist()
    assert BatchStream(shapes(4), 2, seed=1).flips(0) is None


def test_generators_differ_by_every_part_of_their_key():
    """torch's CPU generator reads 32 bits of its seed, so parts of a key that are merely put side by side are lost."""
    keys = [(seed, purpose, index) for seed in (0, 1, 2**32, 2**40) for purpose in Purpose for index in (0, 1, 2**32)]
    drawn = [torch.randn(8, generator=generators(*key)[0]) for key in keys]
    assert len({tuple(values.tolist()) for values in drawn}) == len(keys)
    together = generators(7, Purpose.HELD_OUT, np.arange(3))
    for index, generator in enumerate(together):
        (alone,) = generators(7, Purpose.HELD_OUT, index)
        assert torch.equal(torch.randn(8, generator=generator), torch.randn(8, generator=alone))


def test_uniform_numbers_fill_the_unit_interval():
    draws = uniform(0, Purpose.SHAPE, np.arange(20_000))
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    assert counts.sum() == 20_000
    assert abs(counts - 1000).max() < 5 * np.sqrt(1000)  # five standard deviations of a Poisson count


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_the_same_batches_for_any_number_of_workers(workers):
    stream = BatchStream(shapes(10), 4, seed=2, flip=True)
    before = torch.get_rng_state()
    loaded = list(stream.loader(3, 9, workers))
    assert torch.equal(torch.get_rng_state(), before)  # a resumed run restores this state
    assert len(loaded) == 6
    for step, (samples, labels) in zip(range(3, 9), loaded, strict=True):
        assert torch.equal(samples, stream[step][0])
        assert torch.equal(labels, stream[step][1])


def test_a_pickled_stream_gives_the_same_batches():
    stream = BatchStream(shapes(9), 4, seed=2)
    first = stream.indices(5)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(stream)).indices(5), first)


def test_epoch_counts_all_ranks():
    assert BatchStream(shapes(100), 5, seed=0, rank=1, world=4).epoch(10) == 2.0


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 1, "rank": 2, "world": 2}, "rank is 2, .*0 to 1 .* 2 "),
    ],
)
def test_impossible_settings_are_refused(settings, values):
    with pytest.raises(DataError, match=values):
        BatchStream(shapes(3), seed=0, **settings)


def test_negative_steps_are_refused():
    with pytest.raises(IndexError, match="-1"):
        BatchStream(shapes(3), 1, seed=0)[-1]
