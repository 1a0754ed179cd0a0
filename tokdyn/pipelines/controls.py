"""Attach methods to models and pipelines alike, and set and read what changes from call to call in them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from tokdyn import attach, cost
from tokdyn.adapters.clock import Level
from tokdyn.attach import attachment_of, home, inner_model, is_swapped, restore_class, swap_class, trajectory_apart
from tokdyn.cost import TrajectoryStats
from tokdyn.errors import InputError
from tokdyn.methods import Method, find_method
from tokdyn.pipelines.denoisers import denoisers, is_pipeline
from tokdyn.pipelines.telling import Teller, listening
from tokdyn.presets import choose
from tokdyn.progress import tell
from tokdyn.trace.timing import Stopwatch

Target = TypeVar("Target")


def wrap(
    target: Target,
    methods: Method | Sequence[Method] | Mapping[str, Method | Sequence[Method]] | str | Path,
    level: Level | None = None,
) -> Target:
    """Attach methods to a model, or to every denoiser of a pipeline, in place. `unwrap` undoes it exactly.

    A wrapped pipeline tells its denoisers where a trajectory begins and ends, also by an error, which step a call
    belongs to and how many there are; nothing is guessed from noise levels.

    Args:
        target: a diffusion transformer, of diffusers, of tokdyn or of another library (docs/adapters.md); or a pipeline
            of diffusers that has one or several.
        methods: a method, or several in any order. The stage of a method decides where in the model it acts
            (docs/design.md); the order of the list matters only between methods of one stage. For a pipeline also
            methods for each denoiser, by the name of its component, such as {"transformer": [...], "transformer_2":
            [...]}; others stay as they are. Or a preset (docs/presets.md): "fast", for which the configuration decides
            whose it is, "FLUX.1-dev/fast", or a file of `tokdyn calibrate`; what was chosen and why is printed on
            stderr. A pipeline may share denoisers with one that was wrapped with the same methods (`from_pipe`); then
            each pipeline tells the trajectory while it is called.
        level: the values of the model's timestep at pure noise and at the image, such as (1.0, 0.0), where they cannot
            be known (SiT, and models without an adapter); or a function of the model and the arguments of a call that
            returns the noise levels, (B,) or (), where 1 is pure noise. Without it, the direction of time is assumed
            there, and held against the first calls in sampling.

    Returns:
        The same object.

    Raises:
        CompositionError: two of the methods cannot be combined.
        UnsupportedModelError: the model has no adapter, a method cannot be used on models of this kind, or the pipeline
            has no diffusion transformer.
        InputError: the model is wrapped already, an element of the list is not a method, a setting is out of range for
            this model, the pipeline has no denoiser of a given name, or no preset fits, or several do. Nothing is
            wrapped then.
    """
    if isinstance(methods, (str, Path)):
        methods = _of_preset(target, methods)
    if not is_pipeline(target):
        if isinstance(methods, Mapping):
            raise InputError(f"methods by name are for pipelines; give a list for this {type(target).__name__}.")
        attach.wrap(target, _listed(methods), level)  # type: ignore[type-var]
        return target
    models = denoisers(target)
    named = methods if isinstance(methods, Mapping) else dict.fromkeys(models, methods)
    chosen = {name: _listed(each) for name, each in named.items()}
    if not chosen:
        raise InputError(f"no denoiser is named; give methods for {', '.join(map(repr, models))}, or a list for all.")
    for name in chosen:
        if name not in models:
            raise InputError(
                f"this {type(target).__name__} has no denoiser {name!r}; it has {', '.join(map(repr, models))}."
            )
    if not is_swapped(target):  # `from_pipe` makes pipelines that share a model
        chosen = {name: each for name, each in chosen.items() if not _has(models[name], each)}
    return wrap_denoisers(target, [partial(attach.wrap, models[name], each, level) for name, each in chosen.items()])


def _listed(methods: Method | Sequence[Method]) -> Sequence[Method]:
    """Return a list of methods; a single method becomes a list of it."""
    return [methods] if isinstance(methods, Method) else methods


def _of_preset(target: Any, wanted: str | Path) -> Sequence[Method] | Mapping[str, Sequence[Method]]:
    """Choose the preset of a model or pipeline, tell which, and return its methods."""
    if not is_pipeline(target) and not isinstance(target, nn.Module):
        return []  # which `attach.wrap` refuses
    method = find_method(str(wanted))
    if method is not None:
        raise InputError(
            f"{wanted!r} is not a list of methods; give one, such as [tokdyn.{method.__name__}()], or a preset, such "
            "as 'fast'."
        )
    found = denoisers(target) if is_pipeline(target) else {"": target}
    found = {name: inner_model(model) for name, model in found.items()}
    preset = choose(target, found, wanted)
    tell(preset.why)
    return preset.methods if is_pipeline(target) else preset.methods[""]


def unwrap(target: Target) -> Target:
    """Remove all methods, in place; class, state dict and outputs are those before `wrap`.

    Args:
        target: a wrapped model, or a wrapped pipeline.

    Returns:
        The same object.

    Raises:
        InputError: it is not wrapped, or other code has changed the class of one of its modules since.
    """
    models = (
        _found(target) if is_pipeline(target) and is_swapped(target) else wrapped_denoisers(target)
    )  # or were replaced
    for model in models.values():
        attach.unwrap(model)
    if is_pipeline(target):
        restore_class(target)
    return target


def is_wrapped(target: Any) -> bool:
    """Return whether a model, or a denoiser of a pipeline, is wrapped."""
    models = denoisers(target).values() if is_pipeline(target) else [target]
    return any(attachment_of(inner_model(model)) is not None for model in models)


@contextmanager
def disabled(target: Any) -> Iterator[None]:
    """Disable the methods of a wrapped model or pipeline while the context is open: it computes bit for bit as before.

    Raises:
        InputError: it is not wrapped.
    """
    with ExitStack() as stack:
        for model in wrapped_denoisers(target).values():
            stack.enter_context(attach.disabled(model))
        yield


def reset(target: Any) -> None:
    """Forget the current trajectory, its caches and its statistics; the next call begins a new one.

    diffusers pipelines end the trajectory themselves after each image, and keep the statistics.

    Args:
        target: a wrapped model or pipeline.

    Raises:
        InputError: it is not wrapped.
    """
    for model in wrapped_denoisers(target).values():
        attach.reset(model)


@contextmanager
def beside_dense(target: Any) -> Iterator[None]:
    """Make every call in sampling a second time without methods while the context is open, to compare their times.

        with tokdyn.beside_dense(pipe):
            pipe("a red cube")
        print(tokdyn.stats(pipe))

    The statistics then say how much faster the calls are than without methods, measured under the same conditions. The
    results are those of the calls with methods; sampling takes as long as both.

    Args:
        target: a wrapped model or pipeline.

    Raises:
        InputError: it is not wrapped. A call raises one if a cache of diffusers is enabled.
    """
    with ExitStack() as stack:
        for model in wrapped_denoisers(target).values():
            stack.enter_context(attach.beside_dense(model))
        yield


@contextmanager
def keeping(target: Any, mask: Tensor) -> Iterator[None]:
    """Let TokenMerge and TokenDrop leave the tokens of a mask alone while the context is open.

        with tokdyn.keeping(pipe, mask):  # (rows, columns) bool: a face, a text, what is being edited
            pipe("a red cube")

    A kept token is not merged into others, no other is merged into it, and it is not dropped. The ratio and the rate
    remain shares of all tokens; fewer are merged or dropped only where too few others are left. The mask is about the
    generated image; tokens of reference images are left to the methods' own settings.

    Args:
        target: a model or pipeline wrapped with TokenMerge or TokenDrop.
        mask: bool, true for what is to be kept: (rows, columns) of any size, for videos also (frames, rows, columns),
            where (rows, columns) stands for every frame; a token is kept if any entry over its cell is true. Or (N,),
            one entry for each token. Or one of these for each image, on a first axis; the branches of guidance in a
            batch share them.

    Raises:
        InputError: it is not wrapped, a model has neither method, or the mask is not a boolean tensor. A call raises
            one if the mask does not fit its tokens or its batch, or if the call is being compiled.
    """
    with ExitStack() as stack:
        for model in wrapped_denoisers(target).values():
            stack.enter_context(attach.keeping(model, mask))
        yield


def set_tail_drop(target: Any, value: float | Tensor | Mapping[str, float] | None) -> None:
    """Set the tail drop of all following calls: the share of the kept tokens that Chunking drops as well.

    The least probable of the kept tokens are dropped, and at least one per sample stays.

    Args:
        target: a model or pipeline wrapped with Chunking, or a wrapped DC-DiT.
        value: a share in [0, 1] for all samples, a (B,) tensor with one share per sample, or {"cond": .., "uncond": ..}
            with one share per guidance branch (Lite-CFG, arXiv 2603.06351 v2), where perturbed branches count as
            conditional. None restores the method's own setting.

    Raises:
        InputError: the model is not wrapped or has no Chunking, or the value is not one of these. A tensor of another
            length than the batch raises an InputError in the call.
    """
    for model in wrapped_denoisers(target).values():
        attach.set_tail_drop(model, value)


def agree(target: Any, group: Any) -> None:
    """Let processes decide alike which steps FeatureCache caches: a step is cached only where all of them would.

    Without it, processes that wait for each other inside of the model may wait forever: those that compute guidance
    branches of one image, or hold shards of the weights (`fully_shard`). The processes between which diffusers splits
    the tokens (context parallelism) agree by themselves.

    Args:
        target: a model or pipeline wrapped with FeatureCache. All processes must make the same calls, with equally many
            samples.
        group: the processes, as a `torch.distributed` process group or a device mesh of one dimension; None lets this
            process decide alone again.

    Raises:
        InputError: it is not wrapped or has no FeatureCache, or there is no such group.
    """
    for model in wrapped_denoisers(target).values():
        attach.agree(model, group)


def stats(target: Any, guided: bool | None = None) -> TrajectoryStats:
    """Return what the last trajectory computed and what it cost, during it or after its end.

    A trajectory ends when a diffusers pipeline has made its images, when another image begins, or with `tokdyn.reset`.
    In training, every call is one. The last 512 calls are kept.

    Args:
        target: a wrapped model, or a wrapped pipeline, whose denoisers are taken together.
        guided: whether each batch held the two guidance branches as halves, which then have entries of their own. None
            assumes so if a tail drop was set for each branch. What a wrapped pipeline says of its batches goes before.

    Returns:
        One entry for each call and guidance branch, empty before the first call; printed, it is a table.

    Raises:
        InputError: it is not wrapped.
    """
    found = [cost.stats(model, guided) for model in wrapped_denoisers(target).values()]
    if len(found) == 1:
        return found[0]
    calls = sorted((call for each in found for call in each.calls), key=lambda call: call.step)
    short = {name: shares for each in reversed(found) for name, shares in each.shortfalls.items()}
    return TrajectoryStats(type(target).__name__, tuple(calls), found[0].pipeline_seconds, short)


def wrap_denoisers(pipe: Target, actions: Iterable[Callable[[], nn.Module]]) -> Target:
    """Wrap denoisers by actions that return them, all or none, and let the pipeline tell them the trajectory."""
    done: list[nn.Module] = []
    try:
        done.extend(action() for action in actions)
    except BaseException:
        for model in done:
            attach.unwrap(model)
        raise
    if not is_swapped(pipe):
        swap_class(pipe, _call_pipeline)
    return pipe


def wrapped_denoisers(target: Any) -> dict[str, Any]:
    """Return the wrapped denoisers of a pipeline by name, or a model itself, which the function that gets it checks.

    Raises:
        InputError: no denoiser of the pipeline is wrapped.
    """
    if not is_pipeline(target):
        return {"": target}
    found = _found(target)
    if not found:
        raise InputError(f"this {type(target).__name__} is not wrapped; call tokdyn.wrap(pipe, methods) first.")
    return found


def _found(pipe: Any) -> dict[str, Any]:
    """Return the wrapped denoisers of a pipeline by name."""
    return {name: model for name, model in denoisers(pipe).items() if attachment_of(inner_model(model)) is not None}


def _has(model: nn.Module, methods: Sequence[Method]) -> bool:
    """Return whether a model is wrapped with these methods."""
    attachment = attachment_of(inner_model(model))
    return attachment is not None and attachment.methods == tuple(methods)


def _call_pipeline(pipe: Any, plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a pipeline as one trajectory or several, which end with the call."""
    models = {name: inner_model(each) for name, each in pipe.components.items() if isinstance(each, nn.Module)}
    found = {name: attachment_of(model) for name, model in models.items()}
    attachments = {name: each for name, each in found.items() if each is not None}
    teller = Teller(pipe, attachments, _guided(pipe, plain, args, kwargs))
    timer = Stopwatch(home(next(iter(models.values()))))
    with ExitStack() as stack:
        for attachment in attachments.values():
            stack.enter_context(trajectory_apart(attachment))
        before = [(each, list(each.history), each.trajectory.pipeline) for each in attachments.values()]
        for attachment in attachments.values():
            attachment.clear()
        try:
            with listening(pipe.components, teller):
                return plain(pipe, *args, **kwargs)
        finally:
            timer.stop()
            called = any(each.records for each in attachments.values())
            for attachment, history, earlier in before:
                attachment.end()
                attachment.trajectory.pipeline = timer if called else earlier
                if not called:  # a call without methods, or one that failed early, is no trajectory
                    attachment.history[:] = history


def _guided(pipe: Any, plain: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool | None:
    """Return whether a call of a pipeline is guided, where its guidance scale says so; None where it says nothing.

    Pipelines such as PixArt and DiT guide with a scale above 1, but have no property that tells so while they run.
    """
    parameters = inspect.signature(plain).parameters
    if "guidance_scale" not in parameters:
        return None
    try:
        given = inspect.signature(plain).bind(pipe, *args, **kwargs)
    except TypeError:  # the call is going to fail
        return None
    given.apply_defaults()
    scale = given.arguments["guidance_scale"]
    return scale > 1.0 if isinstance(scale, (int, float)) else None
