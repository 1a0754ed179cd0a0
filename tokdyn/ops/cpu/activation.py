"""GELU in its tanh form, computed as `x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3)))` one cacheful at a time.

PyTorch's kernel for the tanh form is much slower than the one for the erf form. Where gradients are wanted, the
derivative is computed on the way and kept in place of the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokdyn.ops import layers, torch_private
from tokdyn.ops.dispatch import cpu_form
from tokdyn.ops.precision import exact

_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR
_PART = 1 << 17  # elements per thread that stay in the cache from one operation to the next
_FEW = 1 << 16  # elements below which PyTorch's one slow kernel is faster than several operations


@cpu_form(layers.gelu_tanh)
def gelu_tanh(x: Tensor) -> Tensor | None:
    """Apply GELU to a large tensor, in fp32 inside for half types."""
    if x.numel() < _FEW or torch_private.sigmoid_backward is None:
        return None
    return gelu(x, overwrite=False)


def gelu(x: Tensor, overwrite: bool, source: Tensor | None = None, layer: nn.Module | None = None) -> Tensor:
    """Apply GELU to the output of a layer, or to any tensor.

    Args:
        x: any shape, floating point.
        overwrite: nothing else needs x, so its memory may be reused.
        source: `x = layer(source)`; a second derivative computes x again from it, as x may be overwritten by then.
            None keeps x itself.
        layer: see `source`.

    Returns:
        The shape and type of x.
    """
    if x.numel() < _FEW or torch_private.sigmoid_backward is None:
        return F.gelu(x, approximate="tanh")
    if torch.is_grad_enabled() and x.requires_grad:
        if source is None:
            source, overwrite = x, False
        out: Tensor = _Gelu.apply(x, overwrite, source, layer)
        return out
    return _values(x, overwrite)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(context, x, overwrite, source, layer):  # type: ignore[no-untyped-def]
        out, slope = _values_and_slopes(x.detach(), overwrite)
        context.save_for_backward(slope, source)
        context.layer = layer
        context.autocast = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")
        return out

    @staticmethod
    def backward(context, gradient):  # type: ignore[no-untyped-def]
        slope, source = context.saved_tensors
        if not torch.is_grad_enabled():
            return gradient * slope, None, None, None
        dtype, enabled = context.autocast
        with torch.autocast("cpu", dtype, enabled=enabled):
            x = source if context.layer is None else context.layer(source)
        out = F.gelu(x, approximate="tanh")
        return torch.autograd.grad(out, x, gradient, create_graph=True)[0], None, None, None


def _values(x: Tensor, overwrite: bool) -> Tensor:
    x = x.contiguous()
    out = x if overwrite else torch.empty_like(x)
    start = exact(x[:0]).new_tensor(-_LINEAR)
    for a, z, (found,) in _parts(x, out):
        torch.addcmul(start, a, a, value=-_CUBIC, out=z).mul_(a).exp_().add_(1)
        _write(torch.div, a, z, found, z)
    return out


def _values_and_slopes(x: Tensor, overwrite: bool) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    out = torch.empty_like(x)
    slope = x if overwrite else torch.empty_like(x)
    start = exact(x[:0]).new_tensor(_LINEAR)
    s, free = (start.new_empty(_length(x)) for _ in range(2))
    for a, z, (found, slanted) in _parts(x, out, slope):
        s, free = s[: len(a)], free[: len(a)]
        torch.addcmul(start, a, a, value=_CUBIC, out=z).mul_(a)
        torch.sigmoid(z, out=s)
        _write(torch.mul, s, a, found, free)
        # s + s (1 - s) x dz/dx, and x dz/dx = 3 z - 2 _LINEAR x
        torch_private.sigmoid_backward(z.sub_(a, alpha=_LINEAR * 2 / 3), s, grad_input=z)
        _write(partial(torch.add, alpha=3), s, z, slanted, z)
    return out, slope


def _parts(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
    """Yield parts of x in fp32 or fp64, as much scratch memory, and the same parts of the other tensors."""
    length, kind = _length(x), exact(x[:0]).dtype
    scratch = torch.empty(2, length, dtype=kind, device=x.device)
    for part, *rest in zip(*(torch.split(t.view(-1), length) for t in (x, *others)), strict=True):
        wide, z = scratch[:, : len(part)]
        yield part if part.dtype == kind else wide.copy_(part), z, rest


def _length(x: Tensor) -> int:
    return min(_PART * torch.get_num_threads(), x.numel())


def _write(operation: Callable[..., Tensor], a: Tensor, b: Tensor, target: Tensor, scratch: Tensor) -> None:
    """Compute into the target; where PyTorch would have to cast, computing and copying is twice as fast."""
    if target.dtype == a.dtype:
        operation(a, b, out=target)
    else:
        target.copy_(operation(a, b, out=scratch))
