"""Count the FLOPs of a forward pass with torch's FlopCounterMode; a multiply-add is 2 FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.attention.flex_attention as flex
from torch import Tensor, nn
from torch._higher_order_ops.flex_attention import flex_attention, sdpa_dense
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode


def count(model: nn.Module, *inputs: Any, **keywords: Any) -> tuple[int, dict[str, int], Any]:
    """Run a forward pass without gradients and count the FLOPs of its matrix products, convolutions and attention.

    Args:
        model: any module; on the meta device nothing is computed or allocated.
        *inputs: positional arguments of its forward.
        **keywords: keyword arguments of its forward.

    Returns:
        The FLOPs of the pass (a multiply-add is 2); the FLOPs by child module, with "rest" for those that the model
        computes outside of its children; and the output.
    """
    return count_call(model, inputs, keywords)


def count_call(
    model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], training: bool = False
) -> tuple[int, dict[str, int], Any]:
    """Count as `count` does; `training` keeps gradients, so that methods which act in training only are included."""
    mode = FlopCounterMode(display=False, custom_mapping=operator_formulas())
    with torch.set_grad_enabled(training), nullcontext() if training else frozen(model), eager_flex_attention(), mode:
        output = model(*inputs, **keywords)
    total, children = int(mode.get_total_flops()), by_child(mode, type(model).__name__)
    rest = total - sum(children.values())
    return total, children | ({"rest": rest} if rest else {}), output


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter require gradients: within torch's counter, views of one require them even without gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def by_child(mode: FlopCounterMode, root: str) -> dict[str, int]:
    """Sum the counted FLOPs by child of the root module.

    Args:
        mode: the counter, after the forward pass.
        root: class name of the root module, by which the counter lists it.

    Returns:
        FLOPs by name of the child. A child that is not called itself, such as a list, has those of its own children.
    """
    counts = {name: sum(ops.values()) for name, ops in mode.get_flop_counts().items() if name.startswith(f"{root}.")}
    children: dict[str, int] = {}
    for name, value in counts.items():
        parts = name.split(".")
        if value and not any(".".join(parts[:end]) in counts for end in range(2, len(parts))):
            children[parts[1]] = children.get(parts[1], 0) + int(value)
    return children


def to_meta(value: Any) -> Any:
    """Move tensors to the meta device, also inside of lists, tuples and dictionaries; leave anything else unchanged."""
    if isinstance(value, (list, tuple)):
        return type(value)(to_meta(item) for item in value)
    if isinstance(value, dict):
        return {name: to_meta(item) for name, item in value.items()}
    return value.to("meta") if isinstance(value, Tensor) else value


def _dense_attention(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Count the two products of dense attention, of queries with keys and of attention weights with values."""
    *heads, length, width = query
    outer = 1
    for size in heads:
        outer *= size
    return 2 * outer * length * key[-2] * (width + value[-1])


def _dense_attention_backward(_: tuple[int, ...], *inputs: tuple[int, ...], **__: Any) -> int:
    """Count the four products of the gradients of dense attention; those that a kernel computes anew are left out."""
    return 2 * _dense_attention(*inputs[:3])


def _ragged_attention(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, *_: Any, **__: Any) -> int:
    """Count the two products of attention of packed rows (T, H, d), from the lengths of the samples.

    Reading the lengths synchronises with the device, which the kernel itself does not.
    """
    lengths = offsets.diff().tolist()
    return sum(2 * length * length * query.shape[1] * (query.shape[2] + value.shape[2]) for length in lengths)


@contextmanager
def eager_flex_attention() -> Iterator[None]:
    """Let flex attention that is not compiled run as it is, and not through the compiler, which refuses counters."""
    before = flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        yield
    finally:
        flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before


def _flex_attention(mode: Any, *args: Any) -> Any:
    """Compute flex attention as it is without a compiler, by products of all queries and keys, which are counted."""
    with mode:
        return sdpa_dense(*args)


_QUANTISED = {
    "aten": ("_int_mm", "_weight_int8pack_mm", "_weight_int4pack_mm", "_weight_int4pack_mm_for_cpu"),
    "bitsandbytes": ("gemm_4bit", "gemv_4bit", "int8_linear_matmul", "int8_scaled_mm"),
    "quanto": ("qbytes_mm",),
}
"""Products with quantised weights, by the namespace of the operators; a library that is not loaded has none."""


def _quantised_product(x: tuple[int, ...], *_: Any, out_shape: tuple[int, ...], **__: Any) -> int:
    """Count the product of x (..., K) with a quantised weight, which may be packed, from its result (..., E)."""
    return 2 * math.prod(out_shape) * x[-1]


def _complex_transform(x: tuple[int, ...], axes: Sequence[int], *_: Any, **__: Any) -> int:
    """Count Fourier transforms of complex values over some axes of n values: 5 n log2 n for each."""
    return 2 * _real_transforms(x, axes)


def _transform(x: tuple[int, ...], axes: Sequence[int], *_: Any, **__: Any) -> int:
    """Count Fourier transforms of real values (...) over some axes."""
    return _real_transforms(x, axes)


def _inverse_transform(_: Any, axes: Sequence[int], *__: Any, out_shape: tuple[int, ...], **___: Any) -> int:
    """Count Fourier transforms to real values (...) over some axes."""
    return _real_transforms(out_shape, axes)


def _real_transforms(x: tuple[int, ...], axes: Sequence[int]) -> int:
    """Count Fourier transforms of real values (...) over axes of n values: 2.5 n log2 n operations for each."""
    values = math.prod(x[axis] for axis in axes)
    return math.prod(x) // max(values, 1) * round(2.5 * values * math.log2(max(values, 1)))


def operator_formulas() -> dict[Any, Callable[..., int]]:
    """Return FLOP formulas for operators that torch's counter does not know.

    They are attention kernels, fused on CPU and packed on CUDA, products with quantised weights, and Fourier
    transforms. Flex attention that is not compiled, which the counter refuses, can be counted from then on.
    """
    import torch.nn.attention.varlen  # registers the operator of packed rows

    if _FlopCounterMode not in flex_attention.python_key_table:
        flex_attention.py_impl(_FlopCounterMode)(_flex_attention)
    _ragged_attention._get_raw = True  # type: ignore[attr-defined]  # the counter then passes tensors, not shapes
    quantised = [(getattr(torch.ops, space), name) for space, names in _QUANTISED.items() for name in names]
    return {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _dense_attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _dense_attention_backward,
        torch.ops.torch_attn._varlen_attn: _ragged_attention,
        torch.ops.aten._fft_r2c: _transform,
        torch.ops.aten._fft_c2r: _inverse_transform,
        torch.ops.aten._fft_c2c: _complex_transform,
        **{getattr(space, name): _quantised_product for space, name in quantised if hasattr(space, name)},
    }
