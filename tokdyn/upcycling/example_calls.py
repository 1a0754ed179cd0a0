"""Build calls as pipelines make them of the transformers that they draw with, from the configuration alone.

They hold zeros. What they are for is their shapes, and what methods read of them: noise levels and grids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from tokdyn.errors import InputError
from tokdyn.upcycling.pipeline_settings import PipelineConfig

_PIXELS = 8  # along a side of a latent, in the VAEs of all these pipelines
_FRAMES = 4  # of a latent frame, in the VAE of Wan
Call = dict[str, Any]


def example_call(kind: str, model: Mapping[str, Any], config: PipelineConfig, dtype: torch.dtype) -> Call:
    """Return the arguments of a call that a pipeline makes while it draws.

    Args:
        kind: name of the transformer's class.
        model: its configuration.
        config: height, width, frames and guidance; those that are null are the defaults of the pipeline.
        dtype: of the latents and embeddings.

    Raises:
        InputError: the class is not known, or the size does not fit it.
    """
    check_kind(kind)
    return {
        name: value.to(dtype) if torch.is_tensor(value) and name in _HALVES else value
        for name, value in _CALLS[kind](model, config).items()
    }


def check_kind(kind: str) -> None:
    """Raise an InputError unless the calls of a class are known."""
    if kind not in _CALLS:
        raise InputError(
            f"--dry-run knows the calls of {', '.join(_CALLS)}, and this is a {kind}; leave --dry-run out, and the "
            "memory is worked out before the first step."
        )


_HALVES = ("hidden_states", "encoder_hidden_states", "pooled_projections", "guidance", "img_ids", "txt_ids")


def _latent_sides(config: PipelineConfig, height: int, width: int, patch: int) -> tuple[int, int]:
    """Return rows and columns of the latents.

    Args:
        config: height and width in pixels; if they are null, the next two are taken.
        height: default of the pipeline.
        width: default of the pipeline.
        patch: latents along a side of a token.

    Raises:
        InputError: they are no multiples of the pixels of a token.
    """
    sides = config.height or height, config.width or width
    step = _PIXELS * patch
    if any(side % step for side in sides):
        raise InputError(f"height and width are {sides[0]} and {sides[1]}; give multiples of {step}.")
    return sides[0] // _PIXELS, sides[1] // _PIXELS


def _flux(model: Mapping[str, Any], config: PipelineConfig) -> Call:
    """FluxPipeline: T5 embeddings of 512 tokens, CLIP's pooled embedding, latents in tokens of 2x2."""
    rows, columns = (side // 2 for side in _latent_sides(config, 1024, 1024, 2))
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    guidance = 3.5 if config.guidance is None else config.guidance
    return {
        "hidden_states": torch.zeros(1, rows * columns, model["in_channels"]),
        "timestep": torch.full((1,), 0.5),
        "guidance": torch.full((1,), guidance) if model.get("guidance_embeds") else None,
        "pooled_projections": torch.zeros(1, model["pooled_projection_dim"]),
        "encoder_hidden_states": torch.zeros(1, 512, model["joint_attention_dim"]),
        "txt_ids": torch.zeros(512, 3),
        "img_ids": torch.cat([torch.zeros(rows * columns, 1), places], dim=1),
        "joint_attention_kwargs": {},
        "return_dict": False,
    }


def _sd3(model: Mapping[str, Any], config: PipelineConfig) -> Call:
    """StableDiffusion3Pipeline: 77 tokens of CLIP and 256 of T5; with guidance both branches in one call."""
    rows, columns = _latent_sides(config, 1024, 1024, model["patch_size"])
    guidance = 7.0 if config.guidance is None else config.guidance
    branches = 2 if guidance > 1.0 else 1
    return {
        "hidden_states": torch.zeros(branches, model["in_channels"], rows, columns),
        "timestep": torch.full((branches,), 500.0),
        "encoder_hidden_states": torch.zeros(branches, 77 + 256, model["joint_attention_dim"]),
        "pooled_projections": torch.zeros(branches, model["pooled_projection_dim"]),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def _wan(model: Mapping[str, Any], config: PipelineConfig) -> Call:
    """WanPipeline: 512 tokens of UMT5; a call for each branch of guidance."""
    rows, columns = _latent_sides(config, 480, 832, model["patch_size"][1])
    frames = (config.frames or 81) - 1
    return {
        "hidden_states": torch.zeros(1, model["in_channels"], frames // _FRAMES + 1, rows, columns),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.zeros(1, 512, model["text_dim"]),
        "attention_kwargs": None,
        "return_dict": False,
    }


_CALLS: dict[str, Callable[[Mapping[str, Any], PipelineConfig], Call]] = {
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "WanTransformer3DModel": _wan,
}
