"""Declare how a block arranges its arguments where samples are not on the first axis and tokens on the second.

The engine and the methods compute with (B, N, D). An `Arrangement` converts the arguments of blocks whose tokens have
no batch axis, whose samples are frames or places of a video, or which get an object that holds tensors of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokdyn.lazy import Lazy
from tokdyn.tokens import Grid, ImageTokens

Change = Callable[[Mapping[str, Any], Lazy[ImageTokens]], Mapping[str, Any]]
"""`change(named, images)` converts those of the arguments `named` that have to be, and returns all of them in the same
order; `images` has the grids of the call, read at the first use."""


@dataclass(frozen=True)
class Arrangement:
    """How the arguments of a block, of its attention and of its MLP are arranged; results are named like arguments.

    Attributes:
        inward: converts arguments to samples on the first axis and tokens on the second.
        outward: converts them back; the MLP must take its tokens in both ways.
        parts: `parts(grid)` returns into how many equal parts, each with a grid of its own, attention splits the tokens
            of a sample, as samples on the first axis. Attention is then called as the block calls it. None if it is
            not split.
    """

    inward: Change
    outward: Change
    parts: Callable[[Grid], tuple[int, Grid]] | None = None


def change_results(out: Any, names: Sequence[str], change: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Any:
    """Convert a result, a tensor or a tuple of tensors.

    Args:
        out: the result.
        names: for each tensor in it, the name of the argument that it is arranged like.
        change: converts arguments by name.
    """
    values = out if isinstance(out, tuple) else (out,)
    names = names[: len(values)]
    changed = change(dict(zip(names, values, strict=True)))
    return tuple(changed[name] for name in names) if isinstance(out, tuple) else changed[names[0]]


def without_batch(*names: str) -> Arrangement:
    """Return the arrangement of blocks that take the tokens of a single sample, as (N, D) in place of (1, N, D).

    Args:
        *names: of the arguments of the block, its attention and its MLP that lack the batch axis.
    """

    def inward(named: Mapping[str, Any], images: Lazy[ImageTokens]) -> dict[str, Any]:
        return {name: value[None] if name in names and value is not None else value for name, value in named.items()}

    def outward(named: Mapping[str, Any], images: Lazy[ImageTokens]) -> dict[str, Any]:
        return {name: value[0] if name in names and value is not None else value for name, value in named.items()}

    return Arrangement(inward, outward)
