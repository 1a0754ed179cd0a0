"""Adapters of JoyImage Edit and Edit Plus, whose text and image streams meet in attention, the image first."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from tokdyn.adapters.base import Arguments, Blocks, Follow, ModelAdapter, Products
from tokdyn.adapters.readers import timestep_level
from tokdyn.adapters.width import SlicedLayer, Width, mlp_layers, runs_processor
from tokdyn.errors import InputError
from tokdyn.tokens import Grid


def _joy_modulated(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated image tokens of a block of JoyImage."""
    shift, scale = block.img_mod(arguments["temb"])[:2]  # type: ignore[operator]
    out: Tensor = block.img_norm1(arguments["hidden_states"]) * (1 + scale[:, None]) + shift[:, None]  # type: ignore[operator]
    return out


def _joy_grid(model: nn.Module, call: Arguments) -> Grid:
    """Return the grid of latents (B, C, frames, rows, columns), or (B, images, C, frames, rows, columns)."""
    latents = call["hidden_states"]
    if latents.dim() == 6 and latents.shape[1] > 1:
        raise InputError(
            f"hidden_states holds {latents.shape[1]} images per sample; a wrapped JoyImageEditTransformer3DModel takes "
            "one with methods that reduce tokens, so leave out the reference images."
        )
    patch = model.config["patch_size"]  # type: ignore[index]
    grid = tuple(size // part for size, part in zip(latents.shape[-3:], patch, strict=True))
    return grid[1:] if grid[0] == 1 else grid


_JOY_BLOCKS = Blocks(
    "double_blocks",
    text="encoder_hidden_states",
    returns=("tokens", "text"),
    joint="first",
    follow=(Follow("image_rotary_emb", axis=0, batched=False, item=0),),
    attention=("attn",),
    mlp=("img_mlp",),
    modulated=_joy_modulated,
    products=Products(text=("*.txt_*", "txt_*")),
    width=Width(
        layers=(
            *(SlicedLayer(f"attn.{stream}_attn_qkv", out=("heads",)) for stream in ("img", "txt")),
            *(SlicedLayer(f"attn.{stream}_attn_proj", into=("heads",)) for stream in ("img", "txt")),
            *mlp_layers("img_mlp.net.2", "img_mlp.net.0.proj"),
        ),
        inner="attn.img_attn_proj.in_features",
        hidden="img_mlp.net.2.in_features",
        attention=("attn",),
        sliceable=runs_processor("attn", "JoyImageAttnProcessor", "JoyImageEditPlusAttnProcessor"),
    ),
)

JOYIMAGE = ModelAdapter(
    name="JoyImage Edit",
    classes=("JoyImageEditTransformer3DModel",),
    blocks=(_JOY_BLOCKS,),
    grid=_joy_grid,
    level=timestep_level(),
    width=lambda model: int(model.config["hidden_size"]),  # type: ignore[index]
    guidance="calls",
)


def _joy_plus_grid(model: nn.Module, call: Arguments) -> Grid:
    """Return the grid of the image of every sample, of which `shape_list` has frames, rows and columns."""
    shapes = {tuple(map(tuple, images)) for images in call["shape_list"]}
    if len(shapes) > 1 or len(next(iter(shapes))) > 1:
        raise InputError(
            "shape_list holds reference images, or images of several sizes; a wrapped "
            "JoyImageEditPlusTransformer3DModel takes one image per sample, of one size, with methods that reduce "
            "tokens."
        )
    ((grid,),) = shapes
    return grid[1:] if grid[0] == 1 else grid


JOYIMAGE_PLUS = replace(
    JOYIMAGE,
    name="JoyImage Edit Plus",
    classes=("JoyImageEditPlusTransformer3DModel",),
    blocks=(replace(_JOY_BLOCKS, follow=(Follow("image_rotary_emb"), Follow("attention_mask", axis=3))),),
    grid=_joy_plus_grid,
    guidance="uncond_first",
)
