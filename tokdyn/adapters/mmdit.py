"""Models of diffusers in which text and image tokens attend to each other: SD3 and Flux."""

from __future__ import annotations

from torch import Tensor, nn

from tokdyn.adapters.base import Arguments, Follow, ModelAdapter, Stack
from tokdyn.adapters.latents import CONTROL, IP_ADAPTER, grid_of_ids, patches, timestep

SD3 = ModelAdapter(
    name="SD3",
    classes=("SD3Transformer2DModel",),
    stacks=(
        Stack(
            "transformer_blocks",
            text="encoder_hidden_states",
            returns=("text", "tokens"),
            attention=("attn",),
            mlp=("ff",),
        ),
    ),
    grid=patches(),
    level=timestep(),
    refuse={"block_controlnet_hidden_states": CONTROL, "joint_attention_kwargs": IP_ADAPTER},
)


def _flux_grid(model: nn.Module, call: Arguments) -> tuple[int, ...]:
    ids: Tensor = call["img_ids"]
    return grid_of_ids(ids[0] if ids.dim() == 3 else ids)


_ROTARY = (Follow("image_rotary_emb", axis=0, batched=False),)

FLUX = ModelAdapter(
    name="Flux",
    classes=("FluxTransformer2DModel",),
    stacks=(
        Stack(
            "transformer_blocks",
            text="encoder_hidden_states",
            returns=("text", "tokens"),
            follow=_ROTARY,
            attention=("attn",),
            mlp=("ff",),
        ),
        Stack(
            "single_transformer_blocks",
            text="encoder_hidden_states",
            returns=("text", "tokens"),
            inside="last",
            follow=_ROTARY,
            attention=("attn",),
            mlp=(),
        ),
    ),
    grid=_flux_grid,
    level=timestep(scale=1.0),
    refuse={
        "controlnet_block_samples": CONTROL,
        "controlnet_single_block_samples": CONTROL,
        "joint_attention_kwargs": IP_ADAPTER,
    },
)
