"""Costs of blocks that depend on more than image and text tokens: further arguments, experts, configurations.

The law that computed FLOPs equal counted ones is checked for every class in `test_laws.py` and the tests of coverage.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokdyn
from tests.contract.coverage_images import IMAGES
from tests.contract.coverage_videos import VIDEOS
from tests.contract.kit import latents, randomized
from tokdyn import DepthSkip, FeatureCache, TokenMerge
from tokdyn.adapters import ADAPTERS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own
KNOWN = {**IMAGES, **VIDEOS}
UNKNOWN = {
    "Sana WM",  # attention along frames in chunks
    "Kandinsky 6 SR",  # attention to blocks that the data choose
    "Latte",  # attention among the tokens of a frame, or of a place
    "Wan Animate 2",  # attention to stored keys
    "AnyFlow FAR",
}
LTX, K6, SA3 = "LTX-2.3", "Kandinsky6Transformer3DModel", "StableAudio3DiTModel"
MOTIF, HELIOS, HIDREAM = "MotifVideoTransformer3DModel", "HeliosTransformer3DModel", "HiDreamImageTransformer2DModel"

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "text mask": ("GlmImageTransformer2DModel", {}, {"attention_mask": torch.ones(2, 6)}),
    "no attention between video and sound": (LTX, {}, {"isolate_modalities": True}),
    "perturbed block": (LTX, {}, {"spatio_temporal_guidance_blocks": [2]}),
    "perturbed sample": (
        LTX, {}, {"spatio_temporal_guidance_blocks": [2], "perturbation_mask": torch.tensor([0.0, 1.0])},
    ),
    "no sound": (K6, {}, {"audio_hidden_states": None}),
    "nothing to inpaint": (SA3, {}, {"local_add_cond": None}),
    "one map of attention": (SA3, {"use_differential_attention": False}, {}),
    "text for earlier frames": (HELIOS, {"guidance_cross_attn": False}, {}),
    "no text for earlier frames": (HELIOS, {"guidance_cross_attn": True}, {}),
    "decoder": (MOTIF, {"num_decoder_layers": 1, "num_single_layers": 3}, {}),
    "image before the text": (MOTIF, {"image_embed_dim": 8}, {"image_embeds": latents(2, 3, 8)}),
    "one timestep for all frames": ("Cosmos 2", {}, {"timestep": torch.full((2,), 0.5)}),
    "no experts": (HIDREAM, {"num_routed_experts": 0}, {}),
    "one expert for each token": (HIDREAM, {"num_activated_experts": 1}, {}),
    "more places than tokens for experts": ("NucleusMoEImageTransformer2DModel", {"capacity_factors": 0.3}, {}),
}  # fmt: skip


def tiny(name: str, **changes: Any) -> nn.Module:
    """A tiny model with another configuration."""
    model: Any = KNOWN[name].build()
    if not changes:
        return model
    torch.manual_seed(0)
    kept = {key: value for key, value in model.config.items() if not key.startswith("_")}
    other = type(model)(**{**kept, **changes})
    if name.startswith("Nucleus"):
        other.load_state_dict(model.state_dict())  # it leaves weights of experts empty
    return randomized(other)


def arguments(case: str) -> dict[str, Any]:
    name, _, more = CASES[case]
    call = {**KNOWN[name].inputs(2), **more}
    return {key: value for key, value in call.items() if value is not None}


@pytest.mark.parametrize("case", CASES)
def test_computed_is_counted_whatever_is_given(case: str) -> None:
    name, changes, _ = CASES[case]
    call = arguments(case)
    plain = tokdyn.flops(tiny(name, **changes), **call)
    assert plain.computed
    assert plain.dense == plain.total == plain.counted
    model = tiny(name, **changes)
    skip = DepthSkip(blocks=(1,))
    methods = [skip] if case in ("decoder", "perturbed sample") else [TokenMerge(ratio=0.5), skip]
    found = tokdyn.flops(tokdyn.wrap(model, methods), **call)
    assert found.total == found.counted < plain.total
    assert found.dense == plain.total


def test_nearly_all_families_say_what_their_blocks_multiply() -> None:
    without = {adapter.name for adapter in ADAPTERS if any(blocks.products is None for blocks in adapter.blocks)}
    assert without == UNKNOWN


@pytest.mark.slow  # flex attention without a compiler
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_a_model_whose_data_choose_what_attends_to_what_is_counted() -> None:
    name = "Kandinsky6SRTransformer3DModel"
    model, call = KNOWN[name].build(), KNOWN[name].inputs(1)
    plain = tokdyn.flops(model, **call)
    assert not plain.computed
    found = tokdyn.flops(tokdyn.wrap(model, [DepthSkip(blocks=(1,))]), **call)
    assert found.dense == plain.total > found.total


@torch.no_grad()
def test_a_cached_step_is_compared_with_what_the_blocks_would_get() -> None:
    """The last blocks of the decoder read all tokens as text, which a step whose blocks do not run cannot tell."""
    name, changes, _ = CASES["decoder"]
    call, tiny_one = arguments("decoder"), KNOWN[name]
    plain = tokdyn.flops(tiny(name, **changes), **call)
    model = tokdyn.wrap(tiny(name, **changes), [FeatureCache(threshold=1e9)])
    for level in (0.9, 0.8):
        model(**{**call, **tiny_one.at(2, level)})
    computed, cached = tokdyn.stats(model).calls
    assert cached.cached
    assert cached.dense_flops == computed.dense_flops == computed.block_flops
    found = tokdyn.flops(model, **{**call, **tiny_one.at(2, 0.7)})
    assert found.total == found.counted < plain.total
    assert found.dense == plain.total


def moving(call: dict[str, Any]) -> dict[str, Any]:
    """The call with a little other latents."""
    return {**call, "hidden_states": 0.99 * call["hidden_states"]}


@pytest.mark.parametrize("method", [DepthSkip(blocks=(1,)), DepthSkip(learned=True), FeatureCache(threshold=1e9)])
@torch.no_grad()
def test_models_whose_products_are_not_known_are_counted_twice(method: Any) -> None:
    """With methods and without, and the trajectory goes on as if nothing had been counted."""
    tiny_one = VIDEOS["SanaWMTransformer3DModel"]
    call = tiny_one.inputs(2)
    plain = tokdyn.flops(tiny_one.build(), **call)
    model = tokdyn.wrap(tiny_one.build(), [method])
    first = tokdyn.flops(model, **call)
    assert not first.computed
    assert first.dense == plain.counted
    assert "by calling the model" in str(first)
    if isinstance(method, FeatureCache):
        assert first.total == plain.total  # nothing is cached yet
        model(**call)
        later = tokdyn.flops(model, **moving({**call, "timestep": 0.9 * call["timestep"]}))
        assert later.total < 0.1 * plain.total
        assert later.dense == plain.counted
    assert len(tokdyn.stats(model).calls) == isinstance(method, FeatureCache)
    assert tokdyn.stats(model).flops in (None, 0)


def test_levels_that_differ_by_frame_cost_more_modulation() -> None:
    """Where every token has a timestep of its own, adaLN runs over tokens, and over fewer with fewer tokens."""
    call = VIDEOS["Cosmos 2"].inputs(2)
    by_frame = tokdyn.flops(VIDEOS["Cosmos 2"].build(), **call)
    shared: dict[str, Tensor] = {**call, "timestep": torch.full((2,), 0.5)}
    once = tokdyn.flops(VIDEOS["Cosmos 2"].build(), **shared)
    assert by_frame.parts["adaLN"] == 24 * once.parts["adaLN"]
