"""Adapter of HiDream, whose blocks add another layer of the text encoder's tokens each, and whose MLPs are experts.

Images that are not square are padded behind their tokens, and stay padded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tokdyn.adapters.base import Arguments, Blocks, Follow, ModelAdapter
from tokdyn.adapters.products import Experts, Products
from tokdyn.adapters.readers import IMAGE_PROMPT_REASON, patch_grid, timestep_level
from tokdyn.adapters.width import SlicedLayer, Width, runs_processor
from tokdyn.errors import InputError
from tokdyn.tokens import Grid


def _grid(model: nn.Module, call: Arguments) -> Grid:
    """Return the grid of latents (B, C, rows, columns), or of packed latents of one size."""
    if call["hidden_states"].dim() == 4:
        return patch_grid(model, call)
    sizes = {tuple(size) for size in call["img_sizes"].tolist()}
    if len(sizes) > 1:
        raise InputError(
            f"the images in hidden_states have the sizes {sorted(sizes)}; call a wrapped "
            "HiDreamImageTransformer2DModel with images of one size at a time."
        )
    return sizes.pop()


def _modulated(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated image tokens of a block of HiDream."""
    inner: nn.Module = block.block  # type: ignore[assignment]
    shift, scale = inner.adaLN_modulation(arguments["temb"])[:, None].chunk(12, dim=-1)[:2]  # type: ignore[operator]
    out: Tensor = inner.norm1_i(arguments["hidden_states"]) * (1 + scale) + shift  # type: ignore[operator]
    return out


_FOLLOW = (Follow("hidden_states_masks"), Follow("image_rotary_emb"))


def _width(*streams: str) -> Width:
    """Declare the attention of a block; `streams` are the endings of its layers' names, one for each stream."""
    attention = "block.attn1"
    norms = {"to_q": "q_rms_norm", "to_k": "k_rms_norm", "to_v": None}
    return Width(
        layers=(
            *(
                SlicedLayer(f"{attention}.{layer}{end}", out=("heads",), norm=norm and f"{attention}.{norm}{end}")
                for end in streams
                for layer, norm in norms.items()
            ),
            *(SlicedLayer(f"{attention}.to_out{end}", into=("heads",)) for end in streams),
        ),
        inner=f"{attention}.to_out.in_features",
        hidden=None,  # a token goes through the experts that it chooses
        attention=(attention,),
        sliceable=runs_processor(attention, "HiDreamAttnProcessor"),
    )


def _experts(block: Any) -> tuple[Experts, ...]:
    """Return the experts of a block, of which every token uses the best ones; none if it has a plain MLP."""
    mlp = block.block.ff_i
    if not hasattr(mlp, "experts"):
        return ()
    weights = sum(
        layer.in_features * layer.out_features for layer in mlp.experts[0].modules() if isinstance(layer, nn.Linear)
    )
    return (Experts("block.ff_i.experts", 2 * weights, mlp.num_activated_experts, router=2 * mlp.gate.weight.numel()),)


_PRODUCTS = Products(experts=_experts, indicator=("block.adaLN_modulation.*",))

HIDREAM = ModelAdapter(
    name="HiDream",
    classes=("HiDreamImageTransformer2DModel",),
    blocks=(
        Blocks(
            "double_stream_blocks",
            text="encoder_hidden_states",
            returns=("tokens", "text"),
            image="first",
            joint="first",
            follow=_FOLLOW,
            full_between=True,  # the model counts on the number of image tokens
            attention=("block.attn1",),
            mlp=("block.ff_i",),
            modulated=_modulated,
            products=replace(
                _PRODUCTS, text=("*.to_q_t", "*.to_k_t", "*.to_v_t", "*.to_out_t", "*.ff_t.*"), mlp=("*.ff_t.*",)
            ),
            width=_width("", "_t"),
        ),
        Blocks(
            "single_stream_blocks",
            image="first",
            joint="first",
            follow=_FOLLOW,
            full_between=True,
            attention=("block.attn1",),
            mlp=("block.ff_i",),
            products=_PRODUCTS,
            width=_width(""),
        ),
    ),
    grid=_grid,
    read_ahead=("img_sizes",),
    level=timestep_level("timesteps"),
    refuse={"attention_kwargs": IMAGE_PROMPT_REASON},
)
