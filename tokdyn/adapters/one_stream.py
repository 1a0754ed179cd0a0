"""Adapters of image models with text and image in one sequence throughout: Krea 2, Ideogram 4, OmniGen, ERNIE-Image."""

from __future__ import annotations

from torch import Tensor, nn

from tokdyn.adapters.base import Arguments, Blocks, Follow, ModelAdapter, Products
from tokdyn.adapters.readers import IMAGE_PROMPT_REASON, grid_from_ids, patch_grid, timestep_level
from tokdyn.adapters.width import SlicedLayer, Width, attention_layers, mlp_layers, runs_processor
from tokdyn.tokens import Grid, ImageTokens

_IMAGE = 2  # in the argument `indicator` of Ideogram 4


def _krea_grid(model: nn.Module, call: Arguments) -> Grid | ImageTokens:
    """Return the grid of the image tokens, whose ids follow those of the text tokens."""
    return grid_from_ids(call["position_ids"][-call["hidden_states"].shape[1] :])


def _krea_modulated(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block of Krea 2, whose own table is added to the model's modulation."""
    scale, shift = (arguments["temb"].unflatten(-1, (6, -1)) + block.scale_shift_table).unbind(-2)[:2]
    out: Tensor = block.norm1(arguments["hidden_states"]) * (1 + scale) + shift  # type: ignore[operator]
    return out


KREA2 = ModelAdapter(
    name="Krea 2",
    classes=("Krea2Transformer2DModel",),
    blocks=(
        Blocks(
            "transformer_blocks",
            image="last",
            follow=(Follow("attention_mask", axis=3), Follow("image_rotary_emb", axis=0, batched=False)),
            attention=("attn",),
            mlp=("ff",),
            modulated=_krea_modulated,
            width=Width(
                layers=(
                    *attention_layers("attn"),
                    SlicedLayer("attn.to_gate", out=("heads",)),
                    *mlp_layers("ff.down", "ff.gate", "ff.up"),
                ),
                inner="attn.to_out.0.in_features",
                hidden="ff.down.in_features",
                attention=("attn",),
                counts=("num_heads", "num_kv_heads"),
                sliceable=runs_processor("attn", "Krea2AttnProcessor"),
            ),
        ),
    ),
    grid=_krea_grid,
    read_ahead=("position_ids",),
    level=timestep_level(scale=1.0),
    refuse={"attention_kwargs": IMAGE_PROMPT_REASON},
    guidance="calls",
)


def _ideogram_grid(model: nn.Module, call: Arguments) -> Grid | ImageTokens:
    """Return the grid of the image tokens, which `indicator` marks."""
    return grid_from_ids(call["position_ids"][0][call["indicator"][0] == _IMAGE])


def _ideogram_modulated(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block of Ideogram 4, which scales them without a shift."""
    scale = block.adaln_modulation(arguments["adaln_input"]).chunk(4, dim=-1)[0]  # type: ignore[operator]
    out: Tensor = block.attention_norm1(arguments["hidden_states"]) * (1 + scale)  # type: ignore[operator]
    return out


IDEOGRAM4 = ModelAdapter(
    name="Ideogram 4",
    classes=("Ideogram4Transformer2DModel",),
    blocks=(
        Blocks(
            "layers",
            image="last",
            follow=(
                Follow("attention_mask", axis=2),  # an entry per pair of tokens
                Follow("attention_mask", axis=3),
                Follow("image_rotary_emb"),
                Follow("adaln_input"),
            ),
            attention=("attention",),
            mlp=("feed_forward",),
            modulated=_ideogram_modulated,
            products=Products(indicator=("adaln_modulation",)),
            width=Width(
                layers=(
                    *attention_layers("attention"),
                    *mlp_layers("feed_forward.w2", "feed_forward.w1", "feed_forward.w3"),
                ),
                inner="attention.to_out.0.in_features",
                hidden="feed_forward.w2.in_features",
                attention=("attention",),
                counts=("num_heads",),
                sliceable=runs_processor("attention", "Ideogram4AttnProcessor"),
            ),
        ),
    ),
    grid=_ideogram_grid,
    read_ahead=("position_ids", "indicator"),
    level=timestep_level(scale=1.0, backwards=True),
    refuse={"attention_kwargs": IMAGE_PROMPT_REASON},
    guidance="calls",
)


OMNIGEN = ModelAdapter(
    name="OmniGen",
    classes=("OmniGenTransformer2DModel",),
    blocks=(
        Blocks(
            "layers",
            image="last",  # after the prompt, its images and the timestep
            follow=(
                Follow("attention_mask", axis=2, dims=4),  # an entry per pair of tokens
                Follow("attention_mask", axis=3, dims=4),
                Follow("image_rotary_emb", axis=0, batched=False),
            ),
            attention=("self_attn",),
            mlp=("mlp",),
            width=Width(
                layers=(*attention_layers("self_attn"), *mlp_layers("mlp.down_proj", "mlp.gate_up_proj")),
                inner="self_attn.to_out.0.in_features",
                hidden="mlp.down_proj.in_features",
                attention=("self_attn",),
                inners=("inner_dim", "inner_kv_dim", "out_dim"),
                sliceable=runs_processor("self_attn", "OmniGenAttnProcessor2_0"),
            ),
        ),
    ),
    grid=patch_grid,
    level=timestep_level(scale=1.0, backwards=True),
    width=lambda model: int(model.config["hidden_size"]),  # type: ignore[index]
    guidance="cond_first",
)


def _ernie_modulated(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block of ERNIE-Image, whose modulation is computed once for all blocks."""
    shift, scale = arguments["temb"][:2]
    out: Tensor = block.adaLN_sa_ln(arguments["x"]) * (1 + scale) + shift  # type: ignore[operator]
    return out


ERNIE_IMAGE = ModelAdapter(
    name="ERNIE-Image",
    classes=("ErnieImageTransformer2DModel",),
    blocks=(
        Blocks(
            "layers",
            tokens="x",
            sequence_first=("x", "temb"),
            image="first",
            joint="first",
            follow=(
                Follow("rotary_pos_emb"),  # of the blocks
                Follow("image_rotary_emb"),  # of their attention
                Follow("temb"),
                Follow("attention_mask", axis=3),
            ),
            attention=("self_attention",),
            mlp=(),  # it gets tokens before samples
            modulated=_ernie_modulated,
            products=Products(mlp=("mlp.*",)),
            width=Width(
                layers=(
                    *attention_layers("self_attention"),
                    *mlp_layers("mlp.linear_fc2", "mlp.gate_proj", "mlp.up_proj"),
                ),
                inner="self_attention.to_out.0.in_features",
                hidden="mlp.linear_fc2.in_features",
                attention=("self_attention",),
                sliceable=runs_processor("self_attention", "ErnieImageSingleStreamAttnProcessor"),
            ),
        ),
    ),
    grid=patch_grid,
    level=timestep_level(),
    width=lambda model: int(model.config["hidden_size"]),  # type: ignore[index]
)
