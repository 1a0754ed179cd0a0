"""Find the model inside of DDP, FSDP and compile containers; reject what methods cannot run with.

That is a model whose weights or tokens are split over devices, or one with a cache of diffusers.

Functions that only read a model accept it inside of a container. `wrap` does not, because it has to come before some
containers; the errors say which order works.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tokdyn.adapters.splitting import context_parallel
from tokdyn.attach.attachment import Attachment
from tokdyn.compose import Placed
from tokdyn.errors import InputError, UnsupportedModelError

_CONTAINERS = {  # class name: attribute that holds the model, and what to call on the wrapped model afterwards
    "OptimizedModule": ("_orig_mod", "torch.compile"),
    "DistributedDataParallel": ("module", "DistributedDataParallel"),
    "DataParallel": ("module", "DistributedDataParallel"),
    "FullyShardedDataParallel": ("module", "fully_shard"),
    "AveragedModel": ("module", "AveragedModel"),
    "PeftModel": ("get_base_model()", None),
}
_BY_FIRST_BLOCK = ("FirstBlockCacheConfig", "MagCacheConfig", "SeaCacheConfig")
"""Caches of diffusers that decide at the first block and record at the last one what all blocks did."""
_DENOISERS = ("transformer", "transformer_2", "unet")


def held_model(model: Any) -> Any:
    """Return the model that a container holds; None if the argument is not a container."""
    for kind in type(model).__mro__:
        if kind.__name__ in _CONTAINERS:
            path = _CONTAINERS[kind.__name__][0]
            return model.get_base_model() if path.endswith("()") else getattr(model, path)
    return None


def inner_model(model: Any) -> Any:
    """Return the model inside of all containers; a model without a container is returned itself."""
    while (held := held_model(model)) is not None:
        model = held
    return model


@contextmanager
def without_attachment(model: nn.Module) -> Iterator[None]:
    """Remove the attachment from the submodules of a wrapped model while the context is open."""
    attachment = model._modules.pop("tokdyn")
    try:
        yield
    finally:
        model._modules["tokdyn"] = attachment


def check_model(model: Any) -> None:
    """Check that the argument is a torch.nn.Module.

    Raises:
        UnsupportedModelError: it is not; for a pipeline the message names the models in it.
    """
    if isinstance(model, nn.Module):
        return
    names = [f"pipe.{name}" for name in _DENOISERS if isinstance(getattr(model, name, None), nn.Module)]
    cure = f"give the model in it, {' or '.join(names)}" if names else "give a torch.nn.Module"
    raise UnsupportedModelError(f"{type(model).__name__} is not a model; {cure}.")


def check_target(model: Any) -> None:
    """Check that the argument is a model that `wrap` can attach methods to, and not a container around one.

    Raises:
        UnsupportedModelError: it is not a torch.nn.Module, or it is a container such as DistributedDataParallel or the
            result of torch.compile; the message says what to wrap instead.
    """
    check_model(model)
    if held_model(model) is None:
        return
    path, maker = next(_CONTAINERS[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in _CONTAINERS)
    after = "" if maker is None else f", then {maker} on the result"
    raise UnsupportedModelError(
        f"{type(model).__name__} holds the model; call tokdyn.wrap on the model in it, model.{path}{after}."
    )


def check_sharding(model: nn.Module, attachment: Attachment) -> None:
    """Check that the methods can run on a model whose weights are sharded or whose tokens are split over devices.

    Raises:
        InputError: one cannot; the message names it and says why.
    """
    if not attachment.methods:
        return
    needy = attachment.blueprint.needs_all_tokens
    if needy is not None and context_parallel(model, _first_block(model, attachment)) is not None:
        raise InputError(
            f"{needy} cannot be used while context parallelism splits the tokens of this {type(model).__name__} "
            "over devices, because no device has the whole grid; leave out the context parallelism or the method."
        )
    if not _sharded(model, attachment):
        return
    diverging = _diverging(attachment, model.training and torch.is_grad_enabled())
    if diverging is not None:
        raise InputError(
            f"{diverging} may run other blocks in one process than in another, but the blocks of this "
            f"{type(model).__name__} are sharded, so all processes have to run the same ones; use "
            "DistributedDataParallel, settings that do not depend on the sample or its noise level, or, for "
            "FeatureCache, tokdyn.agree before fully_shard."
        )


def check_parts_unsharded(model: nn.Module, attachment: Attachment) -> None:
    """Check that methods with trainable parts are not attached to a model that is sharded already.

    Raises:
        InputError: they are; `wrap` has to come before `fully_shard`.
    """
    if _sharded(model, attachment) and len(attachment.parts):
        raise InputError(
            f"this {type(model).__name__} is sharded already, so the trainable parts of the methods would not be, and "
            "would differ between processes; call tokdyn.wrap on the model first and fully_shard on the result."
        )


def check_top(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Check that the class which tokdyn gave each module is still its class, so that the model can be unwrapped.

    Args:
        model: the wrapped model, for the message.
        modules: its modules.

    Raises:
        InputError: another library has changed the class of a module since; the message names that class.
    """
    for part in modules:
        kind = type(part)
        if hasattr(kind, "_tokdyn_base") and "_tokdyn_base" not in vars(kind):
            raise InputError(
                f"this {type(model).__name__} cannot be unwrapped, because its parts were given the class "
                f"{kind.__name__} after it was wrapped; use tokdyn.disabled, or load the weights into a new model."
            )


def _diverging(attachment: Attachment, training: bool) -> str | None:
    """Return the name of a method by which two processes may run other blocks, or a block another number of times."""
    drop = attachment.settings.tail_drop
    several = drop is not None and (isinstance(drop, dict) or len(set(drop)) > 1)
    agreed = attachment.settings.agreement is not None
    for placed in attachment.blueprint.placed:
        diverges = placed.traits.diverges and not (agreed and placed.traits.compares)
        diverges = diverges and not (training and placed.traits.masks_in_training)
        if diverges or (several and "tail_drop" in placed.traits.controls):
            return placed.name
    return None


def _first_block(model: nn.Module, attachment: Attachment) -> nn.Module:
    """Return the first block of a wrapped model, without `getattr` where that can be: it is called in every call."""
    held: Any = model
    for name in attachment.adapter.blocks[0].path.split("."):
        held = held._modules.get(name) or getattr(held, name)
    first: nn.Module = next(iter(held._modules.values()))
    return first


def _sharded(model: nn.Module, attachment: Attachment) -> bool:
    """Return whether FSDP2 (`torch.distributed.fsdp.fully_shard`) shards the model or its first block."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    places = (model, _first_block(model, attachment))
    return any(kind.__name__ == "FSDPModule" for place in places for kind in type(place).__mro__)


def check_beside_dense(model: nn.Module) -> None:
    """Check that calls can be made without methods too.

    Raises:
        InputError: a cache of diffusers would count them.
    """
    cache = getattr(model, "_cache_config", None)
    if cache is not None:
        raise InputError(
            f"diffusers' {type(cache).__name__} on this {type(model).__name__} would take the call without methods for "
            "a step; disable it (disable_cache), or leave out tokdyn.beside_dense."
        )


def check_cache(model: nn.Module, placed: Sequence[Placed], depth: int, config: Any) -> None:
    """Check that a cache of diffusers and the methods of a model do not get into each other's way.

    Args:
        model: for the message.
        placed: the methods.
        depth: number of blocks of the model.
        config: of the cache; None if there is no cache.

    Raises:
        InputError: a FeatureCache would be a second cache, a method may skip the block at which the cache decides or
            the one at which it records, or the cache would keep results of tokens that are others in the next step.
    """
    if config is None:
        return
    kind = type(config).__name__
    for each in placed:
        skipped = each.traits.owns.get("skipping", frozenset())
        if "residual of all blocks" in each.traits.owns:
            raise InputError(
                f"this {type(model).__name__} would have two caches, {each.name} and diffusers' {kind}; leave out one."
            )
        inside = each.traits.tokens == "merged" and kind not in (*_BY_FIRST_BLOCK, "TextKVCacheConfig")
        if inside or each.traits.tokens == "subset":
            raise InputError(
                f"diffusers' {kind} on this {type(model).__name__} would reuse results of the tokens that {each.name} "
                f"leaves in one step for those of another; use tokdyn.FeatureCache in the place of {kind}."
            )
        for block, place, role in ((0, "first", "decides"), (depth - 1, "last", "records what the blocks did")):
            if kind in _BY_FIRST_BLOCK and (skipped is None or block in skipped):
                raise InputError(
                    f"{each.name} may skip the {place} block of this {type(model).__name__}, at which diffusers' "
                    f"{kind} {role}; give {each.name} other blocks, or use tokdyn.FeatureCache in the place of {kind}."
                )


def enable_cache(model: Any, original: Any, config: Any, *args: Any, **kwargs: Any) -> None:
    """Enable a cache of diffusers in a wrapped model, after checking that it goes with the methods."""
    blueprint = model.tokdyn.blueprint
    check_cache(model, blueprint.placed, blueprint.sizes.depth, config)
    original(model, config, *args, **kwargs)
