"""Which heads, channels and MLP tokens the layers of a block see: masks, selected rows, and what layers did without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokdyn.adapters.tokens import split
from tokdyn.adapters.width import Kind
from tokdyn.attach.class_swap import attach_like, is_attached
from tokdyn.attach.handlers.base import Frame
from tokdyn.attach.sites import Site, layer_sites
from tokdyn.attach.width.copies import readable
from tokdyn.attach.width.layout import Layer, Layout, reach
from tokdyn.attach.width.slices import Slice
from tokdyn.methods import WidthGates
from tokdyn.ops.skipping import gate
from tokdyn.ops.width import spread, with_text

_ROWS, _MASK = "rows", "mask"  # what the layer into the MLP hands to the layer out of it
STREAM = "stream"
"""Name of the tokens before the norm ahead of the MLP, which a block shows on their way there."""


def _place(site: Site) -> str:
    """Say where image tokens lie in what the MLP gets."""
    return site.blocks.inside_mlp or site.blocks.image


def _logits(gates: WidthGates, frame: Frame, site: Site, x: Tensor) -> tuple[Tensor, int]:
    """Compute logits (B, M) of the image tokens in x, (T,) of packed rows, and count the text tokens beside them."""
    if site.blocks.stream is not None and (stream := frame.exchange.given.pop(STREAM, None)) is not None:
        assert stream.shape == x.shape, "methods that merge tokens on the way were refused"
        x = stream
    if frame.view.packing is not None:
        text, image = None, x
    else:
        place = _place(site)
        text, image = split(x, None if place == "all" else x.shape[1] - frame.block.text, place)
    rows = image.numel() // image.shape[-1]
    frame.context.trace.spend("DynamicWidth gates", rows * gates.token_flops)
    return gates.token_logits(site.block, image), 0 if text is None else text.shape[1]


def token_mask(gates: WidthGates, frame: Frame, site: Site, x: Tensor, temperature: float) -> Tensor:
    """Draw 0 or 1 for every token of (B, S, D) or of packed rows, in training with a gradient."""
    logits, text = _logits(gates, frame, site, x)
    noise = frame.exchange.given.get("noise")
    if noise is not None:
        noise = _of_view(frame, noise).to(logits)
    if frame.view.packing is None:
        drawn = gate(
            logits, frame.context.training, temperature, None if noise is None else noise[:, : logits.shape[1]]
        )
        whole = with_text(drawn, text, _place(site))
        frame.exchange.returned[frame.view.samples] = whole.mean(dim=1)
        return whole
    sample = _sample_of_rows(frame, "channels", x)
    count = torch.bincount(sample, minlength=frame.view.batch)
    if noise is not None:
        slot = torch.arange(len(sample), device=x.device) - (count.cumsum(0) - count).index_select(0, sample)
        noise = noise.flatten().index_select(0, sample * noise.shape[1] + slot)
    whole = gate(logits, frame.context.training, temperature, noise)
    frame.exchange.returned[frame.view.samples] = whole.new_zeros(frame.view.batch).index_add(0, sample, whole) / count
    return whole


def _of_view(frame: Frame, given: Tensor) -> Tensor:
    """Select the entries of the samples of a view from those of the samples that the block was given."""
    if frame.view.samples == frame.exchange.samples:
        return given
    row = {sample: row for row, sample in enumerate(frame.exchange.samples)}
    return given.index_select(0, torch.tensor([row[sample] for sample in frame.view.samples], device=given.device))


def _sample_of_rows(frame: Frame, kind: Kind, x: Tensor) -> Tensor:
    """List the sample (T,) of each packed row that attention or the MLP gets; merging may have left fewer rows."""
    assert frame.view.packing is not None
    lengths = frame.view.packing.lengths
    if sum(lengths) != len(x):
        merged = frame.block.attention if kind == "heads" else frame.block.mlp
        lengths = tuple(length for _, length in merged[-len(lengths) :])
    return torch.repeat_interleave(torch.tensor(lengths, device=x.device), output_size=len(x))


def _rows(gates: WidthGates, frame: Frame, site: Site, x: Tensor) -> Tensor | None:
    """List the rows, in x as (B S, D), of the tokens that the MLP sees; None if it sees all."""
    logits, text = _logits(gates, frame, site, x)
    whole = with_text(logits, text, _place(site)) > 0 if text else logits > 0
    rows = whole.flatten().nonzero().flatten()
    frame.block.mlp_rows = int(frame.block.mlp_rows or 0) + len(rows) - len(x) * text
    return None if len(rows) == whole.numel() else rows


def select_tokens(gates: WidthGates, frame: Frame, site: Site, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute an MLP on the tokens of x (B, S, D) or (T, D) that it sees, of all samples together; the others get 0."""
    rows = _rows(gates, frame, site, x)
    return call(x) if rows is None else _put(x, rows, call)


def _put(x: Tensor, rows: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function to some rows of x (..., D); the others get 0."""
    flat = x.reshape(-1, x.shape[-1])
    out = call(flat.index_select(0, rows)[None])[0]
    return out.new_zeros(len(flat), out.shape[1]).index_copy(0, rows, out).view(*x.shape[:-1], -1)


def into_mlp(
    gates: WidthGates,
    temperature: float,
    frame: Frame,
    module: nn.Module,
    site: Site,
    call: Callable[..., Any],
    x: Tensor,
    *args: Any,
) -> Tensor:
    """Compute the layer into an MLP that is no module of its own, with channels of 0 for tokens that it does not see.

    They stay 0 through the activation, up to the layer out of the MLP.
    """
    layer = site.layer
    assert layer is not None
    if frame.context.training or torch.compiler.is_compiling():
        frame.exchange.given[_MASK] = token_mask(gates, frame, site, x, temperature)
        return call(x, *args)  # type: ignore[no-any-return]
    rows = _rows(gates, frame, site, x)
    if rows is None:
        return call(x, *args)  # type: ignore[no-any-return]
    frame.exchange.given[_ROWS] = rows
    if layer.split and not readable(module):
        return call(x, *args)  # type: ignore[no-any-return]
    if isinstance(module, nn.Linear):
        _save(frame, layer, x, rows, (module.out_features - layer.split) * x.shape[-1])
    if not layer.split:
        return _put(x, rows, lambda some: call(some, *args))
    (weight, rest), (bias, over) = _split_weight(module, layer.split, 0)
    out = _put(x, rows, lambda some: F.linear(some, rest, over))
    return torch.cat([F.linear(x, weight, bias), out], dim=-1)


def out_of_mlp(
    frame: Frame, module: nn.Module, layer: Layer, call: Callable[..., Any], x: Tensor, *args: Any
) -> Tensor:
    """Compute the layer out of such an MLP and of the attention beside it."""
    rows, mask = frame.exchange.given.get(_ROWS), frame.exchange.given.get(_MASK)
    if rows is not None and readable(module):
        (weight, rest), (bias, _) = _split_weight(module, layer.split, 1)
        flat = x.flatten(0, 1)
        out = F.linear(flat[:, : layer.split], weight, bias)
        seen = F.linear(flat.index_select(0, rows)[:, layer.split :], rest)
        _save(frame, layer, x, rows, rest.numel())
        return out.index_add(0, rows, seen.to(out.dtype)).view(*x.shape[:2], -1)
    if rows is not None:
        mask = x.new_zeros(x.shape[0] * x.shape[1]).index_fill(0, rows, 1.0).view(x.shape[:2])
    if mask is not None:
        heads, channels = x[..., : layer.split], x[..., layer.split :]
        x = torch.cat([heads, channels * mask[..., None].to(x.dtype)], dim=-1)
    return call(x, *args)  # type: ignore[no-any-return]


def _save(frame: Frame, layer: Layer, x: Tensor, rows: Tensor, elements: int) -> None:
    """Note the FLOPs that some elements of a weight did not spend on tokens that the MLP does not see."""
    frame.block.save(".".join(layer.names), 2 * elements * (x.numel() // x.shape[-1] - len(rows)))


def _split_weight(
    layer: Any, split: int, axis: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """Split weight and bias of a linear layer along an axis; along the second, the bias goes with the first part."""
    weight, bias = layer.weight, layer.bias
    first, second = weight.tensor_split([split], dim=axis)
    if bias is None or axis == 1:
        return (first, second), (bias, None)
    return (first, second), (bias[:split], bias[split:])


def find_layers(frame: Frame, block: nn.Module, site: Site, layout: Layout, only_tokens: bool = False) -> None:
    """Attach the layers of a block, also those that took the place of others after wrapping.

    Args:
        frame: of the call.
        block: the module.
        site: of the block.
        layout: of the block.
        only_tokens: whether only tokens are selected, which takes layers where the MLP is no module of its own.
    """
    if only_tokens and not layout.parallel:
        return
    for key, found in layer_sites(block, site, layout).items():
        assert found.layer is not None
        module = reach(block, found.layer.names)
        assert module is not None
        known = frame.sites.get(key)  # of a layer that is gone, if its id is used again
        if known is not None and known.layer is found.layer and is_attached(module):
            continue
        for inside in module.modules():  # an adapter layer took the place of a layer that it holds now
            frame.sites.pop(id(inside), None)
        attach_like(module, block)
        frame.sites[key] = found


def note_saved(frame: Frame, site: Site, layout: Layout, taken: Slice) -> None:
    """Note the FLOPs that a pruned block did not spend on the rows that its layers saw."""
    call = frame.block
    text = call.samples * call.text
    rows = {
        kind: sum(samples * tokens for samples, tokens in call.groups(merged))
        for kind, merged in (("block", []), ("attention", call.attention), ("mlp", call.mlp))
    }
    if call.mlp_rows is not None:
        rows["mlp"] = int(call.mlp_rows)
    beside = () if site.blocks.products is None else site.blocks.products.beside  # sees no merged tokens
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


def input_mask(frame: Frame, layer: Layer, layout: Layout, x: Tensor) -> Tensor | None:
    """Spread masks over the inputs of a layer: (1 or B, 1, C), or (1 or T, C) for packed rows; None without masks."""
    masks = [frame.exchange.given.get(kind) for kind in layer.into]
    samples = max((len(mask) for mask in masks if mask is not None), default=0)
    if not samples:
        return None
    parts = [
        x.new_ones(samples, layout.total(kind)) if mask is None else spread(mask, layout.sizes[kind]).to(x.dtype)
        for kind, mask in zip(layer.into, masks, strict=True)
    ]
    whole = torch.cat(parts, dim=1)
    if samples > 1:
        whole = _of_view(frame, whole)
    if frame.view.packing is None:
        return whole[:, None]
    return whole.index_select(0, _sample_of_rows(frame, layer.into[0], x)) if samples > 1 else whole


def select_channels(table: Any, index: Tensor) -> Any:
    """Select channels of a table, or of each of several."""
    if isinstance(table, (tuple, list)):
        return type(table)(select_channels(each, index) for each in table)
    return table.index_select(-1, index.to(table.device))
