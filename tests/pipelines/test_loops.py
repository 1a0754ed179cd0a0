"""Loops of pipelines that are unlike the usual one: inpainting, schedules of one's own, copies of the scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import tokdyn
from tests.contract.models import TINY, of_diffusers
from tests.contract.pipelines import build, flux, images, prompts, vae, wan
from tests.pipelines.calls import branches, quiet, seen
from tokdyn import FeatureCache

ALWAYS = [FeatureCache(threshold=1e9)]
Draw = Callable[[Any], Tensor]


def reused(pipe: Any) -> list[bool]:
    """For each step whether it was reused, by all branches or none."""
    found = [{bool(reused) for at, _, reused in seen(pipe) if at == step} for step in range(len(branches(pipe)))]
    assert all(len(each) == 1 for each in found)
    return [each.pop() for each in found]


def check(pipe: Any, draw: Draw, steps: int) -> None:
    """The first and the last of a number of steps are computed, in both of two calls."""
    tokdyn.wrap(pipe, ALWAYS)
    first = draw(pipe)
    expected = [0 < step < steps - 1 for step in range(steps)]
    assert reused(pipe) == expected
    assert torch.equal(draw(pipe), first)
    assert reused(pipe) == expected


def draw(pipe: Any, **given: Any) -> Tensor:
    given = {"num_inference_steps": 5, "output_type": "np", **given}
    return torch.as_tensor(pipe(**given, generator=torch.Generator().manual_seed(3))[0]).clone()


def masked(rows: int, columns: int, **more: Any) -> Draw:
    picture = torch.linspace(0, 1, rows * columns).view(1, 1, rows, columns)
    given = {"image": picture.repeat(1, 3, 1, 1), "mask_image": picture.round(), "strength": 0.6}
    size = {"height": rows, "width": columns}
    return lambda pipe: draw(pipe, **given, **size, **prompts(pooled=True), **more)


def sd3_inpainting(scheduler: Any) -> Any:
    model = of_diffusers(
        "SD3Transformer2DModel",
        sample_size=8, patch_size=2, in_channels=16, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=16,
        pos_embed_max_size=12,
    )  # fmt: skip
    return quiet(diffusers.StableDiffusion3InpaintPipeline(model, scheduler, vae(16), *(None,) * 6))


def flux_inpainting() -> Any:
    parts = flux().components
    names = inspect.signature(diffusers.FluxInpaintPipeline.__init__).parameters
    return quiet(diffusers.FluxInpaintPipeline(**{name: each for name, each in parts.items() if name in names}))


def test_inpainting_begins_late() -> None:
    """At strength 0.6 three of five steps are left, and five of nine calls of Heun's sampler."""
    check(sd3_inpainting(diffusers.FlowMatchEulerDiscreteScheduler()), masked(8, 16), 3)
    check(sd3_inpainting(diffusers.FlowMatchHeunDiscreteScheduler()), masked(8, 16), 5)
    check(flux_inpainting(), masked(16, 24, true_cfg_scale=2.0), 3)


@pytest.mark.parametrize("name", ["Flux", "SD3"])
def test_noise_levels_may_be_given(name: str) -> None:
    check(build(name), lambda pipe: images(pipe, name, 9, sigmas=[1.0, 0.8, 0.5, 0.2]), 4)


def test_timesteps_may_be_given() -> None:
    pipe = build("PixArt")
    pipe.scheduler = diffusers.DDPMScheduler()
    check(pipe, lambda pipe: images(pipe, "PixArt", 9, timesteps=[900, 700, 500, 100]), 4)


def forcing() -> Any:
    """A pipeline that gives each frame of a video a copy of the scheduler."""
    where = "diffusers.pipelines.skyreels_v2.pipeline_skyreels_v2_diffusion_forcing"
    pytest.importorskip(where, reason="diffusers 0.36 needs ftfy for it", exc_type=ImportError)
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    model = TINY["SkyReelsV2Transformer3DModel"].build()
    return quiet(diffusers.SkyReelsV2DiffusionForcingPipeline(None, None, model, wan().vae, scheduler))


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        ({}, 4),
        ({"ar_step": 2, "causal_block_size": 1}, 8),  # frames begin two steps apart
        pytest.param({"num_frames": 25, "overlap_history": 5}, 4, marks=pytest.mark.slow),  # one loop after the other
    ],
    ids=["alike", "staggered", "long"],
)
def test_copies_of_the_scheduler_count_steps(more: dict[str, int], steps: int) -> None:
    size = {"height": 32, "width": 48, "num_frames": 9, "base_num_frames": 9, **more}
    check(forcing(), lambda pipe: draw(pipe, prompt=None, **prompts(), **{**size, "num_inference_steps": 4}), steps)


class Pair(diffusers.DiffusionPipeline):
    """Has a model of its own for the unconditional branch."""

    def __init__(self, transformer: Any, unconditional_transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, unconditional_transformer=unconditional_transformer, scheduler=scheduler
        )

    @torch.no_grad()
    def __call__(self, steps: int) -> None:
        self.scheduler.set_timesteps(steps)
        inputs = TINY["DiTTransformer2DModel"].inputs(1)
        x = inputs["hidden_states"]
        for timestep in self.scheduler.timesteps:
            call = {**inputs, "hidden_states": x, "timestep": timestep[None]}
            out = 2.0 * self.transformer(**call).sample - self.unconditional_transformer(**call).sample
            x = self.scheduler.step(out[:, :4], timestep, x).prev_sample


def test_a_model_may_be_a_branch() -> None:
    kind = TINY["DiTTransformer2DModel"]
    pipe = tokdyn.wrap(Pair(kind.build(), kind.build(), diffusers.DDIMScheduler()), ALWAYS)
    pipe(steps=4)
    assert branches(pipe) == dict.fromkeys(range(4), ("cond", "uncond"))
    assert reused(pipe) == [False, True, True, False]


class Rounds(diffusers.DiffusionPipeline):
    """Makes images one after the other, and says the number of the steps of all."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, rounds: int, steps: int) -> list[int]:
        self._num_timesteps, inputs = rounds * steps, TINY["DiTTransformer2DModel"].inputs(1)
        found = []
        for _ in range(rounds):
            self.scheduler.set_timesteps(steps)
            x = inputs["hidden_states"]
            for timestep in self.scheduler.timesteps:
                out = self.transformer(**{**inputs, "hidden_states": x, "timestep": timestep[None]}).sample[:, :4]
                found.append(tokdyn.stats(self.transformer).calls[-1].reused)
                x = self.scheduler.step(out, timestep, x).prev_sample
        return found


def test_every_round_of_a_pipeline_ends_with_a_computed_step() -> None:
    pipe = tokdyn.wrap(Rounds(TINY["DiTTransformer2DModel"].build(), diffusers.DDIMScheduler()), ALWAYS)
    assert pipe(rounds=2, steps=4) == [0, 1, 1, 0] * 2
