"""Tiny image models of diffusers with random weights that are checked by `test_coverage.py` alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.contract.kit import Tiny, ids, latents, of_diffusers

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
FLUX = {**HEADS, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 12}
AXES = {"axes_dims_rope": (4, 4, 8)}


def bria() -> nn.Module:
    return of_diffusers("BriaTransformer2DModel", **FLUX, **AXES)


def fibo() -> nn.Module:
    return of_diffusers("BriaFiboTransformer2DModel", **FLUX, **AXES, text_encoder_dim=12)


def hunyuan_image() -> nn.Module:
    return of_diffusers(
        "HunyuanImageTransformer2DModel",
        **HEADS, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, num_refiner_layers=1,
        patch_size=(1, 1), text_embed_dim=12, rope_axes_dim=(8, 8),
    )  # fmt: skip


def flux3() -> nn.Module:
    return of_diffusers("Flux3Transformer2DModel", **FLUX, cond_in_channels=4, axes_dims_rope=(4, 4, 4, 4))


def krea2() -> nn.Module:
    return of_diffusers(
        "Krea2Transformer2DModel",
        in_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, timestep_embed_dim=16, text_hidden_dim=12, num_text_layers=2, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def ideogram4() -> nn.Module:
    return of_diffusers(
        "Ideogram4Transformer2DModel",
        **HEADS, in_channels=4, num_layers=4, intermediate_size=48, adaln_dim=16, llm_features_dim=12,
        mrope_section=(4, 2, 2),
    )  # fmt: skip


def prx() -> nn.Module:
    return of_diffusers(
        "PRXTransformer2DModel",
        in_channels=4, context_in_dim=12, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=4, axes_dim=[8, 8],
    )  # fmt: skip


def packed(batch: int, **more: Any) -> dict[str, Any]:
    """Arguments of a model that gets a packed image of 4 x 5 cells and its position ids."""
    return {
        "hidden_states": latents(batch, 20, 4),
        "encoder_hidden_states": latents(batch, 6, 12),
        "timestep": torch.full((batch,), 500.0),
        "img_ids": ids(4, 5),
        "txt_ids": torch.zeros(6, 3),
        **more,
    }


def places(text: int, offset: int = 0) -> Tensor:
    """(text + 20, 3) position ids of text tokens and of an image of 4 x 5 cells."""
    return torch.cat([torch.zeros(text, 3), ids(4, 5) + torch.tensor([0, offset, offset])])


def masked(batch: int) -> Tensor:
    """(B, 6) which of the text tokens are no padding."""
    return torch.arange(6) < torch.tensor([4, *[6] * (batch - 1)])[:, None]


def ideogram4_inputs(batch: int) -> dict[str, Any]:
    """Prompts of different lengths, padded on the left."""
    role = torch.cat([torch.full((batch, 6), 3), torch.full((batch, 20), 2)], dim=1)
    role[0, :2] = 0
    return {
        "hidden_states": latents(batch, 26, 4),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": latents(batch, 26, 12),
        "position_ids": places(6, offset=65536).long().expand(batch, -1, -1),
        "segment_ids": torch.where(role == 0, -1, 1),
        "indicator": role,
    }


FLOW = ("timestep", 1.0, 0.0)
IMAGES: dict[str, Tiny] = {
    "BriaTransformer2DModel": Tiny(bria, packed),
    "BriaFiboTransformer2DModel": Tiny(
        fibo, lambda b: packed(b, text_encoder_layers=[latents(b, 6, 12) + layer for layer in range(4)])
    ),
    "HunyuanImageTransformer2DModel": Tiny(
        hunyuan_image,
        lambda b: {
            "hidden_states": latents(b, 4, 4, 6),
            "timestep": torch.full((b,), 500.0),
            "encoder_hidden_states": latents(b, 6, 12),
            "encoder_attention_mask": masked(b).long(),
        },
    ),
    "Flux3Transformer2DModel": Tiny(
        flux3,
        lambda b: packed(
            b,
            timestep=torch.full((b,), 0.5),
            img_ids=torch.cat([ids(4, 5), torch.zeros(20, 1)], 1),
            txt_ids=torch.zeros(6, 4),
        ),
        clock=FLOW,
    ),
    "Krea2Transformer2DModel": Tiny(
        krea2,
        lambda b: {
            "hidden_states": latents(b, 20, 4),
            "encoder_hidden_states": latents(b, 6, 2, 12),
            "timestep": torch.full((b,), 0.5),
            "position_ids": places(6),
            "encoder_attention_mask": masked(b),
        },
        clock=FLOW,
        shared=frozenset({"position_ids"}),
    ),
    "Ideogram4Transformer2DModel": Tiny(ideogram4, ideogram4_inputs, clock=("timestep", 0.0, 1.0)),
    "PRXTransformer2DModel": Tiny(
        prx,
        lambda b: {
            "hidden_states": latents(b, 4, 8, 12),
            "timestep": torch.full((b,), 0.5),
            "encoder_hidden_states": latents(b, 6, 12),
            "attention_mask": masked(b),
        },
        clock=FLOW,
    ),
}
"""One for each class."""
