"""The rules of composition: what may be combined, and in which order it acts. Everything is refused here.

Stages, traits and rules are described in docs/design.md. Nothing here knows a model beyond its number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

from tokdyn.errors import CompositionError
from tokdyn.methods.base import Method, Stage, Traits


@dataclass(frozen=True)
class Placed:
    """A method in its place.

    Attributes:
        method: the configuration.
        traits: what it said of itself.
        index: its place in the user's list.
    """

    method: Method
    traits: Traits
    index: int

    @property
    def name(self) -> str:
        """What errors call it."""
        return type(self.method).__name__


def compose(methods: Sequence[Method], depth: int) -> tuple[Placed, ...]:
    """Order methods from the outermost to the innermost, or refuse them.

    Args:
        methods: the user's list.
        depth: blocks of the model.

    Raises:
        CompositionError: two methods do not go together; names both and what would.
        InputError: blocks that the model does not have.
    """
    placed = [Placed(method, method.traits(depth), index) for index, method in enumerate(methods)]
    placed.sort(key=lambda each: (each.traits.stage, each.index))
    for outer, inner in combinations(placed, 2):
        for rule in _RULES:
            rule(outer, inner, depth)
    return tuple(placed)


def _blocks(each: Placed, depth: int) -> frozenset[int]:
    """The blocks that a method encloses."""
    if each.traits.span is None:
        return frozenset(range(depth))
    first, last = each.traits.span
    return frozenset(range(first, last + 1))


def _phase(outer: Placed, inner: Placed, depth: int) -> None:
    """PHASE: what acts only in training and what acts only in sampling never meet."""
    if not outer.traits.phases & inner.traits.phases:
        early = outer if "train" in outer.traits.phases else inner
        late = inner if early is outer else outer
        raise CompositionError(
            f"{early.name} acts only in training and {late.name} only in sampling; wrap with {early.name} to train, "
            f"unwrap, and wrap with {late.name} to sample."
        )


def _own(outer: Placed, inner: Placed, depth: int) -> None:
    """OWN: one owner for every decision."""
    for thing, where in outer.traits.owns.items():
        if thing not in inner.traits.owns:
            continue
        other = inner.traits.owns[thing]
        shared = (where if other is None else other if where is None else where & other) or frozenset()
        if where is None and other is None:
            place = ""
        elif shared:
            place = f" of block{'s' if len(shared) > 1 else ''} {', '.join(map(str, sorted(shared)))}"
        else:
            continue
        cure = "give them different blocks" if where is not None or other is not None else "keep one of them"
        raise CompositionError(f"{_both(outer, inner)} decide the {thing}{place}; {cure}.")


def _trait(outer: Placed, inner: Placed, depth: int) -> None:
    """TRAIT: what needs the full grid cannot run inside what leaves a part of it."""
    if inner.traits.needs_grid and outer.traits.tokens != "full" and _blocks(outer, depth) & _blocks(inner, depth):
        raise CompositionError(
            f"{inner.name} needs all cells of the grid, but inside {outer.name} there is a {outer.traits.tokens} set "
            f"of tokens; use {inner.name} with partition='bucket', which works on any set."
        )


def _unstable(outer: Placed, inner: Placed, depth: int) -> None:
    """UNSTABLE: no memory from step to step where the set of tokens changes."""
    if inner.traits.remembers and outer.traits.moving:
        cure = (
            f"put {inner.name} before {outer.name} in the list"
            if outer.traits.stage == inner.traits.stage
            else f"use {inner.name} without {outer.name}"
        )
        raise CompositionError(
            f"{inner.name} remembers tokens from step to step, but inside {outer.name} the set of tokens changes; "
            f"{cure}."
        )


def _nest(outer: Placed, inner: Placed, depth: int) -> None:
    """NEST: two spans lie one in the other or apart."""
    if outer.traits.stage == inner.traits.stage == Stage.STACK and not _blocks(outer, depth) >= _blocks(inner, depth):
        raise CompositionError(
            f"{outer.name} begins behind the first block, but {inner.name} begins with it; use {outer.name} with "
            "indicator='input'."
        )
    if outer.traits.stage != Stage.SPAN or inner.traits.stage != Stage.SPAN:
        return
    a, b = _blocks(outer, depth), _blocks(inner, depth)
    if a & b and not a >= b and not b >= a:
        raise CompositionError(
            f"{outer.name} over blocks {min(a)} to {max(a)} and {inner.name} over blocks {min(b)} to {max(b)} overlap; "
            "let one lie within the other or apart from it."
        )
    if b > a:
        raise CompositionError(
            f"{inner.name} over blocks {min(b)} to {max(b)} encloses {outer.name} over blocks {min(a)} to {max(a)}, "
            f"but comes after it; put {inner.name} first in the list."
        )


def _budget(outer: Placed, inner: Placed, depth: int) -> None:
    """BUDGET: two losses that hold the same quantity at a target would fight."""
    if outer.traits.learns is not None and outer.traits.learns == inner.traits.learns:
        raise CompositionError(
            f"{_both(outer, inner)} each learn to hold the {outer.traits.learns} at a target of their own, and the two "
            "losses would fight; let one of them follow a fixed or calibrated schedule."
        )


def _aligned(outer: Placed, inner: Placed, depth: int) -> None:
    """TRAIT: who decides about the tokens of a branch by those of its block cannot have them merged on the way."""
    for one, other in ((outer, inner), (inner, outer)):
        if one.traits.aligned is not None and f"merging around {one.traits.aligned}" in other.traits.owns:
            raise CompositionError(
                f"{one.name} decides about the tokens of the {one.traits.aligned} by those of the block "
                f"(token_input='stream'), but {other.name} merges them on the way there; use {other.name} with "
                "where='attention'."
            )


def _both(outer: Placed, inner: Placed) -> str:
    return f"two {outer.name}" if outer.name == inner.name else f"{outer.name} and {inner.name}"


_RULES: tuple[Callable[[Placed, Placed, int], None], ...] = (_phase, _own, _trait, _unstable, _nest, _budget, _aligned)
