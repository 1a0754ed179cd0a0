"""Linear layers without gradients in bf16 on CPU: bias and GELU inside the matrix product, few different row counts.

Kernels are compiled for every number of rows, and packed rows have another number at every call. So products take a
few rows more than there are, up to the next of few counts. A tensor from `empty_rows` has the room for them behind its
own rows; any other is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.ops.activation import gelu_tanh
from tokdyn.ops.device import by_hand, halves_multiply_slowly
from tokdyn.ops.watched import is_watched
from tokdyn.tokens import TILE

_product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_casts: ContextVar[dict[int, tuple[Tensor, Tensor]] | None] = ContextVar("tokdyn_casts", default=None)


@contextmanager
def weights_cast_once() -> Iterator[None]:
    """Within this context weights do not change: what autocast makes of them is kept, and freed at the end."""
    token = _casts.set({})
    try:
        yield
    finally:
        _casts.reset(token)


def linear(x: Tensor, layer: nn.Module, gelu: bool = False) -> Tensor:
    """`layer(x)`, or the tanh form of GELU of it.

    Args:
        x: (..., D).
        layer: maps (..., D) to (..., E); one that is no plain `nn.Linear`, or is watched by hooks, is called.
        gelu: apply GELU.

    Returns:
        (..., E), in the type that the layer computes in.
    """
    if not _fits(x, layer):
        out: Tensor = layer(x)
        return gelu_tanh(out) if gelu else out
    assert isinstance(layer, nn.Linear)
    kind = product_dtype(x)
    weight, bias = _cast(layer.weight, kind), None if layer.bias is None else _cast(layer.bias, kind)
    count = x.numel() // x.shape[-1]
    rows = _with_room(x.reshape(count, -1), kind)
    fused: Tensor = _product(rows, weight, bias, *(("gelu", [], "tanh") if gelu else ("none", [], "")))
    return fused[:count].view(*x.shape[:-1], -1)


def product_dtype(x: Tensor) -> torch.dtype:
    """The type that matrix products of x are computed in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def empty_rows(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(count, width) to be written, with room behind for the rows that `linear` adds."""
    return torch.empty(_room(count), width, dtype=dtype, device=device)[:count]


def _fits(x: Tensor, layer: Any) -> bool:
    """Whether the kernel has this case, and nobody would miss the call of the layer."""
    if torch.is_grad_enabled() or type(layer) is not nn.Linear or _product is None or not by_hand(x):
        return False
    kind, parameters = product_dtype(x), (layer.weight, *(() if layer.bias is None else (layer.bias,)))
    known = (kind,) if not torch.is_autocast_enabled("cpu") else (torch.float32, kind)
    return (
        kind == torch.bfloat16
        and x.numel() > 0
        and not halves_multiply_slowly(x.new_empty(0, dtype=kind))
        and all(type(each) is nn.Parameter and each.dtype in known for each in parameters)
        and x.dtype in known
        and not is_watched(layer)
        and not torch._C._len_torch_dispatch_stack()  # counters of FLOPs know the operators of nn.Linear only
    )


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    kept = _casts.get()
    if weight.dtype == dtype or kept is None:
        return weight.to(dtype)
    if id(weight) not in kept:
        kept[id(weight)] = weight, weight.to(dtype)
    return kept[id(weight)][1]


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
