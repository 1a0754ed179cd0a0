"""Counting the FLOPs of a forward pass that runs, with torch's own counter; a multiply-add is 2 FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tokdyn.errors import InputError
from tokdyn.flops.analytic import grid_of, is_chunked, model_config, model_parts
from tokdyn.tokens import aligned, cells


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass of a whole batch. A multiply-add is 2 FLOPs.

    Attributes:
        parts: analytic FLOPs by part; for a model without an analytic formula, the counted ones of its children.
        counted: what torch's FlopCounterMode saw on the path that ran; None if nothing ran.
        batch: B, images in the batch.
        counted_parts: the counted FLOPs by child module of the model.
    """

    parts: dict[str, int]
    counted: int | None = None
    batch: int = 1
    counted_parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Sum of the parts: FLOPs of the whole batch, multiply-add = 2."""
        return sum(self.parts.values())

    @property
    def per_image(self) -> float:
        """FLOPs per image, multiply-add = 2."""
        return self.total / self.batch

    def __str__(self) -> str:
        lines = [f"{name:<12} {value / 1e9:10.3f} GFLOPs" for name, value in self.parts.items()]
        lines.append(f"{'total':<12} {self.total / 1e9:10.3f} GFLOPs (multiply-add = 2, batch of {self.batch})")
        if self.counted is not None:
            lines.append(f"{'counted':<12} {self.counted / 1e9:10.3f} GFLOPs")
        return "\n".join(lines)


def count(model: nn.Module, *inputs: Any, **keywords: Any) -> tuple[int, dict[str, int], Any]:
    """Run a forward pass without gradients and count its matrix products, convolutions and attention.

    Args:
        model: any module; on the meta device nothing is computed or allocated.
        *inputs: positional arguments of its forward.
        **keywords: keyword arguments of its forward.

    Returns:
        FLOPs of the pass (multiply-add = 2), the same by child module with "rest" for what the model computes
        outside of them, and the output.
    """
    mode = FlopCounterMode(display=False, custom_mapping=attention_formulas())
    with torch.no_grad(), mode:
        output = model(*inputs, **keywords)
    total, children = int(mode.get_total_flops()), _by_child(mode, type(model).__name__)
    rest = total - sum(children.values())
    return total, children | ({"rest": rest} if rest else {}), output


def flops(model: nn.Module, *inputs: Any, **keywords: Any) -> Flops:
    """FLOPs of one forward pass: analytic by part, and counted on the path that runs. A multiply-add is 2 FLOPs.

    For `DiT` and `DCDiT` the two agree exactly, at any input size; DC-DiT's analytic cost is taken at the kept counts
    of this very pass. Where attention ran on padded rows (tokdyn.ops.attention), the part "padding" is what that
    added.
    Without inputs, or for a DC-DiT on the meta device (which tokens are kept depends on data), only the analytic
    cost is given, at the model's target.

    Args:
        model: a `DiT`, a `DCDiT` or, if inputs are given, any other module.
        *inputs: positional arguments of its forward; the first is the (B, C, H, W) input.
        **keywords: keyword arguments of its forward, as in `flops(model, x, timestep=t, class_labels=y)`.

    Returns:
        The FLOPs of the whole batch; `.per_image` divides by B.

    Raises:
        InputError: a foreign model without inputs.
    """
    tensors = [value for value in (*inputs, *keywords.values()) if isinstance(value, Tensor) and value.dim()]
    tensors.sort(key=lambda tensor: tensor.dim() != 4)  # stable: the first (B, C, H, W), if there is one
    batch = tensors[0].shape[0] if tensors else 1
    meta = any(parameter.is_meta for parameter in model.parameters())
    try:
        config: Mapping[str, Any] | None = model_config(model)
    except InputError:
        if not tensors:
            raise
        config = None
    chunked = config is not None and is_chunked(config)
    if config is not None:
        keywords.pop("return_dict", None)
        if tensors and tensors[0].dim() == 4:
            config = {**config, "sample_size": tuple(tensors[0].shape[-2:])}
    if not tensors or (chunked and meta):
        return Flops(model_parts(config, batch=batch), batch=batch)
    if meta:
        inputs = tuple(_to_meta(value) for value in inputs)
        keywords = {name: _to_meta(value) for name, value in keywords.items()}
    total, children, output = count(model, *inputs, **keywords)
    if config is None:
        return Flops(children, total, batch, children)
    if chunked:
        rows = output.routing.keep.sum(dim=1).tolist()
        parts = model_parts(config, rows, device=output.routing.keep.device.type)
    else:
        rows = [cells(grid_of(config))] * batch
        parts = model_parts(config, batch=batch)
    padding = total - sum(parts.values())
    if padding in _paddings(config, rows):
        parts["padding"] = padding
    return Flops(parts, total, batch, children)


def _paddings(config: Mapping[str, Any], rows: Sequence[int]) -> set[int]:
    """What attention computes beyond its rows where it pads: all samples to one length, or the keys of each."""
    exact = sum(n * n for n in rows)
    together, keys = len(rows) * aligned(max(rows)) ** 2, sum(n * aligned(n) for n in rows)
    return {4 * config["depth"] * config["hidden_size"] * (pairs - exact) for pairs in (together, keys)} - {0}


def _by_child(mode: FlopCounterMode, root: str) -> dict[str, int]:
    """FLOPs by child of the root module: those of its outermost modules that were called, since lists are not."""
    counts = {name: sum(ops.values()) for name, ops in mode.get_flop_counts().items() if name.startswith(f"{root}.")}
    children: dict[str, int] = {}
    for name, value in counts.items():
        parts = name.split(".")
        if value and not any(".".join(parts[:end]) in counts for end in range(2, len(parts))):
            children[parts[1]] = children.get(parts[1], 0) + int(value)
    return children


def _to_meta(value: Any) -> Any:
    """A tensor without its data; anything else unchanged."""
    return value.to("meta") if isinstance(value, Tensor) else value


def _dense_attention(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Two products of dense attention: q k^T and weights v."""
    *heads, length, width = query
    outer = 1
    for size in heads:
        outer *= size
    return 2 * outer * length * key[-2] * (width + value[-1])


def _ragged_attention(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, *_: Any, **__: Any) -> int:
    """Attention of packed rows (T, H, d): the sum of squared lengths; the counter is the one place that reads them."""
    lengths = offsets.diff().tolist()
    return sum(2 * length * length * query.shape[1] * (query.shape[2] + value.shape[2]) for length in lengths)


def attention_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas of attention kernels that torch's counter does not know: fused on CPU, and packed rows on CUDA."""
    import torch.nn.attention.varlen  # registers the operator of packed rows

    _ragged_attention._get_raw = True  # type: ignore[attr-defined]  # the counter passes tensors, not shapes
    return {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _dense_attention,
        torch.ops.torch_attn._varlen_attn: _ragged_attention,
    }
