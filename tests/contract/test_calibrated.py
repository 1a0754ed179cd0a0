"""Fingerprints: one warning where a calibrated method meets another model or sampler, and silence elsewhere."""

import re
import warnings

import pytest
import torch

import tokdyn
from tests.contract.models import CLOCKED, TINY, of_diffusers
from tokdyn import FeatureCache
from tokdyn.attach import different, fingerprint, other_sampler
from tokdyn.methods import TEACACHE_FLUX

LEVELS = (0.9, 0.6, 0.3)


def skip_of(model):
    return tokdyn.DepthSkip(table=((0.0, 1.0, (1,)),), fingerprint=fingerprint(model))


def cache_of(model, levels=LEVELS):
    return tokdyn.FeatureCache(threshold=0.5, fingerprint=fingerprint(model, levels))


@torch.no_grad()
def sampled(model, levels, batch=1):
    """Run the model through noise levels."""
    tiny = TINY[type(model).__name__]
    for level in levels:
        model(**{**tiny.inputs(batch), **tiny.at(batch, level)})


def said(action):
    """The warnings of an action."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        action()
    return [str(each.message) for each in found if issubclass(each.category, UserWarning)]


@pytest.mark.parametrize("name", CLOCKED)
def test_a_model_knows_its_own_fingerprint(name):
    model = TINY[name].build()
    mark = fingerprint(model, LEVELS)
    assert mark == fingerprint(TINY[name].build(), LEVELS)
    assert mark.startswith(f"{name}:")
    assert len(mark) < 100
    assert different(mark, model) is None
    tokdyn.wrap(model, [skip_of(model), cache_of(model)])  # any warning would be an error
    assert fingerprint(model, LEVELS) == mark
    sampled(model, [*LEVELS, *LEVELS, *LEVELS])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["DiT", "FluxTransformer2DModel"])
def test_a_cast_model_is_the_same_model(name, dtype):
    mark = fingerprint(TINY[name].build())
    assert different(mark, TINY[name].build().to(dtype)) is None
    assert different(fingerprint(TINY[name].build().to(dtype)), TINY[name].build()) is None


def test_another_model_is_told_once_with_the_reason_and_the_cure():
    model, other = TINY["DiT"].build(), TINY["DiT"].build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    (found,) = said(lambda: tokdyn.wrap(other, [skip_of(model), cache_of(model)]))
    assert re.search(r"^DepthSkip .*weights.*tokdyn\.calibrate\(model, calls, DepthSkip\(\)\)\.$", found)
    assert said(lambda: sampled(other, LEVELS)) == []


def test_the_warning_points_at_the_line_of_the_user():
    mark = tokdyn.DepthSkip(fingerprint="SiT:0:0")
    with pytest.warns(UserWarning, match="DiT.* SiT") as found:
        tokdyn.wrap(TINY["DiT"].build(), [mark])
    assert found[0].filename == __file__


def test_another_configuration_is_told():
    settings = {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "sample_size": 8,
        "patch_size": 2, "num_embeds_ada_norm": 1000,
    }  # fmt: skip
    model, wide = (of_diffusers("DiTTransformer2DModel", **settings, norm_eps=eps) for eps in (1e-5, 1e-3))
    assert "configuration" in (different(fingerprint(model), wide) or "")
    plain = torch.nn.Sequential(torch.nn.Linear(3, 4))
    other = torch.nn.Sequential(torch.nn.Linear(3, 5))
    assert "configuration" in (different(fingerprint(plain), other) or "")


def test_methods_do_not_count_and_weights_that_cannot_be_read_are_passed_over():
    model = TINY["DiT"].build()
    mark = fingerprint(model)
    tokdyn.wrap(model, [tokdyn.Chunking(target=4)])
    assert fingerprint(model) == mark
    empty = TINY["DiT"].build().to("meta")
    assert different(mark, empty) is None
    assert different(fingerprint(empty), TINY["DiT"].build()) is None


def test_another_sampler_is_told_once_after_a_trajectory():
    model = TINY["DiT"].build()
    tokdyn.wrap(model, [cache_of(model)])
    assert said(lambda: sampled(model, [0.9, 0.5])) == []
    (found,) = said(lambda: sampled(model, [0.9]))
    assert re.search(r"^FeatureCache .*sampler.* 2 steps.* 3\.", found)
    assert "tokdyn.calibrate(model, calls, FeatureCache())" in found
    assert said(lambda: sampled(model, [0.5, 0.9, 0.1, 0.8])) == []


def test_a_pipeline_that_says_when_it_is_done_is_told_then():
    model = TINY["DiT"].build()
    tokdyn.wrap(model, [cache_of(model)])
    sampled(model, [0.9, 0.5, 0.3])
    (found,) = said(model._reset_stateful_cache)
    assert re.search(r"0\.900-0\.500-0\.300.* 0\.900-0\.600-0\.300", found)


def test_depth_skipping_holds_for_any_number_of_steps():
    model = TINY["DiT"].build()
    tokdyn.wrap(model, [skip_of(model)])
    sampled(model, [0.9, 0.5, 0.9, 0.4, 0.9])


def test_training_and_single_calls_are_no_trajectories():
    model = TINY["DiT"].build()
    tokdyn.wrap(model, [cache_of(model)])
    sampled(model, [0.3, 0.5, 0.7, 0.9])  # each above the one before
    model.train()
    for _ in range(3):
        model(**TINY["DiT"].inputs(1))


def test_samplers_are_compared_within_half_precision():
    mark = fingerprint(torch.nn.Linear(2, 2), (0.999, 0.5, 0.02))
    assert other_sampler(mark, (0.9985, 0.5, 0.0195)) is None
    assert other_sampler(mark, (0.95, 0.5, 0.02)) is not None
    assert other_sampler(fingerprint(torch.nn.Linear(2, 2)), (0.9, 0.5)) is None


def test_published_coefficients_warn_on_models_of_another_family():
    method = FeatureCache(coefficients=TEACACHE_FLUX)
    with pytest.warns(UserWarning, match="FluxTransformer2DModel.* DiTTransformer2DModel"):
        tokdyn.wrap(TINY["DiTTransformer2DModel"].build(), [method])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokdyn.wrap(TINY["FluxTransformer2DModel"].build(), [method])
        tokdyn.wrap(TINY["DiTTransformer2DModel"].build(), [FeatureCache(coefficients=(2.0, 0.0))])
