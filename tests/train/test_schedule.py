"""Learning rate, target, tail drop, EMA decay and seeds as functions of the step."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokdyn.recipe import ChunkingSettings, OptimizerSettings
from tokdyn.seeds import Stream, generator, mix, mixed, noise_generator, seed_everything
from tokdyn.train import schedule


def test_the_learning_rate_warms_up_and_decays() -> None:
    settings = OptimizerSettings(lr=1.0, warmup_steps=4, decay="linear", final_lr=0.5)
    rates = [schedule.learning_rate(settings, step, 12) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.75)  # half way from 1 to 0.5
    assert rates[12] == pytest.approx(0.5)
    cosine = OptimizerSettings(lr=1.0, decay="cosine")
    assert schedule.learning_rate(cosine, 3, 12) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule.learning_rate(OptimizerSettings(lr=0.1), 10**9, 12) == 0.1


def test_the_target_follows_the_curriculum() -> None:
    settings = ChunkingSettings(curriculum=((10, 2.0), (20, 4.0), (40, 16.0)))
    found = [schedule.target(settings, 16.0, step) for step in (0, 10, 15, 20, 30, 40, 99)]
    assert found == [2.0, 2.0, 3.0, 4.0, 10.0, 16.0, 16.0]
    held = settings.model_copy(update={"interpolation": "hold"})
    assert [schedule.target(held, 16.0, step) for step in (0, 19, 20, 39, 40)] == [2.0, 2.0, 4.0, 4.0, 16.0]
    assert schedule.target(ChunkingSettings(), 4.0, 7) == 4.0


def test_budgets_are_drawn_only_after_the_warm_up() -> None:
    settings = ChunkingSettings(budget_warmup_steps=50)
    drawn = [schedule.tail_drop(settings, 0, step, 0, 4) for step in range(1450)]
    assert drawn[:50] == [0.0] * 50
    counts = Counter(float(drop) for drop in drawn[50:])
    assert set(counts) == set(settings.tail_drops)
    # 1400 draws of 7 values are 200 each, with a standard deviation of 13; five of those.
    assert all(abs(count - 200) < 65 for count in counts.values())


def test_budgets_per_step_are_alike_on_all_devices_and_budgets_per_sample_differ() -> None:
    step = ChunkingSettings(budget_warmup_steps=0)
    assert schedule.tail_drop(step, 0, 5, 0, 4) == schedule.tail_drop(step, 0, 5, 4, 4)
    sample = ChunkingSettings(budget_warmup_steps=0, draw="sample")
    whole = schedule.tail_drop(sample, 0, 5, 0, 8)
    halves = [schedule.tail_drop(sample, 0, 5, first, 4) for first in (0, 4)]
    assert isinstance(whole, torch.Tensor)
    assert torch.equal(whole, torch.cat([torch.as_tensor(half) for half in halves]))
    assert len(set(whole.tolist())) > 1
    assert schedule.tail_drop(ChunkingSettings(tail_drops=(0.0,), budget_warmup_steps=0), 0, 5, 0, 4) == 0.0


def test_the_ema_decay_warms_up() -> None:
    assert schedule.ema_decay(0.9999, True, 0) == 0.1
    assert schedule.ema_decay(0.9999, True, 90) == 0.91
    assert schedule.ema_decay(0.9999, True, 10**7) == 0.9999
    assert schedule.ema_decay(0.9, False, 0) == 0.9


def test_splitmix64_gives_the_reference_outputs() -> None:
    """First outputs of the reference generator (Vigna, prng.di.unimi.it/splitmix64.c) seeded with 1234567."""
    golden = 0x9E3779B97F4A7C15
    found = [mix((1234567 + index * golden) & (2**64 - 1)) for index in range(3)]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 64)), min_size=2, max_size=50, unique=True))
def test_seeds_of_different_places_differ(places: list[tuple[int, int]]) -> None:
    seeds = {mix(0, stream, *place) for place in places for stream in Stream}
    assert len(seeds) == len(places) * len(Stream)


def test_a_generator_does_not_touch_the_global_one() -> None:
    seed_everything(0, Stream.MICRO_STEP, 1, 2)
    expected = torch.rand(3)
    seed_everything(0, Stream.MICRO_STEP, 1, 2)
    torch.rand(1, generator=generator(0, Stream.PREVIEW))
    assert torch.equal(torch.rand(3), expected)


def test_noise_of_seeds_far_apart_differs_and_that_of_small_seeds_is_that_of_torch() -> None:
    seeds = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**61]
    drawn = [torch.rand(2, generator=noise_generator(seed)) for seed in seeds]
    assert len({tuple(each.tolist()) for each in drawn}) == len(seeds)
    for seed, found in zip(seeds[:3], drawn, strict=False):
        assert torch.equal(found, torch.rand(2, generator=torch.Generator().manual_seed(seed)))


@given(st.integers(-5, 2**70), st.lists(st.integers(-5, 2**70), max_size=3))
def test_one_seed_is_mixed_like_an_array_of_them(seed: int, parts: list[int]) -> None:
    kept = [part % 2**64 for part in parts]
    arrays = [np.array([part, part], dtype=np.uint64) for part in kept]
    assert mixed(seed, *arrays).tolist() == [mix(seed, *parts)] * (2 if parts else 1)
