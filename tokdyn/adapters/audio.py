"""Adapters of diffusers' audio models, whose tokens lie on a line.

These are Stable Audio and Stable Audio 3, ACE-Step, LongCat Audio and MiniMax Music 3.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from tokdyn.adapters import modulation
from tokdyn.adapters.base import Arguments, Blocks, Follow, ModelAdapter, Products
from tokdyn.adapters.readers import IMAGE_PROMPT_REASON, timestep_level
from tokdyn.adapters.width import SlicedLayer, Width, attention_and_mlp, attention_layers, mlp_layers, runs_processor
from tokdyn.tokens import Grid


def _samples_grid(model: nn.Module, call: Arguments) -> Grid:
    """Return the grid of latents (B, C, L): one token per sample of the latent sound."""
    return (call["hidden_states"].shape[2],)


STABLE_AUDIO = ModelAdapter(
    name="Stable Audio",
    time="timestep_proj",
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


def _patches_grid(model: nn.Module, call: Arguments) -> Grid:
    return (call["hidden_states"].shape[2] // int(model.config["patch_size"]),)  # type: ignore[index]


def _sa3_sliceable(block: nn.Module) -> bool:
    attention: Any = block.self_attn
    return type(attention.processor).__name__ == "StableAudio3SelfAttnProcessor"


STABLE_AUDIO3 = ModelAdapter(
    name="Stable Audio 3",
    time="to_timestep_embed",
    classes=("StableAudio3DiTModel",),
    blocks=(
        Blocks(
            "transformer_blocks",
            image="last",  # behind memory tokens
            follow=(Follow("rope", axis=0, batched=False), Follow("local_seq")),
            attention=("self_attn",),
            mlp=("ff",),
            modulated=modulation.stable_audio3,
            products=Products(
                cross=("cross_attn",),
                cross_joint=True,
                context="context",
                over={"local_seq": ("to_local_embed.*",)},
                channels=lambda attention: attention.heads * attention.dim_heads * (1 + attention.use_differential),
            ),
            width=Width(
                layers=(
                    SlicedLayer("self_attn.to_qkv", out=("heads",)),
                    SlicedLayer("self_attn.to_out", into=("heads",)),
                    *mlp_layers("ff.proj_out", "ff.proj_in"),
                ),
                inner="self_attn.to_out.in_features",
                hidden="ff.proj_out.in_features",
                attention=("self_attn",),
                sliceable=_sa3_sliceable,
            ),
        ),
    ),
    grid=_patches_grid,
    level=timestep_level(scale=1.0),
    width=lambda model: int(model.config["embed_dim"]),  # type: ignore[index]
    heads=lambda model: int(model.config["num_heads"]),  # type: ignore[index]
)


def _ace_grid(model: nn.Module, call: Arguments) -> Grid:
    return (-(-call["hidden_states"].shape[1] // int(model.config["patch_size"])),)  # type: ignore[index]


def _counts_tokens(model: nn.Module) -> str | None:
    """Return why a model whose attention backend counts windows in tokens needs all of them; None for other models."""
    layers: Any = model.layers
    backend = layers[0].self_attn.processor._attention_backend
    if "flash" not in str(getattr(backend, "value", backend)):
        return None
    return (
        "with this attention backend, tokens attend to a number of neighbours in the sequence, whichever are left out; "
        "set another backend, or use DepthSkip or FeatureCache"
    )


def _as_many_keys(block: nn.Module) -> bool:
    """Tell whether attention has as many heads of keys as of queries, so that its heads can be sliced."""
    attention: Any = block.self_attn
    return attention.kv_heads == attention.heads and runs_processor("self_attn", "AceStepAttnProcessor2_0")(block)


ACE_STEP = ModelAdapter(
    name="ACE-Step",
    classes=("AceStepTransformer1DModel",),
    blocks=(
        Blocks(
            "layers",
            follow=(
                Follow("position_embeddings", axis=0, batched=False),
                Follow("image_rotary_emb", axis=0, batched=False),  # the name in attention
                Follow("attention_mask", axis=2, dims=4),
                Follow("attention_mask", axis=3, dims=4),
            ),
            attention=("self_attn",),
            mlp=("mlp",),
            modulated=modulation.ace_step,
            products=Products(cross=("cross_attn",), indicator=()),
            width=Width(
                layers=(*attention_layers("self_attn"), *mlp_layers("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")),
                inner="self_attn.to_out.0.in_features",
                hidden="mlp.down_proj.in_features",
                attention=("self_attn",),
                counts=("heads", "kv_heads"),
                sliceable=_as_many_keys,
            ),
        ),
    ),
    grid=_ace_grid,
    level=timestep_level(scale=1.0),
    varying=("timestep_r",),
    whole=_counts_tokens,
    refuse={"attention_kwargs": IMAGE_PROMPT_REASON},
    width=lambda model: int(model.config["hidden_size"]),  # type: ignore[index]
    guidance="cond_first",
)

LONGCAT_AUDIO = ModelAdapter(
    name="LongCat Audio",
    classes=("LongCatAudioDiTTransformer",),
    blocks=(
        Blocks(
            "blocks",
            follow=(
                Follow("rope", axis=0, batched=False),
                Follow("audio_rotary_emb", axis=0, batched=False),  # the name in attention
                Follow("mask"),
                Follow("attention_mask"),
            ),
            shared=("cond_rope",),
            attention=("self_attn",),
            mlp=("ffn",),
            modulated=modulation.longcat_audio,
            products=Products(
                sample=("adaln_mlp.*",), cross=("cross_attn",), context="cond", mlp=("ffn.*",), indicator=()
            ),
            width=Width(
                layers=(
                    SlicedLayer("self_attn.to_q", out=("heads",), norm="self_attn.q_norm"),
                    SlicedLayer("self_attn.to_k", out=("heads",), norm="self_attn.k_norm"),
                    SlicedLayer("self_attn.to_v", out=("heads",)),
                    SlicedLayer("self_attn.to_out.0", into=("heads",)),
                    *mlp_layers("ffn.ff.3", "ffn.ff.0"),
                ),
                inner="self_attn.to_out.0.in_features",
                hidden="ffn.ff.3.in_features",
                attention=("self_attn",),
                sliceable=runs_processor("self_attn", "AudioDiTSelfAttnProcessor"),
            ),
        ),
    ),
    grid=lambda model, call: (call["hidden_states"].shape[1],),
    level=timestep_level(scale=1.0),
    width=lambda model: int(model.config["dit_dim"]),  # type: ignore[index]
    heads=lambda model: int(model.config["dit_heads"]),  # type: ignore[index]
    guidance="calls",
)

MINIMAX_MUSIC3 = ModelAdapter(
    name="MiniMax Music 3",
    classes=("MiniMaxMusic3Transformer1DModel",),
    blocks=(
        replace(
            STABLE_AUDIO.blocks[0],  # behind a token of the timestep
            follow=(Follow("rotary_emb", axis=0, batched=False),),
            attention=("attn",),
            mlp=(),  # two layers of the block itself
            products=Products(mlp=("ff_*",)),
            width=Width(
                layers=(*attention_layers("attn"), *mlp_layers("ff_out", "ff_in")),
                inner="attn.to_out.0.in_features",
                hidden="ff_out.in_features",
                attention=("attn",),
                sliceable=runs_processor("attn", "MiniMaxMusic3AttnProcessor"),
            ),
        ),
    ),
    grid=_samples_grid,
    level=timestep_level(scale=1.0, backwards=True),
    guidance="calls",
)
