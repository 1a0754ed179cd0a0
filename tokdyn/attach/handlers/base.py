"""Define the four kinds of handlers. A handler is the object that carries out a method in a wrapped model.

- A bracket acts around consecutive blocks: it opens before the first one, where it may select tokens, and closes after
  the last one, where it restores the token grid.
- A gate decides for each sample whether a block runs.
- A sublayer handler acts around the attention or the MLP of a block.
- A kernel computes a block, or some of its layers, in another way, such as with sliced weights.

The methods below share their arguments: `frame` is where the thread is, `view` the samples and tokens of the block
call, `site` the role of the module that is called, and `named` the arguments of its call, by name. What a handler
keeps during a call of the model goes into `frame.context.slots[slot]`, at a number that its `Plan` gives it.

A file in this folder holds the handlers of one method and registers the function that builds them with `@handles`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
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
"""A call of a block that takes the block's arguments as one dictionary, by name."""


@dataclass(frozen=True)
class BlockCall:
    """The call of a block, as a bracket gets it that opens before this block.

    Attributes:
        module: the block.
        site: the site of the block.
        named: the arguments of the call, by name.
    """

    module: nn.Module
    site: Site
    named: dict[str, Any]


class Bracket(ABC):
    """A handler around consecutive blocks; one that selects tokens is a `Selector`.

    Attributes:
        first: index of the first block inside, counted over all lists of blocks.
        last: index of the last block inside.
        is_selector: whether it is a `Selector`; to ask for its class takes a microsecond in every cached step.
    """

    first: int
    last: int
    is_selector: ClassVar[bool] = False

    @property
    def never(self) -> bool:
        """Whether the settings let it have no effect, whatever the call."""
        return False

    @abstractmethod
    def open(self, frame: Frame, view: TokenView, x: Tensor, block: BlockCall) -> tuple[Tensor, TokenView]:
        """Act before the first block: select tokens, or decide which samples skip the blocks.

        Returns:
            The image tokens (B, M, D) that the blocks get in place of x (B, N, D), and their view.
        """

    @abstractmethod
    def close(self, frame: Frame, view: TokenView, x: Tensor) -> tuple[Tensor, TokenView]:
        """Act after the last block, which returned x (B, M, D).

        Returns:
            Image tokens (B, N, D) for the view that `open` got, and this view.
        """

    def close_streams(self, frame: Frame, streams: Sequence[Tensor]) -> Sequence[Tensor]:
        """Act on the tokens (B, L, D) of the other streams in `Blocks.streams`, just before `close`; return them."""
        return streams


class Selector(Bracket):
    """A bracket that selects tokens. It gets generated tokens only; reference tokens stay beside those it selects."""

    is_selector = True

    @abstractmethod
    def selects(self, context: CallContext) -> bool:
        """Return whether tokens are selected in this call; if not, the bracket gets reference tokens too."""


class Gate(ABC):
    """A handler that decides for each sample whether a block runs. A block that does not run returns its input."""

    @abstractmethod
    def always(self, context: CallContext, block: int) -> bool | None:
        """Return whether the block is skipped, if all samples and noise levels agree; None if they differ."""

    @abstractmethod
    def skips(self, context: CallContext, view: TokenView, block: int) -> Sequence[bool]:
        """Return for every sample of the view whether it skips the block. Called only if `always` returns None."""

    @abstractmethod
    def weight(self, context: CallContext, view: TokenView, block: int) -> Tensor | None:
        """Return a (B,) factor for the block's change (output minus input), 0 or 1 with a gradient; None if it is 1."""


class Sublayer(ABC):
    """A handler around the attention or the MLP of a block."""

    @abstractmethod
    def around(self, frame: Frame, view: TokenView, site: Site, call: Callable[..., Any], named: dict[str, Any]) -> Any:
        """Return what the sublayer returns. `call(**named)` computes the sublayer without this handler."""

    def steady(self, context: CallContext) -> bool:
        """Whether it does the same in every call, so that a graph of torch.compile can hold it."""
        return True

    def alike(self, context: CallContext, block: int) -> int:
        """Return the number that stands for all blocks in which this handler does the same as in this compiled one."""
        return block


class Kernel(ABC):
    """A handler that computes a block, or layers of it, in another way. The block is not compiled by itself then."""

    @abstractmethod
    def key(self, context: CallContext, view: TokenView, block: int) -> Sequence[Hashable] | None:
        """Return a key for every sample of the view; samples with equal keys are computed together. None: all are."""

    @abstractmethod
    def run(self, frame: Frame, module: nn.Module, site: Site, inner: Inner, named: dict[str, Any]) -> Any:
        """Return what the block `module` returns for samples with equal keys, which `frame.view` holds.

        `inner(named)` computes the block without this handler.
        """

    @abstractmethod
    def layer(
        self, frame: Frame, module: nn.Module, site: Site, call: Callable[..., Any], x: Tensor, *rest: Any
    ) -> Tensor:
        """Return what the layer `module`, one that the adapter names in `Blocks.width`, returns for x (..., D).

        `call(x, *rest)` computes the layer without this handler.
        """

    @abstractmethod
    def forget(self) -> None:
        """Drop everything that was derived from the model's weights, such as slices of them."""


@dataclass(frozen=True)
class Handlers:
    """The handlers of a model by kind, in each kind the outermost first.

    Attributes:
        brackets: the brackets, except for `own_chunking`.
        gates: the gates.
        sublayers: the handlers around attention and MLP.
        kernels: the kernels.
        own_chunking: the FeatureCache around DC-DiT's own chunking; None in other models, or without a FeatureCache.
        separates_text: whether a method distinguishes image tokens from text tokens in one sequence, if it can.
        counts: whether a method cannot do without that distinction.
        slots: number of slots of state that the handlers use, all together.
        edges: indices of the blocks before which a bracket opens or after which one closes.
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
    """Tensors that require gradients and pass into or out of the computation of a block, besides its arguments.

    Under gradient checkpointing, `given` become arguments of the recomputed function, and `returned` its results.

    Attributes:
        samples: positions in the batch of the samples that the tensors in `given` have entries for.
        given: tensors for the inside of the block, by name, such as masks.
        returned: tensors from the inside of the block, by the samples (positions in the batch) that they are about.
    """

    samples: tuple[int, ...] = ()
    given: dict[str, Any] = field(default_factory=dict)
    returned: dict[tuple[int, ...], Tensor] = field(default_factory=dict)


class Frame(NamedTuple):
    """What a thread is computing: a call of the model and, inside of a block, the block for some samples of the batch.

    Attributes:
        context: the call of the model.
        handlers: the handlers of the model.
        sites: the sites of the model.
        remember: called before a block with frame, module, site and arguments by name, so that the block can be
            recomputed in this frame; None if gradients are disabled.
        view: the samples and tokens that the block is computed for; without samples outside of blocks.
        block: where this computation of the block is recorded.
        exchange: tensors that pass into and out of this computation.
    """

    context: CallContext
    handlers: Handlers
    sites: Sites
    remember: Callable[[Frame, nn.Module, Site, dict[str, Any]], None] | None
    view: TokenView
    block: BlockTrace
    exchange: Exchange


def scale_change(results: dict[str, Any], inputs: dict[str, Any], weight: Tensor, view: TokenView) -> None:
    """Replace results by `input + weight * (result - input)`, with a weight (B,) for each sample."""
    packing = view.packing
    factor = weight.view(-1, 1, 1) if packing is None else weight.index_select(0, packing.sample)[:, None]
    for name, value in results.items():
        if value is not None and inputs.get(name) is not None:
            results[name] = torch.lerp(inputs[name].to(value.dtype), value, factor.to(value.dtype))


@dataclass(frozen=True)
class Plan:
    """What the handlers of one method are built from.

    Attributes:
        placed: the method and its traits.
        module: the trainable parts of the method; None if it has none.
        sizes: depth, width and heads of the model.
        adapter: the adapter of the model.
        layouts: the layouts of all blocks if a method of the stack prunes blocks, else ().
        slot: the slot of the first handler; each further handler has the next one, in the order in which the builder
            returns them.
    """

    placed: Placed
    module: Any
    sizes: Sizes
    adapter: ModelAdapter
    layouts: tuple[Layout, ...]
    slot: int

    @property
    def method(self) -> Any:
        """The method, an immutable configuration."""
        return self.placed.method

    @property
    def span(self) -> tuple[int, int]:
        """Indices of the first and the last block that the method acts on."""
        return self.placed.traits.span or (0, self.sizes.depth - 1)


Builder = Callable[[Plan], Sequence[object]]
_BUILDERS: dict[type[Method], Builder] = {}


def handles(method: type[Method]) -> Callable[[Builder], Builder]:
    """Return a decorator that registers the function which builds the handlers of a method, in place of an earlier."""

    def register(build: Builder) -> Builder:
        _BUILDERS[method] = build
        return build

    return register


def build_handlers(plan: Plan) -> Sequence[object]:
    """Build the handlers of a method.

    Raises:
        InputError: no function is registered for the method.
    """
    build = _BUILDERS.get(type(plan.method))
    if build is None:
        cure = f"register a function that builds one with tokdyn.attach.handles({plan.placed.name})"
        raise InputError(f"{plan.placed.name} has no handler; {cure}.")
    return build(plan)
