"""Adapters of image models whose blocks read the text but return image tokens only: PRX, Lumina-Next, Nucleus-Image."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokdyn.adapters.base import Arguments, Blocks, Follow, ModelAdapter, Products
from tokdyn.adapters.products import Experts
from tokdyn.adapters.readers import CONTROL_REASON, IMAGE_PROMPT_REASON, patch_grid, shapes_grid, timestep_level
from tokdyn.adapters.width import SlicedLayer, Width, attention_and_mlp, attention_layers, mlp_layers, runs_processor


def _prx_modulated(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block of PRX."""
    shift, scale, _ = block.modulation(arguments["temb"])[0]  # type: ignore[operator]
    out: Tensor = block.img_pre_norm(arguments["hidden_states"]) * (1 + scale) + shift  # type: ignore[operator]
    return out


PRX = ModelAdapter(
    name="PRX",
    time="time_in",
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
                text_sees="none",
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


def _lumina_modulated(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block of Lumina-Next."""
    out: Tensor = block.norm1(arguments["hidden_states"], arguments["temb"])[0]  # type: ignore[operator]
    return out


def _lumina_sliceable(block: nn.Module) -> bool:
    """Return whether a block of Lumina-Next can be sliced: norms across heads come after its heads are counted."""
    runs = runs_processor(("attn1", "attn2"), "LuminaAttnProcessor2_0")
    return runs(block) and block.attn1.norm_q is None  # type: ignore[union-attr]


LUMINA_NEXT = ModelAdapter(
    name="Lumina-Next",
    classes=("LuminaNextDiT2DModel",),
    blocks=(
        Blocks(
            "layers",
            follow=(
                Follow("attention_mask"),
                Follow("image_rotary_emb"),  # of the blocks; attention gets it under two names
                Follow("query_rotary_emb"),
                Follow("key_rotary_emb"),
            ),
            attention=("attn1",),
            mlp=("feed_forward",),
            modulated=_lumina_modulated,
            products=Products(mlp=("feed_forward.*",), cross=("attn2",)),
            width=Width(
                layers=(
                    *attention_layers("attn1", out=False),
                    *attention_layers("attn2"),  # its output layer takes the sum of both attentions
                    *mlp_layers("feed_forward.linear_2", "feed_forward.linear_1", "feed_forward.linear_3"),
                ),
                inner="attn2.to_out.0.in_features",
                hidden="feed_forward.linear_2.in_features",
                attention=("attn1", "attn2"),
                per_head=("gate",),
                sliceable=_lumina_sliceable,
            ),
        ),
    ),
    grid=patch_grid,
    level=timestep_level(scale=1.0, backwards=True),
    refuse={"cross_attention_kwargs": IMAGE_PROMPT_REASON},
    width=lambda model: int(model.config["hidden_size"]),  # type: ignore[index]
    guidance="cond_first",
)


def _hunyuan_modulated(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block of HunyuanDiT, whose first norm shifts them."""
    out: Tensor = block.norm1(arguments["hidden_states"], arguments["temb"])  # type: ignore[operator]
    return out


HUNYUAN_DIT = ModelAdapter(
    name="HunyuanDiT",
    classes=("HunyuanDiT2DModel",),
    blocks=(
        Blocks(
            "blocks",
            follow=(Follow("image_rotary_emb", axis=0, batched=False), Follow("skip")),
            full_between=True,  # later blocks get the tokens of earlier ones
            attention=("attn1",),
            mlp=("ff",),
            modulated=_hunyuan_modulated,
            products=Products(cross=("attn2",)),
            width=attention_and_mlp("attn1", "ff", "HunyuanAttnProcessor2_0"),
        ),
    ),
    grid=patch_grid,
    level=timestep_level(),
    refuse={"controlnet_block_samples": CONTROL_REASON},
)


def _nucleus_modulated(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated image tokens of a block of Nucleus-Image, which scales them without a shift."""
    scale = block.img_mod(arguments["temb"])[:, None].chunk(4, dim=-1)[0]  # type: ignore[operator]
    out: Tensor = block.pre_attn_norm(arguments["hidden_states"]) * (1 + scale)  # type: ignore[operator]
    return out


def _nucleus_experts(block: Any) -> tuple[Experts, ...]:
    """Return the experts of a block, each of which chooses as many tokens of a sample; none if it has a plain MLP."""
    if not block.moe_enabled:
        return ()
    experts = block.img_mlp.experts
    weights = experts.gate_up_proj[0].numel() + experts.down_proj[0].numel()
    return (Experts("img_mlp.experts", 2 * weights, block.img_mlp.capacity_factor, experts.num_experts),)


NUCLEUS = ModelAdapter(
    name="Nucleus-Image",
    classes=("NucleusMoEImageTransformer2DModel",),
    blocks=(
        Blocks(
            "transformer_blocks",
            text="encoder_hidden_states",
            joint="first",
            follow=(
                Follow("image_rotary_emb", axis=0, batched=False, item=0),
                Follow("attention_kwargs", dims=2),  # of the blocks; attention gets what is in it
                Follow("attention_mask", dims=2),
            ),
            attention=("attn",),
            mlp=(),  # experts choose among the tokens of a sample, and get them twice
            modulated=_nucleus_modulated,
            products=Products(text=("encoder_proj", *Products().text), text_sees="none", experts=_nucleus_experts),
            width=Width(
                layers=attention_layers("attn"),
                inner="attn.to_out.0.in_features",
                hidden=None,
                attention=("attn",),
                sliceable=runs_processor("attn", "NucleusMoEAttnProcessor2_0"),
            ),
        ),
    ),
    grid=shapes_grid,
    level=timestep_level(scale=1.0),
    refuse={"attention_kwargs": IMAGE_PROMPT_REASON},
    guidance="calls",
)
