"""Select tokens for the MLP of a block, mask the inputs of its layers, and record the FLOPs that this saves.

The functions share some arguments: `gates` are the trained gates, `temperature` is that of their Gumbel-sigmoid in
training, `frame` is the frame of the block call, `site` the site of the MLP or layer that is computed, and x its input,
(B, S, D) or packed rows (T, D). Row i of a dense x is row i of x flattened to (B S, D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokdyn.adapters.counting import text_stream
from tokdyn.adapters.tokens import split
from tokdyn.adapters.width import Kind
from tokdyn.attach.handlers.base import Frame
from tokdyn.attach.sites import Site
from tokdyn.attach.width.copies import readable
from tokdyn.attach.width.layout import Layer, Layout
from tokdyn.attach.width.slices import Slice
from tokdyn.methods import DynamicWidth, WidthGates
from tokdyn.ops.skipping import gate
from tokdyn.ops.width import spread, with_text
from tokdyn.trace.calls import CallTrace

_ROWS, _MASK = "rows", "mask"  # names in `Exchange.given`: what the first layer of the MLP hands to its last layer
STREAM = "stream"
"""Name in `Exchange.given` of the tokens before the norm ahead of the MLP; see `Blocks.stream`."""
Spent = tuple[int, int, tuple[int, int]]  # see `Widths.spent`


def _place(site: Site) -> str:
    """Return where image tokens are in the input of the MLP: "first", "last" or "all"."""
    return site.blocks.inside_mlp or site.blocks.image


def _logits(gates: WidthGates, frame: Frame, site: Site, x: Tensor) -> tuple[Tensor, int]:
    """Compute the logits of a block's token gate from x, or from the stored `STREAM`, which is removed then.

    Returns:
        Logits (B, M) of the image tokens, or (T,) of packed rows; and the number of text tokens of each sample in x.
    """
    if site.blocks.stream is not None and (stream := frame.exchange.given.pop(STREAM, None)) is not None:
        assert stream.shape == x.shape, "compose refuses methods that merge tokens between the stream and the MLP"
        x = stream
    if frame.view.packing is not None:
        text, image = None, x
    else:
        place, blocks, beside = _place(site), site.blocks, frame.block.text
        if blocks.text is not None and blocks.inside_mlp is None:
            beside -= text_stream(frame.block, blocks)
        text, image = split(x, None if place == "all" else x.shape[1] - beside, place)
    rows = image.numel() // image.shape[-1]
    frame.context.trace.spend("DynamicWidth gates", rows * gates.token_flops)
    return gates.token_logits(site.block, image), 0 if text is None else text.shape[1]


def token_mask(gates: WidthGates, frame: Frame, site: Site, x: Tensor, temperature: float) -> Tensor:
    """Draw whether each token goes through the MLP: (B, S), or (T,) for packed rows, of 0 and 1.

    In training the result has a gradient. Text tokens are always 1. The share of 1 of each sample is put into
    `frame.exchange.returned`.
    """
    logits, text = _logits(gates, frame, site, x)
    noise = frame.exchange.given.get("noise")
    if noise is not None:
        noise = _select_view(frame, noise).to(logits)
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


def _select_view(frame: Frame, values: Tensor) -> Tensor:
    """Select the samples of the frame's view from values (b, ...) for the samples of its exchange."""
    if frame.view.samples == frame.exchange.samples:
        return values
    row = {sample: row for row, sample in enumerate(frame.exchange.samples)}
    return values.index_select(0, torch.tensor([row[sample] for sample in frame.view.samples], device=values.device))


def _sample_of_rows(frame: Frame, kind: Kind, x: Tensor) -> Tensor:
    """Return the sample (T,) of each packed row of x, the input of attention ("heads") or of the MLP ("channels").

    TokenMerge may have left fewer rows than the block has.
    """
    assert frame.view.packing is not None
    lengths = frame.view.packing.lengths
    if sum(lengths) != len(x):
        merged = frame.block.attention if kind == "heads" else frame.block.mlp
        lengths = tuple(length for _, length in merged[-len(lengths) :])
    return torch.repeat_interleave(torch.tensor(lengths, device=x.device), output_size=len(x))


def _rows(gates: WidthGates, frame: Frame, site: Site, x: Tensor) -> Tensor | None:
    """Return the indices of the rows of x that go through the MLP, text tokens included; None if all do.

    Their number is recorded in the trace of the block.
    """
    logits, text = _logits(gates, frame, site, x)
    whole = with_text(logits, text, _place(site)) > 0 if text else logits > 0
    rows = whole.flatten().nonzero().flatten()
    frame.block.mlp_rows = int(frame.block.mlp_rows or 0) + len(rows) - len(x) * text
    return None if len(rows) == whole.numel() else rows


def select_tokens(gates: WidthGates, frame: Frame, site: Site, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute an MLP, `call`, on the tokens of x that its gate selects, of all samples together; the others get 0."""
    rows = _rows(gates, frame, site, x)
    return call(x) if rows is None else _apply_to_rows(x, rows, call)


def _apply_to_rows(x: Tensor, rows: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function to some rows of x; the others get 0."""
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
    """Compute the first layer of an MLP that is not a module of its own, for the tokens that its gate selects.

    The MLP channels of the other tokens are 0, and stay 0 through the activation up to the last layer. Outputs of the
    layer that belong to heads are computed for all tokens. The selection is passed on to `out_of_mlp` in the exchange.
    `call(x, *args)` computes the layer `module` for all tokens.
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
        return _apply_to_rows(x, rows, lambda some: call(some, *args))
    (head_weight, mlp_weight), (head_bias, mlp_bias) = _split_weight(module, layer.split, 0)
    out = _apply_to_rows(x, rows, lambda some: F.linear(some, mlp_weight, mlp_bias))
    return torch.cat([F.linear(x, head_weight, head_bias), out], dim=-1)


def out_of_mlp(
    frame: Frame, module: nn.Module, layer: Layer, call: Callable[..., Any], x: Tensor, *args: Any
) -> Tensor:
    """Compute the linear layer that attention and MLP share at the end of a block, as in Flux's single blocks.

    The input of the layer is the outputs of the heads followed by the channels of the MLP. Tokens that `into_mlp` did
    not select get the part of attention and the bias alone. `call(x, *args)` is the forward of the layer `module`; if
    the weight cannot be read in parts, it runs with the channels of these tokens set to zero.
    """
    rows, mask = frame.exchange.given.get(_ROWS), frame.exchange.given.get(_MASK)
    if rows is not None and readable(module):
        (head_weight, mlp_weight), (bias, _) = _split_weight(module, layer.split, 1)
        flat = x.flatten(0, 1)
        out = F.linear(flat[:, : layer.split], head_weight, bias)
        mlp = F.linear(flat.index_select(0, rows)[:, layer.split :], mlp_weight)
        _save(frame, layer, x, rows, mlp_weight.numel())
        return out.index_add(0, rows, mlp.to(out.dtype)).view(*x.shape[:2], -1)
    if rows is not None:
        mask = x.new_zeros(x.shape[0] * x.shape[1]).index_fill(0, rows, 1.0).view(x.shape[:2])
    if mask is not None:
        heads, channels = x[..., : layer.split], x[..., layer.split :]
        x = torch.cat([heads, channels * mask[..., None].to(x.dtype)], dim=-1)
    return call(x, *args)  # type: ignore[no-any-return]


def _save(frame: Frame, layer: Layer, x: Tensor, rows: Tensor, elements: int) -> None:
    """Record the FLOPs saved by a number of elements of a weight, which ran over these rows of x only."""
    frame.block.save(".".join(layer.names), 2 * elements * (x.numel() // x.shape[-1] - len(rows)))


def _split_weight(
    layer: Any, split: int, axis: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """Split weight and bias of a linear layer into the part of the heads and the part of the MLP.

    Args:
        layer: the layer.
        split: number of its outputs or inputs that belong to heads.
        axis: 0 to split its outputs; 1 to split its inputs, and then the whole bias goes with the heads.

    Returns:
        Both weights, and both biases, None where there is none.
    """
    weight, bias = layer.weight, layer.bias
    first, second = weight.tensor_split([split], dim=axis)
    if bias is None or axis == 1:
        return (first, second), (bias, None)
    return (first, second), (bias[:split], bias[split:])


def note_saved(frame: Frame, site: Site, layout: Layout, taken: Slice) -> None:
    """Record the FLOPs that the slices `taken` saved in a block, by the number of rows that each of its layers got."""
    call = frame.block
    text, stream = call.samples * call.text, call.samples * text_stream(call, site.blocks)
    rows = {
        kind: sum(samples * tokens for samples, tokens in call.groups(merged))
        for kind, merged in (("block", []), ("attention", call.attention), ("mlp", call.mlp))
    }
    if call.mlp_rows is not None:
        rows["mlp"] = int(call.mlp_rows)
    products = site.blocks.products
    others = () if products is None else products.beside + products.cross  # they get tokens before merging
    attentions = {path: tuple(path.split(".")) for path in layout.width.attention}
    for layer in layout.layers:
        elements = taken.without.get(layer.names)
        if not elements:
            continue
        held = next((path for path, names in attentions.items() if layer.names[: len(names)] == names), None)
        if held is not None:
            inside = "block" if held in others else "attention"
        else:
            inside = "block" if layout.parallel else "mlp"
        counts = {"text": stream, "image": rows[inside], "joint": rows[inside] + text}
        counts["sequence"] = counts["joint"] - stream
        count = counts.get(layer.rows, call.samples * call.context)
        call.save(".".join(layer.names), 2 * elements * count)


def note_reach(
    trace: CallTrace, method: DynamicWidth, gates: WidthGates, layouts: Sequence[Layout], spent: Sequence[Spent]
) -> None:
    """Note it if the target is out of reach: if no gates that may shut could lower the FLOPs `spent` to it.

    The first head and the first group of channels of a block are always on. Graphs of torch.compile do not note it.
    """
    saved = whole = 0
    for block, _, (attention, mlp) in () if torch.compiler.is_compiling() else spent:
        heads, channels = (layouts[block].sizes[kind] for kind in ("heads", "channels"))
        shut = 0 if gates.channels is None or not channels else mlp * sum(channels[1:]) // sum(channels)
        saved += shut if gates.tokens is None else mlp
        saved += 0 if gates.heads is None else attention * (len(heads) - 1) // len(heads)
        whole += attention + mlp
    if whole:
        trace.fall_short("DynamicWidth", (1.0 - method.target,), (saved,), (whole,))


def input_mask(frame: Frame, site: Site, layout: Layout, x: Tensor) -> Tensor | None:
    """Return the mask of a layer's inputs, in which the value of each head or group is repeated for its channels.

    Returns:
        (1 or B, 1, C); (1, 1 or B, C) for x (S, B, C); (P B, 1, C) where each sample is P rows of x; or (1 or T, C) for
        packed rows and for x (T, C) of one sample. None if the exchange holds no masks for this layer.
    """
    layer = site.layer
    assert layer is not None
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
        whole = _select_view(frame, whole)
    if frame.view.packing is None:
        if x.dim() == 2:  # a block without a batch axis
            return whole
        if frame.context.parts(site.blocks)[0] > 1 and len(whole) not in (1, len(x)):
            whole = whole.repeat_interleave(len(x) // len(whole), dim=0)
        return whole[:, None] if len(x) == len(whole) or len(x) == frame.view.batch else whole[None]
    return whole.index_select(0, _sample_of_rows(frame, layer.into[0], x)) if samples > 1 else whole
