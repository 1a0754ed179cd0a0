"""Linear layers in bf16 without gradients: bias and GELU inside the matrix product, and few different numbers of rows.

oneDNN compiles a kernel for every number of rows, and packed rows have another number in every call. So products take a
few rows more than there are, up to the next of few counts. A tensor from `empty_rows`, and the result of another such
product, has the room for them behind its own rows; any other is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.ops import layers, torch_private
from tokdyn.ops.dispatch import cpu_form
from tokdyn.ops.precision import cpu_multiplies, product_dtype
from tokdyn.tokens import TILE

_PLAIN: tuple[Any, ...] = ("none", [], "")
_GELU: tuple[Any, ...] = ("gelu", [], "tanh")
_FORWARD = nn.Linear.forward


@cpu_form(layers.linear)
def linear(x: Tensor, layer: nn.Module, gelu: bool = False) -> Tensor | None:
    """Apply a linear layer in bf16 without gradients."""
    kind = product_dtype(x)
    if torch.is_grad_enabled() or not isinstance(layer, nn.Linear):
        return None
    if not _may_bypass(x, layer) or not _has_kernel(x, layer, kind):
        return None
    weight, bias = _cast(layer.weight, kind), None if layer.bias is None else _cast(layer.bias, kind)
    count = x.numel() // x.shape[-1]
    rows = _with_room(x.reshape(count, -1), kind)
    out: Tensor = torch_private.linear_pointwise(rows, weight, bias, *(_GELU if gelu else _PLAIN))
    return out[:count].view(*x.shape[:-1], -1)


def empty_rows(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate (count, width) rows with room behind them for those that `linear` adds."""
    return torch.empty(_room(count), width, dtype=dtype, device=device)[:count]


def _may_bypass(x: Tensor, layer: nn.Linear) -> bool:
    """Whether the layer is `nn.Linear` itself and nobody would miss its call."""
    return (
        type(layer) is nn.Linear
        and nn.Linear.forward is _FORWARD
        and x.numel() > 0
        and x.shape[-1] == layer.weight.shape[1]
        and not torch_private.has_hooks(layer)
        and all(_is_ordinary(each) for each in (layer.weight, layer.bias) if each is not None)
        # Counters of FLOPs know only the operators of nn.Linear.
        and torch_private.dispatch_modes is not None
        and not torch_private.dispatch_modes()
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
