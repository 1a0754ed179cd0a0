"""Calibrated caches: measurements, polynomial and threshold, and a simulation that agrees with the cache."""

from __future__ import annotations

import pytest
import torch

import tokdyn
from tests.calibration.trajectories import LEVELS, trajectory, watch_blocks
from tests.contract.models import CLOCKED, TINY, one_of, sample
from tokdyn.calibration import calibrate_cache
from tokdyn.calibration.threshold import simulate
from tokdyn.cost import count
from tokdyn.errors import InputError
from tokdyn.methods import TEACACHE_FLUX
from tokdyn.ops.caching import fit_rescaling, relative_change

PAIRS = [(name, indicator) for name in CLOCKED for indicator in ("input", "first_block")]
PAIRS.remove(("DCDiT", "first_block"))  # its first block lies within its chunking


def reused(model, calls):
    """Return the number of samples that reuse, and the FLOPs, of every call of a wrapped model."""
    results = []
    for call in calls:
        spent = count(model, **call)[0]
        results.append((tokdyn.stats(model).calls[-1].reused, spent))
    return results


@pytest.mark.pairwise("caching", cost=6)
@pytest.mark.parametrize(("name", "indicator"), PAIRS)
def test_simulation_agrees_with_the_cache(name, indicator):
    model, calls = TINY[name].build(), trajectory(name, LEVELS[:4]) + trajectory(name, LEVELS[1:4])
    alike = calls if name == "DCDiT" else calls[:1]  # the tokens it keeps, and so its cost, depend on the data
    plain = len(calls) / len(alike) * sum(count(model, **call)[0] for call in alike)
    found = calibrate_cache(model, calls, tokdyn.FeatureCache(indicator=indicator), steps=0.6)
    assert found.computed <= 0.6
    tokdyn.wrap(model, [found.method])
    done = reused(model, calls)
    assert [number for number, _ in done] == [int(reuse.sum()) for reuse in simulate(found.steps, found.method)]
    # the samples of a DC-DiT differ in cost, and the share ignores that
    close = 0.05 if name == "DCDiT" else 1e-12
    assert sum(spent for _, spent in done) / plain == pytest.approx(found.flops, rel=close)
    assert 1 - sum(number for number, _ in done) / (2 * len(calls)) == pytest.approx(found.computed)


@pytest.mark.parametrize(
    "settings",
    [{"warmup": 3, "max_reused": 1}, {"start": 0.4, "end": 0.9, "max_reused": 2}, {"indicator": "time", "warmup": 2}],
    ids=["steps", "shares", "time"],
)
@torch.no_grad()
def test_the_simulation_keeps_to_the_window(settings):
    model, calls = TINY["DiT"].build(), trajectory("DiT", branches=1)
    method = tokdyn.FeatureCache(threshold=1.0, num_steps=len(LEVELS), **settings)
    found = calibrate_cache(model, calls, method, steps=0.75)
    tokdyn.wrap(model, [found.method])
    done = []
    for call in calls:
        model(**call)
        done.append(tokdyn.stats(model).calls[-1].reused)
    assert done == [int(reuse.sum()) for reuse in simulate(found.steps, found.method)]
    assert any(done)
    assert not any(done[: settings.get("warmup", 1)])


def test_rules_without_a_polynomial_are_not_calibrated():
    with pytest.raises(InputError, match=r"seacache.*needs no calibration"):
        calibrate_cache(TINY["DiT"].build(), trajectory("DiT"), tokdyn.FeatureCache(rule="seacache"))


@pytest.mark.pairwise("caching")
@pytest.mark.parametrize(("name", "indicator"), [pair for pair in PAIRS if pair[0] != "DCDiT"])
@torch.no_grad()
def test_measurements_are_relative_changes_of_indicator_and_output(name, indicator):
    """Hooks on the plain model see the same."""
    model, calls = TINY[name].build(), trajectory(name, LEVELS[:3])
    found = calibrate_cache(model, calls, tokdyn.FeatureCache(indicator=indicator), degree=1)
    indicators, outputs = [], []
    for call in calls:
        blocks = watch_blocks(model, call)
        before, after, modulated = blocks[0]
        indicators.append(modulated if indicator == "input" else after - before)
        outputs.append(blocks[-1][1])
    for now, step in enumerate(found.steps):
        if step.change is None:
            assert now < 2
            continue
        last = now - 2  # the step before in the same branch
        torch.testing.assert_close(step.change, relative_change(indicators[now], indicators[last]), rtol=1e-6, atol=0)
        torch.testing.assert_close(step.effect, relative_change(outputs[now], outputs[last]), rtol=1e-6, atol=0)


@torch.no_grad()
def test_cache_of_a_dc_dit_encloses_the_chunking():
    """Its indicator is what the encoder returns, and its output is what the decoder gets."""
    model, calls = TINY["DCDiT"].build(), trajectory("DCDiT", LEVELS[:3], branches=1)
    found = calibrate_cache(model, calls, tokdyn.FeatureCache(), degree=1)
    encoded, chunked = [], []
    model.encoder.register_forward_hook(lambda module, args, out: encoded.append(out))
    model.decoder.register_forward_pre_hook(lambda module, args: chunked.append(args[0]))
    for call in calls:
        model(**call)
    for step in (1, 2):
        torch.testing.assert_close(found.steps[step].change, relative_change(encoded[step], encoded[step - 1]))
        torch.testing.assert_close(found.steps[step].effect, relative_change(chunked[step], chunked[step - 1]))
    with pytest.raises(tokdyn.CompositionError, match=r"FeatureCache .*Chunking"):
        calibrate_cache(model, calls, tokdyn.FeatureCache(indicator="first_block"))
    tokdyn.unwrap(tokdyn.wrap(model, []))  # the model is not left wrapped


def test_polynomial_fits_the_measurements_of_all_branches_and_samples():
    model, calls = TINY["DiT"].build(), trajectory("DiT")
    found = calibrate_cache(model, calls, tokdyn.FeatureCache(threshold=0.3), degree=2)
    steps = [step for step in found.steps if step.change is not None]
    assert len(steps) == 2 * (len(LEVELS) - 1)
    changes, effects = (torch.cat([getattr(step, name) for step in steps]) for name in ("change", "effect"))
    assert found.method.coefficients == fit_rescaling(changes, effects, 2)
    assert found.method.threshold == 0.3
    assert fit_rescaling(changes, effects, 0) == pytest.approx((float(effects.double().mean()),))
    residual = (torch.tensor(found.method.coefficients) * changes[:, None] ** torch.tensor([2, 1, 0])).sum(1) - effects
    assert found.fit == pytest.approx(1 - float(residual.var(correction=0) / effects.var(correction=0)), abs=1e-3)


def test_measurements_do_not_span_trajectories_or_branches():
    """Trajectories in any order give the same measurements as alone."""
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


def test_samples_are_measured_independently():
    model, calls = TINY["DiT"].build(), trajectory("DiT", branches=1)
    both = calibrate_cache(model, calls, tokdyn.FeatureCache()).steps
    second = calibrate_cache(model, [one_of(call, 1) for call in calls], tokdyn.FeatureCache()).steps
    for pair, alone in zip(both[1:], second[1:], strict=True):
        torch.testing.assert_close(pair.change[1:], alone.change, rtol=1e-5, atol=0)
        torch.testing.assert_close(pair.effect[1:], alone.effect, rtol=1e-5, atol=0)


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("kind", ["flops", "steps"])
def test_threshold_meets_its_target_and_a_lower_one_does_not(kind, target):
    model, calls = TINY["DiT"].build(), trajectory("DiT")
    found = calibrate_cache(model, calls, tokdyn.FeatureCache(num_steps=len(LEVELS)), **{kind: target})
    share = found.flops if kind == "flops" else found.computed
    assert share <= target
    least = sum(int((~reuse).sum()) for reuse in simulate(found.steps, found.method))
    tighter = found.method.model_copy(update={"threshold": 0.5 * found.method.threshold})
    assert sum(int((~reuse).sum()) for reuse in simulate(found.steps, tighter)) > least
    assert target - share < 2.5 / len(LEVELS)  # a threshold moves several samples at once


@torch.no_grad()
def test_calibrated_cache_is_closer_than_an_even_one_with_as_many_computed_steps():
    """The point of calibrating: the steps that it reuses are those that matter least."""
    model, calls = TINY["DiT"].build(), trajectory("DiT", tuple(1 - (step / 24) ** 2 for step in range(24)), 1, 1)
    plain = [sample(model(**call)) for call in calls]
    found = calibrate_cache(model, calls, tokdyn.FeatureCache(), steps=0.5)
    computed = round(found.computed * len(calls))
    even = tokdyn.FeatureCache(steps=tuple(sorted({round(i * len(calls) / computed) for i in range(computed)})))
    error = []
    for method in (found.method, even):
        tokdyn.wrap(model, [method])
        errors = [
            (sample(model(**call)) - right).norm() / right.norm() for call, right in zip(calls, plain, strict=True)
        ]
        assert sum(not record.cached for record in tokdyn.stats(model).calls) == computed
        error.append(float(torch.stack(errors).square().mean()))
        tokdyn.unwrap(model)
    assert error[0] < error[1]


def test_published_coefficients_are_accepted():
    cache = tokdyn.FeatureCache(threshold=0.4, coefficients=TEACACHE_FLUX)
    assert len(cache.coefficients) == 5
    assert cache.coefficients[-1] == pytest.approx(0.264230861)


@pytest.mark.parametrize(
    ("method", "options", "named"),
    [
        (tokdyn.FeatureCache(), {"flops": 0.5, "steps": 0.5}, "flops .*steps"),
        (tokdyn.FeatureCache(), {"steps": 1.5}, r"steps=1\.5"),
        (tokdyn.FeatureCache(), {"steps": 0.01}, r"steps=0\.01 .* 0\.125"),
        (tokdyn.FeatureCache(), {"degree": 0}, "degree=0"),
        (tokdyn.FeatureCache(), {"levels": 4}, "levels .*FeatureCache"),
        (tokdyn.FeatureCache(steps=(0, 2)), {}, r"FeatureCache\(steps=\(0, 2\)\)"),
    ],
)
def test_invalid_options_are_refused(method, options, named):
    with pytest.raises(tokdyn.InputError, match=named):
        tokdyn.calibrate(TINY["DiT"].build(), trajectory("DiT"), method, **options)


def test_calls_without_two_steps_are_refused():
    with pytest.raises(tokdyn.InputError, match="trajectories"):
        tokdyn.calibrate(TINY["DiT"].build(), trajectory("DiT", (0.5,)), tokdyn.FeatureCache())
