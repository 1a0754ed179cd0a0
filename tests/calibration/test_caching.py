"""Calibrated caches: the points, the polynomial, the threshold, and that the simulation is what the cache does."""

from __future__ import annotations

import pytest
import torch

import tokdyn
from tests.calibration.trajectories import LEVELS, trajectory
from tests.contract.models import CLOCKED, TINY, one_of, sample
from tokdyn.calibration import calibrate_cache
from tokdyn.calibration.threshold import simulate
from tokdyn.cost import count
from tokdyn.methods import TEACACHE_FLUX
from tokdyn.ops.caching import fit_rescaling, relative_change

PAIRS = [(name, indicator) for name in CLOCKED for indicator in ("input", "first_block")]
PAIRS.remove(("DCDiT", "first_block"))  # its first block lies within its chunking
every = pytest.mark.parametrize(("name", "indicator"), PAIRS)


def reused(model, calls):
    """The number of samples that reuse, and FLOPs, of every call of a wrapped model."""
    found = []
    for call in calls:
        spent = count(model, **call)[0]
        found.append((tokdyn.stats(model).calls[-1].reused, spent))
    return found


@every
def test_the_simulation_is_what_the_cache_does(name, indicator):
    model, calls = TINY[name].build(), trajectory(name, LEVELS[:4]) + trajectory(name, LEVELS[1:4])
    alike = calls if name == "DCDiT" else calls[:1]  # what it keeps, and so what it costs, depends on the data
    plain = len(calls) / len(alike) * sum(count(model, **call)[0] for call in alike)
    found = calibrate_cache(model, calls, tokdyn.FeatureCache(indicator=indicator), steps=0.6)
    assert found.computed <= 0.6
    tokdyn.wrap(model, [found.method])
    done = reused(model, calls)
    assert [number for number, _ in done] == [int(reuse.sum()) for reuse in simulate(found.steps, found.method)]
    # the samples of DC-DiT differ in cost, and the share takes them for equal
    close = 0.05 if name == "DCDiT" else 1e-12
    assert sum(spent for _, spent in done) / plain == pytest.approx(found.flops, rel=close)
    assert 1 - sum(number for number, _ in done) / (2 * len(calls)) == pytest.approx(found.computed)


@pytest.mark.parametrize(("name", "indicator"), [pair for pair in PAIRS if pair[0] != "DCDiT"])
@torch.no_grad()
def test_the_points_are_relative_changes_of_indicator_and_output(name, indicator):
    """Compared with hooks on a wrapped model whose cache reuses nothing."""
    model, calls = TINY[name].build(), trajectory(name, LEVELS[:3])
    found = calibrate_cache(model, calls, tokdyn.FeatureCache(indicator=indicator), degree=1)
    outputs = []

    class Last:
        """A bracket around the last block that keeps what comes out of it."""

        first = last = 3

        def open(self, run, x):
            return x

        def close(self, run, x):
            outputs.append(x)
            return x

    tokdyn.wrap(model, [tokdyn.FeatureCache(threshold=1e-9, indicator=indicator)])
    *before, cache = model.tokdyn.actors.brackets
    model.tokdyn.actors = type(model.tokdyn.actors)(brackets=(*before, cache, Last()))
    seen = []
    for call, step in zip(calls, found.steps, strict=True):
        model(**call)
        seen.append(cache.memory.branches[len(seen) % 2].seen)
        if step.change is None:
            assert len(seen) <= 2
            continue
        now = len(seen) - 1
        torch.testing.assert_close(step.change, relative_change(seen[now], seen[now - 2]), rtol=1e-6, atol=0)
        torch.testing.assert_close(step.effect, relative_change(outputs[now], outputs[now - 2]), rtol=1e-6, atol=0)


@torch.no_grad()
def test_in_dc_dit_the_cache_looks_around_the_chunking(monkeypatch):
    model, calls = TINY["DCDiT"].build(), trajectory("DCDiT", LEVELS[:3], branches=1)
    found = calibrate_cache(model, calls, tokdyn.FeatureCache(), degree=1)
    plain, tokens, results = type(model)._chunked, [], []

    def spy(self, x, *rest):
        tokens.append(x)
        results.append(plain(self, x, *rest)[0])
        return results[-1], plain(self, x, *rest)[1]

    monkeypatch.setattr(type(model), "_chunked", spy)
    for call in calls:
        model(**call)
    for step in (1, 2):
        torch.testing.assert_close(found.steps[step].change, relative_change(tokens[step], tokens[step - 1]))
        torch.testing.assert_close(found.steps[step].effect, relative_change(results[step], results[step - 1]))
    with pytest.raises(tokdyn.CompositionError, match="begins behind the first block"):
        calibrate_cache(model, calls, tokdyn.FeatureCache(indicator="first_block"))
    tokdyn.unwrap(tokdyn.wrap(model, []))  # it is not left wrapped


def test_the_polynomial_fits_the_points_of_all_branches_and_samples():
    model, calls = TINY["DiT"].build(), trajectory("DiT")
    found = calibrate_cache(model, calls, tokdyn.FeatureCache(threshold=0.3), degree=2)
    steps = [step for step in found.steps if step.change is not None]
    assert len(steps) == 2 * (len(LEVELS) - 1)
    changes, effects = (torch.cat([getattr(step, name) for step in steps]) for name in ("change", "effect"))
    assert found.method.coefficients == fit_rescaling(changes, effects, 2)
    assert found.method.threshold == 0.3
    assert fit_rescaling(changes, effects, 0) == pytest.approx((float(effects.double().mean()),))
    left = (torch.tensor(found.method.coefficients) * changes[:, None] ** torch.tensor([2, 1, 0])).sum(1) - effects
    assert found.fit == pytest.approx(1 - float(left.var(correction=0) / effects.var(correction=0)), abs=1e-3)


def test_no_pair_reaches_over_trajectories_or_branches():
    """Trajectories in any order, and branches apart, give the same points as alone."""
    model = TINY["DiT"].build()
    one, two = (
        trajectory("DiT", branches=1),
        [{**call, "class_labels": call["class_labels"] + 3} for call in trajectory("DiT", LEVELS[1:], branches=1)],
    )
    apart = [calibrate_cache(model, calls, tokdyn.FeatureCache()).steps for calls in (one, two)]
    together = calibrate_cache(model, two + one, tokdyn.FeatureCache()).steps
    expected = [*apart[1], *apart[0]]
    assert [step.change is None for step in together] == [step.change is None for step in expected]
    for now, alone in zip(together, expected, strict=True):
        if now.change is not None:
            assert torch.equal(now.change, alone.change)
            assert torch.equal(now.effect, alone.effect)


def test_samples_are_measured_apart():
    model, calls = TINY["DiT"].build(), trajectory("DiT", branches=1)
    both = calibrate_cache(model, calls, tokdyn.FeatureCache()).steps
    second = calibrate_cache(model, [one_of(call, 1) for call in calls], tokdyn.FeatureCache()).steps
    for pair, alone in zip(both[1:], second[1:], strict=True):
        torch.testing.assert_close(pair.change[1:], alone.change, rtol=1e-5, atol=0)
        torch.testing.assert_close(pair.effect[1:], alone.effect, rtol=1e-5, atol=0)


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("kind", ["flops", "steps"])
def test_the_threshold_meets_its_target_and_a_little_less_does_not(kind, target):
    model, calls = TINY["DiT"].build(), trajectory("DiT")
    found = calibrate_cache(model, calls, tokdyn.FeatureCache(num_steps=len(LEVELS)), **{kind: target})
    share = found.flops if kind == "flops" else found.computed
    assert share <= target
    least = sum(int((~reuse).sum()) for reuse in simulate(found.steps, found.method))
    tighter = found.method.model_copy(update={"threshold": 0.5 * found.method.threshold})
    assert sum(int((~reuse).sum()) for reuse in simulate(found.steps, tighter)) > least
    assert target - share < 2.5 / len(LEVELS)  # a threshold moves several samples at once


@torch.no_grad()
def test_a_calibrated_cache_is_closer_than_an_even_one_that_computes_as_much():
    """The point of calibrating: with as many computed steps, the others are those that cost less."""
    model, calls = TINY["DiT"].build(), trajectory("DiT", tuple(1 - (step / 24) ** 2 for step in range(24)), 1, 1)
    plain = [sample(model(**call)) for call in calls]
    found = calibrate_cache(model, calls, tokdyn.FeatureCache(), steps=0.5)
    computed = round(found.computed * len(calls))
    even = tokdyn.FeatureCache(steps=tuple(sorted({round(i * len(calls) / computed) for i in range(computed)})))
    error = []
    for method in (found.method, even):
        tokdyn.wrap(model, [method])
        away = [(sample(model(**call)) - right).norm() / right.norm() for call, right in zip(calls, plain, strict=True)]
        assert sum(not record.cached for record in tokdyn.stats(model).calls) == computed
        error.append(float(torch.stack(away).square().mean()))
        tokdyn.unwrap(model)
    assert error[0] < error[1]


def test_published_coefficients_can_be_started_from():
    cache = tokdyn.FeatureCache(threshold=0.4, coefficients=TEACACHE_FLUX)
    assert len(cache.coefficients) == 5
    assert cache.coefficients[-1] == pytest.approx(0.264230861)


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        (tokdyn.FeatureCache(), {"flops": 0.5, "steps": 0.5}, "give flops or steps"),
        (tokdyn.FeatureCache(), {"steps": 1.5}, "steps is 1.5; give the share to come down to, between 0 and 1"),
        (tokdyn.FeatureCache(), {"steps": 0.01}, r"steps=0.01 cannot be reached: .* leaves 0\.125; ask for more"),
        (tokdyn.FeatureCache(), {"degree": 0}, "degree is 0"),
        (tokdyn.FeatureCache(), {"levels": 4}, "levels has no meaning for FeatureCache"),
        (tokdyn.FeatureCache(steps=(0, 2)), {}, r"FeatureCache\(steps=\(0, 2\)\) says already which steps"),
    ],
)
def test_mistakes_are_named(method, options, sentence):
    with pytest.raises(tokdyn.InputError, match=sentence):
        tokdyn.calibrate(TINY["DiT"].build(), trajectory("DiT"), method, **options)


def test_calls_without_two_steps_are_refused():
    with pytest.raises(tokdyn.InputError, match="hold no two steps of one trajectory"):
        tokdyn.calibrate(TINY["DiT"].build(), trajectory("DiT", (0.5,)), tokdyn.FeatureCache())
