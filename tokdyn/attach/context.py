"""The context of one call of a wrapped model: its arguments, what is read from them, its trace, and slots for handlers.

State that outlasts the call is in the attachment, and the samples and tokens of a block call are in its `TokenView`.
Nothing in the context changes its meaning while a block runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from tokdyn.adapters.base import Blocks, ModelAdapter
from tokdyn.attach.inferred import Guard
from tokdyn.attach.offload import Residency
from tokdyn.attach.sites import Site
from tokdyn.attach.view import FollowedArguments, TokenView
from tokdyn.errors import InputError
from tokdyn.tokens import Grid, cells
from tokdyn.trace.calls import BlockTrace, CallTrace
from tokdyn.trace.trajectory import Position, Trajectory

Value = TypeVar("Value")


class Lazy(Generic[Value]):
    """A value that is computed at the first use and then kept."""

    def __init__(self, read: Callable[[], Value]) -> None:
        self._read: Callable[[], Value] | None = read
        self._values: list[Value] = []

    @property
    def value(self) -> Value:
        """The value; computed now if it is not known yet."""
        if not self._values:
            assert self._read is not None, "closed before anything was read"
            self._values.append(self._read())
        return self._values[0]

    @property
    def known(self) -> bool:
        """Whether the value has been computed or set."""
        return bool(self._values)

    def put(self, value: Value) -> None:
        """Set the value, if it is not known yet."""
        if not self._values:
            self._values.append(value)

    def close(self) -> None:
        """Release the function that computes the value; afterwards, a value that is not known may not be used."""
        self._read = None


@dataclass(frozen=True)
class Settings:
    """What the user has set for the following calls, by the functions of `tokdyn.attach.controls`.

    Attributes:
        tail_drop: one share for all samples, one for each sample, or one for each guidance branch by name; None leaves
            it to the methods' own settings.
        drop_rate: rate at which TokenDrop acts, in sampling too; None lets it act in training only, at its own rate.
        calibrating: whether routers adjust their bias to the tokens of this call.
    """

    tail_drop: tuple[float, ...] | dict[str, float] | None = None
    drop_rate: float | None = None
    calibrating: bool = False


@dataclass
class Readings:
    """Values that are read from the arguments of a call at their first use, which synchronises with an accelerator.

    Attributes:
        grid: the token grid.
        levels: noise levels, one for each sample or one for all.
        position: step, guidance branch and image of the call.
        followed: entries of the blocks' arguments for the tokens of views.
    """

    grid: Lazy[Grid]
    levels: Lazy[tuple[float, ...]]
    position: Lazy[Position]
    followed: FollowedArguments


@dataclass(eq=False)
class CallContext:
    """One call of the model.

    Attributes:
        model: the wrapped model.
        adapter: the adapter of the model.
        arguments: the arguments of the call, by name.
        settings: what the user has set for this call.
        trace: what was computed so far.
        slots: the state of each handler, at the index of its slot; None until the handler sets it.
        readings: values that are read from the arguments.
        guard: checks of a model whose adapter was inferred; None for other models.
        residency: which offloaded weights are on the computing device.
        counted: returns the FLOPs counted so far, while `tokdyn.flops` counts; else None.
        losses: auxiliary losses so far, by the name of the method.
        view: the view of the next block, which changes when brackets open and close; None before the first block.
    """

    model: nn.Module
    adapter: ModelAdapter
    arguments: Mapping[str, Any]
    settings: Settings
    trace: CallTrace
    slots: list[Any]
    readings: Readings
    guard: Guard | None
    residency: Residency
    counted: Callable[[], int] | None
    losses: dict[str, Tensor]
    view: TokenView | None = None

    @property
    def training(self) -> bool:
        """Whether the model is in training mode and gradients are enabled."""
        return self.trace.training

    @property
    def grid(self) -> Grid:
        """The token grid, read from the arguments at the first use.

        Raises an InputError if it cannot be read, or has another number of cells than the blocks get image tokens.
        """
        return self.readings.grid.value

    @property
    def position(self) -> Position:
        """Step, guidance branch and image of this call. A handler that uses it must read it in every call."""
        return self.readings.position.value

    def levels(self, view: TokenView) -> tuple[float, ...]:
        """Return the noise level of every sample of a view, on the host; 1 is pure noise."""
        values = self.per_sample(self.readings.levels.value, self.trace.batch, "the timestep")
        return tuple(values[sample] for sample in view.samples)

    def level_tensor(self, view: TokenView, device: torch.device | str) -> Tensor:
        """Return the noise levels of a view, (b,) or (1,) fp32 on a device, without synchronising with it."""
        values = self.trace.levels
        if self.readings.levels.known:
            values = torch.tensor(self.readings.levels.value, device=device)
        values = values.to(device)
        if len(values) > 1 and view.samples != tuple(range(len(values))):
            values = values.index_select(0, torch.tensor(view.samples, device=device))
        return values

    @staticmethod
    def per_sample(values: Sequence[float], batch: int, what: str) -> tuple[float, ...]:
        """Return a value for each sample from one value for all or one for each.

        Args:
            values: one value, or as many as samples.
            batch: B.
            what: name of the values, for the message.

        Raises:
            InputError: their number is neither 1 nor B.
        """
        if len(values) == 1:
            return tuple(values) * batch
        if len(values) != batch:
            raise InputError(
                f"{what} has {len(values)} entries, but the batch holds {batch} samples; give 1 or {batch}."
            )
        return tuple(values)

    def check_grid(self, grid: Grid) -> Grid:
        """Return the grid, after checking that it has as many cells as the blocks get image tokens, if that is known.

        Raises:
            InputError: it has not.
        """
        if self.trace.cells not in (0, cells(grid)):
            raise InputError(
                f"the token grid of this {type(self.model).__name__} is {' x '.join(map(str, grid))}, but its blocks "
                f"get {self.trace.cells} image tokens; leave out arguments that add tokens, such as reference images."
            )
        return grid

    def add_loss(self, name: str, value: Tensor) -> None:
        """Add to an auxiliary loss of this call."""
        self.losses[name] = self.losses[name] + value if name in self.losses else value

    def which(self, view: TokenView) -> tuple[int, ...] | None:
        """Return the positions in the batch of a view's samples; None if the view has all samples."""
        return None if len(view.samples) == self.trace.batch else view.samples

    def record(self, view: TokenView, site: Site, named: Mapping[str, Any]) -> BlockTrace:
        """Add a computation of a block for the samples of a view to the trace, and return its record."""
        lengths = () if view.packing is None else view.packing.lengths
        rows = lengths if len(set(lengths)) > 1 else None
        tokens = view.room if view.packing is None else view.packing.longest
        beside = (0, 0) if view.packing is not None else other_tokens(named, site.blocks, tokens)
        block = BlockTrace(site.block, view.batch, tokens, *beside, rows=rows, which=self.which(view))
        self.trace.blocks.append(block)
        return block

    def finish(self, recomputed: bool) -> CallTrace:
        """Return the trace of the call; start an empty one if its blocks may be recomputed in the backward pass."""
        trace = self.trace
        if recomputed:
            self.trace = trace.blank()
        return trace

    def release(self) -> None:
        """Release the arguments after the call, so that frames which are kept for recomputation do not hold them."""
        self.arguments, self.readings.followed = {}, FollowedArguments()
        self.readings.grid.close()
        self.readings.position.close()


def open_context(
    model: nn.Module,
    adapter: ModelAdapter,
    arguments: Mapping[str, Any],
    settings: Settings,
    trace: CallTrace,
    slots: list[Any],
    trajectory: Trajectory,
    guard: Guard | None,
    counted: Callable[[], int] | None,
) -> CallContext:
    """Create the context of a call. Nothing is read from the arguments yet.

    Args:
        model: the wrapped model.
        adapter: the adapter of the model.
        arguments: the arguments of the call, by name.
        settings: what the user has set for this call.
        trace: a new trace.
        slots: one None for each slot of the handlers.
        trajectory: the trajectory that the call belongs to.
        guard: checks of a model whose adapter was inferred; None for other models.
        counted: returns the FLOPs counted so far, while they are counted; else None.
    """
    readings = Readings(
        Lazy(lambda: _read_grid(context)),
        Lazy(lambda: _read_levels(trace)),
        Lazy(lambda: trajectory.position(trace.observed, trace.batch)),
        FollowedArguments(),
    )
    context = CallContext(model, adapter, arguments, settings, trace, slots, readings, guard, Residency(), counted, {})
    return context


def _read_levels(trace: CallTrace) -> tuple[float, ...]:
    """Read the noise levels of a call, with all that was observed of it: the host waits once for both."""
    if trace.observed is None or torch.compiler.is_compiling():
        return tuple(trace.levels.tolist())
    levels = tuple(each.level for each in trace.observed.samples)
    return levels if isinstance(trace.level, Tensor) and trace.level.numel() > 1 else levels[:1]


def _read_grid(context: CallContext) -> Grid:
    """Read the token grid of a call and check it."""
    read = context.adapter.grid
    assert read is not None, "methods that need a grid were refused"
    return context.check_grid(read(context.model, context.arguments))


def other_tokens(named: Mapping[str, Any], blocks: Blocks, image: int) -> tuple[int, int]:
    """Count the text tokens that a block gets in both its streams, and the encoder tokens of its cross-attention."""
    products, text = blocks.products, named.get(blocks.text or "")
    encoder = named.get(products.context) if products is not None and products.cross else None
    beside = named[blocks.tokens].shape[1] - image
    encoder = encoder[0] if isinstance(encoder, tuple) else encoder
    return beside + (0 if text is None else text.shape[1]), 0 if encoder is None else encoder.shape[1]


def is_offloaded(module: nn.Module) -> bool:
    """Return whether hooks of accelerate or diffusers onload the weights of a module when it is called."""
    held = vars(module)
    return "_hf_hook" in held or "_diffusers_hook" in held
