"""Compute the FLOPs of one forward pass by part, and count them with torch's counter; a multiply-add is 2 FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.attach import attachment_of, disabled, inner_model, untraced
from tokdyn.cost.analytic import grid_of, is_chunked, model_config, model_parts
from tokdyn.cost.call_cost import call_cost, is_computable, paddings
from tokdyn.cost.counter import count, count_call, to_meta
from tokdyn.cost.trajectory_stats import in_gflops
from tokdyn.errors import InputError
from tokdyn.tokens import cells


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass of a whole batch; a multiply-add is 2 FLOPs.

    Attributes:
        parts: FLOPs by part. Those of blocks and methods are computed if the model has an adapter; all others are
            counted and listed by module.
        counted: all FLOPs, counted by torch's FlopCounterMode; None if the model did not run.
        batch: B, images in the batch.
        counted_parts: counted FLOPs by child module of the model.
        dense: FLOPs of the same pass without methods; None for an unwrapped `DiT` or `DCDiT`, and for an unwrapped
            model whose blocks no adapter describes.
        computed: whether parts were computed; otherwise parts and `dense` were all counted, in two calls.
    """

    parts: dict[str, int]
    counted: int | None = None
    batch: int = 1
    counted_parts: dict[str, int] = field(default_factory=dict)
    dense: int | None = None
    computed: bool = True

    @property
    def total(self) -> int:
        """Sum of the parts: FLOPs of the whole batch; a multiply-add is 2."""
        return sum(self.parts.values())

    @property
    def per_image(self) -> float:
        """FLOPs per image; a multiply-add is 2."""
        return self.total / self.batch

    def __str__(self) -> str:
        def row(name: str, value: int) -> str:
            return f"{name:<{width}} {in_gflops(value, max(self.total, self.counted or 0)):>10} GFLOPs"

        width = max(12, *(len(name) for name in self.parts))
        lines = [row(name, value) for name, value in self.parts.items()]
        lines.append(f"{row('total', self.total)} (multiply-add = 2, batch of {self.batch})")
        if not self.computed:
            lines.append(f"{'counted':<{width}} by calling the model: nothing says what its blocks multiply")
        elif self.counted is not None:
            lines.append(row("counted", self.counted))
        if self.dense is not None and self.dense != self.total:
            lines.append(f"{row('dense', self.dense)}: the total is {self.total / self.dense:.1%} of it")
        return "\n".join(lines)


def flops(model: nn.Module, *inputs: Any, **keywords: Any) -> Flops:
    """Compute the FLOPs of one forward pass by part, and count them with torch's counter; a multiply-add is 2 FLOPs.

    This runs the model. Statistics, caches and losses of a wrapped model stay as they are.

    - For an unwrapped `DiT` or `DCDiT` all parts are computed, for the tokens that this pass kept, and their sum equals
      the counted FLOPs exactly. If attention runs on padded rows (`tokdyn.ops.attention`), the part "padding" holds
      their FLOPs.
    - For other models with an adapter, and for wrapped ones, the parts of blocks and methods are computed from the
      layers of the blocks and the decisions of the methods in this pass; everything else is counted by module. A
      wrapped model in training mode runs as in training.
    - For a model without an adapter, or whose adapter does not say what its blocks multiply, everything is counted by
      module; if it is wrapped, it is called a second time without its methods, for `dense`.
    - Without inputs, or for a DC-DiT on the meta device, whose router has no values to decide by, nothing runs, and the
      cost of a `DiT` or of a `DCDiT` that keeps 1/N of its tokens is computed.

    Args:
        model: a `DiT`, a `DCDiT` or, with inputs, any other module.
        *inputs: positional arguments of its forward.
        **keywords: keyword arguments of its forward, as in `flops(model, x, timestep=t, class_labels=y)`. B is the
            length of the first 4-D tensor, or else of the first tensor, among all arguments.

    Returns:
        The FLOPs of the whole batch; `.per_image` divides them by B.

    Raises:
        InputError: there are no inputs although the cost depends on them, or the model is on the meta device although
            its cost depends on values.
    """
    model = inner_model(model)
    tensors = [value for value in (*inputs, *keywords.values()) if isinstance(value, Tensor) and value.dim()]
    tensors.sort(key=lambda tensor: tensor.dim() != 4)  # stable: the first (B, C, H, W) tensor, if there is one
    batch = tensors[0].shape[0] if tensors else 1
    attachment = attachment_of(model)
    wrapped = attachment is not None and attachment.enabled and bool(attachment.methods)
    if wrapped and not tensors:
        raise InputError(
            f"the cost of a wrapped {type(model).__name__} depends on its inputs; call tokdyn.flops(model, *inputs)."
        )
    try:
        config = None if wrapped else model_config(model)
    except InputError:
        if not tensors:
            raise
        config = None
    if config is not None:
        return _own(model, config, inputs, keywords, tensors[0] if tensors else None, batch)
    if is_computable(model):
        cost = call_cost(model, inputs, keywords)
        return Flops(cost.parts, cost.counted, cost.batch, cost.children, cost.dense)
    if any(parameter.is_meta for parameter in model.parameters()):
        inputs, keywords = to_meta(inputs), to_meta(keywords)
    if attachment is None or not wrapped:
        with nullcontext() if attachment is None else untraced(attachment):
            total, children, _ = count(model, *inputs, **keywords)
        return Flops(children, total, batch, children, computed=False)
    if attachment.adapter.inferred:  # its first call has extra checks, which are not what it costs
        with untraced(attachment), torch.no_grad():
            model(*inputs, **keywords)
    with untraced(attachment):
        total, children, _ = count_call(model, inputs, keywords, model.training and torch.is_grad_enabled())
    with disabled(model):
        dense = count(model, *inputs, **keywords)[0]
    return Flops(children, total, batch, children, dense, computed=False)


def _own(
    model: nn.Module,
    config: Mapping[str, Any],
    inputs: tuple[Any, ...],
    keywords: dict[str, Any],
    first: Tensor | None,
    batch: int,
) -> Flops:
    """Compute and count the FLOPs of an unwrapped `DiT` or `DCDiT`.

    Args:
        model: the model.
        config: its settings.
        inputs: positional arguments of its forward.
        keywords: keyword arguments of its forward.
        first: the (B, C, rows, columns) input; None if there are no inputs.
        batch: B.
    """
    keywords.pop("return_dict", None)
    if first is not None and first.dim() == 4:
        config = {**config, "sample_size": tuple(first.shape[-2:])}
    meta = any(parameter.is_meta for parameter in model.parameters())
    if first is None or (is_chunked(config) and meta):
        return Flops(model_parts(config, batch=batch), batch=batch)
    if meta:
        inputs, keywords = to_meta(inputs), to_meta(keywords)
    total, children, output = count(model, *inputs, **keywords)
    if is_chunked(config):
        rows = output.routing.keep.sum(dim=1).tolist()
        parts = model_parts(config, rows, device=output.routing.keep.device.type)
    else:
        rows = [cells(grid_of(config))] * batch
        parts = model_parts(config, batch=batch)
    padding = total - sum(parts.values())
    width, heads = config["hidden_size"], config["num_heads"]
    device = next(model.parameters()).device
    if padding in paddings([(4 * config["depth"] * width, rows)], device, width // heads):
        parts["padding"] = padding
    return Flops(parts, total, batch, children)
