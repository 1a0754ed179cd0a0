"""What attention of a block gets: its tokens, normalised and modulated by the timestep. Feature caches compare it."""

from __future__ import annotations

import torch
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
    """Of blocks whose first norm takes the embedding `temb`: SD3, Flux, HunyuanVideo, AuraFlow and Lumina 2.

    HunyuanVideo from an image modulates the tokens of its first frame apart.
    """
    frame = {}
    if "num_tokens" in named:
        frame = {"token_replace_emb": named["token_replace_emb"], "first_frame_num_tokens": named["num_tokens"]}
    out: Tensor = block.norm1(named["hidden_states"], emb=named["temb"], **frame)[0]  # type: ignore[operator]
    return out


def with_text(block: nn.Module, named: Arguments) -> Tensor:
    """Of CogVideoX, whose first norm takes the text too."""
    out: Tensor = block.norm1(named["hidden_states"], named["encoder_hidden_states"], named["temb"])[0]  # type: ignore[operator]
    return out


def shift_table(block: nn.Module, named: Arguments) -> Tensor:
    """Of PixArt and Sana, whose blocks add a table of their own to the modulation of the model."""
    x, timestep = named["hidden_states"], named["timestep"]
    table: Tensor = block.scale_shift_table  # type: ignore[assignment]
    shift, scale = (table[None] + timestep.view(len(x), 6, -1)).chunk(6, dim=1)[:2]
    out: Tensor = block.norm1(x) * (1 + scale) + shift  # type: ignore[operator]
    return out


def shift_table_per_token(block: nn.Module, named: Arguments) -> Tensor:
    """Of LTX and Wan: the same, where the timestep may differ from token to token."""
    x, temb = named["hidden_states"], named["temb"]
    table: Tensor = block.scale_shift_table.view(6, -1)  # type: ignore[operator]
    shift, scale = (table[:2] + temb.reshape(len(x), -1, *table.shape)[:, :, :2]).unbind(2)  # (B, N or 1, D)
    out: Tensor = block.norm1(x) * (1 + scale) + shift  # type: ignore[operator]
    return out.to(x.dtype)


def scale_alone(block: nn.Module, named: Arguments) -> Tensor:
    """Of Z-Image, whose blocks scale and do not shift."""
    scale = block.adaLN_modulation(named["adaln_input"]).chunk(4, dim=1)[0]  # type: ignore[operator]
    out: Tensor = block.attention_norm1(named["x"]) * (1 + scale[:, None])  # type: ignore[operator]
    return out


def of_the_image(block: nn.Module, named: Arguments) -> Tensor:
    """Of Qwen-Image, which modulates the tokens of reference images by a second timestep, told by `modulate_index`."""
    shift, scale = block.img_mod(named["temb"]).chunk(6, dim=-1)[:2]  # type: ignore[operator]
    shift, scale, index = shift[:, None], scale[:, None], named.get("modulate_index")
    if index is not None:
        first = index[..., None] == 0
        shift, scale = (torch.where(first, *each.chunk(2)) for each in (shift, scale))
    out: Tensor = block.img_norm1(named["hidden_states"]) * (1 + scale) + shift  # type: ignore[operator]
    return out


def of_the_model(block: nn.Module, named: Arguments) -> Tensor:
    """Of Flux 2, where the model computes one modulation for all blocks; diffusers 0.36 splits it beforehand."""
    if "temb_mod_img" in named:
        shift, scale = named["temb_mod_img"].chunk(6, dim=-1)[:2]
    else:
        shift, scale = named["temb_mod_params_img"][0][:2]
    if shift.dim() == 2:
        shift, scale = shift[:, None], scale[:, None]
    out: Tensor = block.norm1(named["hidden_states"]) * (1 + scale) + shift  # type: ignore[operator]
    return out
