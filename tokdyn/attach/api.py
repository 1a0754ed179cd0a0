"""wrap, unwrap, disabled: methods on a model, and off it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from tokdyn.adapters import adapter_for
from tokdyn.adapters.base import ModelAdapter
from tokdyn.attach import checkpointing, instance
from tokdyn.attach.around import _chunked
from tokdyn.attach.attachment import Attachment
from tokdyn.attach.calibrated import warn_of_another_model
from tokdyn.attach.run import Run
from tokdyn.attach.targets import check_cut, check_model, check_parts_before, check_target, check_top, inside
from tokdyn.errors import InputError, UnsupportedModelError
from tokdyn.methods import Method, TokenMerge
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
    attachment = Attachment(model, adapter_for(model), methods)
    _check_dense(model, attachment)
    _check_weighted(model, attachment)
    warn_of_another_model(model, methods)
    check_cut(model, attachment)
    check_parts_before(model, attachment)
    roles = attachment.roles(model)
    model.tokdyn = attachment
    more: tuple[Any, ...] = (_chunked,) if attachment.adapter.chunked else ()
    before = _grid_ahead if attachment.adapter.read_ahead else None
    own = (each for each in (save_pretrained, enable_layerwise_casting) if hasattr(model, each.__name__))
    functions = (forward, _reset_stateful_cache, cache_context, *own, *more)
    instance.attach(model, _call_model, *functions, before=before)
    for part in model.modules():
        if id(part) in roles:
            instance.attach(part, _call_part)
    return model


def _check_dense(model: nn.Module, attachment: Attachment) -> None:
    """Refuse to leave tokens out of blocks that look at neighbouring cells."""
    if not attachment.adapter.dense:
        return
    for each in attachment.placed:
        method = each.method
        if each.traits.tokens == "subset" or (isinstance(method, TokenMerge) and method.where != "attention"):
            raise UnsupportedModelError(
                f"{each.name} leaves out tokens, but the blocks of {type(model).__name__} look at neighbouring cells; "
                "use TokenMerge(where='attention'), DepthSkip or FeatureCache."
            )


def _check_weighted(model: nn.Module, attachment: Attachment) -> None:
    """Refuse to weigh the keys of attention that has no softmax."""
    if not attachment.adapter.softmax and any(isinstance(e, TokenMerge) and e.weighted for e in attachment.methods):
        raise UnsupportedModelError(
            f"TokenMerge(weighted=True) weighs the keys of softmax attention, but {type(model).__name__} has linear "
            "attention; leave weighted out."
        )


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
        instance.detach(part)
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
    found = model.__dict__.get("_modules", {}).get("tokdyn")
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


def _grid_ahead(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid | None:
    """The token grid of a call, where it depends on values that no graph of torch.compile can look at."""
    attachment = attachment_of(model)
    if attachment is None or attachment.meter or not (attachment.enabled and attachment.methods):
        return None
    named = {**dict(zip(attachment.names, args, strict=False)), **kwargs}
    known = all(named.get(name) is not None for name in attachment.adapter.read_ahead)
    return attachment.adapter.grid(model, named) if known else None


def _call_model(
    model: nn.Module, plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Grid | None = None
) -> Any:
    """A call of the model: a run of its own, on a grid that may be known already."""
    attachment = attachment_of(model)
    if attachment is None or not (attachment.meter or (attachment.enabled and attachment.methods)):
        before = instance.enter(None)
        try:
            return plain(model, *args, **kwargs)
        finally:
            instance.enter(before)
    named = {**dict(zip(attachment.names, args, strict=False)), **kwargs}
    if attachment.reduces:
        _refuse(model, attachment.adapter, named)
    if not torch.compiler.is_compiling():
        check_cut(model, attachment)
    run = Run(model, attachment, named if attachment.meter is None else attachment.meter.arguments, grid)
    before = instance.enter(run)
    bound = checkpointing.bind(model, run)
    try:
        out = plain(model, *args, **kwargs)
    except BaseException:
        attachment.trajectory.clear()  # a step that is tried again is no second branch
        raise
    finally:
        instance.enter(before)
        checkpointing.release(bound)
    if attachment.watch is not None and not run.training:
        attachment.watch.see(run.turn, run.level[0])
    attachment.losses = run.losses
    attachment.remember(run.finish())
    return out


def forward(model: nn.Module, hidden: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's forward; called directly, as guidance in the public DiT does, it is a call of the model too."""
    run = instance.current()
    if run is not None and run.model is model:
        return hidden(model, *args, **kwargs)
    return _call_model(model, hidden, args, kwargs)


def _call_part(part: nn.Module, plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of a block by its model, or of an attention or MLP by its block."""
    run: Run | None = instance.current()
    if run is None or id(part) not in run.roles:
        return plain(part, *args, **kwargs)
    role = run.roles[id(part)]

    def call(*a: Any, **k: Any) -> Any:
        return run.weights.around(part, lambda: plain(part, *a, **k))

    if role.kind == "block":
        meter = run.attachment.meter
        before = 0 if meter is None else meter.counted()
        out = run.block(part, role, call, args, kwargs)
        if meter is not None:
            run.record.inside += meter.counted() - before
        return out
    return run.branch(role, call, args, kwargs)


def _refuse(model: nn.Module, adapter: ModelAdapter, named: Mapping[str, Any]) -> None:
    """Refuse arguments that hold something for every cell where there may be fewer tokens."""
    for name, reason in adapter.refuse.items():
        value = named.get(name)
        if isinstance(value, Mapping):  # attention arguments: a LoRA scale is welcome
            value = next((key for key in value if key.startswith("ip_")), None)
        if value is not None:
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
