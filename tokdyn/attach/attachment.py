"""The attachment of a wrapped model: its methods, their trained parts and handlers, and its trajectory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokdyn.adapters.base import ModelAdapter
from tokdyn.attach.checks import own_methods
from tokdyn.attach.context import Settings, open_context
from tokdyn.attach.handlers import load_handlers
from tokdyn.attach.handlers.base import Bracket, Exchange, Frame, Gate, Handlers, Kernel, Plan, Sublayer, build_handlers
from tokdyn.attach.handlers.feature_cache import CachedBlocks
from tokdyn.attach.handlers.token_merge import MergedTokens
from tokdyn.attach.inferred import Guard, samples
from tokdyn.attach.offload import home
from tokdyn.attach.recompute import Replays
from tokdyn.attach.sites import Sites, argument_names, blocks_of, find_sites
from tokdyn.attach.view import TokenView
from tokdyn.attach.width.layout import Layout, layouts_of
from tokdyn.compose import Placed, compose
from tokdyn.methods import Method, Sizes
from tokdyn.tokens import ImageTokens
from tokdyn.trace.calls import BlockTrace, CallTrace, levels_of
from tokdyn.trace.observation import Observation
from tokdyn.trace.trajectory import Trajectory
from tokdyn.watching import Watch

REMEMBERED = 512  # traces of calls that are kept: 250 steps of two guidance branches
KINDS = ("brackets", "gates", "sublayers", "kernels")


@dataclass(frozen=True)
class Meter:
    """What an attachment needs while the FLOPs of a call are counted.

    Attributes:
        counted: returns the FLOPs counted so far; a multiply-add is 2.
        arguments: arguments of the call by name. They have values even if the model itself gets meta tensors.
    """

    counted: Callable[[], int]
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Blueprint:
    """What was decided when the model was wrapped.

    Attributes:
        adapter: the adapter of the model.
        methods: the methods as the user listed them.
        placed: the methods with their traits, from the outermost to the innermost.
        sizes: depth, width and heads of the model.
        names: names of the arguments of the model's forward, in order.
        layouts: for each block, where its heads and MLP channels are in its weights, if a method computes some of them
            only; else ().
    """

    adapter: ModelAdapter
    methods: tuple[Method, ...]
    placed: tuple[Placed, ...]
    sizes: Sizes
    names: tuple[str, ...]
    layouts: tuple[Layout, ...]

    def __post_init__(self) -> None:
        _ = self.reduces, self.needs_all_tokens  # at its first use, cached_property of Python 3.11 locks

    @cached_property
    def reduces(self) -> bool:
        """Whether a method lets blocks compute fewer tokens than the grid has."""
        return any(placed.traits.tokens != "full" for placed in self.placed)

    @cached_property
    def needs_all_tokens(self) -> str | None:
        """The name of a method that needs the whole grid; None if none does."""
        return next((placed.name for placed in self.placed if placed.traits.needs_all_tokens), None)


class Prepared(NamedTuple):
    """What was read of a call before it was made, outside of graphs of torch.compile.

    Attributes:
        images: the token grids, where they depend on values and not only on shapes.
        level: what the adapter says of the noise level; only beside an observation.
        seen: the call as it was observed; None in training and where there is no noise level to tell steps by.
    """

    images: ImageTokens | None = None
    level: Tensor | float | None = None
    seen: Observation | None = None


class Attachment(nn.Module):
    """Everything that `wrap` adds to a model, registered as its submodule `model.tokdyn`.

    Attributes:
        blueprint: what was decided when the model was wrapped.
        parts: trainable parts of the methods, by their index in the user's list.
        handlers: the handlers of the methods.
        settings: what the user has set for the following calls.
        enabled: whether the methods act.
        meter: set while `tokdyn.flops` counts.
        trajectory: the current trajectory.
        watch: warns about methods that were not made for these calls.
        losses: auxiliary losses of the last call by the name of their method; empty except in training.
        history: traces of the last calls, with empty ones before the first call and between trajectories. Its length
            and types never change, so that a compiled model is not recompiled because of it.
        replays: frames in which gradient checkpointing recomputes blocks.
    """

    def __init__(self, model: nn.Module, adapter: ModelAdapter, methods: Sequence[Method]) -> None:
        super().__init__()
        self.blueprint = draw(model, adapter, methods)
        self.parts = nn.ModuleDict()
        for placed in sorted(self.blueprint.placed, key=lambda placed: placed.index):
            built = placed.method.build(self.blueprint.sizes)
            if built is not None:
                self.parts[str(placed.index)] = built.to(home(model))
        self.handlers = _handlers(self.blueprint, self.parts)
        self.settings, self.enabled = Settings(), True
        self.meter: Meter | None = None
        self.trajectory, self.replays = Trajectory(), Replays()
        self.watch = Watch.over(adapter, self.blueprint.placed, self.parts)
        self.losses: dict[str, Tensor] = {}
        self.history: list[CallTrace] = [CallTrace()] * REMEMBERED
        self._sites: Sites = {}
        self.train(model.training)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies, without sites (a copy finds those of its own model), losses and history."""
        return {**self.__dict__, "_sites": {}, "losses": {}, "history": [CallTrace()] * REMEMBERED}

    @property
    def adapter(self) -> ModelAdapter:
        """The adapter of the model."""
        return self.blueprint.adapter

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods as the user listed them."""
        return self.blueprint.methods

    @property
    def records(self) -> list[CallTrace]:
        """Traces of the last calls, without the empty ones."""
        return [trace for trace in self.history if trace.batch]

    @property
    def remembers(self) -> bool:
        """Whether a method keeps tensors of one step for the next."""
        return any(placed.traits.remembers for placed in self.blueprint.placed)

    @property
    def caches(self) -> list[Any]:
        """The handlers with a `memory` of earlier steps: those of FeatureCache and of TokenMerge."""
        handlers = (self.handlers.own_chunking, *self.handlers.brackets, *self.handlers.sublayers)
        return [handler for handler in handlers if isinstance(handler, (CachedBlocks, MergedTokens))]

    def sites(self, model: nn.Module) -> Sites:
        """Return the sites of the wrapped model; found at the first use, in a copy of the model once more."""
        if not self._sites:
            plan = self.blueprint
            stream = any(placed.traits.aligned is not None for placed in plan.placed)
            self._sites = find_sites(model, plan.adapter, bool(self.handlers.sublayers), plan.layouts, stream)
        return self._sites

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Return the blocks of the wrapped model, in the order in which they run."""
        return [block for blocks in self.adapter.blocks for block in blocks_of(model, blocks)]

    def begin_call(self, model: nn.Module, arguments: Mapping[str, Any], gradients: bool, prepared: Prepared) -> Frame:
        """Make the frame of a call.

        Args:
            model: that carries this.
            arguments: of the call, by name.
            gradients: whether they are wanted.
            prepared: what was read of it already.
        """
        adapter, trajectory = self.adapter, self.trajectory
        images, level, seen = prepared
        if seen is None and adapter.level is not None:
            level = adapter.level(model, arguments)
        training = model.training and gradients
        trace = CallTrace(level, training=training, observed=seen, branch=trajectory.name(seen))
        name, depth, caches = type(model).__name__, self.blueprint.sizes.depth, bool(self.handlers.brackets)
        guard = Guard(name, depth, samples(arguments), caches=caches) if adapter.inferred else None
        counted = None if self.meter is None else self.meter.counted
        slots: list[Any] = [None] * self.handlers.slots
        context = open_context(model, adapter, arguments, self.settings, trace, slots, trajectory, guard, counted)
        if images is not None:
            context.readings.images.put(images)
        remember = self.replays.remember if gradients and (training or not self.remembers) else None
        return Frame(
            context, self.handlers, self.sites(model), remember, TokenView((), 0, 0), BlockTrace(0, 0, 0), Exchange()
        )

    def prepare(self, model: nn.Module, arguments: Mapping[str, Any], images: ImageTokens | None = None) -> Prepared:
        """Look at a call before it is made."""
        adapter, training = self.adapter, model.training and torch.is_grad_enabled()
        level = None if adapter.level is None or training else adapter.level(model, arguments)
        told = adapter.telling(arguments)
        seen = None if level is None else self.trajectory.observe(told, levels_of(level))
        if self.meter is None and not self.watch.done:
            self.watch.see(model, seen, not training and not self.settings.drop_rate, self.trajectory.steps)
        return Prepared(images, level, seen)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Drop slices of the model's weights when the model is moved to another device or dtype."""
        for kernel in self.handlers.kernels:
            kernel.forget()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def replace_handlers(self, change: Callable[[Any], Any]) -> None:
        """Replace every handler by `change(handler)`, for example to observe its calls."""
        kinds: Any = {name: tuple(map(change, getattr(self.handlers, name))) for name in KINDS}
        self.handlers = replace(self.handlers, own_chunking=change(self.handlers.own_chunking), **kinds)

    def takes(self, control: str) -> bool:
        """Return whether one of the methods has this control in its traits, such as "tail_drop"."""
        return any(control in placed.traits.controls for placed in self.blueprint.placed)

    def set(self, **settings: Any) -> None:
        """Change settings, given by name, for the following calls."""
        self.settings = replace(self.settings, **settings)

    def remember(self, trace: CallTrace) -> None:
        """Add the trace of a call to the history, or an empty trace between two trajectories; drop the oldest."""
        self.history.pop(0)  # in place: a copy touches the reference counts of all traces
        self.history.append(trace)

    def conclude(self, output: Any) -> None:
        """Note what the model returned, for the trajectory and for caches that compare predictions."""
        self.trajectory.note(output)
        for handler in (self.handlers.own_chunking, *self.handlers.brackets):  # in every cached step
            if isinstance(handler, CachedBlocks):
                handler.note(output)

    def end(self) -> None:
        """End the trajectory and clear the caches; its statistics stay until the next one begins."""
        self.remember(CallTrace())
        self.trajectory.end()
        if self.watch.sampler:
            self.watch.sampler.end()
        for cache in self.caches:
            cache.memory.clear()

    def clear(self) -> None:
        """End the trajectory, clear the caches, and forget all statistics."""
        self.end()
        self.history[:] = [CallTrace()] * REMEMBERED


def draw(model: nn.Module, adapter: ModelAdapter, methods: Sequence[Method]) -> Blueprint:
    """Order the methods for a model and lay out its blocks.

    Raises:
        CompositionError: two of the methods cannot be combined.
        UnsupportedModelError: the blocks cannot be pruned the way that a method needs.
        InputError: a setting is out of range for the model.
    """
    sizes = sizes_of(model, adapter)
    placed = compose((*methods, *own_methods(adapter)), sizes.depth)
    users = tuple(one for one in placed if one.index < len(methods))
    layouts = layouts_of(model, adapter, methods)
    return Blueprint(adapter, tuple(methods), users, sizes, argument_names(model), layouts)


def sizes_of(model: nn.Module, adapter: ModelAdapter) -> Sizes:
    """Return the sizes of a model, from which methods build their trainable parts."""
    blocks = [block for blocks in adapter.blocks for block in blocks_of(model, blocks)]
    weights = tuple(sum(p.numel() for p in block.parameters()) for block in blocks)
    return Sizes(adapter.width(model), adapter.heads(model), weights)


def _handlers(blueprint: Blueprint, parts: nn.ModuleDict) -> Handlers:
    """Build the handlers of all methods, from the outermost to the innermost."""
    load_handlers()
    built: list[object] = []
    for placed in blueprint.placed:
        module = dict(parts).get(str(placed.index))
        built += build_handlers(Plan(placed, module, blueprint.sizes, blueprint.adapter, blueprint.layouts, len(built)))
    caches = [each for each in built if isinstance(each, CachedBlocks)] if blueprint.adapter.chunked else []
    return Handlers(
        tuple(each for each in built if isinstance(each, Bracket) and each not in caches),
        tuple(each for each in built if isinstance(each, Gate)),
        tuple(each for each in built if isinstance(each, Sublayer)),
        tuple(each for each in built if isinstance(each, Kernel)),
        own_chunking=caches[0] if caches else None,
        separates_text=any(placed.traits.reads != "nothing" for placed in blueprint.placed),
        counts=any(placed.traits.reads in ("count", "grid") for placed in blueprint.placed),
        slots=len(built),
    )
