"""One call of a wrapped model: arguments, what is read of them, what happened, and a slot of state for each handler.

What outlasts the call belongs to the attachment; which tokens a block call is about says its `TokenView`. Nothing here
changes its meaning while a block runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from tokdyn.adapters.base import ModelAdapter
from tokdyn.attach.inferred import Guard
from tokdyn.attach.offload import Residency
from tokdyn.attach.view import FollowedArguments, TokenView
from tokdyn.errors import InputError
from tokdyn.tokens import Grid, cells
from tokdyn.trace.calls import CallTrace
from tokdyn.trace.trajectory import Position, Trajectory

Value = TypeVar("Value")


class Lazy(Generic[Value]):
    """A value that is read when it is first asked for, once for all who share this object."""

    def __init__(self, read: Callable[[], Value]) -> None:
        self._read: Callable[[], Value] | None = read
        self._values: list[Value] = []

    @property
    def value(self) -> Value:
        """The value, read now unless it is known."""
        if not self._values:
            assert self._read is not None, "closed before anything was read"
            self._values.append(self._read())
        return self._values[0]

    @property
    def known(self) -> bool:
        """Whether it has been read."""
        return bool(self._values)

    def put(self, value: Value) -> None:
        """Set the value, unless it is known."""
        if not self._values:
            self._values.append(value)

    def close(self) -> None:
        """Read nothing from now on, and let go what would be read."""
        self._read = None


@dataclass(frozen=True)
class Settings:
    """What the user set for the calls to come; see `tokdyn.attach.controls`.

    Attributes:
        tail_drop: one share, one a sample, or one a guidance branch; None leaves it to the methods.
        drop_rate: TokenDrop acts in sampling too, at this rate; None leaves it to training.
        calibrating: routers adapt their bias to what they see.
    """

    tail_drop: tuple[float, ...] | dict[str, float] | None = None
    drop_rate: float | None = None
    calibrating: bool = False


@dataclass
class Readings:
    """What handlers may ask of the arguments of a call; on an accelerator the host waits for each when it is read.

    Attributes:
        grid: token grid of the image.
        levels: (B) or (1) noise levels.
        position: which step of which branch the call is.
        followed: arguments of blocks, brought to the tokens of views.
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
        adapter: what is known of its family.
        arguments: of the call, by name.
        settings: what the user set for it.
        trace: what happened so far.
        losses: auxiliary losses so far, by the name of the method.
        slots: the state of each handler, by its slot.
        readings: of the arguments.
        guard: checks of a model whose adapter was inferred, None for others.
        residency: where offloaded weights are.
        counted: FLOPs counted so far, while `tokdyn.flops` counts; else None.
        view: of the block that comes next; changed between blocks, where brackets open and close.
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
        """Whether the model is in training mode and gradients are wanted."""
        return self.trace.training

    @property
    def grid(self) -> Grid:
        """Token grid of the image, read from the arguments when a method asks for it."""
        return self.readings.grid.value

    @property
    def position(self) -> Position:
        """Which step of which guidance branch this call is. A handler that asks must ask in every call."""
        return self.readings.position.value

    def levels(self, view: TokenView) -> tuple[float, ...]:
        """Read the noise level of every sample of a view; 1 is pure noise."""
        values = self.per_sample(self.readings.levels.value, self.trace.batch, "the timestep")
        return tuple(values[sample] for sample in view.samples)

    def level_tensor(self, view: TokenView, device: torch.device | str) -> Tensor:
        """(b,) or (1,) fp32 noise levels of a view on a device, without waiting for it."""
        values = self.trace.levels
        if self.readings.levels.known:
            values = torch.tensor(self.readings.levels.value, device=device)
        values = values.to(device)
        if len(values) > 1 and view.samples != tuple(range(len(values))):
            values = values.index_select(0, torch.tensor(view.samples, device=device))
        return values

    @staticmethod
    def per_sample(values: Sequence[float], batch: int, what: str) -> tuple[float, ...]:
        """Give each sample its value: one for all, or one a sample.

        Raises:
            InputError: as many as neither.
        """
        if len(values) == 1:
            return tuple(values) * batch
        if len(values) != batch:
            raise InputError(f"{what} has {len(values)} entries, but the batch holds {batch} samples.")
        return tuple(values)

    def check_grid(self, grid: Grid) -> Grid:
        """Compare a grid with the number of image tokens, where that is known.

        Raises:
            InputError: they differ.
        """
        if self.trace.cells not in (0, cells(grid)):
            raise InputError(
                f"the token grid of this {type(self.model).__name__} is {' x '.join(map(str, grid))}, but its blocks "
                f"get {self.trace.cells} image tokens; leave out what adds or takes away tokens, such as images."
            )
        return grid

    def add_loss(self, name: str, value: Tensor) -> None:
        """Add to an auxiliary loss of this call."""
        self.losses[name] = self.losses[name] + value if name in self.losses else value

    def which(self, view: TokenView) -> tuple[int, ...] | None:
        """Name the samples of a view by their places in the batch; None for all of them."""
        return None if len(view.samples) == self.trace.batch else view.samples

    def finish(self) -> CallTrace:
        """Hand the trace over; blocks that are recomputed for a backward pass add nothing to it."""
        trace, self.trace = self.trace, self.trace.blank()
        return trace

    def release(self) -> None:
        """Let go of the arguments: what comes back to this call later must not keep them alive."""
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
    """Open the context of a call, of which nothing has been read yet.

    Args:
        model: the wrapped model.
        adapter: of its family.
        arguments: of the call, by name.
        settings: what the user set for it.
        trace: empty.
        slots: of the handlers, empty.
        trajectory: that the call is part of.
        guard: checks of a model whose adapter was inferred.
        counted: FLOPs so far, while they are counted.
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
    """Read the token grid of a call."""
    read = context.adapter.grid
    assert read is not None, "methods that need a grid were refused"
    return context.check_grid(read(context.model, context.arguments))


def is_offloaded(module: nn.Module) -> bool:
    """Whether hooks of accelerate or diffusers bring the weights of a module to the computing device."""
    held = vars(module)
    return "_hf_hook" in held or "_diffusers_hook" in held
