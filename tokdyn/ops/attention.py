"""Self-attention over dense tokens, and over packed tokens of samples of different length.

Packed samples of equal length are computed as a dense batch. Others take one of three exact paths: one call per sample,
all samples padded to the longest, or the variable-length kernel that PyTorch has for CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokdyn.errors import InputError
from tokdyn.ops.dispatch import has_cpu_form
from tokdyn.tokens import Packing, aligned

Backend = Literal["auto", "split", "padded", "varlen"]
_backend: ContextVar[Backend] = ContextVar("tokdyn_attention_backend", default="auto")


@contextmanager
def attention_backend(backend: Backend) -> Iterator[None]:
    """Force one path for packed tokens within this context.

    Args:
        backend: "split" (one call per sample), "padded", "varlen" (CUDA), or "auto", which chooses the fastest.

    Raises:
        InputError: there is no backend of that name.
    """
    if backend not in get_args(Backend):
        raise InputError(f"there is no attention backend {backend!r}; known are {', '.join(get_args(Backend))}.")
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def forced_backend() -> Backend:
    """Return the backend that `attention_backend` asks for, "auto" outside of that context.

    A compiled graph keeps the one that it was compiled with.
    """
    return _backend.get()


@has_cpu_form
def dense_attention(qkv: Tensor, heads: int, key_bias: Tensor | None = None) -> Tensor:
    """Compute `softmax(q k^T / sqrt(d) + bias) v` for samples of equal length.

    Args:
        qkv: (B, N, 3 D), queries, keys and values side by side.
        heads: H, a divisor of D.
        key_bias: (B, N), added to the logits of each key.

    Returns:
        (B, N, D).
    """
    query, key, value = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=heads).unbind(0)
    mask = None if key_bias is None else rearrange(key_bias, "b n -> b 1 1 n").to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return rearrange(out, "b h n d -> b n (h d)")


@has_cpu_form
def packed_attention(qkv: Tensor, heads: int, packing: Packing, key_bias: Tensor | None = None) -> Tensor:
    """Compute self-attention within each sample of packed tokens.

    Args:
        qkv: (T, 3 D), queries, keys and values side by side.
        heads: H, a divisor of D.
        packing: which rows belong to which sample.
        key_bias: (T,), added to the logits of each key.

    Returns:
        (T, D).

    Raises:
        InputError: the variable-length kernel was asked for with a bias, which it does not take.
    """
    if len(set(packing.lengths)) == 1:
        return equal_attention(qkv, heads, packing, key_bias)
    backend = forced_backend()
    if backend == "auto":
        backend = _choose(qkv.device, qkv.dtype, qkv.shape[1] // (3 * heads), key_bias is not None)
    if backend == "varlen":
        if key_bias is not None:
            raise InputError("variable-length attention takes no bias of the keys; use another attention backend.")
        return _variable_length(qkv, heads, packing)
    return (padded_attention if backend == "padded" else split_attention)(qkv, heads, packing, key_bias)


def equal_attention(qkv: Tensor, heads: int, packing: Packing, key_bias: Tensor | None) -> Tensor:
    """Compute attention within packed samples of equal length, which are a dense batch."""
    batch = len(packing.lengths)
    bias = None if key_bias is None else rearrange(key_bias, "(b n) -> b n", b=batch)
    out = dense_attention(rearrange(qkv, "(b n) c -> b n c", b=batch), heads, bias)
    return rearrange(out, "b n d -> (b n) d")


def split_attention(qkv: Tensor, heads: int, packing: Packing, key_bias: Tensor | None) -> Tensor:
    """Compute packed attention by one call per sample."""
    rows = qkv.split_with_sizes(packing.lengths)
    biases: Sequence[Tensor | None] = [None] * len(rows)
    if key_bias is not None:
        biases = key_bias[None].split_with_sizes(packing.lengths, dim=1)
    return torch.cat([dense_attention(part[None], heads, bias)[0] for part, bias in zip(rows, biases, strict=True)])


def padded_attention(qkv: Tensor, heads: int, packing: Packing, key_bias: Tensor | None) -> Tensor:
    """Pad all samples to a little over the longest, mask the empty keys, and take the real rows back."""
    padding, batch = packing.padded, len(packing.lengths)
    padded = rearrange(qkv.index_select(0, padding.gather), "(b r) c -> b r c", b=batch)
    bias = rearrange(padding.bias, "b 1 1 r -> b r")
    if key_bias is not None:
        bias = bias + key_bias.index_select(0, padding.gather).view_as(bias)
    out = dense_attention(padded, heads, bias)
    return rearrange(out, "b r d -> (b r) d").index_select(0, padding.scatter)


def _variable_length(qkv: Tensor, heads: int, packing: Packing) -> Tensor:
    """Run PyTorch's variable-length flash attention: CUDA, fp16 or bf16."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = rearrange(qkv, "t (three h d) -> three t h d", three=3, h=heads).unbind(0)
    offsets, longest = packing.cu_seqlens, packing.longest
    out = varlen_attn(query, key, value, offsets, offsets, longest, longest)
    assert isinstance(out, Tensor)  # it is a pair only where the log-sum-exp is asked for
    return rearrange(out, "t h d -> t (h d)")


def _choose(device: torch.device, dtype: torch.dtype, head_width: int, biased: bool) -> Backend:
    """Choose the fastest path for samples of different length."""
    if device.type == "cpu":
        return "split"
    if device.type == "cuda" and not biased:
        capability = torch.cuda.get_device_capability(device)
        return "varlen" if _has_variable_length(dtype, head_width, capability) else "padded"
    return "padded"


def _has_variable_length(dtype: torch.dtype, head_width: int, capability: tuple[int, int]) -> bool:
    """Whether the variable-length kernel takes this type and head width d = D / H, on a GPU of that capability."""
    fits = head_width % 8 == 0 and head_width <= 256
    return fits and dtype in (torch.float16, torch.bfloat16) and capability >= (8, 0)


def computed_pairs(
    lengths: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    head_width: int,
    learning: bool = False,
    biased: bool = False,
) -> int:
    """Count the (query, key) pairs of one head that the forward pass of packed attention computes, padding included.

    Args:
        lengths: number of rows of each sample.
        device: of the rows.
        dtype: of the rows.
        head_width: d = D / H.
        learning: whether gradients are enabled, which can change the path.
        biased: whether keys have a bias.
    """
    return pairs_of(torch.empty(0, dtype=dtype, device=device), lengths, head_width, learning, biased)


@has_cpu_form
def pairs_of(rows: Tensor, lengths: Sequence[int], head_width: int, learning: bool, biased: bool) -> int:
    """Count the pairs as `computed_pairs` does, for rows of the device and type of a tensor."""
    backend = forced_backend()
    if len(set(lengths)) > 1:
        if backend == "auto":
            backend = _choose(rows.device, rows.dtype, head_width, biased)
        if backend == "padded":
            return len(lengths) * aligned(max(lengths)) ** 2
    return sum(n * n for n in lengths)
