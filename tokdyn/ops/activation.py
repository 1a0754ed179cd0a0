"""GELU in its tanh form (arXiv 1606.08415), which PyTorch computes slowly on CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tokdyn.ops.device import by_hand
from tokdyn.ops.precision import exact

_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR
_PART = 1 << 17  # numbers per thread that stay in the cache from one operation to the next
_FEW = 1 << 16  # numbers below which one slow operation is faster than several


def gelu_tanh(x: Tensor, over: bool = False) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), computed as x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3))).

    On CPU it goes through the tensor part by part, in fp32 inside for half types. Where gradients are wanted it finds
    the derivative too while it is there, and keeps that.

    Args:
        x: any shape, floating point.
        over: nobody needs x any more, so it may be written over; that saves the way to fresh memory.

    Returns:
        The shape and type of x.
    """
    if x.numel() < _FEW or not by_hand(x):
        return F.gelu(x, approximate="tanh")
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _Gelu.apply(x, over)
        return out
    return _values(x, over)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(context, x, over):  # type: ignore[no-untyped-def]
        out, slope = _values_and_slopes(x.detach(), over)
        context.save_for_backward(slope)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):  # type: ignore[no-untyped-def]
        (slope,) = context.saved_tensors
        return gradient * slope, None


def _values(x: Tensor, over: bool) -> Tensor:
    x = x.contiguous()
    out = x if over else torch.empty_like(x)
    start = exact(x[:0]).new_tensor(-_LINEAR)
    for a, z, (found,) in _parts(x, out):
        torch.addcmul(start, a, a, value=-_CUBIC, out=z).mul_(a).exp_().add_(1)
        _write(torch.div, a, z, found, z)
    return out


def _values_and_slopes(x: Tensor, over: bool) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    out = torch.empty_like(x)
    slope = x if over else torch.empty_like(x)
    start = exact(x[:0]).new_tensor(_LINEAR)
    s, free = (start.new_empty(_length(x)) for _ in range(2))
    for a, z, (found, slanted) in _parts(x, out, slope):
        s, free = s[: len(a)], free[: len(a)]
        torch.addcmul(start, a, a, value=_CUBIC, out=z).mul_(a)
        torch.sigmoid(z, out=s)
        _write(torch.mul, s, a, found, free)
        # s + s (1 - s) x dz/dx, and x dz/dx = 3 z - 2 _LINEAR x
        torch.ops.aten.sigmoid_backward(z.sub_(a, alpha=_LINEAR * 2 / 3), s, grad_input=z)
        _write(partial(torch.add, alpha=3), s, z, slanted, z)
    return out, slope


def _parts(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
    """Parts of x in fp32 or fp64, as much scratch memory, and the same parts of the others."""
    length, kind = _length(x), exact(x[:0]).dtype
    scratch = torch.empty(2, length, dtype=kind, device=x.device)
    for part, *rest in zip(*(torch.split(t.view(-1), length) for t in (x, *others)), strict=True):
        wide, z = scratch[:, : len(part)]
        yield part if part.dtype == kind else wide.copy_(part), z, rest


def _length(x: Tensor) -> int:
    return min(_PART * torch.get_num_threads(), x.numel())


def _write(operation: Callable[..., Tensor], a: Tensor, b: Tensor, where: Tensor, scratch: Tensor) -> None:
    """Where PyTorch must cast, two steps are twice as fast as its one."""
    if where.dtype == a.dtype:
        operation(a, b, out=where)
    else:
        where.copy_(operation(a, b, out=scratch))
