"""Set and read what changes from call to call in a wrapped model: budgets, losses, the trajectory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tokdyn.attach.containers import inner_model
from tokdyn.attach.entry import attached
from tokdyn.attach.measuring import trajectory_apart, untraced
from tokdyn.attach.offload import weights_are_offloaded
from tokdyn.errors import InputError
from tokdyn.methods import Method
from tokdyn.trace.agreement import Agreement
from tokdyn.trace.calls import CallTrace
from tokdyn.trace.steps import last_trajectory
from tokdyn.trace.trajectory import Trajectory

Model = TypeVar("Model", bound=nn.Module)


def set_tail_drop(model: nn.Module, value: float | Tensor | Mapping[str, float] | None) -> None:
    """Set the tail drop of all following calls: the share of the kept tokens that Chunking drops as well.

    The least probable of the kept tokens are dropped, and at least one per sample stays.

    Args:
        model: a model wrapped with Chunking, or a wrapped DC-DiT.
        value: a share in [0, 1] for all samples, a (B,) tensor with one share per sample, or {"cond": .., "uncond": ..}
            with one share per guidance branch (Lite-CFG, arXiv 2603.06351 v2), where perturbed branches count as
            conditional. None restores the method's own setting.

    Raises:
        InputError: the model is not wrapped or has no Chunking, or the value is not one of these. A tensor of another
            length than the batch raises an InputError in the call.
    """
    attachment = attached(model)
    if not (attachment.takes("tail_drop") or attachment.adapter.chunked):
        raise InputError(
            f"this {type(model).__name__} is wrapped without Chunking, so it has no kept tokens to drop; wrap it with "
            "tokdyn.Chunking."
        )
    if value is None:
        attachment.set(tail_drop=None)
        return
    if isinstance(value, Mapping):
        if set(value) != {"cond", "uncond"}:
            raise InputError(f"tail_drop has the keys {sorted(value)}; give a share for 'cond' and for 'uncond'.")
        attachment.set(tail_drop={name: _share(share) for name, share in value.items()})
        return
    if isinstance(value, torch.Tensor) and value.dim() > 1:
        raise InputError(f"tail_drop has shape {tuple(value.shape)}; give one number or one for each sample, (B,).")
    given = value.flatten().tolist() if isinstance(value, torch.Tensor) else [value]
    attachment.set(tail_drop=tuple(_share(share) for share in given))


def _share(value: Any) -> float:
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise InputError(f"tail_drop is {value}; give a share between 0 and 1.")
    return share


def losses(model: nn.Module) -> dict[str, Tensor]:
    """Return the auxiliary losses of the last call, to be added to the training loss of the model.

    Read them after every forward: the next call of the model replaces them.

    Returns:
        Scalars with gradients, by the name of the method that they belong to, already multiplied by its `loss_weight`.
        Empty if the last call was not in training mode with gradients, or no method has a loss.

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
    """Let TokenDrop drop this share of the tokens while the context is open, in sampling too.

    A prediction from fewer tokens serves as the weak one of guidance: `tokdyn.ops.dropping.drop_guidance` combines two
    predictions (TREAD, arXiv 2501.04765: rates 0.3 and 0.7, scale 1.5).

    Args:
        model: a model wrapped with TokenDrop.
        rate: share of the tokens to drop, in [0, 1).

    Raises:
        InputError: the model is not wrapped or has no TokenDrop, or the rate is not in [0, 1).
    """
    attachment = attached(model)
    if not attachment.takes("drop_rate"):
        raise InputError(
            f"this {type(model).__name__} is wrapped without TokenDrop, so no tokens can be dropped; wrap it with "
            "tokdyn.TokenDrop."
        )
    if not 0.0 <= rate < 1.0:
        raise InputError(f"the rate is {rate}; give the share of the tokens to drop, at least 0 and below 1.")
    before = attachment.settings.drop_rate
    attachment.set(drop_rate=rate)
    try:
        yield
    finally:
        attachment.set(drop_rate=before)


@contextmanager
def keeping(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Let TokenMerge and TokenDrop leave the tokens of a mask alone while the context is open.

    A kept token is not merged into others, no other is merged into it, and it is not dropped. The ratio and the rate
    remain shares of all tokens, and fewer are merged or dropped only where too few others are left.

    Args:
        model: a model wrapped with TokenMerge or TokenDrop.
        mask: bool, true for what is to be kept; see `tokdyn.keeping` for its shapes.

    Raises:
        InputError: the model is not wrapped or has neither method, or the mask is not a boolean tensor. A call raises
            one if the mask does not fit its tokens or its batch, or if the call is being compiled.
    """
    attachment = attached(model)
    if not attachment.takes("keep"):
        raise InputError(
            f"this {type(model).__name__} is wrapped without a method that merges or drops tokens, so there is nothing "
            "to keep; wrap it with tokdyn.TokenMerge or tokdyn.TokenDrop."
        )
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.is_meta:
        kind = f"{mask.dtype} on {mask.device}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise InputError(f"the mask of tokens to keep is {kind}; give a boolean tensor with values, like `mask > 0`.")
    before = attachment.settings.keep
    attachment.set(keep=mask.detach().cpu())
    try:
        yield
    finally:
        attachment.set(keep=before)


@torch.no_grad()
def calibrate_router(model: nn.Module, *inputs: Any, **arguments: Any) -> None:
    """Shift the bias of Chunking's router so that, of one batch, it keeps 1/N of the tokens, with N the target.

    This calls the model once. Statistics, caches and losses stay as they are.

    Args:
        model: a model wrapped with Chunking.
        *inputs: positional arguments of the call.
        **arguments: keyword arguments of the call.

    Raises:
        InputError: the model is not wrapped or has no Chunking, is inside of a container such as
            DistributedDataParallel, or is offloaded, so that the new bias would be lost.
    """
    attachment = attached(model)
    if not attachment.takes("calibrate_router"):
        raise InputError(
            f"this {type(model).__name__} is wrapped without Chunking, so it has no router to calibrate; wrap it with "
            "tokdyn.Chunking."
        )
    if model is not inner_model(model):
        raise InputError(
            f"{type(model).__name__} holds the model, and each process would calibrate the router on another batch; "
            "call calibrate_router on the model itself, before it is put into the container."
        )
    if weights_are_offloaded(model, attachment, writing=True):
        raise InputError(
            "the weights of the methods are offloaded; call calibrate_router before offload is enabled on the model."
        )
    attachment.set(calibrating=True)
    try:
        with untraced(attachment):
            model(*inputs, **arguments)
    finally:
        attachment.set(calibrating=False)


@contextmanager
def trajectory(model: nn.Module, steps: int | None = None) -> Iterator[Trajectory]:
    """Tell a model that the calls in this context are those of one trajectory: a sampling loop of one's own.

        with tokdyn.trajectory(model, steps=len(timesteps)) as here:
            for step, timestep in enumerate(timesteps):
                here.step = step
                ...  # call the model

    Caches, budgets per guidance branch and statistics begin and end with the context, also where it ends by an error. A
    trajectory that is under way, such as that of a pipeline whose callback this is, goes on afterwards.
    Without a step, the step of each call is guessed from its noise level and its input; where the loop sets
    `here.step`, nothing is guessed and no inputs are compared. `here.branch` names the guidance branch of the calls to
    come, such as "cond", or the branches in equal parts of their batch, such as ("uncond", "cond"); without a name,
    branches are told apart by what they are conditioned on.

    Args:
        model: a wrapped model.
        steps: number of steps; then FeatureCache computes the last one.

    Yields:
        The trajectory, whose `step` and `branch` can be set.

    Raises:
        InputError: the model is not wrapped, or the number of steps is not positive.
    """
    if steps is not None and not (isinstance(steps, int) and steps >= 1):
        raise InputError(f"steps is {steps!r}; give the number of steps of the loop, at least 1, or leave it out.")
    attachment = attached(model)
    with trajectory_apart(attachment):
        attachment.end()
        attachment.trajectory.begin(steps)
        try:
            yield attachment.trajectory
        finally:
            attachment.trajectory.branch = None
            attachment.end()


def agree(model: nn.Module, group: Any) -> None:
    """Let processes decide alike which steps FeatureCache caches; see `tokdyn.agree`.

    Args:
        model: a model wrapped with FeatureCache.
        group: the processes, as a `torch.distributed` process group or a device mesh of one dimension; None lets this
            process decide alone again.

    Raises:
        InputError: the model is not wrapped or has no FeatureCache, or there is no such group.
    """
    attachment = attached(model)
    if not any("residual of all blocks" in placed.traits.owns for placed in attachment.blueprint.placed):
        raise InputError(
            f"this {type(model).__name__} is wrapped without FeatureCache, so there is nothing to agree on; wrap it "
            "with tokdyn.FeatureCache."
        )
    if group is not None and not hasattr(group, "size"):
        raise InputError(
            f"group is {group!r}; give a process group, such as torch.distributed.group.WORLD, or a device mesh."
        )
    if hasattr(group, "get_group"):
        group = group.get_group()
    attachment.set(agreement=None if group is None else Agreement(group))


def accept_methods(model: Model) -> Model:
    """Take the methods of a wrapped model as they are: no call warns that they do nothing useful, or less than asked.

    For models that are about to be trained, timed or compared, whose methods are untrained on purpose.

    Returns:
        The same object.

    Raises:
        InputError: the model is not wrapped.
    """
    attached(model).watch.settle()
    return model


def reset(model: nn.Module) -> None:
    """Forget the current trajectory, its caches and its statistics; the next call begins a new one.

    diffusers pipelines end the trajectory themselves after each image, and keep the statistics.

    Raises:
        InputError: the model is not wrapped.
    """
    attached(model).clear()
