"""Tiny models with random weights, one for each adapter, built without a download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Tiny:
    """How to build a model and what to call it with.

    Attributes:
        build: makes the model.
        inputs: keyword arguments for a batch of that size.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]


def randomized(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model in evaluation mode, with every constant parameter replaced by small random numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.std(correction=0) == 0:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return randomized(
        DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=4, sample_size=8,
            patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
        )
    )  # fmt: skip


def pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    return randomized(
        PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=4, sample_size=8,
            patch_size=2, norm_type="ada_norm_single", cross_attention_dim=16, caption_channels=12,
            use_additional_conditions=False, interpolation_scale=1,
        )
    )  # fmt: skip


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return randomized(
        SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
            pos_embed_max_size=12, qk_norm="rms_norm", dual_attention_layers=(0, 1),
        )
    )  # fmt: skip


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return randomized(
        FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        )
    )  # fmt: skip


def wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return randomized(
        WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
            text_dim=12, freq_dim=32, ffn_dim=48, num_layers=4, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        )
    )  # fmt: skip


def ltx() -> nn.Module:
    from diffusers import LTXVideoTransformer3DModel

    torch.manual_seed(0)
    return randomized(
        LTXVideoTransformer3DModel(
            in_channels=4, out_channels=4, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=16,
            cross_attention_dim=32, num_layers=4, caption_channels=12,
        )
    )  # fmt: skip


def sana() -> nn.Module:
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(0)
    return randomized(
        SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=4,
            num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=12,
            sample_size=4, patch_size=1, mlp_ratio=2.5,
        )
    )  # fmt: skip


def ids(rows: int, columns: int) -> Tensor:
    """(N, 3) position ids of Flux."""
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return torch.cat([torch.zeros(len(places), 1), places], dim=1)


def own() -> nn.Module:
    from tokdyn import DiT

    torch.manual_seed(0)
    return randomized(
        DiT(sample_size=(8, 12), patch_size=2, in_channels=4, hidden_size=16, depth=4, num_heads=2, num_classes=10)
    )


def latents(batch: int, *shape: int) -> Tensor:
    """(B, ...) white noise whose samples do not depend on how many there are."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(batch)]
    return torch.stack(rows)


def classes(batch: int) -> Tensor:
    return torch.arange(batch) % 10


TINY = {
    "DiTTransformer2DModel": Tiny(
        dit,
        lambda b: {
            "hidden_states": latents(b, 4, 8, 8),
            "timestep": torch.full((b,), 500),
            "class_labels": classes(b),
        },
    ),
    "PixArtTransformer2DModel": Tiny(
        pixart,
        lambda b: {
            "hidden_states": latents(b, 4, 8, 12),
            "encoder_hidden_states": latents(b, 6, 12),
            "timestep": torch.full((b,), 500),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "SD3Transformer2DModel": Tiny(
        sd3,
        lambda b: {
            "hidden_states": latents(b, 4, 8, 12),
            "encoder_hidden_states": latents(b, 6, 12),
            "pooled_projections": latents(b, 10),
            "timestep": torch.full((b,), 500.0),
        },
    ),
    "FluxTransformer2DModel": Tiny(
        flux,
        lambda b: {
            "hidden_states": latents(b, 20, 4),
            "encoder_hidden_states": latents(b, 6, 12),
            "pooled_projections": latents(b, 10),
            "timestep": torch.full((b,), 0.5),
            "img_ids": ids(4, 5),
            "txt_ids": torch.zeros(6, 3),
            "guidance": torch.full((b,), 3.5),
        },
    ),
    "WanTransformer3DModel": Tiny(
        wan,
        lambda b: {
            "hidden_states": latents(b, 4, 2, 8, 6),
            "encoder_hidden_states": latents(b, 6, 12),
            "timestep": torch.full((b,), 500),
        },
    ),
    "LTXVideoTransformer3DModel": Tiny(
        ltx,
        lambda b: {
            "hidden_states": latents(b, 24, 4),
            "encoder_hidden_states": latents(b, 6, 12),
            "encoder_attention_mask": torch.ones(b, 6),
            "timestep": torch.full((b,), 500.0),
            "num_frames": 2,
            "height": 3,
            "width": 4,
        },
    ),
    "SanaTransformer2DModel": Tiny(
        sana,
        lambda b: {
            "hidden_states": latents(b, 4, 4, 6),
            "encoder_hidden_states": latents(b, 6, 12),
            "encoder_attention_mask": torch.ones(b, 6),
            "timestep": torch.full((b,), 500.0),
        },
    ),
    "DiT": Tiny(
        own,
        lambda b: {
            "hidden_states": latents(b, 4, 8, 12),
            "timestep": torch.full((b,), 500),
            "class_labels": classes(b),
        },
    ),
}


def sample(output: Any) -> Tensor:
    """(B, ...) what a model predicts."""
    found = output[0] if isinstance(output, tuple) else output.sample
    return found if isinstance(found, Tensor) else torch.stack(list(found))
