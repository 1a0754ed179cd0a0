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
