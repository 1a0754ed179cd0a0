"""Modular pipelines of diffusers: their loop is a block, and a guider asks for the predictions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tokdyn
from tests.contract.models import TINY
from tests.contract.pipelines import flux, prompts, sd3, wan
from tests.pipelines.calls import branches, kept, quiet, seen
from tokdyn import Chunking, FeatureCache

pytest.importorskip("diffusers.modular_pipelines.stable_diffusion_3", reason="diffusers 0.42 has the pipelines tested")

from diffusers.guiders import ClassifierFreeGuidance, SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxAutoBlocks
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import StableDiffusion3AutoBlocks
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanBlocks

ALWAYS = [FeatureCache(threshold=1e9)]
NEVER = [FeatureCache(steps=tuple(range(9)))]
PAIR = ("cond", "uncond")


def without_guidance(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in given.items() if not key.startswith("negative")}


MODULAR: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Wan": (WanBlocks, wan, {**prompts(), "height": 32, "width": 48, "num_frames": 5, "output": "videos"}),
    "SD3": (StableDiffusion3AutoBlocks, sd3, {**prompts(pooled=True), "height": 8, "width": 16, "output": "images"}),
    "Flux": (
        FluxAutoBlocks,
        flux,
        {**without_guidance(prompts(pooled=True)), "height": 16, "width": 24, "output": "images"},
    ),
}
"""The blocks, the pipeline whose components they get, and the arguments of a call."""


def modular(name: str, **components: Any) -> Any:
    """A modular pipeline without the blocks of text and image encoders, which get nothing to do."""
    make, whole, _ = MODULAR[name]
    blocks = make()
    for block in [each for each in blocks.sub_blocks if each.endswith("encoder")]:
        blocks.sub_blocks.pop(block)
    pipe = blocks.init_pipeline()
    pipe.update_components(**{key: each for key, each in whole().components.items() if key in pipe.components})
    pipe.update_components(**components)
    return quiet(pipe)


def draw(pipe: Any, name: str, **more: Any) -> Tensor:
    given = {**MODULAR[name][2], "num_inference_steps": 5, "output_type": "pt", **more}
    return torch.as_tensor(pipe(**given, generator=torch.Generator().manual_seed(3))).clone()


@pytest.mark.parametrize("name", MODULAR)
def test_steps_and_branches_are_told(name: str) -> None:
    pipe = modular(name)
    kind, plain = type(pipe), draw(pipe, name)
    assert tokdyn.wrap(pipe, ALWAYS) is pipe
    first = draw(pipe, name)
    assert not torch.equal(first, plain)
    assert branches(pipe) == dict.fromkeys(range(5), ("cond",) if name == "Flux" else PAIR)
    assert {step for step, _, reused in seen(pipe) if reused} == {1, 2, 3}
    assert torch.equal(draw(pipe, name), first)
    with tokdyn.disabled(pipe):
        assert torch.equal(draw(pipe, name), plain)
    tokdyn.unwrap(pipe)
    assert type(pipe) is kind
    assert torch.equal(draw(pipe, name), plain)


def test_steps_are_counted_where_image_to_image_begins() -> None:
    pipe = tokdyn.wrap(modular("Flux"), ALWAYS)
    draw(pipe, "Flux", image_latents=torch.ones(1, 4, 16, 24), strength=0.6)
    assert seen(pipe) == [(0, "cond", 0), (1, "cond", 1), (2, "cond", 0)]


def test_predictions_of_a_guider_are_branches() -> None:
    """It skips layers from step 1 to step 3, by hooks that come and go."""
    skipping = LayerSkipConfig(indices=[1], fqn="blocks")
    guider = SkipLayerGuidance(guidance_scale=3.0, skip_layer_guidance_stop=0.9, skip_layer_config=skipping)
    pipe = modular("Wan", guider=guider)
    plain = draw(pipe, "Wan")
    assert torch.equal(draw(tokdyn.wrap(pipe, NEVER), "Wan"), plain)
    tokdyn.unwrap(pipe)
    tokdyn.wrap(pipe, ALWAYS)
    first = draw(pipe, "Wan")
    assert branches(pipe) == {0: PAIR, **dict.fromkeys(range(1, 4), (*PAIR, "cond_skip")), 4: PAIR}
    assert [step for step, branch, reused in seen(pipe) if branch == "cond_skip" and not reused] == [1]
    assert torch.equal(draw(pipe, "Wan"), first)
    assert type(pipe.guider) is SkipLayerGuidance
    tokdyn.unwrap(pipe)
    tokdyn.wrap(pipe, [Chunking(target=2)])
    tokdyn.set_tail_drop(pipe, {"cond": 0.0, "uncond": 0.5})
    draw(pipe, "Wan")
    assert kept(pipe) == {"cond": (6,), "uncond": (3,), "cond_skip": (6,)}


def test_a_guider_may_stop() -> None:
    pipe = tokdyn.wrap(modular("Wan", guider=ClassifierFreeGuidance(guidance_scale=3.0, stop=0.5)), ALWAYS)
    draw(pipe, "Wan")
    assert branches(pipe) == {0: PAIR, 1: PAIR, **dict.fromkeys(range(2, 5), ("cond",))}


def test_methods_are_saved_copied_and_lost_with_the_model(tmp_path: Path) -> None:
    pipe = modular("Wan")
    plain = draw(pipe, "Wan")
    tokdyn.wrap(pipe, [*ALWAYS, Chunking(target=2)])
    expected = draw(pipe, "Wan")
    again = tokdyn.load(modular("Wan"), tokdyn.save(pipe, tmp_path))
    assert torch.equal(draw(again, "Wan"), expected)
    twin = copy.deepcopy(pipe)
    assert twin.transformer is not pipe.transformer
    assert torch.equal(draw(twin, "Wan"), expected)
    pipe.update_components(transformer=TINY["WanTransformer3DModel"].build())
    assert torch.equal(draw(pipe, "Wan"), plain)
