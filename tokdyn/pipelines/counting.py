"""Count the FLOPs of one call of a pipeline by component; a multiply-add is 2 FLOPs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokdyn import attach, cost
from tokdyn.attach import attachment_of, inner_model, untraced
from tokdyn.cost import Flops
from tokdyn.cost.counter import operator_formulas
from tokdyn.pipelines.denoisers import is_pipeline


def flops(target: Any, *inputs: Any, **keywords: Any) -> Flops:
    """Compute or count the FLOPs of one call of a model, or of one call of a pipeline; a multiply-add is 2 FLOPs.

    Of a model, see `tokdyn.cost.flops` for what is computed and what is counted. Of a pipeline, everything is counted,
    by component, for all steps of the call; parts that belong to no component are called "rest". A wrapped pipeline is
    called a second time without its methods, for `dense`. Statistics, caches and losses stay as they are.

        tokdyn.flops(model, x, timestep=t, class_labels=y)
        tokdyn.flops(pipe, "a red cube", num_inference_steps=28)

    Args:
        target: a `DiT`, a `DCDiT` or, with inputs, any other module; or a pipeline of diffusers.
        *inputs: positional arguments of the call.
        **keywords: keyword arguments of the call.

    Returns:
        The FLOPs of the whole batch; `.per_image` divides them by its images.

    Raises:
        InputError: there are no inputs although the cost of the model depends on them, or the model is on the meta
            device although its cost depends on values.
    """
    if not is_pipeline(target):
        return cost.flops(target, *inputs, **keywords)
    models = {name: each for name, each in target.components.items() if isinstance(each, nn.Module)}
    attachments = [each for each in map(attachment_of, map(inner_model, models.values())) if each is not None]
    acting = [each for each in attachments if each.enabled and each.methods]
    with ExitStack() as stack:
        for attachment in attachments:
            stack.enter_context(untraced(attachment))
        dense = None
        if acting:
            with ExitStack() as without:
                for model in models.values():
                    if attachment_of(inner_model(model)) is not None:
                        without.enter_context(attach.disabled(model))
                dense = _count(target, models, *_again(inputs, keywords))[0]
        total, parts, batch = _count(target, models, inputs, keywords)
    return Flops(parts, total, batch, dict(parts), dense)


def _again(inputs: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copy the generators among the arguments, so that a second call draws what the first does."""

    def fresh(value: Any) -> Any:
        if isinstance(value, torch.Generator):
            return value.clone_state()
        return [fresh(each) for each in value] if isinstance(value, list) else value

    return tuple(map(fresh, inputs)), {name: fresh(value) for name, value in keywords.items()}


def _count(
    pipe: Any, models: dict[str, nn.Module], inputs: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[int, dict[str, int], int]:
    """Call a pipeline and count.

    Returns:
        All FLOPs, those of each component that has any, and the number of images.
    """
    mode = FlopCounterMode(display=False, custom_mapping=operator_formulas())
    with torch.random.fork_rng(), mode, _shares(models, mode) as parts:
        output = pipe(*inputs, **keywords)
    total = int(mode.get_total_flops())
    rest = total - sum(parts.values())
    made: Any = output[0] if isinstance(output, tuple) else next(iter(vars(output).values()), None)
    return total, {**parts, **({"rest": rest} if rest else {})}, len(made) if hasattr(made, "__len__") else 1


@contextmanager
def _shares(models: dict[str, nn.Module], mode: FlopCounterMode) -> Iterator[dict[str, int]]:
    """Add up what is counted in each model, also where a part of it is called and not the model itself, as of a VAE."""
    parts: defaultdict[str, int] = defaultdict(int)
    inside: list[int] = []  # what was counted when the outermost module of a model was entered
    handles = []

    def enter(*_: Any) -> None:
        inside.append(int(mode.get_total_flops()))

    def leave(name: str) -> Any:
        def done(*_: Any) -> None:
            before = inside.pop()
            if not inside:
                parts[name] += int(mode.get_total_flops()) - before

        return done

    for name, model in models.items():
        for module in (model, *model.children()):
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave(name), always_call=True))
    try:
        yield parts
    finally:
        for handle in handles:
            handle.remove()
