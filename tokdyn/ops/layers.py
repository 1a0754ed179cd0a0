"""The layers of our own models as functions: linear maps, GELU, norms, and modulation by a condition.

Each function is its formula; `tokdyn.ops.cpu` has faster forms for the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokdyn.ops.dispatch import has_cpu_form
from tokdyn.tokens import Packing

Casts = dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]]
"""A weight and its cast, by the weight's id and the type it was cast to."""

_casts: ContextVar[Casts | None] = ContextVar("tokdyn_casts", default=None)


@contextmanager
def weights_cast_once() -> Iterator[None]:
    """Declare that weights do not change within this context, so that `linear` may keep what it casts them to.

    Autocast keeps casts only of weights that require gradients, where `linear` cannot find them, and keeps none in
    inference mode. The casts are freed at the end.
    """
    token = _casts.set({})
    try:
        yield
    finally:
        _casts.reset(token)


def kept_casts() -> Casts | None:
    """Return the casts that `weights_cast_once` keeps, or None outside of that context."""
    return _casts.get()


@has_cpu_form
def linear(x: Tensor, layer: nn.Module, gelu: bool = False) -> Tensor:
    """Apply a linear layer, and GELU after it if asked to.

    Args:
        x: (..., D).
        layer: maps (..., D) to (..., E); any module, so that LoRA and quantised layers work.
        gelu: apply `gelu_tanh` to the result.

    Returns:
        (..., E), in the type that the layer computes in.
    """
    out: Tensor = layer(x)
    return gelu_tanh(out) if gelu else out


def gelu_tanh(x: Tensor) -> Tensor:
    """Apply `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`, GELU in its tanh form (arXiv 1606.08415).

    Args:
        x: any shape, floating point.

    Returns:
        The shape and type of x.
    """
    return F.gelu(x, approximate="tanh")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Apply RMSNorm, `x / sqrt(mean(x^2) + eps) * weight` over the last axis (arXiv 1910.07467).

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean square.

    Returns:
        The shape of x, in the wider type of x and weight.
    """
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps)


@has_cpu_form
def group_norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Apply GroupNorm (arXiv 1803.08494) and SiLU.

    Args:
        x: (B, C, ...).
        norm: the module with groups, weight, bias and epsilon.

    Returns:
        The shape and type of x.
    """
    return F.silu(norm(x))


@has_cpu_form
def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, packing: Packing | None = None, eps: float = 1e-6
) -> Tensor:
    """Apply `LayerNorm(x) * (1 + scale) + shift`, the modulation of adaLN (arXiv 2212.09748).

    Args:
        x: (B, N, D), or (T, D) with a packing.
        shift: (B, D).
        scale: (B, D).
        packing: which rows of a packed x belong to which sample.
        eps: epsilon of the norm.

    Returns:
        The shape of x, in its type or in the one that autocast would cast it to for the product that follows.
    """
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    scale, shift = per_token((1 + scale).to(x.dtype), packing), per_token(shift.to(x.dtype), packing)
    return torch.addcmul(shift, normed, scale)


def gated_add(x: Tensor, gate: Tensor, y: Tensor, packing: Packing | None = None) -> Tensor:
    """Apply `x + gate * y`, the gated residual of adaLN-Zero (arXiv 2212.09748).

    Args:
        x: (B, N, D), or (T, D) with a packing.
        gate: (B, D).
        y: the shape of x.
        packing: which rows of packed x and y belong to which sample.

    Returns:
        The shape and type of x.
    """
    return torch.addcmul(x, per_token(gate.to(x.dtype), packing), y.to(x.dtype))


def per_token(modulation: Tensor, packing: Packing | None) -> Tensor:
    """Give every token the (B, D) modulation of its sample: (B, 1, D), or (T, D) with a packing."""
    return modulation[:, None] if packing is None else modulation.index_select(0, packing.sample)
