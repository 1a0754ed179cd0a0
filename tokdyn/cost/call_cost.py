"""Compute and count the FLOPs of one call of a model that has an adapter, wrapped or not."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokdyn.adapters import adapter_for
from tokdyn.adapters.structure import structures
from tokdyn.attach import Attachment, Meter, argument_names, blocks_of, metered, untraced
from tokdyn.cost.blocks import Costs
from tokdyn.cost.counter import by_child, eager_flex_attention, frozen, operator_formulas, to_meta
from tokdyn.errors import InputError, UnsupportedModelError
from tokdyn.models.blocks import Attention
from tokdyn.ops.attention import computed_pairs
from tokdyn.trace.calls import CallTrace


@dataclass(frozen=True)
class CallCost:
    """The FLOPs of one call with the whole batch; a multiply-add is 2.

    Attributes:
        parts: FLOPs by part: computed for blocks and methods, counted by module for everything else.
        dense: FLOPs of the same call without methods.
        counted: all FLOPs, counted by torch.
        children: counted FLOPs by child module of the model.
        batch: B.
    """

    parts: dict[str, int]
    dense: int
    counted: int
    children: dict[str, int]
    batch: int


def is_computable(model: nn.Module) -> bool:
    """Return whether the FLOPs of the model's blocks can be computed: an adapter declares their products."""
    try:
        return structures(model, adapter_for(model)) is not None
    except UnsupportedModelError:
        return False


def call_cost(model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> CallCost:
    """Call a model and both count and compute its FLOPs; a multiply-add is 2.

    A wrapped model in training mode, with gradients enabled, runs as in training, so that methods which act only in
    training are included. Trajectory, caches, statistics and losses stay as they are.

    Args:
        model: a model for which `is_computable` holds.
        inputs: positional arguments of the call.
        keywords: keyword arguments of the call.

    Raises:
        InputError: the model is on the meta device, but what it computes depends on the values of its inputs.
    """
    names = argument_names(model)
    arguments = {**dict(zip(names, inputs, strict=False)), **keywords}
    meta = any(parameter.is_meta for parameter in model.parameters())
    if meta:
        inputs, keywords = to_meta(inputs), to_meta(keywords)
    mode = FlopCounterMode(display=False, custom_mapping=operator_formulas())
    with metered(model, Meter(mode.get_total_flops, arguments)) as attachment, untraced(attachment):
        training = bool(attachment.methods) and model.training and torch.is_grad_enabled()
        try:
            frozen_or_not = nullcontext() if training else frozen(model)
            with torch.set_grad_enabled(training), frozen_or_not, eager_flex_attention(), mode:
                model(*inputs, **keywords)
        except RuntimeError as error:
            if not meta:
                raise
            raise InputError(
                f"this {type(model).__name__} is on the meta device, but what it computes depends on values ({error}); "
                "move it to another device."
            ) from error
        record = attachment.records[-1]
        children = by_child(mode, type(model).__name__)
        return _combined(model, attachment, record, int(mode.get_total_flops()), children)


def _combined(
    model: nn.Module, attachment: Attachment, record: CallTrace, total: int, children: dict[str, int]
) -> CallCost:
    """Combine FLOPs counted outside of the blocks with those computed for blocks and methods.

    Args:
        model: the model.
        attachment: the attachment that recorded the call.
        record: the trace of the call.
        total: all FLOPs, counted.
        children: counted FLOPs by child module of the model.
    """
    known = structures(model, attachment.adapter)
    assert known is not None
    costs = Costs(known)
    for earlier in attachment.records[:-1]:
        costs.learn(earlier)
    holders = {blocks.path.partition(".")[0] for blocks in attachment.adapter.blocks} | {"tokdyn"}
    outside = {name: value for name, value in children.items() if name not in holders}
    rest = total - record.counted - sum(outside.values())
    blocks, methods = costs.spent(record), costs.methods(record)
    inside = record.counted - sum(blocks.values()) - sum(methods.values())
    if inside in _paddings(model, attachment, record):
        blocks["padding"] = inside
    names = list(children)
    first = next((place for place, name in enumerate(names) if name in holders), len(names))
    before = {name: outside[name] for name in names[:first]}
    after = {name: value for name, value in outside.items() if name not in before}
    unassigned = total - sum(children.values())
    return CallCost(
        {**before, **blocks, **methods, **after, **({"rest": rest} if rest else {})},
        sum(outside.values()) + rest + sum(costs.dense(record).values()),
        total,
        children | ({"rest": unassigned} if unassigned else {}),
        record.batch,
    )


def _paddings(model: nn.Module, attachment: Attachment, record: CallTrace) -> set[int]:
    """Return the possible FLOPs of padding in the attention of tokdyn's own blocks; none for other blocks."""
    blocks = [
        (block, group.packing is not None) for group in attachment.adapter.blocks for block in blocks_of(model, group)
    ]
    calls: list[tuple[float, Sequence[int]]] = []
    for call in record.blocks:
        block, packed = blocks[call.block]
        attention = getattr(block, "attn", None)
        if not isinstance(attention, Attention):
            return set()
        pair = 4 * call.heads * attention.proj.in_features
        groups = [[tokens] * samples for samples, tokens in call.groups(call.attention)]
        calls += [(pair, rows) for rows in ([list(chain(*groups))] if packed else groups)]
    width, heads = attachment.blueprint.sizes.width, attachment.blueprint.sizes.heads
    return paddings(calls, next(model.parameters()).device, width // heads)


def paddings(calls: Sequence[tuple[float, Sequence[int]]], device: torch.device, head_width: int) -> set[int]:
    """Return the possible FLOPs that padded rows add to calls of attention; a multiply-add is 2.

    Whether attention pads depends on dtype, gradients and bias, which are not recorded.

    Args:
        calls: for each call of attention, the FLOPs of one query-key pair and the rows of each sample.
        device: device of the model.
        head_width: d = D / H.

    Returns:
        One value for each combination of dtype, gradients and bias, without 0.
    """
    possible = set()
    dtypes = torch.float32, torch.bfloat16, torch.float16
    for dtype, gradients, biased in product(dtypes, (False, True), (False, True)):
        padding = 0
        for flops, rows in calls:
            pairs = computed_pairs(rows, device, dtype, head_width, gradients, biased) - sum(n * n for n in rows)
            padding += round(flops * pairs)
        possible.add(padding)
    return possible - {0}
