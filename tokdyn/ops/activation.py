"""GELU in its tanh form (arXiv 1606.08415), which PyTorch computes slowly on CPU."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tokdyn.ops.device import by_hand
from tokdyn.ops.precision import exact

_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR
_PART = 1 << 17  # numbers per thread that stay in the cache from one operation to the next
_FEW = 1 << 16  # numbers below which one slow operation is faster than several


def gelu_tanh(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), computed as x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)).

    On CPU it goes through the tensor part by part, in fp32 inside for half types. Where gradients are wanted it finds
    the derivative too while it is there, and keeps that in place of x.

    Args:
        x: any shape, floating point.

    Returns:
        The shape and type of x.
    """
    if x.numel() < _FEW or not by_hand(x):
        return F.gelu(x, approximate="tanh")
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _Gelu.apply(x)
        return out
    return _values(x, learning=False)[0]


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(context, x):  # type: ignore[no-untyped-def]
        out, slope = _values(x, learning=True)
        context.save_for_backward(slope)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):  # type: ignore[no-untyped-def]
        (slope,) = context.saved_tensors
        return gradient * slope


def _values(x: Tensor, learning: bool) -> tuple[Tensor, Tensor]:
    """The function, and its derivative when learning."""
    x = x.contiguous()
    out = torch.empty_like(x)
    slope = torch.empty_like(x) if learning else out
    part = _PART * torch.get_num_threads()
    wide = exact(x[:0]).dtype
    linear = torch.tensor(_LINEAR, dtype=wide, device=x.device)
    scratch = torch.empty(2, min(part, x.numel()), dtype=wide, device=x.device)
    for numbers, found, slanted in zip(*(torch.split(t.view(-1), part) for t in (x, out, slope)), strict=True):
        a, (z, s) = exact(numbers), scratch[:, : len(numbers)]
        torch.addcmul(linear, a, a, value=_CUBIC, out=z).mul_(a)
        torch.sigmoid(z, out=s)
        torch.mul(s, a, out=found)
        if learning:  # s + s (1 - s) x dz/dx, and x dz/dx = 3 z - 2 _LINEAR x
            torch.ops.aten.sigmoid_backward(z.sub_(a, alpha=_LINEAR * 2 / 3), s, grad_input=z)
            torch.add(s, z, alpha=3, out=slanted)
    return out, slope
