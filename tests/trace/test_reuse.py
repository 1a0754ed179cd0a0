"""What holds of every rule of a cache, whatever it sees: the window, the limit in a row, the threshold."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokdyn.errors import InputError
from tokdyn.methods import FeatureCache
from tokdyn.ops.easycache import predicted_change, transformation_rate
from tokdyn.ops.magcache import drift, ratio_at
from tokdyn.ops.seacache import sea_filter, wiener_gain
from tokdyn.trace.memory import BranchMemory
from tokdyn.trace.reuse import decide, nothing_accumulated
from tokdyn.trace.trajectory import Position

SETTINGS = {
    "teacache": {},
    "magcache": {"ratios": (1.0, 1.2, 1.05, 0.99, 0.9)},
    "easycache": {},
    "seacache": {},
}
bounds = st.one_of(st.integers(0, 5), st.floats(0, 0.5))


def decided(method, values, told=None):
    """Decisions (steps of B) about a trajectory whose indicators and predictions are these values, (steps, B, 2)."""
    batch = values.shape[1]
    images = tuple(range(batch))
    found = [[False] * batch]
    branch = BranchMemory(images, values[0].shape, nothing_accumulated(method, batch, values.device), values[0])
    branch.awaited = [False] * batch, [True] * batch
    branch.note(values[0] + 1)
    for step, value in enumerate(values[1:], 1):
        position = Position("cond", 0, images, (step,) * batch, 1, num_steps=told)
        reused = decide(method, position, branch, value, [False] * batch)
        branch.indicator, branch.awaited = value, (reused, [False] * batch)
        branch.note(value.square() + 1)
        found.append(reused)
    return found


@pytest.mark.parametrize("rule", SETTINGS)
@given(st.data())
def test_the_window_the_limit_and_the_threshold_hold(rule, data):
    steps = data.draw(st.integers(2, 12))
    numbers = st.lists(st.floats(-2, 2, width=32), min_size=4 * steps, max_size=4 * steps)
    values = torch.tensor(data.draw(numbers)).view(steps, 2, 2)
    most = data.draw(st.one_of(st.none(), st.integers(1, 3)))
    warmup, start = data.draw(bounds), data.draw(bounds)
    end = data.draw(st.one_of(st.integers(6, 12), st.floats(0.6, 1.0)))
    threshold = data.draw(st.sampled_from((0.0, 0.1, 1.0, math.inf)))
    method = FeatureCache(
        rule=rule, threshold=threshold, warmup=warmup, start=start, end=end, max_reused=most, **SETTINGS[rule]
    )
    found = decided(method, values, told=steps)
    first, after = (value if isinstance(value, int) else int(value * steps + 1e-9) for value in (warmup, end))
    begin = start if isinstance(start, int) else int(start * steps + 1e-9)
    for row in zip(*found, strict=True):
        assert not any(row[: max(1, first, begin)])
        assert not any(row[after:])
        assert not row[-1]
        runs = "".join("r" if reuse else " " for reuse in row).split()
        assert max(map(len, runs), default=0) <= (most or steps)
        if threshold <= 0:
            assert not any(row)
    if rule == "magcache" and threshold == math.inf and most is None:
        window = range(max(1, first, begin), min(after, steps - 1))
        assert found == [[step in window] * 2 for step in range(steps)]


@pytest.mark.parametrize("rule", SETTINGS)
def test_a_sample_is_decided_as_if_it_were_alone(rule):
    values = torch.randn(15, 3, 2, generator=torch.Generator().manual_seed(2)).cumsum(0)
    method = FeatureCache(rule=rule, threshold=0.8, max_reused=3, **SETTINGS[rule])
    together = decided(method, values, told=15)
    alone = [decided(method, values[:, i : i + 1], told=15) for i in range(3)]
    assert together == [[row[step][0] for row in alone] for step in range(15)]
    assert any(map(any, together))


def test_windows_in_steps_and_in_shares():
    assert FeatureCache().window(None).start == 1
    assert 10**9 in FeatureCache(warmup=3).window(None)
    assert FeatureCache(warmup=3, start=5).window(None).start == 5
    assert FeatureCache(end=4).window(None) == range(1, 4)
    assert FeatureCache(end=4).window(20) == range(1, 4)
    assert FeatureCache().window(20) == range(1, 19)
    assert FeatureCache(warmup=0.2, end=0.9).window(50) == range(10, 45)
    assert FeatureCache(start=0.29).window(100) == range(29, 99)
    with pytest.raises(InputError, match=r"warmup=0\.2.*num_steps="):
        FeatureCache(warmup=0.2).window(None)


def test_ratios_are_those_of_the_nearest_step():
    ratios = (1.0, 1.5, 1.2, 0.9, 0.5)
    assert [ratio_at(ratios, step, 5) for step in range(5)] == list(ratios)
    assert [ratio_at(ratios, step, 3) for step in range(3)] == [1.0, 1.2, 0.5]
    assert [ratio_at(ratios, step, 9) for step in range(9)] == [1.0, 1.0, 1.5, 1.2, 1.2, 1.2, 0.9, 0.5, 0.5]
    assert ratio_at(ratios, 0, 1) == 0.5


def test_the_error_of_a_ratio_is_that_of_the_product():
    error, product = drift(torch.tensor([1.0, 1.2]), torch.tensor([1.1, 0.5]))
    torch.testing.assert_close(error, torch.tensor([0.1, 0.4]))
    torch.testing.assert_close(product, torch.tensor([1.1, 0.6]))


def test_the_rate_predicts_a_linear_model_exactly():
    x = torch.randn(3, 2, 4, 5)
    weight = torch.tensor([3.0, -2.0]).view(2, 1, 1)
    rate = transformation_rate(weight * x[1], weight * x[0], x[1], x[0])
    torch.testing.assert_close(rate, torch.tensor([3.0, 2.0]))
    expected = (weight * (x[2] - x[1])).abs().flatten(1).mean(1) / (weight * x[1]).abs().flatten(1).mean(1)
    torch.testing.assert_close(predicted_change(rate, x[2], x[1], weight * x[1]), expected)


@pytest.mark.parametrize("grid", [(7,), (4, 6), (5, 3), (1, 4, 4), (3, 4, 5)])
def test_the_filter_keeps_the_mean_gain_and_removes_noise_last(grid):
    cells = math.prod(grid)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, cells, 3, generator=generator)
    level = torch.tensor([1e-6, 0.95])
    out = sea_filter(x, grid, level)
    torch.testing.assert_close(out[0], x[0], rtol=1e-4, atol=1e-4)  # an image without noise passes
    flat = sea_filter(torch.ones(2, cells, 3), grid, level)
    assert (flat - flat.mean(1, keepdim=True)).abs().max() < 1e-5
    rough = (out[1] - out[1].mean(0)).square().sum() / out[1].mean(0).square().sum()
    assert rough < 0.5 * (x[1] - x[1].mean(0)).square().sum() / x[1].mean(0).square().sum()
    for axis in grid:
        torch.testing.assert_close(wiener_gain(axis, level, 2.0).mean(1), torch.ones(2))


def test_frames_of_a_video_are_filtered_with_the_exponent_of_videos():
    x, level = torch.randn(1, 24, 2), torch.tensor([0.5])
    assert torch.equal(sea_filter(x, (2, 3, 4), level), sea_filter(x, (2, 3, 4), level, 3.0))
    assert torch.equal(sea_filter(x, (4, 6), level), sea_filter(x, (4, 6), level, 2.0))
    torch.testing.assert_close(sea_filter(x, (1, 4, 6), level), sea_filter(x, (4, 6), level))
