"""Adapter of timm's VisionTransformer, the image classifier for which token merging was published (arXiv 2210.09461).

Class, distillation and register tokens come before the image tokens and are neither merged nor dropped. There is no
noise level.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tokdyn.adapters.base import Arguments, Blocks, ModelAdapter
from tokdyn.adapters.facebook import WIDTH
from tokdyn.errors import InputError
from tokdyn.tokens import Grid


def _grid(model: nn.Module, call: Arguments) -> Grid:
    if model.training and not isinstance(model.patch_drop, nn.Identity):
        raise InputError(
            f"this {type(model).__name__} drops patches at random in training, so its tokens do not form a grid; build "
            "it with patch_drop_rate=0 and use TokenDrop, or call model.eval()."
        )
    rows, columns = model.patch_embed.dynamic_feat_size(call["x"].shape[-2:])  # type: ignore[union-attr, operator]
    return rows, columns


def _fits(model: nn.Module) -> bool:
    return hasattr(getattr(model, "patch_embed", None), "dynamic_feat_size") and all(
        hasattr(model, name) for name in ("blocks", "num_prefix_tokens", "patch_drop")
    )


def _heads(model: nn.Module) -> int:
    blocks: Any = model.blocks
    return int(getattr(getattr(blocks[0], "attn", blocks[0]), "num_heads", 0))


TIMM_VIT = ModelAdapter(
    name="timm ViT",
    classes=("VisionTransformer",),
    blocks=(Blocks("blocks", tokens="x", image="last", attention=("attn",), mlp=("mlp",), width=WIDTH),),
    grid=_grid,
    level=None,
    refuse={
        "attn_mask": "it has one entry per pair of tokens; leave it out",
        "is_causal": "merged tokens have no order; leave it out",
    },
    width=lambda model: int(model.embed_dim),  # type: ignore[arg-type]
    heads=_heads,
    fits=_fits,
    entries=("forward_features", "forward_intermediates"),
)
