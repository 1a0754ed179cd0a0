"""What a wrapped model carries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tokdyn.adapters.base import ModelAdapter
from tokdyn.attach.calibrated import SamplerWatch
from tokdyn.attach.handlers.base import Actors, Bracket, Branch, Gate, Kernel
from tokdyn.attach.handlers.chunking import Chunk
from tokdyn.attach.handlers.depth_skip import LearnedSkipping, Skipping
from tokdyn.attach.handlers.dynamic_width import Choosing, Narrowing
from tokdyn.attach.handlers.feature_cache import Cache, FirstBlock
from tokdyn.attach.handlers.token_drop import Dropping
from tokdyn.attach.handlers.token_merge import Merge
from tokdyn.attach.inferred import Guard, samples
from tokdyn.attach.measuring import Meter
from tokdyn.attach.offload import home
from tokdyn.attach.sites import Role, argument_names, blocks_of, find_roles
from tokdyn.attach.support import own_methods
from tokdyn.attach.width.layout import layouts_of
from tokdyn.compose import Placed, compose
from tokdyn.methods import Chunking, DepthSkip, DynamicWidth, FeatureCache, Method, Sizes, TokenDrop, TokenMerge
from tokdyn.methods.base import resolve
from tokdyn.trace.calls import Record
from tokdyn.trace.trajectory import Trajectory

_CALLS = 512  # that are remembered: 250 steps of two branches of guidance


class Attachment(nn.Module):
    """Methods, their trainable parts and their memory. Registered as `model.tokdyn`.

    Attributes:
        adapter: what is known of the model.
        methods: as the user listed them.
        placed: the same, outermost first.
        sizes: of the model.
        layouts: of the blocks, where a method computes parts of their layers.
        parts: trainable parts of the methods, by their place in the user's list.
        actors: the methods at work.
        caches: feature caches around the chunking that a model does itself.
        enabled: whether they are.
        reduces: whether blocks may see other tokens than the full grid.
        history: the last calls, an empty record where a pipeline had made its images and before the first call. Length
            and types never change, so that a compiled model is not compiled again because of it.
        meter: set while `tokdyn.flops` counts.
        trajectory: where sampling is.
        watch: over the sampler, where a method was calibrated for one.
        losses: auxiliary losses of the last call that computed gradients.
        tail_drop: what `tokdyn.set_tail_drop` set; None leaves it to the methods.
        drop_rate: what `tokdyn.dropping` set: TokenDrop acts in sampling too, at this rate.
        calibrating: routers adapt their bias to what they see.
        branch: name of the guidance branch that the pipeline is in, where it says so.
        passed: tokens that blocks were given, and the run as it was then; see `tokdyn.attach.recompute`.
    """

    def __init__(self, model: nn.Module, adapter: ModelAdapter, methods: Sequence[Method]) -> None:
        super().__init__()
        self.adapter, self.methods, self.names = adapter, tuple(methods), argument_names(model)
        self.sizes = sizes_of(model, adapter)
        placed = compose((*methods, *own_methods(adapter)), self.sizes.depth)
        self.placed = tuple(each for each in placed if each.index < len(methods))
        self.layouts = layouts_of(model, adapter, methods)
        self.parts = nn.ModuleDict()
        device = home(model)
        for each in sorted(self.placed, key=lambda placed: placed.index):
            built = each.method.build(self.sizes)
            if built is not None:
                self.parts[str(each.index)] = built.to(device)
        self.actors = _actors(self.placed, self.parts, self.sizes)
        self.caches = tuple(each for each in self.actors.brackets if isinstance(each, Cache) and adapter.chunked)
        inside = tuple(each for each in self.actors.brackets if each not in self.caches)
        self.actors = replace(self.actors, brackets=inside)
        self.reduces = any(each.traits.tokens != "full" for each in self.placed)
        self.enabled = True
        self.history: list[Record] = [Record()] * _CALLS
        self.meter: Meter | None = None
        self.trajectory = Trajectory()
        self.watch = SamplerWatch.of(self.methods)
        self.losses: dict[str, Tensor] = {}
        self.tail_drop: tuple[float, ...] | dict[str, float] | None = None
        self.drop_rate: float | None = None
        self.calibrating = False
        self.branch: str | None = None
        self.passed: Any = WeakTensorKeyDictionary()
        self._roles: dict[int, Role] = {}
        self.train(model.training)

    def __getstate__(self) -> dict[str, Any]:
        """Without the roles, which know the parts of this model and not those of a copy, and without graphs."""
        fresh: dict[str, Any] = {"_roles": {}, "losses": {}, "history": [Record()] * _CALLS, "passed": None}
        return {**self.__dict__, **fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What cannot be pickled is made anew."""
        super().__setstate__({**state, "passed": WeakTensorKeyDictionary()})  # type: ignore[no-untyped-call]

    def roles(self, model: nn.Module) -> dict[int, Role]:
        """Roles of the model's parts; a copy of the model finds its own."""
        if not self._roles:
            stream = any(isinstance(each, DynamicWidth) and each.token_input == "stream" for each in self.methods)
            self._roles = find_roles(model, self.adapter, bool(self.actors.branches), self.layouts, stream)
        return self._roles

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The blocks of the model that carries this, in the order in which they run."""
        return [block for stack in self.adapter.stacks for block in blocks_of(model, stack)]

    def first_block(self, model: nn.Module) -> nn.Module:
        """The first of them."""
        return next(iter(model.get_submodule(self.adapter.stacks[0].path).children()))

    def guard(self, model: nn.Module, arguments: Mapping[str, Any]) -> Guard:
        """The checks of a call of a model whose adapter was inferred."""
        return Guard(type(model).__name__, self.sizes.depth, samples(arguments), caches=bool(self.actors.brackets))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """The model goes to another device or type: slices of its weights are of no more use."""
        for kernel in self.actors.kernels:
            kernel.forget()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def has(self, method: type[Method]) -> bool:
        """Whether a method of that kind is attached."""
        return any(isinstance(each, method) for each in self.methods)

    @property
    def records(self) -> list[Record]:
        """The calls that are remembered."""
        return [record for record in self.history if record.batch]

    def remember(self, record: Record) -> None:
        """Add a call to the history, or an empty record where one run ends and another begins."""
        self.history = [*self.history[1:], record]

    def end(self) -> None:
        """Forget the trajectory; its statistics stay until the next one begins."""
        self.remember(Record())
        self.trajectory.clear()
        if self.watch is not None:
            self.watch.end()
        for cache in self.memories:
            cache.memory.clear()

    def clear(self) -> None:
        """Forget the trajectory and its statistics."""
        self.end()
        self.history = [Record()] * _CALLS

    @property
    def memories(self) -> list[Cache]:
        """The caches, wherever they act."""
        return [each for each in (*self.caches, *self.actors.brackets) if isinstance(each, Cache)]


def sizes_of(model: nn.Module, adapter: ModelAdapter) -> Sizes:
    """What methods need to know of a model to build their parts."""
    blocks = [block for stack in adapter.stacks for block in blocks_of(model, stack)]
    weights = tuple(sum(p.numel() for p in block.parameters()) for block in blocks)
    return Sizes(adapter.width(model), adapter.heads(model), weights)


def _actors(placed: Sequence[Placed], parts: nn.ModuleDict, sizes: Sizes) -> Actors:
    """The methods at work, outermost first."""
    found: dict[str, list[Any]] = {"brackets": [], "gates": [], "branches": [], "kernels": []}
    for each in placed:
        part = dict(parts).get(str(each.index))
        for kind, actor in _MAKERS[type(each.method)](each, part, sizes):
            found[kind].append(actor)
    brackets: list[Bracket] = found["brackets"]
    gates: list[Gate] = found["gates"]
    branches: list[Branch] = found["branches"]
    kernels: list[Kernel] = found["kernels"]
    return Actors(tuple(brackets), tuple(gates), tuple(branches), tuple(kernels))


Made = list[tuple[str, Any]]


def _cache(each: Placed, part: nn.Module | None, sizes: Sizes) -> Made:
    assert isinstance(each.method, FeatureCache)
    if each.method.indicator == "first_block":
        return [("brackets", FirstBlock(each.method.compares)), ("brackets", Cache(each.method, 1, sizes.depth - 1))]
    return [("brackets", Cache(each.method, 0, sizes.depth - 1))]


def _chunk(each: Placed, part: nn.Module | None, sizes: Sizes) -> Made:
    return [("brackets", Chunk(each.method, part, 0, sizes.depth - 1))]  # type: ignore[arg-type]


def _drop(each: Placed, part: nn.Module | None, sizes: Sizes) -> Made:
    assert each.traits.span is not None
    return [("brackets", Dropping(each.method, *each.traits.span))]  # type: ignore[arg-type]


def _skip(each: Placed, part: nn.Module | None, sizes: Sizes) -> Made:
    if part is not None:
        return [("gates", LearnedSkipping(each.method, part, sizes))]  # type: ignore[arg-type]
    return [("gates", Skipping(each.method, sizes.depth))]  # type: ignore[arg-type]


def _merge(each: Placed, part: nn.Module | None, sizes: Sizes) -> Made:
    assert isinstance(each.method, TokenMerge)
    first, last = (0, sizes.depth - 1) if each.method.blocks is None else resolve(each.method.blocks, sizes.depth)
    return [("branches", Merge(each.method, first, last))]


def _narrow(each: Placed, part: nn.Module | None, sizes: Sizes) -> Made:
    if part is None:  # everything stays on
        return []
    narrowing = Narrowing(each.method, part, sizes.depth - 1)  # type: ignore[arg-type]
    choosing: Made = [("branches", Choosing(narrowing))] if narrowing.method.tokens else []
    return [("brackets", narrowing), ("kernels", narrowing), *choosing]


_MAKERS: dict[type[Method], Callable[[Placed, nn.Module | None, Sizes], Made]] = {
    FeatureCache: _cache,
    Chunking: _chunk,
    TokenDrop: _drop,
    DepthSkip: _skip,
    DynamicWidth: _narrow,
    TokenMerge: _merge,
}
