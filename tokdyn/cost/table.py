"""The statistics of a run as plain text, at most about a hundred columns wide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokdyn.cost.statistics import CallStats, RunStats

_MANY, _ENDS = 120, 50  # calls that are shown, and how many of either end if there are more
_UNITS = ((1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"))


def as_text(run: RunStats) -> str:
    """One line for each call, and two that sum up."""
    if not run.calls:
        return f"{run.model}: no calls since it was wrapped or reset"
    size, unit = unit_of(max(call.dense_flops or 0 for call in run.calls))
    header = ("step", "branch", "noise", "tokens", "in attention", "in MLP", "blocks", "reused", unit, "dense", "share")
    rows = [_row(call, size) for call in run.calls]
    shown = rows if len(rows) <= _MANY else [*rows[:_ENDS], *rows[-_ENDS:]]
    widths = [max(len(row[column]) for row in (header, *shown)) for column in range(len(header))]
    lines = [_line(row, widths) for row in (header, *shown)]
    if len(shown) < len(rows):
        lines.insert(1 + _ENDS, f"... {len(rows) - len(shown)} calls ...")
    return "\n".join([*lines, *_summary(run)])


def _row(call: CallStats, size: float) -> tuple[str, ...]:
    spent, dense = call.flops, call.dense_flops
    return (
        str(call.step),
        str(call.branch),
        "-" if call.level is None else f"{call.level:.3f}",
        _kept(call.kept),
        _number(call.attention_tokens),
        _number(call.mlp_tokens),
        f"{len(call.blocks)}/{call.depth}",
        f"{call.reused}/{call.samples}" if call.reused else "-",
        "-" if spent is None else f"{spent / size:.3f}",
        "-" if dense is None else f"{dense / size:.3f}",
        "-" if call.share is None else f"{call.share:.1%}",
    )


def _kept(kept: Sequence[int | None]) -> str:
    """Least, most and mean of the samples."""
    there = [count for count in kept if count is not None]
    if not there:
        return "-"
    low, high = min(there), max(there)
    return str(low) if low == high else f"{low} to {high}, mean {sum(there) / len(there):.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}".removesuffix(".0")


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def unit_of(most: float) -> tuple[float, str]:
    """What to divide FLOPs by, so that the largest has at most four digits before the point, and the unit."""
    return next(((size, name) for size, name in _UNITS if most >= size), (1e6, "MFLOPs"))


def _summary(run: RunStats) -> list[str]:
    first, steps = run.calls[0], len(run.steps)
    reused = f", {run.cached} of them reused" if run.cached else ""
    lines = [
        f"{run.model}: {first.depth} blocks on {first.cells} image tokens, {steps} step{'s' * (steps > 1)}, "
        f"{len(run.calls)} call{'s' * (len(run.calls) > 1)}{reused}"
    ]
    blocks, methods, dense = run.block_flops, run.method_flops, run.dense_flops
    if blocks is None or methods is None or not dense:
        return [*lines, "FLOPs are not known: the adapter does not say what the blocks multiply"]
    size, unit = unit_of(dense)
    return [
        *lines,
        f"blocks {blocks / size:.3f} and methods {methods / size:.3f} of {dense / size:.3f} {unit} dense: "
        f"{(blocks + methods) / dense:.1%}",
        "multiply-add = 2 FLOPs; embedders and head are not in it",
    ]
