"""DC-DiT as its equations read: sorts for packing, modulation repeated for each token, all pairs in de-chunking.

It is only the other side of comparisons; `tests/bench/test_official.py` compares it with the model of the package.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from benchmarks.naive import dense_dechunk
from tokdyn.models import DCDiT


def forward(model: DCDiT, x: Tensor, timestep: Tensor, labels: Tensor, plan: Tensor | None = None) -> Tensor:
    """Compute `model(x, timestep, labels, plan=plan).sample` without tokdyn's operators.

    Args:
        model: its weights are used. Grids are square, sigma is 1, and there is no tail drop.
        x: (B, channels, rows, columns).
        timestep: (B,).
        labels: (B,).
        plan: (B, N) bool, the tokens to keep; None leaves that to the router.
    """
    condition = F.silu(model.t_embedder.mlp[0](_frequencies(timestep, x.dtype)))
    condition = model.t_embedder.mlp[2](condition) + model.y_embedder.embedding_table(labels)
    cells = F.pixel_unshuffle(x, model.config.patch_size)
    maps = model.x_embedder.proj(cells)
    side = maps.shape[-1]
    for layer in model.encoder.layers:
        maps = _residual_block(layer, maps, condition)
    tokens = _rms(model.encoder.norm, maps.flatten(2).transpose(1, 2))
    probability = _probability(model, tokens, side)
    keep = probability > 0.5 if plan is None else plan
    rows, order, real, lengths = _chunk(tokens, keep)
    places = model.pos_embed[0].to(rows.dtype)
    rows = rows + places[order[real]]
    for block in model.blocks:
        rows = _block(block, rows, condition, lengths)
    rows = _rms(model.norm, rows)
    padded = rows.new_zeros(*order.shape, rows.shape[-1])
    padded[real] = rows
    spread = dense_dechunk(padded.float(), probability, order, real, keep, side)
    chosen = torch.where(keep, probability, 1 - probability)
    through = chosen + (1 - chosen).detach()  # 1 forward, the identity backward
    tokens = (spread * through[..., None] + model.chunking.residual(tokens).float()).to(tokens.dtype)
    maps = tokens.transpose(1, 2).reshape(len(x), -1, side, side)
    for layer in model.decoder.layers:
        maps = _residual_block(layer, maps, condition)
    out = _rms(model.decoder.norm, maps.flatten(2).transpose(1, 2))
    shift, scale = model.final_layer.adaLN_modulation(condition).chunk(2, dim=1)
    out = model.final_layer.linear(F.layer_norm(out, out.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None])
    patch = model.config.patch_size
    return rearrange(out, "b (r c) (p q channels) -> b channels (r p) (c q)", r=side, p=patch, q=patch)


def _frequencies(timestep: Tensor, dtype: torch.dtype) -> Tensor:
    scale = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128, device=timestep.device) / 128)
    angle = timestep.float()[:, None] * scale
    return torch.cat((angle.cos(), angle.sin()), dim=1).to(dtype)


def _residual_block(layer: Any, x: Tensor, condition: Tensor) -> Tensor:
    h = layer.conv1(F.silu(layer.norm1(x))) + layer.cond_proj(condition)[:, :, None, None]
    h = layer.conv2(F.silu(layer.norm2(h)))
    return h + (x if layer.skip_proj is None else layer.skip_proj(x))


def _rms(norm: Any, x: Tensor) -> Tensor:
    return (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + norm.eps)) * norm.weight


def _probability(model: DCDiT, tokens: Tensor, side: int) -> Tensor:
    """Compute boundary probabilities (B, N), in fp32 as the router does."""
    with torch.autocast(tokens.device.type, enabled=False):
        maps = tokens.float().transpose(1, 2).reshape(len(tokens), -1, side, side)
        return torch.sigmoid(model.chunking.router(maps, None, 1).reshape(len(tokens), -1))


def _chunk(tokens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Return kept rows (T, D), their cells (B, M), which of these are real (B, M), and the rows of each sample."""
    count, cell = keep.shape[1], torch.arange(keep.shape[1], device=keep.device)
    order = torch.argsort(cell + (~keep) * count, dim=1)
    back = torch.argsort(order, dim=1)  # the rank of every cell
    lengths = keep.sum(dim=1)
    longest = int(lengths.max())
    ranked = torch.argsort(torch.where(keep, back, back + count), dim=1)[:, :longest]
    real = torch.arange(longest, device=keep.device) < lengths[:, None]
    padded = tokens.gather(1, ranked[..., None].expand(-1, -1, tokens.shape[-1]))
    return padded[real], ranked, real, lengths.tolist()


def _block(block: Any, rows: Tensor, condition: Tensor, lengths: list[int]) -> Tensor:
    """Run a block on packed rows with its modulation repeated for every token, and attention sample by sample."""
    repeats = torch.tensor(lengths, device=rows.device)
    parts = block.adaLN_modulation(condition).repeat_interleave(repeats, dim=0).chunk(6, dim=1)
    shift1, scale1, gate1, shift2, scale2, gate2 = parts
    normed = F.layer_norm(rows, rows.shape[-1:], eps=1e-6) * (1 + scale1) + shift1
    rows = rows + gate1 * block.attn.proj(_attention(block.attn, normed, lengths))
    normed = F.layer_norm(rows, rows.shape[-1:], eps=1e-6) * (1 + scale2) + shift2
    return rows + gate2 * block.mlp.fc2(F.gelu(block.mlp.fc1(normed), approximate="tanh"))


def dense_block(block: Any, x: Tensor, condition: Tensor) -> Tensor:
    """Run a block of a DiT on all tokens (B, N, D), in plain PyTorch."""
    parts = block.adaLN_modulation(condition)[:, None].chunk(6, dim=2)
    shift1, scale1, gate1, shift2, scale2, gate2 = parts
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1
    q, k, v = block.attn.qkv(normed).unflatten(2, (3, block.attn.heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + gate1 * block.attn.proj(mixed)
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2
    return x + gate2 * block.mlp.fc2(F.gelu(block.mlp.fc1(normed), approximate="tanh"))


def _attention(attention: Any, rows: Tensor, lengths: list[int]) -> Tensor:
    found = []
    for part in attention.qkv(rows).split(lengths):
        q, k, v = part.view(len(part), 3, attention.heads, -1).permute(1, 2, 0, 3).unsqueeze(1)
        found.append(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).reshape(len(part), -1))
    return torch.cat(found)
