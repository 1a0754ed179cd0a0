"""Linear layers in bf16: bias and GELU inside the matrix product, and few different numbers of rows.

oneDNN compiles a kernel for every number of rows, and packed rows have another number in every call. So, without
gradients, products take a few rows more than there are, up to the next of few counts. A tensor from `empty_rows` has
the room for them behind its own rows; any other is copied. With gradients, only the bias is inside the product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokdyn.ops import layers, torch_private
from tokdyn.ops.cpu.activation import gelu as activate
from tokdyn.ops.dispatch import cpu_form
from tokdyn.ops.precision import cpu_multiplies, product_dtype
from tokdyn.tokens import TILE

_PLAIN: tuple[Any, ...] = ("none", [], "")
_GELU: tuple[Any, ...] = ("gelu", [], "tanh")
_FORWARD = nn.Linear.forward


@cpu_form(layers.linear)
def linear(x: Tensor, layer: nn.Module, gelu: bool = False) -> Tensor | None:
    """Apply a linear layer in bf16, or one in any type with GELU after it."""
    kind, learning = product_dtype(x), torch.is_grad_enabled()
    bypassed = isinstance(layer, nn.Linear) and _may_bypass(x, layer, learning)
    fused = isinstance(layer, nn.Linear) and bypassed and _has_kernel(x, layer, kind)
    if not fused and not gelu:
        return None
    if isinstance(layer, nn.Linear) and fused:
        if not learning:
            return _without_gradients(x, layer, kind, gelu)
        x = x.to(kind)
        bias = None if layer.bias is None else layer.bias.to(kind)
        out = _Linear.apply(x.reshape(-1, x.shape[-1]), layer.weight.to(kind).t(), bias).view(*x.shape[:-1], -1)
        return activate(out, True, x, layer) if gelu else out
    out = layer(x)
    return activate(out, bypassed, x.to(kind), layer) if learning else activate(out, bypassed)


def _without_gradients(x: Tensor, layer: nn.Linear, kind: torch.dtype, gelu: bool) -> Tensor:
    count = x.numel() // x.shape[-1]
    weight, bias = _cast(layer.weight, kind), None if layer.bias is None else _cast(layer.bias, kind)
    rows = _with_room(x.reshape(count, -1), kind)
    out: Tensor = torch_private.linear_pointwise(rows, weight, bias, *(_GELU if gelu else _PLAIN))
    return out[:count].view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """`x weight_t + bias` for (T, D), (D, E) and (E,), with the gradients of `nn.Linear`.

    It saves what `nn.Linear` saves, for that runs instead if a hook exists in only one of both passes of a checkpoint.
    """

    @staticmethod
    def forward(context, x, weight_t, bias):  # type: ignore[no-untyped-def]
        learns_x, learns_weight, *_ = context.needs_input_grad
        context.save_for_backward(x if learns_weight else None, weight_t if learns_x else None)
        if torch_private.dispatch_modes():
            with torch.autocast("cpu", enabled=False):
                return F.linear(x, weight_t.t(), bias)
        return torch_private.linear_pointwise(x, weight_t.t(), bias, *_PLAIN)

    @staticmethod
    def backward(context, gradient):  # type: ignore[no-untyped-def]
        x, weight_t = context.saved_tensors
        with torch.autocast("cpu", enabled=False):
            to_x = None if weight_t is None else gradient.mm(weight_t.t())
            to_weight = None if x is None else gradient.t().mm(x).t()
            to_bias = gradient.sum(0) if context.needs_input_grad[2] else None
        return to_x, to_weight, to_bias


def empty_rows(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate (count, width) rows with room behind them for those that `linear` adds."""
    return torch.empty(_room(count), width, dtype=dtype, device=device)[:count]


def _may_bypass(x: Tensor, layer: nn.Linear, learning: bool) -> bool:
    """Whether the layer is `nn.Linear` itself and nobody would miss its call."""
    if torch_private.dispatch_modes is None:
        return False
    return (
        type(layer) is nn.Linear
        and nn.Linear.forward is _FORWARD
        and x.numel() > 0
        and x.shape[-1] == layer.weight.shape[1]
        and not torch_private.has_hooks(layer)
        and all(_is_ordinary(each) for each in (layer.weight, layer.bias) if each is not None)
        # Counters of FLOPs know only the operators of nn.Linear, which `_Linear` runs for them.
        and (learning or not torch_private.dispatch_modes())
    )


def _is_ordinary(parameter: Tensor) -> bool:
    return type(parameter) is nn.Parameter and parameter.device.type == "cpu" and parameter.is_contiguous()


def _has_kernel(x: Tensor, layer: nn.Linear, kind: torch.dtype) -> bool:
    """Whether the product is in bf16, and processor and oneDNN can compute it."""
    if kind != torch.bfloat16 or torch_private.linear_pointwise is None or not cpu_multiplies(kind):
        return False
    if torch_private.mkldnn_enabled is None or not torch_private.mkldnn_enabled():
        return False
    types = (torch.float32, kind) if torch.is_autocast_enabled("cpu") else (kind,)
    return all(each.dtype in types for each in (x, layer.weight, layer.bias) if each is not None)


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    kept, key = layers.kept_casts(), (id(weight), dtype)
    if weight.dtype == dtype or kept is None:
        return weight.to(dtype)
    if key not in kept:
        # Stored column by column: with few rows, the kernel reads that up to a third faster.
        kept[key] = weight, weight.to(dtype) if weight.dim() == 1 else weight.t().to(dtype).contiguous().t()
    return kept[key][1]


def _room(count: int) -> int:
    """Return the next of 32 to 64 counts for every doubling, all multiples of the kernel's tile."""
    step = max(TILE, 1 << max(0, count.bit_length() - 6))
    return -(-count // step) * step


def _with_room(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Extend (T, D) rows to as many as `_room` says; it does not matter what the added rows hold."""
    count, width = rows.shape
    room = _room(count)
    behind = rows.untyped_storage().nbytes() // rows.element_size() - rows.storage_offset()
    if rows.dtype == dtype and rows.is_contiguous() and room * width <= behind:
        return rows.as_strided((room, width), (width, 1))
    wide = torch.empty(room, width, dtype=dtype, device=rows.device)
    wide[:count].copy_(rows)
    return wide
