"""Adapters of diffusers' audio models, whose tokens lie on a line: Stable Audio."""

from __future__ import annotations

from torch import nn

from tokdyn.adapters.base import Arguments, Blocks, Follow, ModelAdapter, Products
from tokdyn.adapters.readers import timestep_level
from tokdyn.adapters.width import attention_and_mlp
from tokdyn.tokens import Grid


def _samples_grid(model: nn.Module, call: Arguments) -> Grid:
    """Return the grid of latents (B, C, L): one token per sample of the latent sound."""
    return (call["hidden_states"].shape[2],)


STABLE_AUDIO = ModelAdapter(
    name="Stable Audio",
    classes=("StableAudioDiTModel",),
    blocks=(
        Blocks(
            "transformer_blocks",
            image="last",  # behind a token of timestep and duration
            follow=(Follow("rotary_embedding", axis=0, batched=False), Follow("rotary_emb", axis=0, batched=False)),
            attention=("attn1",),
            mlp=("ff",),
            products=Products(cross=("attn2",), cross_joint=True),
            width=attention_and_mlp("attn1", "ff", "StableAudioAttnProcessor2_0"),
        ),
    ),
    grid=_samples_grid,
    level=timestep_level(scale=1.0),
    refuse={"attention_mask": "it has one entry per pair of samples; leave it out"},
)
