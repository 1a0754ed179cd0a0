"""Which tokens the MLP of a block sees: those that it is computed for, and the others that get 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokdyn.adapters.width import Kind
from tokdyn.attach.run import Run
from tokdyn.attach.sites import Role
from tokdyn.attach.tokens import split
from tokdyn.attach.width.copies import readable
from tokdyn.attach.width.layout import Layer
from tokdyn.methods import WidthGates
from tokdyn.ops.skipping import gate
from tokdyn.ops.width import with_text

_ROWS, _MASK = "rows", "mask"  # what a layer into the MLP tells the one that leads out of it
STREAM = "stream"
"""The tokens before the norm ahead of the MLP, as a block gives them on its way there."""


def _place(role: Role) -> str:
    """Where image tokens lie in what the MLP gets."""
    return role.stack.inside_mlp or role.stack.image


def _logits(module: WidthGates, run: Run, role: Role, x: Tensor) -> tuple[Tensor, int]:
    """(B, M) logits of the image tokens in x, (T,) of packed rows, and the number of text tokens beside them."""
    if role.stack.stream is not None and (stream := run.given.pop(STREAM, None)) is not None:
        assert stream.shape == x.shape, "methods that merge tokens on the way were refused"
        x = stream
    if run.packing is not None:
        text, image = None, x
    else:
        place = _place(role)
        text, image = split(x, None if place == "all" else x.shape[1] - run.words, place)
    rows = image.numel() // image.shape[-1]
    run.record.spend("DynamicWidth gates", rows * module.token_flops)
    return module.token_logits(role.block, image), 0 if text is None else text.shape[1]


def chosen(module: WidthGates, run: Run, role: Role, x: Tensor, temperature: float) -> Tensor:
    """0 or 1 for tokens (B, S, D) or packed rows, in training with a gradient; their share goes out of the block."""
    logits, text = _logits(module, run, role, x)
    noise = run.given.get("noise")
    if noise is not None:
        noise = of_samples_here(run, noise).to(logits)
    if run.packing is None:
        drawn = gate(logits, run.training, temperature, None if noise is None else noise[:, : logits.shape[1]])
        whole = with_text(drawn, text, _place(role))
        run.found[run.samples] = whole.mean(dim=1)
        return whole
    sample = sample_of_rows(run, "channels", x)
    count = torch.bincount(sample, minlength=run.batch)
    if noise is not None:
        slot = torch.arange(len(sample), device=x.device) - (count.cumsum(0) - count).index_select(0, sample)
        noise = noise.flatten().index_select(0, sample * noise.shape[1] + slot)
    whole = gate(logits, run.training, temperature, noise)
    run.found[run.samples] = whole.new_zeros(run.batch).index_add(0, sample, whole) / count
    return whole


def of_samples_here(run: Run, given: Tensor) -> Tensor:
    """The entries (b, ...) of the samples that are being computed, of those (B, ...) that the block was given."""
    if run.samples == run.whose:
        return given
    row = {sample: row for row, sample in enumerate(run.whose)}
    return given.index_select(0, torch.tensor([row[sample] for sample in run.samples], device=given.device))


def sample_of_rows(run: Run, kind: Kind, x: Tensor) -> Tensor:
    """(T,) the sample of each packed row that attention, or the MLP, gets; merging may have left fewer."""
    assert run.packing is not None
    lengths = run.packing.lengths
    if sum(lengths) != len(x):
        merged = run.call.attention if kind == "heads" else run.call.mlp
        lengths = tuple(length for _, length in merged[-len(lengths) :])
    return torch.repeat_interleave(torch.tensor(lengths, device=x.device), output_size=len(x))


def _rows(module: WidthGates, run: Run, role: Role, x: Tensor) -> Tensor | None:
    """Rows of the tokens that are on, in x as (B S, D); None if they all are."""
    logits, text = _logits(module, run, role, x)
    whole = with_text(logits, text, _place(role)) > 0 if text else logits > 0
    rows = whole.flatten().nonzero().flatten()
    run.call.mlp_rows = int(run.call.mlp_rows or 0) + len(rows) - len(x) * text
    return None if len(rows) == whole.numel() else rows


def selected(module: WidthGates, run: Run, role: Role, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """An MLP of the tokens that are on, of all samples together, and 0 for the others; x is (B, S, D) or (T, D)."""
    rows = _rows(module, run, role, x)
    return call(x) if rows is None else _put(x, rows, call)


def _put(x: Tensor, rows: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """(..., C) what a function makes of some rows of (..., D), and 0 elsewhere."""
    flat = x.reshape(-1, x.shape[-1])
    out = call(flat.index_select(0, rows)[None])[0]
    return out.new_zeros(len(flat), out.shape[1]).index_copy(0, rows, out).view(*x.shape[:-1], -1)


def into_mlp(
    module: WidthGates,
    temperature: float,
    run: Run,
    part: nn.Module,
    role: Role,
    call: Callable[..., Any],
    x: Tensor,
    *args: Any,
) -> Tensor:
    """A layer into an MLP that is no module of its own: the channels of the tokens that are off are 0.

    They stay 0 through the activation, on the way to the layer that leads out of the MLP.
    """
    layer = role.layer
    assert layer is not None
    if run.training or torch.compiler.is_compiling():
        run.given[_MASK] = chosen(module, run, role, x, temperature)
        return call(x, *args)  # type: ignore[no-any-return]
    rows = _rows(module, run, role, x)
    if rows is None:
        return call(x, *args)  # type: ignore[no-any-return]
    run.given[_ROWS] = rows
    if layer.split and not readable(part):
        return call(x, *args)  # type: ignore[no-any-return]
    if isinstance(part, nn.Linear):
        _save(run, layer, x, rows, (part.out_features - layer.split) * x.shape[-1])
    if not layer.split:
        return _put(x, rows, lambda some: call(some, *args))
    (weight, rest), (bias, over) = _parted(part, layer.split, 0)
    out = _put(x, rows, lambda some: F.linear(some, rest, over))
    return torch.cat([F.linear(x, weight, bias), out], dim=-1)


def out_of_mlp(run: Run, part: nn.Module, layer: Layer, call: Callable[..., Any], x: Tensor, *args: Any) -> Tensor:
    """The layer that leads out of such an MLP, and of attention beside it."""
    rows, mask = run.given.get(_ROWS), run.given.get(_MASK)
    if rows is not None and readable(part):
        (weight, rest), (bias, _) = _parted(part, layer.split, 1)
        flat = x.flatten(0, 1)
        out = F.linear(flat[:, : layer.split], weight, bias)
        seen = F.linear(flat.index_select(0, rows)[:, layer.split :], rest)
        _save(run, layer, x, rows, rest.numel())
        return out.index_add(0, rows, seen.to(out.dtype)).view(*x.shape[:2], -1)
    if rows is not None:
        mask = x.new_zeros(x.shape[0] * x.shape[1]).index_fill(0, rows, 1.0).view(x.shape[:2])
    if mask is not None:
        heads, channels = x[..., : layer.split], x[..., layer.split :]
        x = torch.cat([heads, channels * mask[..., None].to(x.dtype)], dim=-1)
    return call(x, *args)  # type: ignore[no-any-return]


def _save(run: Run, layer: Layer, x: Tensor, rows: Tensor, numbers: int) -> None:
    """Note what so many numbers of a weight did without: the tokens that are off."""
    run.call.save(".".join(layer.names), 2 * numbers * (x.numel() // x.shape[-1] - len(rows)))


def _parted(layer: Any, split: int, axis: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """The weight of a linear layer in two along an axis, and its bias, which is the first's along the second axis."""
    weight, bias = layer.weight, layer.bias
    first, second = weight.tensor_split([split], dim=axis)
    if bias is None or axis == 1:
        return (first, second), (bias, None)
    return (first, second), (bias[:split], bias[split:])
