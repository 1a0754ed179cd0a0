"""Video models of diffusers with cross-attention to text: Wan and LTX."""

from __future__ import annotations

from torch import nn

from tokdyn.adapters.base import Arguments, Follow, ModelAdapter, Stack
from tokdyn.adapters.latents import IP_ADAPTER, timestep
from tokdyn.tokens import Grid


def _wan_grid(model: nn.Module, call: Arguments) -> Grid:
    patch = model.config["patch_size"]  # type: ignore[index]
    return tuple(size // part for size, part in zip(call["hidden_states"].shape[-3:], patch, strict=True))


WAN = ModelAdapter(
    name="Wan",
    classes=("WanTransformer3DModel",),
    stacks=(
        Stack(
            "blocks",
            follow=(Follow("rotary_emb"), Follow("temb", dims=4)),
            attention=("attn1",),
            mlp=("ffn",),
        ),
    ),
    grid=_wan_grid,
    level=timestep(),
    refuse={"attention_kwargs": IP_ADAPTER},
)

LTX = ModelAdapter(
    name="LTX-Video",
    classes=("LTXVideoTransformer3DModel",),
    stacks=(
        Stack(
            "transformer_blocks",
            follow=(Follow("image_rotary_emb"), Follow("temb", dims=3)),
            attention=("attn1",),
            mlp=("ff",),
        ),
    ),
    grid=lambda model, call: (call["num_frames"], call["height"], call["width"]),
    level=timestep(),
    refuse={"attention_kwargs": IP_ADAPTER},
)
