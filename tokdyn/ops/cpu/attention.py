"""Attention on the CPU, where the fastest exact path depends on the type, on gradients and on the rows of the samples.

The measurements behind the choices are in docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokdyn.ops import attention, torch_private
from tokdyn.ops.attention import Backend
from tokdyn.ops.dispatch import cpu_form, differentiable_gradients
from tokdyn.tokens import Packing, aligned

_CALL, _CALL_BF16 = 3_500, 13_000  # what a call for one more sample costs, in pairs of query and key
_LEARN_BF16 = (1.5, 15_000)  # training in bf16: what a pair and a call cost sample by sample, in padded pairs
_SHORT = 512  # rows up to which training in bf16 takes two matrix products
_EXACT = (torch.float32, torch.float64)


@cpu_form(attention.dense_attention)
def dense_attention(qkv: Tensor, heads: int, key_bias: Tensor | None = None) -> Tensor | None:
    """Compute attention as two matrix products when training in bf16, where the fused kernel's gradients are slow."""
    batch, rows, _ = qkv.shape
    if rows > _SHORT or not _learns_in_bf16(qkv):
        return None
    query, key, value = qkv.reshape(batch, rows, 3, heads, -1).permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)
    start = qkv.new_zeros(())
    if key_bias is not None:
        start = key_bias.to(qkv.dtype)[:, None, None].expand(-1, heads, -1, -1).flatten(0, 1)
    beta, alpha = 0 if key_bias is None else 1, query.shape[-1] ** -0.5
    scores = torch.baddbmm(start, query, key.transpose(1, 2), beta=beta, alpha=alpha)
    out = torch.bmm(scores.softmax(dim=-1), value).view(batch, heads, rows, -1)
    return out.transpose(1, 2).reshape(batch, rows, -1)


@cpu_form(attention.packed_attention)
def packed_attention(qkv: Tensor, heads: int, packing: Packing, key_bias: Tensor | None = None) -> Tensor | None:
    """Compute packed attention sample by sample or padded, whichever costs less.

    Kernels in bf16 are compiled for each length, so training in bf16 computes samples one by one in fp32.
    """
    if len(set(packing.lengths)) == 1:
        return None
    wide = _learns_in_bf16(qkv) and key_bias is None
    backend = attention.forced_backend()
    if backend == "auto":
        backend = choose(packing.lengths, qkv.dtype, wide)
    if backend == "padded":
        return attention.padded_attention(qkv, heads, packing, key_bias)
    if backend != "split":
        return None
    rows = qkv.float() if wide else qkv
    if key_bias is None and rows.dtype in _EXACT and rows.requires_grad and _has_kernels():
        out: Tensor = _SplitAttention.apply(rows.contiguous(), heads, packing.lengths)
        return out.to(qkv.dtype)
    return attention.split_attention(rows, heads, packing, key_bias).to(qkv.dtype)


@cpu_form(attention.pairs_of)
def pairs_of(rows: Tensor, lengths: Sequence[int], head_width: int, learning: bool, biased: bool) -> int | None:
    """Count the pairs that the forms in this file compute."""
    if len(set(lengths)) == 1 or attention.forced_backend() != "auto":
        return None
    if choose(lengths, rows.dtype, learning and not biased) == "padded":
        return len(lengths) * aligned(max(lengths)) ** 2
    return sum(n * n for n in lengths)


def choose(lengths: Sequence[int], dtype: torch.dtype, learning: bool = False) -> Backend:
    """Choose the fastest path for samples of these lengths.

    Args:
        lengths: rows of the samples.
        dtype: of the rows.
        learning: gradients are wanted, and keys have no bias.
    """
    together = len(lengths) * aligned(max(lengths)) ** 2
    if learning and dtype == torch.bfloat16:
        pair, call = _LEARN_BF16
        apart = sum(pair * n * n + call for n in lengths)
        return "padded" if together <= apart and aligned(max(lengths)) <= _SHORT else "split"
    call = _CALL_BF16 if dtype == torch.bfloat16 else _CALL
    return "padded" if together <= sum(n * aligned(n) + call for n in lengths) else "split"


def _learns_in_bf16(qkv: Tensor) -> bool:
    return qkv.dtype == torch.bfloat16 and torch.is_grad_enabled() and qkv.requires_grad


def _has_kernels() -> bool:
    """Whether this PyTorch has the fused kernel for the CPU and the one for its gradients."""
    return torch_private.flash_attention is not None and torch_private.flash_attention_backward is not None


class _SplitAttention(torch.autograd.Function):
    """The kernel behind `scaled_dot_product_attention`, with results and gradients written where they belong."""

    @staticmethod
    def forward(context, qkv, heads, lengths):  # type: ignore[no-untyped-def]
        out = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        sums = []
        for part, place in zip(_by_head(qkv, 3 * heads, lengths), _by_head(out, heads, lengths), strict=True):
            mixed, sum_ = torch_private.flash_attention(*part.chunk(3, dim=1))
            place.copy_(mixed)
            sums.append(sum_)
        context.save_for_backward(qkv, out, *sums)
        context.heads, context.lengths = heads, lengths
        return out

    @staticmethod
    def backward(context, gradient):  # type: ignore[no-untyped-def]
        qkv, out, *sums = context.saved_tensors
        heads, lengths = context.heads, context.lengths
        if torch.is_grad_enabled():
            return differentiable_gradients(_plain_split, (qkv, heads, lengths), gradient)
        found = torch.empty_like(qkv)
        rows = (_by_head(each, heads, lengths) for each in (gradient, out))
        wide = (_by_head(each, 3 * heads, lengths) for each in (qkv, found))
        for upper, mixed, part, place, sum_ in zip(*rows, *wide, sums, strict=True):
            slopes = torch_private.flash_attention_backward(upper, *part.chunk(3, dim=1), mixed, sum_, 0.0, False)
            for slope, target in zip(slopes, place.chunk(3, dim=1), strict=True):
                target.copy_(slope)
        return found, None, None


def _plain_split(qkv: Tensor, heads: int, lengths: Sequence[int]) -> Tensor:
    parts: list[Any] = [part.chunk(3, dim=1) for part in _by_head(qkv, 3 * heads, lengths)]
    return torch.cat([F.scaled_dot_product_attention(*each)[0].transpose(0, 1).flatten(1) for each in parts])


def _by_head(rows: Tensor, heads: int, lengths: Sequence[int]) -> Iterator[Tensor]:
    """Yield views (1, H, n, d) of (T, H d) rows, one for each sample."""
    for part in rows.view(1, len(rows), heads, -1).split_with_sizes(lengths, dim=1):
        yield part.transpose(1, 2)
