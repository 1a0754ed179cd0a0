"""wrap, unwrap, disabled: methods on a model, and off it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from tokdyn.adapters import adapter_for
from tokdyn.adapters.base import ModelAdapter
from tokdyn.attach import checkpointing, class_swap
from tokdyn.attach.around import _chunked
from tokdyn.attach.attachment import Attachment, sizes_of
from tokdyn.attach.calibrated import warn_of_another_model
from tokdyn.attach.recompute import go_on, recall, remember
from tokdyn.attach.run import Run
from tokdyn.attach.support import check, check_parts
from tokdyn.attach.targets import check_cut, check_model, check_parts_before, check_target, check_top, inside
from tokdyn.errors import InputError
from tokdyn.methods import Method
from tokdyn.tokens import Grid

Model = TypeVar("Model", bound=nn.Module)


def wrap(model: Model, methods: Sequence[Method]) -> Model:
    """Attach methods to a model, in place. `unwrap` takes them off again, exactly.

    Args:
        model: a diffusion transformer of diffusers, of the public DiT layout, or of tokdyn.
        methods: in any order; where each acts follows from what it is, see docs/design.md.

    Returns:
        The same object.

    Raises:
        CompositionError: two methods that do not go together.
        UnsupportedModelError: a model that no adapter knows, or that a method does not fit.
        InputError: the model is wrapped already, or settings do not fit its blocks.
    """
    check_target(model)
    if attachment_of(model) is not None:
        raise InputError(f"this {type(model).__name__} is wrapped already; call tokdyn.unwrap on it first.")
    for each in methods:
        if not isinstance(each, Method):
            raise InputError(f"{each!r} is no method; give a list of methods, such as [tokdyn.TokenMerge(ratio=0.5)].")
    adapter = adapter_for(model)
    check(model, adapter, methods, sizes_of(model, adapter))
    attachment = Attachment(model, adapter, methods)
    warn_of_another_model(model, methods)
    check_cut(model, attachment)
    check_parts_before(model, attachment)
    roles = attachment.roles(model)
    check_parts(model, methods, roles.values(), attachment.sizes.depth)
    model.tokdyn = attachment
    more: tuple[Any, ...] = tuple(Entry(name) for name in adapter.entries if hasattr(model, name))
    more = (_chunked,) if adapter.chunked else more
    before = _grid_ahead if adapter.read_ahead else None
    own = (each for each in (save_pretrained, enable_layerwise_casting) if hasattr(model, each.__name__))
    functions = (forward, _reset_stateful_cache, cache_context, *own, *more)
    class_swap.attach(model, _call_model, *functions, before=before)
    if methods:
        attach_parts(model, attachment)
    return model


def attach_parts(model: nn.Module, attachment: Attachment) -> None:
    """Let the calls of the blocks, and of what methods need in them, go through the run of the model's call."""
    roles = attachment.roles(model)
    for part in model.modules():
        if id(part) in roles:
            class_swap.attach(part, _call_part)


def unwrap(model: Model) -> Model:
    """Take all methods off. The class, the state dict and the outputs are what they were.

    Raises:
        InputError: the model is not wrapped, or somebody else has changed its class since.
    """
    if attachment_of(model) is None and attachment_of(inside(model)) is not None:
        raise InputError(f"what is wrapped is the model in this {type(model).__name__}; unwrap that.")
    attached(model)
    modules = list(model.modules())
    check_top(model, modules)
    del model.tokdyn
    for part in modules:
        class_swap.detach(part)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes as if it had never been wrapped."""
    attachment = attached(model)
    before, attachment.enabled = attachment.enabled, False
    try:
        yield
    finally:
        attachment.enabled = before


def attachment_of(model: nn.Module) -> Attachment | None:
    """What a model carries if it is wrapped."""
    found = getattr(model, "__dict__", {}).get("_modules", {}).get("tokdyn")
    return found if isinstance(found, Attachment) else None


def attached(model: nn.Module) -> Attachment:
    """What a model carries, or the model in a container such as DistributedDataParallel.

    Raises:
        InputError: it is not wrapped.
    """
    check_model(model)
    found = attachment_of(inside(model))
    if found is None:
        raise InputError(f"this {type(model).__name__} is not wrapped; call tokdyn.wrap(model, methods) first.")
    return found


@dataclass(frozen=True)
class Entry:
    """A method of a model, such as `forward_features`, that runs its blocks: as good as a call of the model."""

    name: str

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, model: nn.Module, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        """A run of its own, unless the model calls it itself."""
        run: Run | None = class_swap.current()
        if run is not None and run.model is model:
            return hidden(model, *args, **kwargs)
        return _call_model(model, hidden, args, kwargs, names=tuple(inspect.signature(hidden).parameters)[1:])


def _grid_ahead(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid | None:
    """The token grid of a call, where it depends on values that no graph of torch.compile can look at."""
    attachment = attachment_of(model)
    if attachment is None or attachment.meter or not (attachment.enabled and attachment.methods):
        return None
    named = {**dict(zip(attachment.names, args, strict=False)), **kwargs}
    known = all(named.get(name) is not None for name in attachment.adapter.read_ahead)
    read = attachment.adapter.grid
    return None if read is None or not known else read(model, named)


def _call_model(
    model: nn.Module,
    plain: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    grid: Grid | None = None,
    names: tuple[str, ...] | None = None,
) -> Any:
    """A call of the model, or of an entry with arguments of those names: a run, on a grid that may be known already."""
    attachment = attachment_of(model)
    if attachment is None or not (attachment.meter or (attachment.enabled and attachment.methods)):
        before = class_swap.enter(None)
        try:
            return plain(model, *args, **kwargs)
        finally:
            class_swap.enter(before)
    named = {**dict(zip(names or attachment.names, args, strict=False)), **kwargs}
    if attachment.reduces:
        _refuse(model, attachment.adapter, named)
    edges = attachment.actors.edges.intersection(named.get("skip_layers") or ())
    if edges:
        raise InputError(
            f"skip_layers leaves out block {min(edges)}, where a method on this {type(model).__name__} begins or ends; "
            "leave out other blocks, or skip that one with tokdyn.DepthSkip."
        )
    if not torch.compiler.is_compiling():
        check_cut(model, attachment)
    run = Run(model, attachment, named if attachment.meter is None else attachment.meter.arguments, grid)
    before = class_swap.enter(run)
    bound = checkpointing.bind(model, run) if run.gradients else []
    try:
        out = plain(model, *args, **kwargs)
        if run.guard is not None:
            run.guard.end()
        if attachment.watch is not None and not run.training:
            attachment.watch.see(run.turn, run.level[0])
    except BaseException:
        attachment.trajectory.clear()  # a step that is tried again is no second branch
        raise
    finally:
        run.release()
        class_swap.enter(before)
        checkpointing.release(bound)
    attachment.losses = run.losses
    attachment.remember(run.finish())
    return out


def forward(model: nn.Module, hidden: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's forward; called directly, as guidance in the public DiT does, it is a call of the model too."""
    run = class_swap.current()
    if run is not None and run.model is model:
        return hidden(model, *args, **kwargs)
    return _call_model(model, hidden, args, kwargs)


def _call_part(part: nn.Module, plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of a block by its model, or of an attention, an MLP or a layer by its block."""
    run: Run | None = class_swap.current()
    again = recall(part, args, kwargs) if run is None else None
    run = run or again
    role = None if run is None else vars(part).get("_tokdyn_role") or run.roles.get(id(part))
    if run is None or role is None:
        return plain(part, *args, **kwargs)
    call = run.weights.around(part, plain)
    if role.kind == "layer":
        return run.layer(part, role, partial(call, **kwargs), args)
    if role.kind != "block":
        return run.branch(role, call, args, kwargs)
    if again is None:
        remember(run, part, role, args, kwargs)
        return run.block(part, role, call, args, kwargs)
    class_swap.enter(again)
    try:
        out = again.block(part, role, call, args, kwargs)
    finally:
        class_swap.enter(None)
    go_on(again, role, out)
    return out


def _refuse(model: nn.Module, adapter: ModelAdapter, named: Mapping[str, Any]) -> None:
    """Refuse arguments that hold something for every cell where there may be fewer tokens."""
    for name, reason in adapter.refuse.items():
        value = named.get(name)
        if isinstance(value, Mapping):  # attention arguments: a LoRA scale is welcome
            value = next((key for key in value if key.startswith("ip_")), None)
        if value is not None and value is not False:
            raise InputError(f"{name} cannot be used with fewer tokens in {type(model).__name__}: {reason}.")


def _reset_stateful_cache(model: nn.Module, hidden: Any, *args: Any, **kwargs: Any) -> None:
    """What diffusers' pipelines call when they have made their images."""
    attached(model).end()
    if hidden is not None:
        hidden(model, *args, **kwargs)


def save_pretrained(model: nn.Module, hidden: Any, *args: Any, **kwargs: Any) -> Any:
    """The model as it was before it was wrapped; `tokdyn.save` writes the methods."""
    with _bare(model):
        return hidden(model, *args, **kwargs)


def enable_layerwise_casting(model: nn.Module, hidden: Any, *args: Any, **kwargs: Any) -> None:
    """Casts the weights of the model, and not those that decide about tokens and blocks."""
    with _bare(model):
        hidden(model, *args, **kwargs)


@contextmanager
def _bare(model: nn.Module) -> Iterator[None]:
    """The model without what it carries."""
    attachment = model._modules.pop("tokdyn")
    try:
        yield
    finally:
        model._modules["tokdyn"] = attachment


@contextmanager
def cache_context(model: nn.Module, hidden: Any, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
    """What diffusers' pipelines enter around the call of a guidance branch: its name."""
    attachment = attached(model)
    before, attachment.branch = attachment.branch, name
    try:
        if hidden is None:
            yield
        else:
            with hidden(model, name, *args, **kwargs):
                yield
    finally:
        attachment.branch = before
