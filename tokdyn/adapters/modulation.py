"""Compute the input of a block's attention: its tokens after the first norm and the modulation by the timestep.

Adapters name one of these functions in `Blocks.modulated`. FeatureCache compares the result in the first block from
step to step, because its change predicts the change of the model's output (arXiv 2411.19108). Every function takes a
block and the arguments of its call by name, and returns the image tokens (B, N, D), or text and image tokens if both
are one sequence. The block is not changed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokdyn.adapters.base import Arguments


def public_dit(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block `block(x, c)` of the public DiT: `layer_norm(x) * (1 + scale) + shift`."""
    x, condition = list(arguments.values())[:2]
    shift, scale = block.adaLN_modulation(condition).chunk(6, dim=1)[:2]  # type: ignore[operator]
    out: Tensor = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    return out


def diffusers_dit(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block of diffusers' DiT, which embeds the timestep and the class itself."""
    x, timestep, labels = (arguments[name] for name in ("hidden_states", "timestep", "class_labels"))
    out: Tensor = block.norm1(x, timestep, labels, hidden_dtype=x.dtype)[0]  # type: ignore[operator]
    return out


def from_embedding(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block whose first norm takes `temb`, as in SD3, Flux, HunyuanVideo and Lumina 2.

    Image-to-video HunyuanVideo modulates the tokens of the first frame by an embedding of their own.
    """
    first_frame = {}
    if "num_tokens" in arguments:
        first_frame = {
            "token_replace_emb": arguments["token_replace_emb"],
            "first_frame_num_tokens": arguments["num_tokens"],
        }
    out: Tensor = block.norm1(arguments["hidden_states"], emb=arguments["temb"], **first_frame)[0]  # type: ignore[operator]
    return out


def cogvideox(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated image tokens of a block of CogVideoX, whose first norm takes the text tokens as well."""
    x, text, embedding = (arguments[name] for name in ("hidden_states", "encoder_hidden_states", "temb"))
    out: Tensor = block.norm1(x, text, embedding)[0]  # type: ignore[operator]
    return out


def shift_table(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block of PixArt or Sana, whose own table is added to the model's modulation."""
    x, timestep = arguments["hidden_states"], arguments["timestep"]
    table: Tensor = block.scale_shift_table  # type: ignore[assignment]
    shift, scale = (table[None] + timestep.view(len(x), 6, -1)).chunk(6, dim=1)[:2]  # each (B, 1, D)
    out: Tensor = block.norm1(x) * (1 + scale) + shift  # type: ignore[operator]
    return out


def shift_table_per_token(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block of LTX or Wan: as in PixArt, but tokens may differ in their timestep."""
    x, temb = arguments["hidden_states"], arguments["temb"]
    table: Tensor = block.scale_shift_table.view(6, -1)  # type: ignore[operator]
    shift, scale = (table[:2] + temb.reshape(len(x), -1, *table.shape)[:, :, :2]).unbind(2)  # each (B, N or 1, D)
    out: Tensor = block.norm1(x) * (1 + scale) + shift  # type: ignore[operator]
    return out.to(x.dtype)


def zimage(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block of Z-Image, which scales them without a shift.

    With reference images, tokens whose `noise_mask` is not 1 are modulated by a second timestep.
    """
    mask = arguments.get("noise_mask")
    names = ("adaln_input",) if mask is None else ("adaln_noisy", "adaln_clean")
    scales = [block.adaLN_modulation(arguments[name]).chunk(4, dim=1)[0][:, None] for name in names]  # type: ignore[operator]
    scale = scales[0] if mask is None else torch.where(mask[..., None] == 1, *scales)
    out: Tensor = block.attention_norm1(arguments["x"]) * (1 + scale)  # type: ignore[operator]
    return out


def qwen(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated image tokens of a block of Qwen-Image.

    Tokens of reference images, whose `modulate_index` is not 0, are modulated by a second timestep. `temb` then has
    2 B rows: the first timestep of all samples, followed by the second.
    """
    shift, scale = block.img_mod(arguments["temb"]).chunk(6, dim=-1)[:2]  # type: ignore[operator]
    shift, scale, index = shift[:, None], scale[:, None], arguments.get("modulate_index")
    if index is not None:
        generated = index[..., None] == 0
        shift, scale = (torch.where(generated, *part.chunk(2)) for part in (shift, scale))
    out: Tensor = block.img_norm1(arguments["hidden_states"]) * (1 + scale) + shift  # type: ignore[operator]
    return out


def flux2(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated image tokens of a block of Flux 2, whose modulation is computed once for all blocks.

    diffusers 0.36 passes it to the blocks split into shift and scale, later versions as one tensor.
    """
    if "temb_mod_img" in arguments:
        shift, scale = arguments["temb_mod_img"].chunk(6, dim=-1)[:2]
    else:
        shift, scale = arguments["temb_mod_params_img"][0][:2]
    if shift.dim() == 2:
        shift, scale = shift[:, None], scale[:, None]
    out: Tensor = block.norm1(arguments["hidden_states"]) * (1 + scale) + shift  # type: ignore[operator]
    return out


def cosmos(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block of Cosmos, which first adds learned positions to its tokens."""
    x, positions = arguments["hidden_states"], arguments.get("extra_pos_emb")
    if positions is not None:
        x = x + positions
    out: Tensor = block.norm1(x, arguments["embedded_timestep"], arguments.get("temb"))[0]  # type: ignore[operator]
    return out


def kandinsky(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block of Kandinsky 5; its nine modulations are those of three sublayers."""
    x = arguments["visual_embed"]
    shift, scale = block.visual_modulation(arguments["time_embed"])[:, None].chunk(9, dim=-1)[:2]  # type: ignore[operator]
    out: Tensor = block.self_attention_norm(x.float()) * (scale.float() + 1.0) + shift.float()  # type: ignore[operator]
    return out.type_as(x)


def kandinsky6(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated video tokens of a block of Kandinsky 6, as in Kandinsky 5."""
    inner: Any = block.video_dec_block
    x, shift_and_scale = arguments["vis"], inner.visual_modulation(arguments["time_embed"][0])[:, None]
    shift, scale = shift_and_scale.chunk(9, dim=-1)[:2]
    out: Tensor = inner.self_attention_norm(x.float()) * (scale.float() + 1.0) + shift.float()
    return out.type_as(x)


def sana_video(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block of Sana Video, as in LTX."""
    return shift_table_per_token(block, {**arguments, "temb": arguments["timestep"]})


def ltx2(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated video tokens of a block of LTX-2, whose table has 6 or 9 rows."""
    x, temb = arguments["hidden_states"], arguments["temb"]
    table: Tensor = block.scale_shift_table  # type: ignore[assignment]
    shift, scale = (table[:2] + temb.reshape(len(x), -1, *table.shape)[:, :, :2]).unbind(2)  # each (B, N or 1, D)
    out: Tensor = block.norm1(x) * (1 + scale) + shift  # type: ignore[operator]
    return out


def minimax_h3(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block of MiniMax-H3, which gives every token a row of a table."""
    shift, scale = block.adaln_proj(arguments["temb"])[:2]  # type: ignore[operator]
    rows = arguments["adaln_indices"]
    out: Tensor = block.norm1(arguments["hidden_states"])  # type: ignore[operator]
    modulated: Tensor = out * (1.0 + scale.index_select(0, rows)) + shift.index_select(0, rows)
    return modulated


def stable_audio3(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block of Stable Audio 3, memory tokens included."""
    modulation: Tensor = block.to_scale_shift_gate + arguments["global_modulation"]
    scale, shift = modulation.chunk(6, dim=-1)[:2]
    out: Tensor = block.pre_norm(arguments["hidden_states"]) * (1 + scale[:, None]) + shift[:, None]  # type: ignore[operator]
    return out


def ace_step(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block of ACE-Step: as in PixArt, with other names."""
    table: Tensor = block.scale_shift_table  # type: ignore[assignment]
    shift, scale = (table + arguments["temb"]).chunk(6, dim=1)[:2]  # each (B, 1, D)
    out: Tensor = block.self_attn_norm(arguments["hidden_states"]) * (1 + scale) + shift  # type: ignore[operator]
    return out


def longcat_audio(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block of LongCat Audio with global modulation: gate, scale and shift."""
    x, given = arguments["hidden_states"], arguments.get("adaln_global_out")
    if given is None:  # every block computes its own modulation from time and text
        return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).type_as(x)
    _, scale, shift = (given + block.adaln_scale_shift).chunk(6, dim=-1)[:3]
    out: Tensor = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).type_as(x) * (1 + scale[:, None]) + shift[:, None]
    return out
