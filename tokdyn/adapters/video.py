"""Video models of diffusers: Wan, LTX-Video, HunyuanVideo and CogVideoX."""

from __future__ import annotations

from torch import nn

from tokdyn.adapters import modulation
from tokdyn.adapters.base import Arguments, Follow, ModelAdapter, Stack
from tokdyn.adapters.latents import IP_ADAPTER, timestep
from tokdyn.adapters.products import Products
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
            modulated=modulation.shift_table_per_token,
            products=Products(cross=("attn2",), words=512),
        ),
    ),
    grid=_wan_grid,
    level=timestep(),
    refuse={"attention_kwargs": IP_ADAPTER},
    guidance="calls",
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
            modulated=modulation.shift_table_per_token,
            products=Products(cross=("attn2",)),
        ),
    ),
    grid=lambda model, call: (call["num_frames"], call["height"], call["width"]),
    level=timestep(),
    refuse={"attention_kwargs": IP_ADAPTER},
)


def _hunyuan_grid(model: nn.Module, call: Arguments) -> Grid:
    frames, rows, columns = call["hidden_states"].shape[-3:]
    across, along = model.config["patch_size"], model.config["patch_size_t"]  # type: ignore[index]
    return frames // along, rows // across, columns // across


HUNYUAN = ModelAdapter(
    name="HunyuanVideo",
    classes=("HunyuanVideoTransformer3DModel",),
    stacks=tuple(
        Stack(
            path,
            text="encoder_hidden_states",
            returns=("tokens", "text"),
            joint="first",
            follow=(
                Follow("attention_mask", axis=3),
                Follow("freqs_cis", axis=0, batched=False),  # what double blocks call it
                Follow("image_rotary_emb", axis=0, batched=False),
            ),
            attention=("attn",),
            mlp=mlp,
            modulated=modulated,
            products=Products(joint=joint),
        )
        for path, mlp, modulated, joint in (
            ("transformer_blocks", ("ff",), modulation.embedding, ()),
            ("single_transformer_blocks", (), None, ("*",)),
        )
    ),
    grid=_hunyuan_grid,
    level=timestep(),
    refuse={"attention_kwargs": IP_ADAPTER},
    guidance="calls",
)


def _cogvideo_grid(model: nn.Module, call: Arguments) -> Grid:
    frames, _, rows, columns = call["hidden_states"].shape[-4:]
    across, along = model.config["patch_size"], model.config["patch_size_t"] or 1  # type: ignore[index]
    return -(-frames // along), rows // across, columns // across


COGVIDEOX = ModelAdapter(
    name="CogVideoX",
    classes=("CogVideoXTransformer3DModel",),
    stacks=(
        Stack(
            "transformer_blocks",
            text="encoder_hidden_states",
            returns=("tokens", "text"),
            follow=(Follow("image_rotary_emb", axis=0, batched=False),),
            inside_mlp="last",
            attention=("attn1",),
            mlp=("ff",),
            modulated=modulation.with_text,
            products=Products(joint=("attn1.*",)),
        ),
    ),
    grid=_cogvideo_grid,
    level=timestep(),
    refuse={"attention_kwargs": IP_ADAPTER},
)
