"""Attach methods to a model and remove them: `wrap`, `unwrap`, `disabled`, and the calls of a wrapped model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from tokdyn import lora
from tokdyn.adapters import adapter_for
from tokdyn.adapters.base import ModelAdapter
from tokdyn.adapters.clock import Level, with_level
from tokdyn.attach import class_swap, containers, recompute
from tokdyn.attach.attachment import Attachment, Prepared, sizes_of
from tokdyn.attach.checks import check, check_arguments, check_sublayers, reads_images
from tokdyn.attach.engine import call_module
from tokdyn.attach.handlers.base import Frame
from tokdyn.attach.handlers.chunking import call_chunked
from tokdyn.attach.sites import attach_time_embedder
from tokdyn.errors import InputError
from tokdyn.methods import Method
from tokdyn.watching import warn_of_another_model, warn_of_missing_gates

Model = TypeVar("Model", bound=nn.Module)


def wrap(model: Model, methods: Sequence[Method], level: Level | None = None) -> Model:
    """Attach methods to a model, in place. `unwrap` removes them and leaves the model as it was.

    Args:
        model: a diffusion transformer, of diffusers, of tokdyn or of another library; see docs/adapters.md.
        methods: in any order. The stage of a method decides where in the model it acts (docs/design.md); the order of
            the list matters only between methods of one stage.
        level: the noise level of a call, where it is not known or runs the other way; see `tokdyn.wrap`.

    Returns:
        The same object.

    Raises:
        CompositionError: two of the methods cannot be combined.
        UnsupportedModelError: the model has no adapter, or a method cannot be used on models of this kind.
        InputError: the model is wrapped already, an element of the list is not a method, or a setting is out of range
            for this model, such as the index of a block.
    """
    containers.check_target(model)
    if attachment_of(model) is not None:
        raise InputError(f"this {type(model).__name__} is wrapped already; call tokdyn.unwrap on it first.")
    adapter = with_level(adapter_for(model), model, level)
    check(model, adapter, methods, sizes_of(model, adapter))
    attachment = Attachment(model, adapter, methods)
    warn_of_another_model(model, methods)
    containers.check_sharding(model, attachment)
    containers.check_parts_unsharded(model, attachment)
    placed, depth = attachment.blueprint.placed, attachment.blueprint.sizes.depth
    warn_of_missing_gates(model, placed, attachment.blueprint.sizes.heads)
    containers.check_cache(model, placed, depth, getattr(model, "_cache_config", None))
    sites = attachment.sites(model)
    check_sublayers(model, methods, sites.values(), depth)
    model.tokdyn = attachment
    class_swap.attach(model, _call_model, _overrides(model, adapter), prepare=_prepare, conclude=_conclude)
    if methods:
        attach_sites(model, attachment)
    return model


def _overrides(model: nn.Module, adapter: ModelAdapter) -> dict[str, Any]:
    """Return the functions that override methods of a wrapped model, by name; see `class_swap.attach`."""
    own: dict[str, Any] = {
        "save_pretrained": _save_pretrained,
        "enable_layerwise_casting": _enable_layerwise_casting,
        "enable_cache": containers.enable_cache,
    }
    overrides = {name: override for name, override in own.items() if hasattr(model, name)}
    overrides |= {name: _call_entry for name in adapter.entries if hasattr(model, name)}
    if adapter.chunked:
        overrides["_chunked"] = call_chunked
    return {
        "forward": _forward,
        "_reset_stateful_cache": _reset_stateful_cache,
        "cache_context": _cache_context,
        **overrides,
    }


def attach_sites(model: nn.Module, attachment: Attachment) -> None:
    """Let calls of the blocks, and of the sublayers and layers that methods need, go through the engine."""
    sites = attachment.sites(model)
    for module in model.modules():
        if id(module) in sites:
            class_swap.attach(module, call_module, outside=recompute.call_outside)
    for block in attachment.blocks(model):
        class_swap.enter_in_table_of_caches(block)
    if any(placed.traits.embedding for placed in attachment.blueprint.placed):
        attach_time_embedder(model, attachment.adapter)


def unwrap(model: Model) -> Model:
    """Remove all methods, in place, and return the model; class, state dict and outputs are those before `wrap`.

    Raises:
        InputError: the model is not wrapped, or other code has changed the class of one of its modules since.
    """
    if attachment_of(model) is None and attachment_of(containers.inner_model(model)) is not None:
        raise InputError(f"this {type(model).__name__} contains the wrapped model; call tokdyn.unwrap on that.")
    attached(model)
    modules = list(model.modules())
    containers.check_top(model, modules)
    lora.remove_lora(model)
    del model.tokdyn
    for module in modules:
        class_swap.detach(module)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Disable the methods of a wrapped model while the context is open: it computes bit for bit as if unwrapped."""
    attachment = attached(model)
    with lora.without_lora(model):
        before, attachment.enabled = attachment.enabled, False
        try:
            yield
        finally:
            attachment.enabled = before


def attachment_of(model: nn.Module) -> Attachment | None:
    """Return the attachment of a model; None if the model is not wrapped."""
    attachment = getattr(model, "__dict__", {}).get("_modules", {}).get("tokdyn")
    return attachment if isinstance(attachment, Attachment) else None


def attached(model: nn.Module) -> Attachment:
    """Return the attachment of a model, or of the model inside of a container such as DistributedDataParallel.

    Raises:
        UnsupportedModelError, InputError: the argument is not a torch.nn.Module, or it is not wrapped.
    """
    containers.check_model(model)
    attachment = attachment_of(containers.inner_model(model))
    if attachment is None:
        raise InputError(f"this {type(model).__name__} is not wrapped; call tokdyn.wrap(model, methods) first.")
    return attachment


def _call_entry(model: nn.Module, hidden: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a method such as `forward_features` that runs the blocks: as good as a call of the model."""
    frame: Frame | None = class_swap.current()
    if frame is not None and frame.context.model is model:
        return hidden(model, *args, **kwargs)
    attachment = _acting(model)
    if attachment is None:
        return class_swap.within(None, hidden, model, *args, **kwargs)
    names = tuple(inspect.signature(hidden).parameters)[1:]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    return _call(model, attachment, hidden, args, kwargs, named, attachment.prepare(model, named))


def _forward(model: nn.Module, hidden: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace `model.forward`: a direct call of it, as the guidance of the public DiT makes, is a call of the model."""
    frame: Frame | None = class_swap.current()
    if frame is not None and frame.context.model is model:
        return hidden(model, *args, **kwargs)
    if torch.compiler.is_compiling():
        return _call_model(model, hidden, args, kwargs)
    out = _call_model(model, hidden, args, kwargs, _prepare(model, args, kwargs))
    _conclude(model, out)
    return out


def _acting(model: nn.Module) -> Attachment | None:
    """Return what a model carries if its calls go through the engine."""
    attachment = attachment_of(model)
    if attachment is None or not (attachment.meter or (attachment.enabled and attachment.methods)):
        return None
    return attachment


def _prepare(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prepared | None:
    """Do before a call what no graph of torch.compile can: look at its values."""
    attachment = _acting(model)
    if attachment is None:
        return None
    named = {**dict(zip(attachment.blueprint.names, args, strict=False)), **kwargs}
    adapter, images = attachment.adapter, None
    if adapter.plain is not None and adapter.plain(named):
        return None
    if attachment.meter is not None:
        named = dict(attachment.meter.arguments)
    elif adapter.read_ahead and all(named.get(name) is not None for name in adapter.read_ahead):
        training = (model.training and torch.is_grad_enabled()) or attachment.settings.drop_rate is not None
        if reads_images(attachment.blueprint.placed, training):
            images = adapter.image_tokens(model, named)
    prepared = attachment.prepare(model, named, images)
    if attachment.settings.beside_dense and prepared.seen is not None:
        containers.check_beside_dense(model)
        with disabled(model), torch.no_grad(), prepared.seen.timing_dense():
            model(*args, **kwargs)
    return prepared


def _conclude(model: nn.Module, output: Any) -> None:
    """Record the prediction of a call, from which a sampler computes the next latents, and what it fell short of."""
    attachment = _acting(model)
    if attachment is not None:
        attachment.conclude(output)
        if (found := attachment.history[-1].shortfalls) and attachment.meter is None:
            attachment.watch.shortfalls.see(model, found)


def _call_model(
    model: nn.Module, plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any], prepared: Prepared | None = None
) -> Any:
    """Call the model, through the engine if methods act."""
    attachment = _acting(model)
    named = {**dict(zip(attachment.blueprint.names, args, strict=False)), **kwargs} if attachment else {}
    if attachment is None or (attachment.adapter.plain is not None and attachment.adapter.plain(named)):
        return class_swap.within(None, plain, model, *args, **kwargs)
    return _call(model, attachment, plain, args, kwargs, named, prepared or Prepared())


def _call(
    model: nn.Module,
    attachment: Attachment,
    plain: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    named: dict[str, Any],
    prepared: Prepared,
) -> Any:
    """Call the model, or an entry of it, in a frame of its own."""
    if attachment.blueprint.reduces or attachment.adapter.refuse_always:
        check_arguments(model, attachment.adapter, named, attachment.blueprint.reduces)
    left_out = attachment.adapter.left_out(model, named)
    brackets = [each for each in attachment.handlers.brackets if not each.never] if left_out else []
    edges = {block for each in brackets for block in (each.first, each.last)}.intersection(left_out)
    if edges:
        raise InputError(
            f"{'skip_layers' if named.get('skip_layers') else 'the model'} leaves out block {min(edges)} in this call, "
            f"where a method on this {type(model).__name__} begins or ends; let it run, or use tokdyn.DepthSkip alone."
        )
    if not torch.compiler.is_compiling():
        containers.check_sharding(model, attachment)
    if attachment.meter is not None:
        named = dict(attachment.meter.arguments)
    gradients = torch.is_grad_enabled()
    frame = attachment.begin_call(model, named, gradients, prepared)
    context = frame.context
    bound = recompute.bind(model, frame) if gradients else []
    try:
        out = class_swap.within(frame, plain, model, *args, **kwargs)
        if context.guard is not None:
            context.guard.end()
        if (sampler := attachment.watch.sampler) and not context.training:
            sampler.see(context.position, context.readings.levels.value[0])
    except BaseException:
        attachment.trajectory.interrupt()  # a call that is tried again is no second branch
        raise
    finally:
        context.release(gradients)
        recompute.release(bound)
    if context.losses or attachment.losses:  # nn.Module looks at what is assigned
        attachment.losses = context.losses
    attachment.remember(context.finish(gradients))
    return out


def _reset_stateful_cache(model: nn.Module, original: Any, *args: Any, **kwargs: Any) -> None:
    """End the trajectory, then call the original method, if any; diffusers pipelines call this after each image."""
    attached(model).end()
    if original is not None:
        original(model, *args, **kwargs)


def _save_pretrained(model: nn.Module, original: Any, *args: Any, **kwargs: Any) -> Any:
    """Write the model without the trained parts of its methods, which `tokdyn.save` writes."""
    with containers.without_attachment(model), lora.set_aside(model):
        return original(model, *args, **kwargs)


def _enable_layerwise_casting(model: nn.Module, original: Any, *args: Any, **kwargs: Any) -> None:
    """Enable layerwise casting, in place, for the model's own weights only: routers and gates keep their dtype."""
    with containers.without_attachment(model), lora.set_aside(model):
        original(model, *args, **kwargs)


@contextmanager
def _cache_context(model: nn.Module, original: Any, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Give calls the name of their guidance branch; diffusers pipelines open this context around them."""
    trajectory = attached(model).trajectory
    before, trajectory.branch = trajectory.branch, name
    try:
        with nullcontext() if original is None else original(model, name, *args, **kwargs):
            yield
    finally:
        trajectory.branch = before
