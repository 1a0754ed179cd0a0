"""What attention of a block gets: its tokens, normalised and modulated by the timestep. Feature caches compare it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tokdyn.adapters.base import Arguments


def public_layout(block: nn.Module, named: Arguments) -> Tensor:
    """Of `block(x, c)`: LayerNorm(x) (1 + scale) + shift, from the adaLN of the block."""
    x, condition = list(named.values())[:2]
    shift, scale = block.adaLN_modulation(condition).chunk(6, dim=1)[:2]  # type: ignore[operator]
    out: Tensor = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    return out


def class_labels(block: nn.Module, named: Arguments) -> Tensor:
    """Of diffusers' DiT, whose blocks embed the timestep and the class themselves."""
    x = named["hidden_states"]
    out: Tensor = block.norm1(x, named["timestep"], named["class_labels"], hidden_dtype=x.dtype)[0]  # type: ignore[operator]
    return out


def embedding(block: nn.Module, named: Arguments) -> Tensor:
    """Of blocks whose first norm takes the embedding `temb`, as in SD3 and Flux."""
    out: Tensor = block.norm1(named["hidden_states"], emb=named["temb"])[0]  # type: ignore[operator]
    return out


def shift_table(block: nn.Module, named: Arguments) -> Tensor:
    """Of PixArt, whose blocks add a table of their own to the modulation of the model."""
    x, timestep = named["hidden_states"], named["timestep"]
    table: Tensor = block.scale_shift_table  # type: ignore[assignment]
    shift, scale = (table[None] + timestep.view(len(x), 6, -1)).chunk(6, dim=1)[:2]
    out: Tensor = block.norm1(x) * (1 + scale) + shift  # type: ignore[operator]
    return out
