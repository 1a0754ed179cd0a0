"""Order the methods of a stack from the outermost to the innermost, and refuse those that cannot be combined.

Stages, traits and rules are described in docs/design.md. All that is known of the model is its number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

from tokdyn.errors import CompositionError
from tokdyn.methods.base import Method, Stage, Traits


@dataclass(frozen=True)
class Placed:
    """A method of a stack, with its traits on a model.

    Attributes:
        method: the method.
        traits: its traits.
        index: its index in the user's list.
    """

    method: Method
    traits: Traits
    index: int

    @property
    def name(self) -> str:
        """Class name of the method, for messages."""
        return type(self.method).__name__


def compose(methods: Sequence[Method], depth: int) -> tuple[Placed, ...]:
    """Order methods from the outermost to the innermost: by stage, and within a stage as the user listed them.

    Args:
        methods: the user's list.
        depth: number of blocks of the model.

    Raises:
        CompositionError: two methods cannot be combined; the message names both and what to do instead.
        InputError: a method names a block that the model does not have.
    """
    placed = [Placed(method, method.traits(depth), index) for index, method in enumerate(methods)]
    placed.sort(key=lambda one: (one.traits.stage, one.index))
    for outer, inner in combinations(placed, 2):
        for rule in _RULES:
            rule(outer, inner, depth)
    return tuple(placed)


def _blocks(placed: Placed, depth: int) -> frozenset[int]:
    """Return the blocks that a method acts on."""
    if placed.traits.span is None:
        return frozenset(range(depth))
    first, last = placed.traits.span
    return frozenset(range(first, last + 1))


def _phase(outer: Placed, inner: Placed, depth: int) -> None:
    """PHASE: a method that acts in training only is not combined with one that acts in sampling only."""
    if not outer.traits.phases & inner.traits.phases:
        training = outer if "train" in outer.traits.phases else inner
        sampling = inner if training is outer else outer
        raise CompositionError(
            f"{training.name} acts only in training and {sampling.name} only in sampling; wrap with {training.name} to "
            f"train, unwrap, and wrap with {sampling.name} to sample."
        )


def _own(outer: Placed, inner: Placed, depth: int) -> None:
    """OWN: every decision has one owner in every block."""
    for decision, blocks in outer.traits.owns.items():
        if decision not in inner.traits.owns:
            continue
        others = inner.traits.owns[decision]
        shared = (blocks if others is None else others if blocks is None else blocks & others) or frozenset()
        if blocks is None and others is None:
            place = ""
        elif shared:
            place = f" of block{'s' if len(shared) > 1 else ''} {', '.join(map(str, sorted(shared)))}"
        else:
            continue
        cure = "give them different blocks" if blocks is not None or others is not None else "keep one of them"
        raise CompositionError(f"{_both(outer, inner)} both decide the {decision}{place}; {cure}.")


def _trait(outer: Placed, inner: Placed, depth: int) -> None:
    """TRAIT: a method that needs the full grid is not put inside of one that leaves tokens out."""
    if inner.traits.needs_grid and outer.traits.tokens != "full" and _blocks(outer, depth) & _blocks(inner, depth):
        tokens = "merged tokens" if outer.traits.tokens == "merged" else "a subset of the tokens"
        raise CompositionError(
            f"{inner.name} needs all cells of the grid, but inside {outer.name} the blocks get {tokens}; use "
            f"{inner.name} with partition='bucket', which works on any set of tokens."
        )


def _unstable(outer: Placed, inner: Placed, depth: int) -> None:
    """UNSTABLE: no method remembers tokens between steps inside of one that selects others in every step."""
    if inner.traits.remembers and outer.traits.moving:
        cure = (
            f"put {inner.name} before {outer.name} in the list"
            if outer.traits.stage == inner.traits.stage
            else f"use {inner.name} without {outer.name}"
        )
        raise CompositionError(
            f"{inner.name} remembers tokens from step to step, but inside {outer.name} the set of tokens changes from "
            f"step to step; {cure}."
        )


def _nest(outer: Placed, inner: Placed, depth: int) -> None:
    """NEST: of two spans, one contains the other or they have no block in common."""
    if outer.traits.stage == inner.traits.stage == Stage.BLOCKS and not _blocks(outer, depth) >= _blocks(inner, depth):
        raise CompositionError(
            f"{outer.name} begins after the first block, but {inner.name} inside of it begins with that block; use "
            f"{outer.name} with indicator='input'."
        )
    if outer.traits.stage != Stage.SPAN or inner.traits.stage != Stage.SPAN:
        return
    a, b = _blocks(outer, depth), _blocks(inner, depth)
    if a & b and not a >= b and not b >= a:
        raise CompositionError(
            f"{outer.name} over blocks {min(a)} to {max(a)} and {inner.name} over blocks {min(b)} to {max(b)} overlap; "
            "choose spans of which one contains the other, or spans without a common block."
        )
    if b > a:
        raise CompositionError(
            f"{inner.name} over blocks {min(b)} to {max(b)} contains {outer.name} over blocks {min(a)} to {max(a)}, "
            f"but comes after it in the list; put the longer {inner.name} first."
        )


def _budget(outer: Placed, inner: Placed, depth: int) -> None:
    """BUDGET: only one loss holds a quantity at a target."""
    if outer.traits.learns is not None and outer.traits.learns == inner.traits.learns:
        raise CompositionError(
            f"{_both(outer, inner)} each have a loss that holds the {outer.traits.learns} at a target, and the two "
            "losses would work against each other; give one of them a fixed or calibrated schedule."
        )


def _aligned(outer: Placed, inner: Placed, depth: int) -> None:
    """TRAIT: if tokens of a sublayer are selected by those of the block, no method merges them before the sublayer."""
    for one, other in ((outer, inner), (inner, outer)):
        if one.traits.aligned is not None and f"merging around {one.traits.aligned}" in other.traits.owns:
            raise CompositionError(
                f"{one.name} selects the tokens of the {one.traits.aligned} by those of the block "
                f"(token_input='stream'), but {other.name} merges tokens before the {one.traits.aligned}; use "
                f"{other.name} with where='attention'."
            )


def _both(outer: Placed, inner: Placed) -> str:
    return f"two {outer.name}" if outer.name == inner.name else f"{outer.name} and {inner.name}"


_RULES: tuple[Callable[[Placed, Placed, int], None], ...] = (_phase, _own, _trait, _unstable, _nest, _budget, _aligned)
