"""What a handler is: a method at work in a model. There are four kinds, by where they act.

A file in this folder holds the handlers of one method and registers the function that builds them with `@handles`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tokdyn.adapters.base import ModelAdapter
from tokdyn.attach.context import CallContext
from tokdyn.attach.sites import Site, Sites
from tokdyn.attach.view import TokenView
from tokdyn.attach.width.layout import Layout
from tokdyn.compose import Placed
from tokdyn.errors import InputError
from tokdyn.methods.base import Method, Sizes
from tokdyn.trace.calls import BlockTrace

Inner = Callable[[dict[str, Any]], Any]
"""A call of a block that takes its arguments by name."""


@dataclass(frozen=True)
class BlockCall:
    """The block call at which a bracket opens.

    Attributes:
        module: the block.
        site: of the block.
        named: its arguments by name.
    """

    module: nn.Module
    site: Site
    named: dict[str, Any]


class Bracket(ABC):
    """A method around the blocks `first` to `last`."""

    first: int
    last: int

    @abstractmethod
    def open(self, frame: Frame, view: TokenView, x: Tensor, block: BlockCall) -> tuple[Tensor, TokenView]:
        """Reduce the tokens x (B, N, D) before the first block, or decide which samples skip the blocks."""

    @abstractmethod
    def close(self, frame: Frame, view: TokenView, x: Tensor) -> tuple[Tensor, TokenView]:
        """Restore the tokens behind the last block, and return the view that the bracket opened on."""


class Gate(ABC):
    """A method that decides whether a block runs."""

    @abstractmethod
    def always(self, context: CallContext, block: int) -> bool | None:
        """Whether the block is skipped, where that is the same for all samples and noise levels; else None."""

    @abstractmethod
    def skips(self, context: CallContext, view: TokenView, block: int) -> Sequence[bool]:
        """Whether the block is skipped, for every sample of the view."""

    @abstractmethod
    def weight(self, context: CallContext, view: TokenView, block: int) -> Tensor | None:
        """(B,) share of the block's effect that is added, 0 or 1 with a gradient; None adds all of it."""


class Sublayer(ABC):
    """A method around the attention or the MLP of a block."""

    @abstractmethod
    def around(self, frame: Frame, view: TokenView, site: Site, call: Callable[..., Any], named: dict[str, Any]) -> Any:
        """Compute the sublayer; `call` is the sublayer as it was and takes its arguments by name."""


class Kernel(ABC):
    """A method that computes a block, or layers of it, in another way."""

    @abstractmethod
    def key(self, context: CallContext, view: TokenView, block: int) -> Sequence[Hashable] | None:
        """What must be equal for samples to be computed together, for every sample; None if all can be."""

    @abstractmethod
    def run(self, frame: Frame, module: nn.Module, site: Site, inner: Inner, named: dict[str, Any]) -> Any:
        """Compute the block for samples of one key; `inner` is the block as it was."""

    @abstractmethod
    def layer(
        self, frame: Frame, module: nn.Module, site: Site, call: Callable[..., Any], x: Tensor, *rest: Any
    ) -> Tensor:
        """Compute a layer that the adapter names in `Blocks.width`; `call` is the layer as it was."""

    @abstractmethod
    def forget(self) -> None:
        """Let go what was made of the model's weights."""


@dataclass(frozen=True)
class Handlers:
    """The handlers of a model by where they act, outermost first.

    Attributes:
        brackets: around blocks.
        gates: on blocks.
        sublayers: around attention and MLP.
        kernels: in place of what a block computes.
        own_chunking: the cache around the chunking that DC-DiT does itself; None for other models.
        separates_text: whether a method tells image tokens from text tokens in one sequence.
        counts: whether it has to.
        slots: of state that the handlers use together.
        edges: blocks at which a bracket opens or closes.
    """

    brackets: tuple[Bracket, ...] = ()
    gates: tuple[Gate, ...] = ()
    sublayers: tuple[Sublayer, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    own_chunking: Any = None
    separates_text: bool = False
    counts: bool = False
    slots: int = 0
    edges: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        edges = frozenset(block for bracket in self.brackets for block in (bracket.first, bracket.last))
        object.__setattr__(self, "edges", edges)


@dataclass(frozen=True)
class Exchange:
    """Tensors with a graph that pass between the inside of a block and what is around it.

    Gradient checkpointing hands `given` in as arguments of what is recomputed, and `returned` out as results.

    Attributes:
        samples: that the given tensors have entries for, by their places in the batch.
        given: by name.
        returned: by the samples they are about.
    """

    samples: tuple[int, ...] = ()
    given: dict[str, Any] = field(default_factory=dict)
    returned: dict[tuple[int, ...], Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Frame:
    """Where a thread is: in a call of the model and, inside of a block, in the computation of some of its samples.

    Attributes:
        context: of the call.
        handlers: of the model.
        sites: of the model.
        remember: called before a block with frame, module, site and arguments by name, so that others can recompute the
            block; None where nobody needs it.
        view: samples and tokens that the block is computed for; of no samples outside of blocks.
        block: trace of the computation.
        exchange: of the computation.
    """

    context: CallContext
    handlers: Handlers
    sites: Sites
    remember: Callable[[Frame, nn.Module, Site, dict[str, Any]], None] | None
    view: TokenView
    block: BlockTrace
    exchange: Exchange


@dataclass(frozen=True)
class Plan:
    """What the handlers of a method are built from.

    Attributes:
        placed: the method and its traits.
        module: its trainable parts, None if it has none.
        sizes: of the model.
        adapter: of the model.
        layouts: of the blocks, where a method computes parts of their layers.
        slot: first of the slots of state that the handlers may use, one each, in the order in which they are returned.
    """

    placed: Placed
    module: Any
    sizes: Sizes
    adapter: ModelAdapter
    layouts: tuple[Layout, ...]
    slot: int

    @property
    def method(self) -> Any:
        """The configuration."""
        return self.placed.method

    @property
    def span(self) -> tuple[int, int]:
        """First and last block that the method is about."""
        return self.placed.traits.span or (0, self.sizes.depth - 1)


Builder = Callable[[Plan], Sequence[object]]
_BUILDERS: dict[type[Method], Builder] = {}


def handles(method: type[Method]) -> Callable[[Builder], Builder]:
    """Register the function that builds the handlers of a method; a later one takes the place of an earlier one."""

    def register(build: Builder) -> Builder:
        _BUILDERS[method] = build
        return build

    return register


def build_handlers(plan: Plan) -> Sequence[object]:
    """Build the handlers of a method.

    Raises:
        InputError: nobody registered how.
    """
    build = _BUILDERS.get(type(plan.method))
    if build is None:
        raise InputError(
            f"{plan.placed.name} has no handler; register a function that builds one with "
            f"tokdyn.attach.handles({plan.placed.name})."
        )
    return build(plan)
