"""Unwrap DDP, FSDP and compile containers; reject sharded models that a method cannot run on.

Where something is only read, containers are looked through. To wrap a model the order matters, and the refusals say
which order works.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed
from torch import nn

from tokdyn.attach.attachment import Attachment
from tokdyn.errors import InputError, UnsupportedModelError

_HOLDERS = {  # class of a container: the attribute of the model in it, and what to do after wrapping that
    "OptimizedModule": ("_orig_mod", "torch.compile"),
    "DistributedDataParallel": ("module", "DistributedDataParallel"),
    "DataParallel": ("module", "DistributedDataParallel"),
    "FullyShardedDataParallel": ("module", "fully_shard"),
    "AveragedModel": ("module", "AveragedModel"),
    "PeftModel": ("get_base_model()", None),
}
_DENOISERS = ("transformer", "transformer_2", "unet")


def held_model(model: Any) -> Any:
    """Return the model that a container holds; None if it is no container."""
    for kind in type(model).__mro__:
        if kind.__name__ in _HOLDERS:
            path = _HOLDERS[kind.__name__][0]
            return model.get_base_model() if path.endswith("()") else getattr(model, path)
    return None


def inner_model(model: Any) -> Any:
    """Take a model out of all containers."""
    while (found := held_model(model)) is not None:
        model = found
    return model


def check_model(model: Any) -> None:
    """Refuse what is not a model.

    Raises:
        UnsupportedModelError: a pipeline, or something else.
    """
    if isinstance(model, nn.Module):
        return
    names = [f"pipe.{name}" for name in _DENOISERS if isinstance(getattr(model, name, None), nn.Module)]
    cure = f"give the model in it, {' or '.join(names)}" if names else "give a torch.nn.Module"
    raise UnsupportedModelError(f"{type(model).__name__} is no model; {cure}.")


def check_target(model: Any) -> None:
    """Refuse what is not the model itself.

    Raises:
        UnsupportedModelError: no model, or a container of one such as DistributedDataParallel.
    """
    check_model(model)
    if held_model(model) is None:
        return
    path, maker = next(_HOLDERS[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in _HOLDERS)
    after = "" if maker is None else f", then {maker} on the result"
    raise UnsupportedModelError(
        f"{type(model).__name__} holds the model; call tokdyn.wrap on the model in it, model.{path}{after}."
    )


def check_sharding(model: nn.Module, attachment: Attachment) -> None:
    """Refuse methods that cannot run on a sharded model, or on one whose tokens are split over devices.

    Raises:
        InputError: names the method and why.
    """
    if not attachment.methods:
        return
    looking = _needs_all_tokens(attachment) if _tokens_are_split(model, attachment) else None
    if looking is not None:
        raise InputError(
            f"{looking} cannot be used while context parallelism splits the tokens of this {type(model).__name__} "
            "over devices, since none of them sees the whole grid; leave the context parallelism or the method out."
        )
    if not _sharded(model, attachment):
        return
    diverging = _diverging(attachment)
    if diverging is not None:
        raise InputError(
            f"{diverging} decides by what each process sees which blocks it runs, but the blocks of this "
            f"{type(model).__name__} are sharded, and all processes have to run the same ones; use "
            "DistributedDataParallel, or settings that are the same at all noise levels."
        )


def check_parts_unsharded(model: nn.Module, attachment: Attachment) -> None:
    """Refuse parts that are trained beside a model that is sharded already.

    Raises:
        InputError: names what to call first.
    """
    if _sharded(model, attachment) and len(attachment.parts):
        raise InputError(
            f"this {type(model).__name__} is sharded already, and the trained parts of methods would differ between "
            "processes; call tokdyn.wrap on the model first and fully_shard on the result."
        )


def check_top(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Refuse to unwrap a model whose parts were given other classes after it was wrapped.

    Raises:
        InputError: names who.
    """
    for part in modules:
        kind = type(part)
        if hasattr(kind, "_tokdyn_base") and "_tokdyn_base" not in vars(kind):
            raise InputError(
                f"this {type(model).__name__} cannot be unwrapped, because its parts were given the class "
                f"{kind.__name__} after it was wrapped; use tokdyn.disabled, or load the weights into a new model."
            )


def _needs_all_tokens(attachment: Attachment) -> str | None:
    """Name a method that has to see all tokens."""
    placed = attachment.blueprint.placed
    return next((each.name for each in placed if each.traits.tokens != "full" or each.traits.compares), None)


def _diverging(attachment: Attachment) -> str | None:
    """Name a method that may run other blocks, or run them another number of times, in one process than in another."""
    drop = attachment.settings.tail_drop
    several = drop is not None and (isinstance(drop, dict) or len(set(drop)) > 1)
    for each in attachment.blueprint.placed:
        if each.traits.diverges or (several and "tail_drop" in each.traits.controls):
            return each.name
    return None


def _sharded(model: nn.Module, attachment: Attachment) -> bool:
    """Whether FSDP2 shards the weights (`torch.distributed.fsdp.fully_shard`)."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    places = (model, attachment.first_block(model))
    return any(kind.__name__ == "FSDPModule" for place in places for kind in type(place).__mro__)


def _tokens_are_split(model: nn.Module, attachment: Attachment) -> bool:
    """Whether diffusers splits the tokens over devices."""
    config = vars(model).get("_parallel_config")
    if getattr(config, "context_parallel_config", None) is not None:
        return True
    places: tuple[Any, ...] = (model, attachment.first_block(model))
    registries = [vars(place)["_diffusers_hook"] for place in places if "_diffusers_hook" in vars(place)]
    return any(name.startswith("cp_") for registry in registries for name in registry.hooks)
