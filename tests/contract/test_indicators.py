"""The indicator of feature caches in variants of models that modulate some tokens apart from the others."""

import pytest
import torch

import tokdyn
from tests.contract.kit import assert_a_cache_compares_what_attention_gets, moved
from tests.contract.models import TINY, of_diffusers, one_of, sample
from tests.contract.references import token_replace


def wan():
    """Wan 2.2 from an image: the tokens of the first frame are clean."""
    inputs = TINY["WanTransformer3DModel"].inputs(2)
    frames = torch.tensor([0.0] * 12 + [500.0] * 12)  # 2 frames of 4 x 3 tokens
    return TINY["WanTransformer3DModel"].build(), {**inputs, "timestep": frames.expand(2, -1)}


def qwen():
    """Qwen-Image-Edit: tokens of reference images have a timestep of their own."""
    model = of_diffusers(
        "QwenImageTransformer2DModel",
        patch_size=2, in_channels=16, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 6, 6), zero_cond_t=True,
    )  # fmt: skip
    return model, TINY["QwenImageTransformer2DModel"].inputs(2)


def hunyuan():
    """HunyuanVideo from an image: the first frame is modulated by a timestep of zero."""
    return token_replace(), TINY["HunyuanVideoTransformer3DModel"].inputs(2)


@pytest.mark.parametrize("variant", [wan, qwen, hunyuan], ids=lambda variant: variant.__name__)
@torch.no_grad()
def test_the_indicator_is_what_attention_gets(variant):
    _, inputs = variant()
    after = {**moved(inputs), "timestep": 0.9 * inputs["timestep"]}
    assert_a_cache_compares_what_attention_gets(lambda: variant()[0], inputs, after)


@pytest.mark.parametrize("variant", [wan, qwen, hunyuan], ids=lambda variant: variant.__name__)
@torch.no_grad()
def test_samples_do_not_depend_on_each_other(variant):
    """A block that one of two samples skips gets the modulation of the other."""
    model, inputs = variant()
    shares = torch.tensor([1.0, 0.2]).view(2, *[1] * (inputs["timestep"].dim() - 1))
    inputs["timestep"] = (inputs["timestep"] * shares).to(inputs["timestep"].dtype)
    tokdyn.wrap(model, [tokdyn.DepthSkip(blocks=(1,), levels=(0.3, 1.0))])
    together = sample(model(**inputs))
    assert [block.samples for block in tokdyn.traces(model)[-1].blocks] == [2, 1, 2, 2]
    for i in range(2):
        alone = sample(model(**one_of(inputs, i)))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=2e-6)


@torch.no_grad()
def test_a_model_with_clean_tokens_is_calibrated_by_its_noisy_ones():
    model, inputs = wan()
    with tokdyn.recording(model) as calls:
        for level in (0.9, 0.5, 0.1):
            model(**{**inputs, "timestep": inputs["timestep"] * 2 * level})
    method = tokdyn.calibrate(model, calls, tokdyn.DepthSkip(), flops=0.8, levels=3)
    assert [row[:2] for row in method.table] == [(0.0, 0.3), (0.3, 0.7), (0.7, 1.0)]
