"""Blocks on packed tokens: the rows (T, D) of DC-DiT, whose samples have different numbers of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokdyn.attach.groups import grouped
from tokdyn.attach.sites import Role
from tokdyn.ops.pack import pack_index, packing_of
from tokdyn.tokens import Packing, cells
from tokdyn.trace.calls import BlockCall

if TYPE_CHECKING:
    from tokdyn.attach.run import Run


def packed_block(
    run: Run, part: nn.Module, role: Role, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Call one block on packed rows, or do not; see `Run.block`."""
    stack, named = role.stack, role.named(args, kwargs)
    assert stack.packing is not None
    packing: Packing = run.packing or named[stack.packing]
    rows: Tensor = named[stack.tokens]
    run.part, run.stack, run.batch = part, stack, len(packing.lengths)
    if not run.record.batch:
        run.record.batch, run.record.cells = run.batch, cells(packing.grid)
        run.record.kept = packing.lengths
    opening = [bracket for bracket in run.actors.brackets if bracket.first == role.block]
    if opening:
        x = _pad(run, rows, packing)
        for bracket in opening:
            x = bracket.open(run, x)
        rows, packing = _pack(run, x, packing)
    run.packing, run.named = packing, {**named, stack.tokens: rows, stack.packing: packing}
    out = _computed(run, part, role, role.by_name(call, args, kwargs), rows, packing)
    for gate in run.actors.gates:
        weight = gate.weight(run, role.block)
        if weight is not None:
            share = weight.index_select(0, packing.sample)[:, None].to(out.dtype)
            out = torch.lerp(rows.to(out.dtype), out, share)
    closing = [bracket for bracket in reversed(run.actors.brackets) if bracket.last == role.block]
    if closing:
        x = _pad(run, out, packing)
        for bracket in closing:
            x = bracket.close(run, x)
        out, run.packing = _pack(run, x, packing)
    return out


def _computed(
    run: Run, part: nn.Module, role: Role, inner: Callable[[dict[str, Any]], Any], rows: Tensor, packing: Packing
) -> Tensor:
    """What the block makes of the rows, for the samples that it runs for."""
    plan = run.running(role.block)
    if plan is None:
        return _part(run, part, role, inner, None, rows, packing)
    running, keys = plan
    for _, samples in grouped(keys, running):
        if len(samples) == run.batch:
            return _part(run, part, role, inner, None, rows, packing)
        chosen = torch.isin(packing.sample, torch.tensor(samples, device=rows.device)).nonzero().squeeze(1)
        found = _part(run, part, role, inner, samples, rows.index_select(0, chosen), _of(packing, samples, chosen))
        rows = rows.index_copy(0, chosen, found.to(rows.dtype))
    return rows


def _part(
    run: Run,
    part: nn.Module,
    role: Role,
    inner: Callable[[dict[str, Any]], Any],
    samples: tuple[int, ...] | None,
    rows: Tensor,
    packing: Packing,
) -> Tensor:
    """The block computed for some samples, or for all."""
    for kernel in run.actors.kernels:
        inner = kernel.around(run, part, role, inner)
    stack = role.stack
    assert stack.packing is not None
    named = {**run.named, stack.tokens: rows, stack.packing: packing}
    ragged = packing.lengths if len(set(packing.lengths)) > 1 else None
    run.call = BlockCall(role.block, len(packing.lengths), packing.longest, rows=ragged, which=run.which(samples))
    run.record.calls.append(run.call)
    if samples is None:
        out: Tensor = inner(named)
        return out
    chosen = torch.tensor(samples, device=rows.device)
    for name, value in named.items():
        if name not in (stack.tokens, stack.packing) and isinstance(value, torch.Tensor) and len(value) == run.batch:
            named[name] = value.index_select(0, chosen)
    out = run.among(samples, None, lambda: inner(named), packing)
    return out


def _of(packing: Packing, samples: tuple[int, ...], chosen: Tensor) -> Packing:
    """The packing of some of the samples, whose rows are the chosen ones."""
    lengths = tuple(packing.lengths[i] for i in samples)
    cell = packing.cell.index_select(0, chosen)
    sample = torch.repeat_interleave(torch.tensor(lengths, device=cell.device), output_size=len(cell))
    return packing_of(lengths, sample, cell, packing.grid)


def _pad(run: Run, rows: Tensor, packing: Packing) -> Tensor:
    """(B, M, D) with the tokens of each sample first; the run knows which they are."""
    starts = packing.cu_seqlens[:-1].long()
    slot = torch.arange(packing.longest, device=rows.device)
    last = torch.tensor(packing.lengths, device=rows.device)[:, None] - 1
    place = (starts[:, None] + torch.minimum(slot, last)).flatten()
    run.index = packing.cell.index_select(0, place).view(len(packing.lengths), -1)
    run.lengths = packing.lengths if len(set(packing.lengths)) > 1 else None
    return rows.index_select(0, place).view(len(packing.lengths), packing.longest, -1)


def _pack(run: Run, x: Tensor, packing: Packing) -> tuple[Tensor, Packing]:
    """The opposite: rows (T, D) of what is there now."""
    assert run.index is not None
    lengths = run.lengths or (run.index.shape[1],) * len(x)
    if lengths != packing.lengths:
        packing = pack_index(run.index, lengths, packing.grid)
    run.index = run.lengths = None
    slot = torch.arange(x.shape[1], device=x.device)
    there = (slot < torch.tensor(lengths, device=x.device)[:, None]).flatten()
    rows = torch.nonzero_static(there, size=sum(lengths)).squeeze(1)
    return x.reshape(-1, x.shape[-1]).index_select(0, rows), packing
