"""What users set and read from call to call in a wrapped model: budgets, losses, the trajectory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.attach.containers import inner_model
from tokdyn.attach.entry import attached
from tokdyn.attach.measuring import untraced
from tokdyn.attach.offload import weights_are_offloaded
from tokdyn.errors import InputError
from tokdyn.methods import Method
from tokdyn.trace.calls import CallTrace
from tokdyn.trace.steps import last_trajectory


def set_tail_drop(model: nn.Module, value: float | Tensor | Mapping[str, float] | None) -> None:
    """Set the share of the kept tokens that learned chunking drops in the calls to come.

    Args:
        model: wrapped with Chunking.
        value: a share in [0, 1] for all samples, a (B,) tensor with one for each, or {"cond": .., "uncond": ..} with
            one for each branch of guidance (Lite-CFG, arXiv 2603.06351 v2); None goes back to the method's own setting.

    Raises:
        InputError: the model has no Chunking, or the value is none of these.
    """
    attachment = attached(model)
    if not (attachment.takes("tail_drop") or attachment.adapter.chunked):
        raise InputError(f"this {type(model).__name__} is wrapped without Chunking, so it has no kept tokens to drop.")
    if value is None:
        attachment.set(tail_drop=None)
        return
    if isinstance(value, Mapping):
        if set(value) != {"cond", "uncond"}:
            raise InputError(f"tail_drop has the branches {sorted(value)}, expected 'cond' and 'uncond'.")
        attachment.set(tail_drop={name: _share(share) for name, share in value.items()})
        return
    if isinstance(value, torch.Tensor) and value.dim() > 1:
        raise InputError(f"tail_drop has shape {tuple(value.shape)}, expected one number or one for each sample (B,).")
    given = value.flatten().tolist() if isinstance(value, torch.Tensor) else [value]
    attachment.set(tail_drop=tuple(_share(share) for share in given))


def _share(value: Any) -> float:
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise InputError(f"tail_drop is {value}, expected a share between 0 and 1.")
    return share


def losses(model: nn.Module) -> dict[str, Tensor]:
    """Return the auxiliary losses of the last call in training, weighted as the methods say, by the name of the method.

    Add their sum to the loss of the model. Read them before the next call: two forwards before one backward have losses
    of their own.

    Raises:
        InputError: the model is not wrapped.
    """
    return dict(attached(model).losses)


def parts(model: nn.Module) -> list[tuple[Method, nn.Module | None]]:
    """List the methods of a model in the user's order, each with the module that it trains, or None.

    In the state dict of the model, the names of these modules begin with `tokdyn.parts.` and the place in this list.

    Raises:
        InputError: the model is not wrapped.
    """
    attachment = attached(model)
    modules = dict(attachment.parts)
    return [(method, modules.get(str(place))) for place, method in enumerate(attachment.methods)]


def traces(model: nn.Module) -> tuple[CallTrace, ...]:
    """Return what the calls of the last trajectory did, in order, block by block; `tokdyn.stats` is computed from it.

    A trajectory ends when a pipeline has made its images, when another image begins, or with `tokdyn.reset`. In
    training, every call is one. The last 512 calls are kept.

    Raises:
        InputError: the model is not wrapped.
    """
    attachment = attached(model)
    return tuple(call.trace for call in last_trajectory(attachment.history, attachment.adapter))


@contextmanager
def dropping(model: nn.Module, rate: float) -> Iterator[None]:
    """Let TokenDrop act at a rate, in sampling too: for guidance by a prediction that saw fewer tokens.

    `ops.dropping.drop_guidance` combines the two predictions (TREAD, arXiv 2501.04765: rates 0.3 and 0.7, scale 1.5).

    Raises:
        InputError: the model has no TokenDrop, or the rate is no share below 1.
    """
    attachment = attached(model)
    if not attachment.takes("drop_rate"):
        raise InputError(f"this {type(model).__name__} is wrapped without TokenDrop, so no tokens can be dropped.")
    if not 0.0 <= rate < 1.0:
        raise InputError(f"the rate is {rate}, expected a share of the tokens in [0, 1).")
    before = attachment.settings.drop_rate
    attachment.set(drop_rate=rate)
    try:
        yield
    finally:
        attachment.set(drop_rate=before)


@torch.no_grad()
def calibrate_router(model: nn.Module, *inputs: Any, **arguments: Any) -> None:
    """Shift the bias of Chunking's router so that it asks for 1/N of the tokens of one batch.

    Args:
        model: wrapped with Chunking.
        *inputs: of a call of the model.
        **arguments: of the same.

    Raises:
        InputError: the model has no Chunking, or what is changed now would be lost or differ between processes.
    """
    attachment = attached(model)
    if not attachment.takes("calibrate_router"):
        raise InputError(f"this {type(model).__name__} is wrapped without Chunking, so it has no router.")
    if model is not inner_model(model):
        raise InputError(
            f"{type(model).__name__} holds the model, and processes would calibrate it on batches of their own; "
            f"calibrate the router of the model before, on one process or on all."
        )
    if weights_are_offloaded(model, attachment, writing=True):
        raise InputError("the weights of the methods are offloaded; calibrate the router before offloading the model.")
    attachment.set(calibrating=True)
    try:
        with untraced(attachment):
            model(*inputs, **arguments)
    finally:
        attachment.set(calibrating=False)


def reset(model: nn.Module) -> None:
    """Forget the trajectory, what caches remember of it, and its statistics: the next call begins a new one.

    Pipelines of diffusers do the same when they have made their images, except that the statistics stay to be read.

    Raises:
        InputError: the model is not wrapped.
    """
    attached(model).clear()
