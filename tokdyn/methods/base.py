"""What every method's configuration shares, and what it says of itself to the rules of composition."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from tokdyn.errors import InputError

Phase = Literal["train", "sample"]
Span = tuple[int, int]
"""First and last block of a stretch, both included; negative numbers count from the end, -1 is the last block."""


class Stage(IntEnum):
    """Where a method acts, outermost first. The order is fixed; within a stage it is the order of the user's list."""

    STACK = 1
    SPAN = 2
    BLOCK = 3
    SUBLAYER = 4
    KERNEL = 5


@dataclass(frozen=True)
class Pruning:
    """What a method prunes of the blocks of a model.

    Attributes:
        heads: attention heads.
        channels: MLP channels.
        tokens: tokens of the MLP.
        stream: whether tokens are chosen by what they are before norm and modulation.
    """

    heads: bool
    channels: bool
    tokens: bool
    stream: bool


@dataclass(frozen=True)
class Traits:
    """What a method with its settings says of itself: the answers to all questions that other code asks about it.

    Attributes:
        stage: where it acts.
        tokens: what those inside it see: the full grid, a subset of the cells, or merged tokens.
        needs_grid: it works only on all cells of the grid.
        reads: what it has to know of the image tokens: nothing, which they are where text lies in the same
            sequence (and does without where that cannot be told), how many there are, or the sizes of their grid.
        moving: the set of tokens changes from step to step, with the data or at random.
        remembers: it keeps something from one step to the next.
        needs_level: it acts by the noise level.
        phases: when it acts; a method that acts in one only has no effect in the other.
        owns: things that only one method may decide; blocks in which, None for all.
        span: the blocks it encloses, counted from the front; None is all.
        learns: what its loss holds at a target; two losses on one quantity would fight.
        target: of that loss: cells per kept token, or the share of the FLOPs of the blocks.
        aligned: a sublayer whose tokens it decides about by those of the block, so that they have to be the same.
        around: sublayers that it acts around, which the blocks must have.
        weighs_keys: it adds to the logits of keys, which takes softmax attention.
        prunes: what it prunes of the blocks, None if nothing.
        needs_sizes: it builds parts that take the width of the model and its number of heads.
        compares: it decides by comparing what the model sees with what it saw before, for which it needs all tokens.
        diverges: it may run other blocks in one process than in another, by what each of them sees.
        controls: the functions of `tokdyn.attach.controls` that act on it.
    """

    stage: Stage
    tokens: Literal["full", "subset", "merged"] = "full"
    needs_grid: bool = False
    reads: Literal["nothing", "split", "count", "grid"] = "nothing"
    moving: bool = False
    remembers: bool = False
    needs_level: bool = False
    phases: frozenset[Phase] = frozenset({"train", "sample"})
    owns: dict[str, frozenset[int] | None] = field(default_factory=dict)
    span: Span | None = None
    learns: Literal["tokens", "FLOPs"] | None = None
    target: float | None = None
    aligned: Literal["attention", "mlp"] | None = None
    around: tuple[Literal["attention", "mlp"], ...] = ()
    weighs_keys: bool = False
    prunes: Pruning | None = None
    needs_sizes: bool = False
    compares: bool = False
    diverges: bool = False
    controls: frozenset[Literal["tail_drop", "drop_rate", "calibrate_router"]] = frozenset()


@dataclass(frozen=True)
class Sizes:
    """What a method needs to know of a model to build its parts.

    Attributes:
        width: D.
        heads: H.
        weights: numbers in the weights of each block; the cost of its matrix products is proportional to it.
    """

    width: int
    heads: int
    weights: tuple[int, ...]

    @property
    def depth(self) -> int:
        """Blocks of the model."""
        return len(self.weights)


class Method(BaseModel):
    """An immutable, strict configuration: one object serves Python, YAML, JSON and the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    aliases: ClassVar[tuple[str, ...]] = ()
    """Other names, in lower case, that files and the command line may use for the method."""

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise InputError(_sentence(type(self), error)) from error

    def build(self, sizes: Sizes) -> nn.Module | None:
        """The trainable parts for a model of these sizes; None if there are none."""
        return None

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """List settings that differ in what they ask of a model, the usual ones first; they fill the support matrix."""
        return (cls(),)

    def traits(self, depth: int) -> Traits:
        """Say what the rules of composition, and all other code, need to know.

        Args:
            depth: blocks of the model.
        """
        raise NotImplementedError


def _sentence(method: type[BaseModel], error: ValidationError) -> str:
    """The first thing that is wrong with the settings."""
    found = error.errors()[0]
    if isinstance(cause := found.get("ctx", {}).get("error"), InputError):
        return f"{method.__name__}: {cause}"
    setting = str(found["loc"][0])
    if found["type"] == "extra_forbidden":
        known = ", ".join(method.model_fields)
        return f"{method.__name__} has no setting {setting!r}; known are {known}."
    reason = found["msg"][0].lower() + found["msg"][1:]
    return f"{method.__name__}: {setting}: {reason}, got {found['input']!r}."


def resolve(span: Span, depth: int) -> Span:
    """A span with its ends counted from the front.

    Raises:
        InputError: an end outside the model, or the last block before the first.
    """
    first, last = (end + depth if end < 0 else end for end in span)
    if not 0 <= first <= last < depth:
        raise InputError(
            f"blocks {span} are not a stretch of a model of {depth} blocks; give the first and the last block, "
            f"from 0 to {depth - 1}, or from the end with negative numbers."
        )
    return first, last
