"""Linear layers in bf16 on CPU: bias and GELU inside the matrix product, and few different numbers of rows.

Kernels are compiled for every number of rows, and packed rows have another number at every call. So, without gradients,
products take a few rows more than there are, up to the next of few counts. A tensor from `empty_rows` has the room for
them behind its own rows; any other is copied. With gradients the bias alone is inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokdyn.ops.activation import gelu_tanh
from tokdyn.ops.device import by_hand, cpu_multiplies
from tokdyn.ops.watched import is_watched
from tokdyn.tokens import TILE

_product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_PLAIN: tuple[Any, ...] = ("none", [], "")
_GELU: tuple[Any, ...] = ("gelu", [], "tanh")
_FORWARD = nn.Linear.forward
_casts: ContextVar[dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] | None] = ContextVar(
    "tokdyn_casts", default=None
)


@contextmanager
def weights_cast_once() -> Iterator[None]:
    """Within this context weights do not change: their casts in `linear` are kept, and freed at the end.

    Autocast keeps its own, of weights that learn, but not where `linear` would find them, and none in inference mode.
    """
    token = _casts.set({})
    try:
        yield
    finally:
        _casts.reset(token)


def linear(x: Tensor, layer: nn.Module, gelu: bool = False) -> Tensor:
    """`layer(x)`, or the tanh form of GELU of it. In bf16 on CPU it has no second derivative.

    Args:
        x: (..., D).
        layer: maps (..., D) to (..., E); one that is no plain `nn.Linear`, or is watched by hooks, is called.
        gelu: apply GELU.

    Returns:
        (..., E), in the type that the layer computes in.
    """
    kind, learning = product_dtype(x), torch.is_grad_enabled()
    plain = isinstance(layer, nn.Linear) and _is_plain(x, layer, learning)
    if not isinstance(layer, nn.Linear) or not plain or not _is_known(x, layer, kind):
        out: Tensor = layer(x)
        return gelu_tanh(out, over=plain) if gelu else out
    count = x.numel() // x.shape[-1]
    rows = x.reshape(count, -1)
    if learning:
        out = _Linear.apply(rows, layer.weight, layer.bias, kind).view(*x.shape[:-1], -1)
        return gelu_tanh(out, over=True) if gelu else out
    weight, bias = _cast(layer.weight, kind), None if layer.bias is None else _cast(layer.bias, kind)
    out = _product(_with_room(rows, kind), weight, bias, *(_GELU if gelu else _PLAIN))
    return out[:count].view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """With gradients, which are those of `nn.Linear`."""

    @staticmethod
    def forward(context, x, weight, bias, kind):  # type: ignore[no-untyped-def]
        context.kinds = x.dtype, weight.dtype, None if bias is None else bias.dtype
        x, weight = x.to(kind), weight.to(kind)
        bias = None if bias is None else bias.to(kind)
        learns_x, learns_weight, *_ = context.needs_input_grad
        # As nn.Linear saves them, which takes over where somebody watches in one of both runs of a checkpoint.
        context.save_for_backward(x if learns_weight else None, weight.t() if learns_x else None)
        if torch._C._len_torch_dispatch_stack():
            with torch.autocast("cpu", enabled=False):
                return F.linear(x, weight, bias)
        return _product(x, weight, bias, *_PLAIN)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):  # type: ignore[no-untyped-def]
        x, weight = context.saved_tensors
        of_x, of_weight, of_bias = context.kinds
        with torch.autocast("cpu", enabled=False):
            to_x = None if weight is None else gradient.mm(weight.t()).to(of_x)
            to_weight = None if x is None else gradient.t().mm(x).to(of_weight)
            to_bias = gradient.sum(0).to(of_bias) if context.needs_input_grad[2] else None
        return to_x, to_weight, to_bias, None


def product_dtype(x: Tensor) -> torch.dtype:
    """The type that matrix products of x are computed in: autocast leaves fp64 alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def empty_rows(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(count, width) to be written, with room behind for the rows that `linear` adds."""
    return torch.empty(_room(count), width, dtype=dtype, device=device)[:count]


def _is_plain(x: Tensor, layer: nn.Linear, learning: bool) -> bool:
    """Whether x is on CPU, the layer `nn.Linear` itself, and nobody would miss its call."""
    return (
        type(layer) is nn.Linear
        and nn.Linear.forward is _FORWARD
        and by_hand(x)
        and x.numel() > 0
        and x.shape[-1] == layer.weight.shape[1]
        and not is_watched(layer)
        and all(_is_ordinary(each) for each in (layer.weight, layer.bias) if each is not None)
        # Counters of FLOPs know the operators of nn.Linear only; with gradients they are what `_Linear` takes then.
        and (learning or not torch._C._len_torch_dispatch_stack())
    )


def _is_ordinary(parameter: Tensor) -> bool:
    return type(parameter) is nn.Parameter and parameter.device.type == "cpu" and parameter.is_contiguous()


def _is_known(x: Tensor, layer: nn.Linear, kind: torch.dtype) -> bool:
    """Products in bf16, on a processor with instructions for them."""
    if kind != torch.bfloat16 or _product is None or not cpu_multiplies(kind) or not torch._C._get_mkldnn_enabled():
        return False
    types = (torch.float32, kind) if torch.is_autocast_enabled("cpu") else (kind,)
    return all(each.dtype in types for each in (x, layer.weight, layer.bias) if each is not None)


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    kept, key = _casts.get(), (id(weight), dtype)
    if weight.dtype == dtype or kept is None:
        return weight.to(dtype)
    if key not in kept:
        # Stored column by column: with few rows the kernel takes up to a third less time for what it reads that way.
        kept[key] = weight, weight.to(dtype) if weight.dim() == 1 else weight.t().to(dtype).contiguous().t()
    return kept[key][1]


def _room(count: int) -> int:
    """The next of 32 to 64 counts for every doubling, multiples of the kernel's tile."""
    step = max(TILE, 1 << max(0, count.bit_length() - 6))
    return -(-count // step) * step


def _with_room(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, D) to (R, D): what the added rows hold does not matter."""
    count, width = rows.shape
    room = _room(count)
    behind = rows.untyped_storage().nbytes() // rows.element_size() - rows.storage_offset()
    if rows.dtype == dtype and rows.is_contiguous() and room * width <= behind:
        return rows.as_strided((room, width), (width, 1))
    wide = torch.empty(room, width, dtype=dtype, device=rows.device)
    wide[:count].copy_(rows)
    return wide
