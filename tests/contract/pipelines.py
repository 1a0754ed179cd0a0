"""Pipelines of diffusers around tiny models, with prompt embeddings in the place of text encoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from tests.contract.models import TINY, latents, of_diffusers


@dataclass(frozen=True)
class Pipe:
    """A pipeline and how to call it.

    Attributes:
        build: makes it.
        arguments: of a call.
        branches: calls of the model in a step, by the names that the pipeline gives them.
    """

    build: Callable[[], Any]
    arguments: Callable[[], dict[str, Any]]
    branches: tuple[str | None, ...] = (None,)


def vae(channels: int = 4, **more: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        latent_channels=channels, norm_num_groups=4, sample_size=8, shift_factor=0.0, scaling_factor=1.0, **more,
    ).eval()  # fmt: skip


def dit() -> Any:
    return diffusers.DiTPipeline(TINY["DiTTransformer2DModel"].build(), vae(), diffusers.DDIMScheduler())


def pixart() -> Any:
    model = TINY["PixArtTransformer2DModel"].build()
    return diffusers.PixArtSigmaPipeline(None, None, vae(), model, diffusers.DDIMScheduler())


def sd3() -> Any:
    model, scheduler = TINY["SD3Transformer2DModel"].build(), diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.StableDiffusion3Pipeline(model, scheduler, vae(), *(None,) * 6)


def flux() -> Any:
    model = of_diffusers(
        "FluxTransformer2DModel",
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=False,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxPipeline(scheduler, vae(), None, None, None, None, model)


def zimage() -> Any:
    model, scheduler = TINY["ZImageTransformer2DModel"].build(), diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.ZImagePipeline(scheduler, vae(), None, None, model)


def wan() -> Any:
    torch.manual_seed(0)
    decoder = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    model = TINY["WanTransformer3DModel"].build()
    return diffusers.WanPipeline(None, None, decoder, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), model)


def ltx() -> Any:
    torch.manual_seed(0)
    decoder = diffusers.AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        decoder_spatio_temporal_scaling=(True, True, False, False), upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4, patch_size=1, patch_size_t=1,
    )  # fmt: skip
    model, scheduler = TINY["LTXVideoTransformer3DModel"].build(), diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.LTXPipeline(scheduler, decoder, None, None, model)


def prompts(*, masks: bool = False, pooled: bool = False) -> dict[str, Tensor]:
    """Embeddings of a prompt of six words and of a negative one."""
    positive, negative = latents(2, 6, 12).split(1)
    found = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    if masks:
        found |= {"prompt_attention_mask": torch.ones(1, 6), "negative_prompt_attention_mask": torch.ones(1, 6)}
    if pooled:
        for name, value in zip(("pooled_prompt_embeds", "negative_pooled_prompt_embeds"), latents(2, 10), strict=True):
            found[name] = value[None]
    return found


PIPES = {
    "DiT": Pipe(dit, lambda: {"class_labels": [1, 2]}),
    "PixArt": Pipe(
        pixart,
        lambda: {
            **prompts(masks=True),
            "negative_prompt": None,
            "height": 8,
            "width": 16,
            "use_resolution_binning": False,
        },
    ),
    "SD3": Pipe(sd3, lambda: {**prompts(pooled=True), "height": 8, "width": 16}),
    "Flux": Pipe(
        flux,
        lambda: {**prompts(pooled=True), "true_cfg_scale": 3.0, "height": 16, "width": 24},
        ("cond", "uncond"),
    ),
    "Z-Image": Pipe(
        zimage,
        lambda: {
            "prompt_embeds": list(latents(2, 6, 12))[:1],
            "negative_prompt_embeds": list(latents(2, 6, 12))[1:],
            "height": 16,
            "width": 32,
            "guidance_scale": 3.0,
        },
    ),
    "Wan": Pipe(wan, lambda: {**prompts(), "height": 32, "width": 48, "num_frames": 5}, ("cond", "uncond")),
    "LTX": Pipe(ltx, lambda: {**prompts(masks=True), "height": 32, "width": 32, "num_frames": 9}, ("cond_uncond",)),
}


def build(name: str) -> Any:
    """A pipeline that prints nothing."""
    pipe = PIPES[name].build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: Any, name: str, steps: int = 4, **changes: Any) -> Tensor:
    """What a pipeline makes of the same noise every time, as a tensor."""
    arguments = {**PIPES[name].arguments(), "num_inference_steps": steps, "output_type": "np", **changes}
    found = pipe(**arguments, generator=torch.Generator().manual_seed(3))[0]
    return torch.as_tensor(found).clone()
