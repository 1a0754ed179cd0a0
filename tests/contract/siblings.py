"""Tiny models of classes that are close to a family of another name."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from tests.contract.kit import Tiny, ids, latents, of_diffusers

FLUX = {
    "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 12, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
    "text_dim": 12, "freq_dim": 32, "ffn_dim": 48, "num_layers": 4, "rope_max_seq_len": 32,
}  # fmt: skip
COGVIEW = {
    "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 4, "num_attention_heads": 2,
    "text_embed_dim": 12, "time_embed_dim": 8, "condition_dim": 4,
}  # fmt: skip


def flux_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": latents(batch, 20, 4),
        "encoder_hidden_states": latents(batch, 6, 12),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids(4, 5),
        "txt_ids": torch.zeros(6, 3),
    }


def wan_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": latents(batch, 4, 2, 8, 6),
        "encoder_hidden_states": latents(batch, 6, 12),
        "timestep": torch.full((batch,), 500),
    }


def cogview_inputs(batch: int, rows: int, columns: int) -> dict[str, Any]:
    return {
        "hidden_states": latents(batch, 4, rows, columns),
        "encoder_hidden_states": latents(batch, 6, 12),
        "timestep": torch.full((batch,), 500),
        **{name: torch.full((batch, 2), value) for name, value in (("original_size", 20), ("target_size", 20))},
        "crop_coords": torch.zeros(batch, 2),
    }


def chroma() -> nn.Module:
    with warnings.catch_warnings():  # the class uses a name that diffusers is giving up
        warnings.simplefilter("ignore", FutureWarning)
        return of_diffusers(
            "ChromaTransformer2DModel",
            **FLUX, approximator_num_channels=8, approximator_hidden_dim=32, approximator_layers=1,
        )  # fmt: skip


def ovis() -> nn.Module:
    return of_diffusers("OvisImageTransformer2DModel", **FLUX, out_channels=4)


def longcat() -> nn.Module:
    return of_diffusers("LongCatImageTransformer2DModel", **FLUX, pooled_projection_dim=10)


def skyreels() -> nn.Module:
    return of_diffusers("SkyReelsV2Transformer3DModel", **WAN)


def chronoedit() -> nn.Module:
    return of_diffusers("ChronoEditTransformer3DModel", **WAN)


def cogview4() -> nn.Module:
    return of_diffusers("CogView4Transformer2DModel", **COGVIEW, attention_head_dim=16, rope_axes_dim=(8, 8))


def cogview3() -> nn.Module:
    return of_diffusers(
        "CogView3PlusTransformer2DModel", **COGVIEW, attention_head_dim=8, pos_embed_max_size=8, sample_size=8
    )


FLUX_CLOCK = ("timestep", 1.0, 0.0)
SIBLINGS = {
    "ChromaTransformer2DModel": Tiny(
        chroma, lambda b: {**flux_inputs(b), "attention_mask": torch.ones(b, 26, dtype=torch.bool)}, clock=FLUX_CLOCK
    ),
    "SkyReelsV2Transformer3DModel": Tiny(skyreels, wan_inputs),
    "CogView4Transformer2DModel": Tiny(cogview4, lambda b: cogview_inputs(b, 8, 12)),
    "CogView3PlusTransformer2DModel": Tiny(cogview3, lambda b: cogview_inputs(b, 8, 12)),
}
"""One for each declaration; the whole contract is checked on them."""
TWINS = {
    "OvisImageTransformer2DModel": Tiny(ovis, flux_inputs, clock=FLUX_CLOCK),
    "LongCatImageTransformer2DModel": Tiny(longcat, flux_inputs, clock=FLUX_CLOCK),
    "ChronoEditTransformer3DModel": Tiny(chronoedit, wan_inputs),
}
"""Others that a declaration is for, too."""
