"""Samples of a batch that a block computes together, because the same of their tokens are there."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokdyn.adapters.base import Stack
from tokdyn.attach.tokens import follow, join, of_samples, split
from tokdyn.tokens import cells

if TYPE_CHECKING:
    from tokdyn.attach.run import Run


@dataclass(frozen=True)
class Group:
    """Some samples.

    Attributes:
        samples: their places in the batch.
        rows: (b,) int64, the same as a tensor.
        index: (b, M) cells of their tokens, None while all are there.
        key: what tells it from the other groups of a call.
    """

    samples: tuple[int, ...]
    rows: Tensor
    index: Tensor | None
    key: Hashable


def grouped(keys: Sequence[Hashable], samples: Sequence[int]) -> list[tuple[Hashable, tuple[int, ...]]]:
    """The samples by key, in order of appearance."""
    found: dict[Hashable, list[int]] = {}
    for sample in samples:
        found.setdefault(keys[sample], []).append(sample)
    return [(key, tuple(members)) for key, members in found.items()]


def arguments_of(run: Run, stack: Stack, group: Group | None) -> dict[str, Any]:
    """The arguments of a block for a group, or for all, each with entries for the tokens that are there alone."""
    named, index = dict(run.named), run.index if group is None else group.index
    following = {how.name for how in stack.follow}
    if group is not None:
        rest = {name: value for name, value in named.items() if name not in following}
        named |= of_samples(rest, group.rows, run.batch, stack)
        if index is not None:
            named[stack.tokens] = shortened(named[stack.tokens], run.count, index.shape[1], stack.image)
    for how in stack.follow:
        value = run.named.get(how.name)
        if value is None or (group is None and index is None):
            continue
        key = (id(value), None if group is None else group.key, id(run.index))
        if key not in run.followed:  # the value is kept, so that its id stays its own
            part = value if group is None else of_samples({how.name: value}, group.rows, run.batch, stack)[how.name]
            cut = part if index is None else follow(part, how, stack, index, cells(run.grid))
            run.followed[key] = ((value, run.index), cut)
        named[how.name] = run.followed[key][1]
    return named


def shortened(x: Tensor, count: int, length: int, image: str) -> Tensor:
    """(b, S, D) with the first `length` of its `count` image tokens; the others hold nothing."""
    if length == count:
        return x
    text, own = split(x, count, image)
    return join(text, own[:, :length], image)


def put(whole: Any, rows: Tensor, part: Any, image: str | None = None, count: int = 0, length: int = 0) -> Any:
    """The results of some samples in place of what was there.

    Args:
        whole: (B, S, D) or None.
        rows: (b,) int64, the samples.
        part: (b, S', D) or None, which wins.
        image: where image tokens lie; None if there are none in it.
        count: image tokens of a sample in `whole`.
        length: those in `part`.
    """
    if whole is None or part is None:
        return part
    if image is not None and length < count:
        text, own = split(part, length, image)
        before = split(whole.index_select(0, rows), count, image)[1]
        part = join(text, torch.cat([own, before[:, length:].to(own.dtype)], dim=1), image)
    return whole.index_copy(0, rows, part.to(whole.dtype))
