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
from tokdyn.ops.cpu.linear import empty_rows
from tokdyn.ops.dispatch import cpu_form, differentiable_gradients
from tokdyn.tokens import Packing, Padding, aligned

_CALL, _CALL_BF16 = 3_500, 13_000  # what a call for one more sample costs, in pairs of query and key
_LEARN_BF16 = (1.5, 15_000)  # training in bf16: what a pair and a call cost sample by sample, in padded pairs
_SHORT = 512  # rows up to which training in bf16 takes two matrix products
_EXACT = (torch.float32, torch.float64)


@cpu_form(attention.dense_attention)
def dense_attention(qkv: Tensor, heads: int, key_bias: Tensor | None = None) -> Tensor | None:
    """Compute dense attention on the fastest path for the type of qkv."""
    batch, rows, _ = qkv.shape
    query, key, value = qkv.reshape(batch, rows, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    bias = None if key_bias is None else key_bias[:, None, None]
    return _attend(query, key, value, bias).transpose(1, 2).reshape(batch, rows, -1)


@cpu_form(attention.packed_attention)
def packed_attention(qkv: Tensor, heads: int, packing: Packing, key_bias: Tensor | None = None) -> Tensor | None:
    """Compute packed attention sample by sample or padded, whichever costs less."""
    if len(set(packing.lengths)) == 1:
        return None
    backend = attention.forced_backend()
    if backend == "auto":
        backend = choose(packing.lengths, qkv.dtype, _learns_in_bf16(qkv, key_bias))
    if backend == "padded":
        return _padded(qkv, heads, packing, key_bias)
    return _split(qkv, heads, packing, key_bias) if backend == "split" else None


@cpu_form(attention.pairs_of)
def pairs_of(rows: Tensor, lengths: Sequence[int], head_width: int, learning: bool, biased: bool) -> int | None:
    """Count the pairs that the forms in this file compute."""
    ragged, backend = len(set(lengths)) > 1, attention.forced_backend()
    if ragged:
        if backend == "auto":
            backend = choose(lengths, rows.dtype, learning and not biased)
        if backend != "split":
            return len(lengths) * aligned(max(lengths)) ** 2 if backend == "padded" else None
    exact = learning and ragged and not biased  # one by one, in fp32
    half = rows.dtype == torch.bfloat16 and not exact
    return sum(n * (aligned(n) if half and not (learning and n <= _SHORT) else n) for n in lengths)


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


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Attend in (B, H, N, d): training in bf16 on short rows as two products, otherwise in the fused kernel."""
    rows = query.shape[-2]
    if query.dtype == torch.bfloat16:
        if query.requires_grad and rows <= _SHORT:
            return _two_products(query, key, value, bias)
        key, value, bias = _aligned_keys(key, value, bias)
    mask = bias if bias is None else bias.to(query.dtype)
    if query.requires_grad and _has_kernels() and _fits(query, mask):
        out: Tensor = _FusedAttention.apply(query, key, value, mask)
        return out
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _has_kernels() -> bool:
    """Whether this PyTorch has the fused kernel for the CPU and the one for its gradients."""
    return torch_private.flash_attention is not None and torch_private.flash_attention_backward is not None


def _fits(query: Tensor, mask: Tensor | None) -> bool:
    """Whether the fused kernels take these arguments."""
    takes = query.dtype in (*_EXACT, torch.bfloat16) and query.stride(-1) == 1 and query.numel() > 0
    return takes and (mask is None or not mask.requires_grad)


class _FusedAttention(torch.autograd.Function):
    """The kernel behind `scaled_dot_product_attention` for (B, H, N, d), with a second derivative."""

    @staticmethod
    def forward(context, query, key, value, mask):  # type: ignore[no-untyped-def]
        out, sums = torch_private.flash_attention(query, key, value, attn_mask=mask)
        context.save_for_backward(query, key, value, mask, out, sums)
        return out

    @staticmethod
    def backward(context, gradient):  # type: ignore[no-untyped-def]
        query, key, value, mask, out, sums = context.saved_tensors
        if torch.is_grad_enabled():
            return differentiable_gradients(F.scaled_dot_product_attention, (query, key, value, mask), gradient)
        slopes = torch_private.flash_attention_backward(
            gradient, query, key, value, out, sums, 0.0, False, attn_mask=mask
        )
        return *slopes, None


def _two_products(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    batch, heads, rows, _ = query.shape
    start = query.new_zeros(()) if bias is None else bias.to(query.dtype).expand(-1, heads, -1, -1).flatten(0, 1)
    products = (query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2))
    scores = torch.baddbmm(start, *products, beta=0 if bias is None else 1, alpha=query.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(dim=-1), value.flatten(0, 1)).view(batch, heads, rows, -1)


def _aligned_keys(key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fill (B, H, N, d) keys and values up to a multiple of the kernel's tile with masked zeros."""
    rows = key.shape[-2]
    missing = aligned(rows) - rows
    if not missing:
        return key, value, bias
    bias = key.new_zeros(1, 1, 1, rows) if bias is None else bias
    key, value = (F.pad(x, (0, 0, 0, missing)) for x in (key, value))
    return key, value, F.pad(bias, (0, missing), value=-torch.inf)


def _learns_in_bf16(qkv: Tensor, key_bias: Tensor | None) -> bool:
    """Whether this is training in bf16 without a bias of the keys.

    Kernels in bf16 are compiled for each length, so samples are computed one by one in fp32, or padded in two products.
    """
    return qkv.dtype == torch.bfloat16 and torch.is_grad_enabled() and qkv.requires_grad and key_bias is None


def _padded(qkv: Tensor, heads: int, packing: Packing, key_bias: Tensor | None) -> Tensor:
    """Pad to a little over the longest sample, mask the empty keys, take the real rows back."""
    padding, batch = packing.padded, len(packing.lengths)
    if _learns_in_bf16(qkv, key_bias) and padding.rows <= _SHORT and torch_private.softmax_backward is not None:
        learnt: Tensor = _PaddedAttention.apply(*_PaddedHeads.apply(qkv, heads, packing), heads, packing)
        return learnt
    padded = qkv.index_select(0, padding.gather).view(batch, padding.rows, 3, heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = padded.unbind(0)
    bias = padding.bias
    if key_bias is not None:
        bias = bias + key_bias.index_select(0, padding.gather).view_as(bias)
    out = _attend(query, key, value, bias).transpose(1, 2).reshape(batch * padding.rows, -1)
    if torch.is_grad_enabled():
        return out.index_select(0, padding.scatter)
    return torch.index_select(out, 0, padding.scatter, out=empty_rows(len(qkv), out.shape[1], out.dtype, out.device))


class _PaddedHeads(torch.autograd.Function):
    """Packed (T, 3 D) rows to padded queries, keys and values (B H, R, d); empty slots repeat a row of their sample.

    Gradients of empty slots are zero, so they are left out instead of being summed.
    """

    @staticmethod
    def forward(context, qkv, heads, packing):  # type: ignore[no-untyped-def]
        padding, batch = packing.padded, len(packing.lengths)
        context.shape, context.padding = (batch, padding.rows, 3, heads, qkv.shape[1] // (3 * heads)), padding
        whole = qkv.index_select(0, padding.gather).view(context.shape).permute(2, 0, 3, 1, 4)
        return tuple(whole.reshape(3, batch * heads, padding.rows, -1).unbind(0))

    @staticmethod
    def backward(context, *gradients):  # type: ignore[no-untyped-def]
        found = gradients[0].new_empty(context.shape)
        for part, gradient in enumerate(gradients):
            place = found[:, :, part].transpose(1, 2)
            place.copy_(gradient.reshape(place.shape))
        return found.flatten(2).flatten(0, 1).index_select(0, context.padding.scatter), None, None


class _PaddedAttention(torch.autograd.Function):
    """Attention of padded heads as two products, for training in bf16; it returns the packed rows."""

    @staticmethod
    def forward(context, query, key, value, heads, packing):  # type: ignore[no-untyped-def]
        padding, batch = packing.padded, len(packing.lengths)
        context.scale = query.shape[-1] ** -0.5
        scores = _product(query, key.transpose(1, 2), context.scale)
        for sample, length in zip(scores.view(batch, heads, *scores.shape[1:]), packing.lengths, strict=True):
            sample[..., length:] = -torch.inf
        weights = scores.softmax(dim=-1)
        context.save_for_backward(query, key, value, weights)
        context.packing = packing
        return _packed_rows(torch.bmm(weights, value), padding)

    @staticmethod
    def backward(context, gradient):  # type: ignore[no-untyped-def]
        query, key, value, weights = context.saved_tensors
        padding, lengths, scale = context.packing.padded, context.packing.lengths, context.scale
        if torch.is_grad_enabled():
            return *differentiable_gradients(_plain_padded, (query, key, value, padding), gradient)[:3], None, None
        upper = gradient.index_select(0, padding.gather).view(len(lengths), padding.rows, -1)
        for sample, length in zip(upper, lengths, strict=True):
            sample[length:] = 0
        upper = upper.unflatten(2, (-1, value.shape[-1])).transpose(1, 2).reshape(value.shape)
        slopes = torch_private.softmax_backward(torch.bmm(upper, value.transpose(1, 2)), weights, -1, weights.dtype)
        to_query, to_key = _product(slopes, key, scale), _product(slopes.transpose(1, 2), query, scale)
        return to_query, to_key, torch.bmm(weights.transpose(1, 2), upper), None, None


def _packed_rows(mixed: Tensor, padding: Padding) -> Tensor:
    """Take the real rows of padded (B H, R, d) heads: (T, D)."""
    batch = len(padding.gather) // padding.rows
    mixed = mixed.view(batch, -1, padding.rows, mixed.shape[-1])
    return mixed.transpose(1, 2).reshape(batch * padding.rows, -1).index_select(0, padding.scatter)


def _plain_padded(query: Tensor, key: Tensor, value: Tensor, padding: Padding) -> Tensor:
    scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
    masked = scores.unflatten(0, (len(padding.bias), -1)) + padding.bias.to(scores.dtype)
    return _packed_rows(masked.softmax(dim=-1).flatten(0, 1) @ value, padding)


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Compute `scale a b` for (B, M, K) and (B, K, N)."""
    return torch.baddbmm(a.new_zeros(()).expand(len(a), a.shape[1], b.shape[2]), a, b, beta=0, alpha=scale)


def _split(qkv: Tensor, heads: int, packing: Packing, key_bias: Tensor | None) -> Tensor:
    """Make one call per sample."""
    wide = _learns_in_bf16(qkv, key_bias)
    if (wide or (qkv.dtype in _EXACT and key_bias is None)) and _has_kernels():
        out: Tensor = _SplitAttention.apply((qkv.float() if wide else qkv).contiguous(), heads, packing.lengths)
        return out.to(qkv.dtype)
    rows = qkv.view(1, len(qkv), 3, heads, -1).split_with_sizes(packing.lengths, dim=1)
    biases: Sequence[Tensor | None] = [None] * len(rows)
    if key_bias is not None:
        biases = key_bias.view(1, 1, 1, -1).split_with_sizes(packing.lengths, dim=3)
    parts = []
    for part, bias in zip(rows, biases, strict=True):
        query, key, value = part.transpose(1, 3).unbind(2)
        parts.append(_attend(query, key, value, bias))
    parts = [part.transpose(1, 2).flatten(2)[0] for part in parts]
    if torch.is_grad_enabled():
        return torch.cat(parts)
    return torch.cat(parts, out=empty_rows(len(qkv), qkv.shape[1] // 3, qkv.dtype, qkv.device))


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
