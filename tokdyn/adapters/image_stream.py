"""Adapters of image models whose blocks return image tokens only, and read the text as keys and values: PRX."""

from __future__ import annotations

from torch import Tensor, nn

from tokdyn.adapters.base import Arguments, Blocks, Follow, ModelAdapter, Products
from tokdyn.adapters.readers import IMAGE_PROMPT_REASON, patch_grid, timestep_level
from tokdyn.adapters.width import SlicedLayer, Width, mlp_layers, runs_processor


def _prx_modulated(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block of PRX."""
    shift, scale, _ = block.modulation(arguments["temb"])[0]  # type: ignore[operator]
    out: Tensor = block.img_pre_norm(arguments["hidden_states"]) * (1 + scale) + shift  # type: ignore[operator]
    return out


PRX = ModelAdapter(
    name="PRX",
    classes=("PRXTransformer2DModel",),
    blocks=(
        Blocks(
            "blocks",
            text="encoder_hidden_states",
            follow=(Follow("image_rotary_emb", axis=2),),
            attention=("attention",),
            mlp=(),  # its layers are those of the block
            modulated=_prx_modulated,
            products=Products(
                text=("*.txt_*",),
                mlp=("gate_proj", "up_proj", "down_proj"),
                queries=False,
                indicator=("modulation.*",),
            ),
            width=Width(
                layers=(
                    SlicedLayer("attention.img_qkv_proj", out=("heads",)),
                    SlicedLayer("attention.txt_kv_proj", out=("heads",)),
                    SlicedLayer("attention.to_out.0", into=("heads",)),
                    *mlp_layers("down_proj", "gate_proj", "up_proj"),
                ),
                inner="attention.to_out.0.in_features",
                hidden="down_proj.in_features",
                attention=("attention",),
                sliceable=runs_processor("attention", "PRXAttnProcessor2_0"),
            ),
        ),
    ),
    grid=patch_grid,
    level=timestep_level(scale=1.0),
    refuse={"attention_kwargs": IMAGE_PROMPT_REASON},
    width=lambda model: int(model.config["hidden_size"]),  # type: ignore[index]
    heads=lambda model: int(model.config["num_heads"]),  # type: ignore[index]
)
