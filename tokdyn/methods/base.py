"""Define the base class of methods, and the traits by which a method answers every question of other code about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ValidationError
from torch import nn

from tokdyn.errors import InputError
from tokdyn.reading import one_line, shown
from tokdyn.section import Section

Phase = Literal["train", "sample"]
Span = tuple[int, int]
"""First and last of consecutive blocks, both included; negative numbers count from the end, -1 is the last block."""


class Stage(IntEnum):
    """Where a method acts, from the outermost to the innermost: BLOCKS is all blocks together, SPAN some of them.

    Methods act in this order whatever their order in the user's list; within one stage the list decides.
    """

    BLOCKS = 1
    SPAN = 2
    BLOCK = 3
    SUBLAYER = 4
    KERNEL = 5


@dataclass(frozen=True)
class Pruning:
    """What a method leaves out of the computation of a block.

    Attributes:
        heads: whether it leaves out attention heads.
        channels: whether it leaves out MLP channels.
        tokens: whether it leaves tokens out of the MLP.
        stream: whether it selects those tokens by their values before norm and modulation.
    """

    heads: bool
    channels: bool
    tokens: bool
    stream: bool


@dataclass(frozen=True)
class Traits:
    """The properties of a method with its settings, which other code asks for instead of the method's class.

    Attributes:
        stage: where the method acts.
        tokens: the tokens that methods inside of it and the blocks get: the "full" grid, a "subset" of its tokens, or
            "merged" ones.
        needs_grid: the method works only on all cells of the grid.
        reads: what the method needs to know about the image tokens: "nothing"; the "split" between image and text
            tokens in one sequence, if it can be found; their "count"; or the sizes of their "grid".
        moving: the method selects other tokens in every step or call.
        remembers: the method keeps tensors of one step for the next.
        needs_level: the method depends on the noise level.
        phases: when the method acts: "train", "sample" or both.
        owns: decisions that only one method may make, by name, and the blocks in which this method makes them; None
            for all blocks.
        span: the blocks that the method acts on, counted from the front; None for all.
        learns: the quantity that a loss of the method holds at a target; None without such a loss. Two methods must not
            hold the same quantity.
        target: the value that this loss holds: cells per kept token, or the share of the FLOPs of the blocks.
        aligned: the sublayer for which the method selects tokens by the tokens of the block, so that both must have the
            same tokens; None otherwise.
        around: the sublayers that the method acts around, which must be modules of their own.
        weighs_keys: the method adds a bias to the logits of keys, which needs softmax attention.
        prunes: what the method leaves out of the computation of a block; None if nothing.
        needs_sizes: `build` needs the width of the model and its number of heads.
        compares: the method decides by comparing tokens with those of the step before; processes can agree on it.
        embedding: the embedding of the timestep that the method reads: as it is ("time"), or projected to the
            modulation of the blocks ("projected_time"); None if neither.
        diverges: in two processes with different samples the method may run different blocks, or a different number of
            groups of samples.
        masks_in_training: in training the method computes everything and multiplies it by masks, so it diverges in
            sampling only.
        controls: the functions of `tokdyn.attach.controls` that act on the method.
        idle: why the method has no effect with these settings, a clause for a message; None if it has one.
        idle_in: returns the same for a trajectory of so many steps; None if the number does not matter.
        short: why a call may leave out a smaller share of the tokens, or of the FLOPs, than the settings ask for, and
            what to do about it, a clause for a message.
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
    embedding: Literal["time", "projected_time"] | None = None
    diverges: bool = False
    masks_in_training: bool = False
    controls: frozenset[Literal["tail_drop", "drop_rate", "calibrate_router", "keep"]] = frozenset()
    idle: str | None = None
    idle_in: Callable[[int], str | None] | None = None
    short: str = "choose other settings for so few tokens"

    @property
    def needs_all_tokens(self) -> bool:
        """Whether one process must hold all tokens of a sample: to leave some out, or to compare whole grids."""
        return self.tokens != "full" or (self.compares and self.needs_grid)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model, from which methods build their trainable parts.

    Attributes:
        width: D; 0 if unknown.
        heads: H; 0 if unknown.
        weights: number of parameters of each block, to which the cost of its matrix products is proportional.
    """

    width: int
    heads: int
    weights: tuple[int, ...]

    @property
    def depth(self) -> int:
        """Number of blocks of the model."""
        return len(self.weights)


class Method(Section):
    """The base class of methods: an immutable configuration with checked settings and no knowledge of any model.

    The same object is built from Python, YAML, JSON and the command line. Unknown or wrong settings raise an
    InputError. docs/methods/adding.md shows how to write a method.
    """

    aliases: ClassVar[tuple[str, ...]] = ()
    """Other names, in lower case, that files and the command line may use for the method."""

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise InputError(_sentence(type(self), error)) from error

    def build(self, sizes: Sizes) -> nn.Module | None:
        """Build the trainable parts for a model of these sizes; None if there are none."""
        return None

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Return one example of each kind of settings that a model may or may not support, the usual one first.

        The support matrix has an entry for each of them.
        """
        return (cls(),)

    def traits(self, depth: int) -> Traits:
        """Return the properties of this method on a model.

        Args:
            depth: number of blocks of the model.

        Raises:
            InputError: the settings name a block that the model does not have.
        """
        raise NotImplementedError


def _sentence(method: type[BaseModel], error: ValidationError) -> str:
    """Write the first of pydantic's errors as a sentence."""
    first = error.errors()[0]
    if isinstance(cause := first.get("ctx", {}).get("error"), InputError):
        return f"{method.__name__}: {cause}"
    setting = one_line(first["loc"][0] if first["loc"] else "settings", 80)
    if cause is not None:
        return f"{method.__name__}: {setting}: {cause}."
    if first["type"] == "extra_forbidden":
        known = ", ".join(method.model_fields)
        return f"{method.__name__} has no setting {setting!r}; known are {known}."
    reason = first["msg"][0].lower() + first["msg"][1:]
    return f"{method.__name__}: {setting}: {reason}, got {shown(first['input'])}."


def resolve(span: Span, depth: int, method: str) -> Span:
    """Return a span with both ends counted from the front.

    Args:
        span: first and last block; negative numbers count from the end.
        depth: number of blocks of the model.
        method: name of the method whose span it is, for the error.

    Raises:
        InputError: an end is not a block of the model, or the last block comes before the first.
    """
    first, last = (end + depth if end < 0 else end for end in span)
    if not 0 <= first <= last < depth:
        raise InputError(
            f"{method}: blocks={shown(span)} is not a span of a model of {depth} blocks; give the first and the "
            "last block, "
            f"from 0 to {depth - 1}, or counted from the end as negative numbers."
        )
    return first, last
