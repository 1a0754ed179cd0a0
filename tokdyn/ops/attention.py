"""Attention over dense and over ragged, packed rows, on the fastest exact path of the device.

On CPU the best path depends on the type, on gradients and on the rows of the samples; docs/performance.md has the
measurements behind the choice. CUDA uses native variable-length attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tokdyn.errors import InputError
from tokdyn.ops.device import by_hand
from tokdyn.ops.linear import empty_rows
from tokdyn.tokens import Packing, aligned

_CALL, _CALL_BF16 = 3_500, 13_000  # what a call for one more sample costs on CPU, in pairs of query and key
_LEARN_BF16 = (1.5, 15_000)  # training in bf16: what a pair and a call cost sample by sample, in padded pairs
_SHORT = 512  # rows up to which training in bf16 on CPU takes two products

Backend = Literal["auto", "split", "padded", "varlen"]
_backend: ContextVar[Backend] = ContextVar("tokdyn_attention_backend", default="auto")


@contextmanager
def attention_backend(backend: Backend) -> Iterator[None]:
    """Force one path for packed rows: "split" (one call a sample), "padded" or "varlen" (CUDA); "auto" chooses.

    Raises:
        InputError: there is no path of that name.
    """
    if backend not in get_args(Backend):
        raise InputError(f"there is no attention backend {backend!r}; known are {', '.join(get_args(Backend))}.")
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


def dense_attention(qkv: Tensor, heads: int, key_bias: Tensor | None = None) -> Tensor:
    """Self-attention of equally long samples.

    Args:
        qkv: (B, N, 3 D), queries, keys and values side by side.
        heads: H, a divisor of D.
        key_bias: (B, N), added to the logits of each key.

    Returns:
        (B, N, D).
    """
    batch, rows, _ = qkv.shape
    query, key, value = qkv.view(batch, rows, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    bias = None if key_bias is None else key_bias[:, None, None]
    return _attend(query, key, value, bias).transpose(1, 2).reshape(batch, rows, -1)


def packed_attention(qkv: Tensor, heads: int, packing: Packing, key_bias: Tensor | None = None) -> Tensor:
    """Self-attention within each sample of packed rows. On CPU it has no second derivative.

    Args:
        qkv: (T, 3 D), queries, keys and values side by side.
        heads: H, a divisor of D.
        packing: which rows belong to which sample.
        key_bias: (T,), added to the logits of each key.

    Returns:
        (T, D).

    Raises:
        InputError: a bias on the path "varlen", which takes none.
    """
    batch = len(packing.lengths)
    if len(set(packing.lengths)) == 1:
        bias = None if key_bias is None else key_bias.view(batch, -1)
        return dense_attention(qkv.view(batch, packing.longest, -1), heads, bias).reshape(len(qkv), -1)
    backend = _backend.get()
    if backend == "auto":
        wide = _learns_in_bf16(qkv, key_bias)
        backend = _choose(packing.lengths, qkv.device, qkv.dtype, qkv.shape[1] // (3 * heads), wide)
        backend = "padded" if backend == "varlen" and key_bias is not None else backend
    if backend == "varlen":
        if key_bias is not None:
            raise InputError("variable-length attention takes no bias of the keys; use another attention backend.")
        return _varlen(qkv, heads, packing)
    if backend == "padded":
        return _padded(qkv, heads, packing, key_bias)
    return _split(qkv, heads, packing, key_bias)


def computed_pairs(
    lengths: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    head_width: int,
    learning: bool = False,
    biased: bool = False,
) -> int:
    """Pairs of query and key that attention computes, with those of rows that are only there to fill up a kernel.

    Args:
        lengths: rows of the samples that are computed together.
        device: of the rows.
        dtype: of the rows.
        head_width: d = D / H.
        learning: gradients are wanted.
        biased: with a bias of the keys.
    """
    backend = _backend.get()
    if len(set(lengths)) > 1:
        if backend == "auto":
            backend = _choose(lengths, device, dtype, head_width, learning and not biased)
            backend = "padded" if backend == "varlen" and biased else backend
        if backend == "padded":
            return len(lengths) * aligned(max(lengths)) ** 2
        if backend == "varlen":
            return sum(rows * rows for rows in lengths)
    wide = learning and len(set(lengths)) > 1 and not biased  # one by one, in fp32
    half = device.type == "cpu" and dtype == torch.bfloat16 and not wide
    return sum(rows * (aligned(rows) if half and not (learning and rows <= _SHORT) else rows) for rows in lengths)


def _choose(
    lengths: Sequence[int], device: torch.device, dtype: torch.dtype, head_width: int, learning: bool = False
) -> Backend:
    """The fastest exact path for samples of these lengths."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return "varlen" if _varlen_takes(dtype, head_width, capability) else "padded"
    call = _CALL_BF16 if dtype == torch.bfloat16 else _CALL
    together = len(lengths) * aligned(max(lengths)) ** 2
    if learning and dtype == torch.bfloat16:
        pair, call = _LEARN_BF16
        apart = sum(pair * n * n + call for n in lengths)
        return "padded" if together <= apart and aligned(max(lengths)) <= _SHORT else "split"
    return "padded" if together <= sum(n * aligned(n) + call for n in lengths) else "split"


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v for (B, H, N, d); on CPU, training in bf16 on short rows, as two products."""
    rows = query.shape[-2]
    if query.device.type == "cpu" and query.requires_grad and query.dtype == torch.bfloat16 and rows <= _SHORT:
        batch, heads, rows, _ = query.shape
        start = query.new_zeros(()) if bias is None else bias.to(query.dtype).expand(-1, heads, -1, -1).flatten(0, 1)
        products = (query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2))
        scores = torch.baddbmm(start, *products, beta=0 if bias is None else 1, alpha=query.shape[-1] ** -0.5)
        return torch.bmm(scores.softmax(dim=-1), value.flatten(0, 1)).view(batch, heads, rows, -1)
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
        key, value, bias = _aligned_keys(key, value, bias)
    mask = bias if bias is None else bias.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _aligned_keys(key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(B, H, N, d) keys and values and masked rows of zeros up to a multiple of the kernel's tile."""
    rows = key.shape[-2]
    missing = aligned(rows) - rows
    if not missing:
        return key, value, bias
    bias = key.new_zeros(1, 1, 1, rows) if bias is None else bias
    key, value = (F.pad(x, (0, 0, 0, missing)) for x in (key, value))
    return key, value, F.pad(bias, (0, missing), value=-torch.inf)


def _padded(qkv: Tensor, heads: int, packing: Packing, key_bias: Tensor | None) -> Tensor:
    """Pad to a little over the longest sample, mask the empty keys, take the real rows back."""
    if _learns_in_bf16(qkv, key_bias) and packing.padded.rows <= _SHORT:
        learnt: Tensor = _PaddedOnCPU.apply(qkv, heads, packing)
        return learnt
    padding = packing.padded
    batch, rows = len(packing.lengths), padding.rows
    padded = qkv.index_select(0, padding.gather).view(batch, rows, 3, heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = padded.unbind(0)
    bias = padding.bias
    if key_bias is not None:
        bias = bias + key_bias.index_select(0, padding.gather).view_as(bias)
    out = _attend(query, key, value, bias).transpose(1, 2).reshape(batch * rows, -1)
    if torch.is_grad_enabled() or not by_hand(out):
        return out.index_select(0, padding.scatter)
    return torch.index_select(out, 0, padding.scatter, out=empty_rows(len(qkv), out.shape[1], out.dtype, out.device))


class _PaddedOnCPU(torch.autograd.Function):
    """Two products for training in bf16: empty slots are filled in place, and have no gradients that must be summed."""

    @staticmethod
    def forward(context, qkv, heads, packing):  # type: ignore[no-untyped-def]
        padding, batch = packing.padded, len(packing.lengths)
        whole = qkv.index_select(0, padding.gather).view(batch, padding.rows, 3, heads, -1)
        query, key, value = whole.permute(2, 0, 3, 1, 4).reshape(3, batch * heads, padding.rows, -1).unbind(0)
        context.scale = query.shape[-1] ** -0.5
        scores = _product(query, key.transpose(1, 2), context.scale)
        for sample, length in zip(scores.view(batch, heads, *scores.shape[1:]), packing.lengths, strict=True):
            sample[..., length:] = -torch.inf
        weights = scores.softmax(dim=-1)
        context.save_for_backward(query, key, value, weights)
        context.packing = packing
        mixed = torch.bmm(weights, value).view(batch, heads, padding.rows, -1)
        return mixed.transpose(1, 2).reshape(batch * padding.rows, -1).index_select(0, padding.scatter)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):  # type: ignore[no-untyped-def]
        query, key, value, weights = context.saved_tensors
        padding, lengths, scale = context.packing.padded, context.packing.lengths, context.scale
        upper = gradient.index_select(0, padding.gather).view(len(lengths), padding.rows, -1)
        for sample, length in zip(upper, lengths, strict=True):
            sample[length:] = 0
        upper = upper.unflatten(2, (-1, value.shape[-1])).transpose(1, 2).reshape(value.shape)
        slopes = torch._softmax_backward_data(torch.bmm(upper, value.transpose(1, 2)), weights, -1, weights.dtype)
        found = gradient.new_empty(len(lengths), padding.rows, 3, *gradient.shape[1:])
        places = found.unflatten(3, (-1, value.shape[-1])).permute(2, 0, 3, 1, 4).unbind(0)
        places[0].copy_(_product(slopes, key, scale).view_as(places[0]))
        places[1].copy_(_product(slopes.transpose(1, 2), query, scale).view_as(places[1]))
        places[2].copy_(torch.bmm(weights.transpose(1, 2), upper).view_as(places[2]))
        return found.flatten(2).flatten(0, 1).index_select(0, padding.scatter), None, None


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Scale a b, of (B, M, K) and (B, K, N)."""
    return torch.baddbmm(a.new_zeros(()).expand(len(a), a.shape[1], b.shape[2]), a, b, beta=0, alpha=scale)


def _learns_in_bf16(qkv: Tensor, key_bias: Tensor | None) -> bool:
    """Training in bf16 on CPU: one by one in fp32, as kernels in bf16 are compiled for each length, or two products."""
    learning = qkv.dtype == torch.bfloat16 and torch.is_grad_enabled() and qkv.requires_grad
    return learning and key_bias is None and by_hand(qkv)


def _split(qkv: Tensor, heads: int, packing: Packing, key_bias: Tensor | None) -> Tensor:
    """One call a sample."""
    wide = _learns_in_bf16(qkv, key_bias)
    if wide or (qkv.dtype in (torch.float32, torch.float64) and key_bias is None and by_hand(qkv)):
        out: Tensor = _SplitOnCPU.apply((qkv.float() if wide else qkv).contiguous(), heads, packing.lengths)
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
    if torch.is_grad_enabled() or not by_hand(qkv):
        return torch.cat(parts)
    return torch.cat(parts, out=empty_rows(len(qkv), qkv.shape[1] // 3, qkv.dtype, qkv.device))


class _SplitOnCPU(torch.autograd.Function):
    """The kernel behind `scaled_dot_product_attention`, each result and gradient written where it belongs."""

    @staticmethod
    def forward(context, qkv, heads, lengths):  # type: ignore[no-untyped-def]
        out = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        sums = []
        for part, place in zip(_by_head(qkv, 3 * heads, lengths), _by_head(out, heads, lengths), strict=True):
            mixed, sum_ = _kernel(*part.chunk(3, dim=1))
            place.copy_(mixed)
            sums.append(sum_)
        context.save_for_backward(qkv, out, *sums)
        context.heads, context.lengths = heads, lengths
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):  # type: ignore[no-untyped-def]
        qkv, out, *sums = context.saved_tensors
        heads, lengths, found = context.heads, context.lengths, torch.empty_like(qkv)
        rows = (_by_head(given, heads, lengths) for given in (gradient, out))
        wide = (_by_head(given, 3 * heads, lengths) for given in (qkv, found))
        for upper, mixed, part, place, sum_ in zip(*rows, *wide, sums, strict=True):
            slopes = _kernel_backward(upper, *part.chunk(3, dim=1), mixed, sum_, 0.0, False)
            for slope, where in zip(slopes, place.chunk(3, dim=1), strict=True):
                where.copy_(slope)
        return found, None, None


_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _by_head(rows: Tensor, heads: int, lengths: Sequence[int]) -> Iterator[Tensor]:
    """(T, H d) to views (1, H, n, d), one a sample."""
    for part in rows.view(1, len(rows), heads, -1).split_with_sizes(lengths, dim=1):
        yield part.transpose(1, 2)


def _varlen_takes(dtype: torch.dtype, head_width: int, capability: tuple[int, int]) -> bool:
    """Whether the variable-length kernel has this type and head width d = D / H, on a GPU of that capability."""
    fits = head_width % 8 == 0 and head_width <= 256
    return fits and dtype in (torch.float16, torch.bfloat16) and capability >= (8, 0)


def _varlen(qkv: Tensor, heads: int, packing: Packing) -> Tensor:
    """PyTorch's variable-length flash attention: CUDA, fp16 or bf16."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = qkv.view(len(qkv), 3, heads, -1).unbind(1)
    offsets, longest = packing.cu_seqlens, packing.longest
    out = varlen_attn(query, key, value, offsets, offsets, longest, longest)
    assert isinstance(out, Tensor)  # a pair only where the log-sum-exp is asked for
    return out.reshape(len(qkv), -1)
