"""The layers of a block whose inputs are masked, and what those of a narrow block did without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.attach.class_swap import attach_like, is_attached
from tokdyn.attach.run import Run
from tokdyn.attach.sites import Role, layer_roles
from tokdyn.attach.width.layout import Layer, Layout, reach
from tokdyn.attach.width.rows import of_samples_here, sample_of_rows
from tokdyn.attach.width.slices import Slice
from tokdyn.ops.width import spread


def know_layers(run: Run, part: nn.Module, role: Role, layout: Layout, rows: bool = False) -> None:
    """Make sure that calls of a block's layers are seen, also of those that were put there after wrapping.

    Args:
        run: of the call.
        part: the block.
        role: of the block.
        layout: of the block.
        rows: only tokens are chosen, so that only a block whose MLP is no module of its own is asked.
    """
    if rows and not layout.parallel:
        return
    for key, found in layer_roles(part, role, layout).items():
        assert found.layer is not None
        module = reach(part, found.layer.names)
        assert module is not None
        known = run.roles.get(key)  # of a layer that is gone, if its id is used again
        if known is not None and known.layer is found.layer and is_attached(module):
            continue
        for inside in module.modules():  # an adapter layer took the place of a layer that it holds now
            run.roles.pop(id(inside), None)
        attach_like(module, part)
        run.roles[key] = found


def note_saved(run: Run, layout: Layout, taken: Slice) -> None:
    """Note what a narrow block did without, of the rows that its layers saw."""
    call = run.call
    text = call.samples * call.text
    rows = {
        kind: sum(samples * tokens for samples, tokens in call.groups(merged))
        for kind, merged in (("block", []), ("attention", call.attention), ("mlp", call.mlp))
    }
    if call.mlp_rows is not None:
        rows["mlp"] = int(call.mlp_rows)
    beside = () if run.stack.products is None else run.stack.products.beside  # sees no merged tokens
    attentions = {path.partition(".")[0] for path in layout.width.attention}
    for layer in layout.layers:
        numbers = taken.without.get(layer.names)
        if not numbers:
            continue
        if layer.names[0] in attentions:
            inside = "block" if layer.names[0] in beside else "attention"
        else:
            inside = "block" if layout.parallel else "mlp"
        seen = {"text": text, "image": rows[inside], "joint": rows[inside] + text}[layer.rows]
        call.save(".".join(layer.names), 2 * numbers * seen)


def factor(run: Run, layer: Layer, layout: Layout, x: Tensor) -> Tensor | None:
    """0 or 1 for the inputs of a layer, (1 or B, 1, C), or (1 or T, C) of packed rows; None if there are no masks."""
    masks = [run.given.get(kind) for kind in layer.into]
    samples = max((len(mask) for mask in masks if mask is not None), default=0)
    if not samples:
        return None
    parts = [
        x.new_ones(samples, layout.total(kind)) if mask is None else spread(mask, layout.sizes[kind]).to(x.dtype)
        for kind, mask in zip(layer.into, masks, strict=True)
    ]
    whole = torch.cat(parts, dim=1)
    if samples > 1:
        whole = of_samples_here(run, whole)
    if run.packing is None:
        return whole[:, None]
    return whole.index_select(0, sample_of_rows(run, layer.into[0], x)) if samples > 1 else whole


def columns(table: Any, index: Tensor) -> Any:
    """A table, or several, with some of the channels."""
    if isinstance(table, (tuple, list)):
        return type(table)(columns(each, index) for each in table)
    return table.index_select(-1, index.to(table.device))
