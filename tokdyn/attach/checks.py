"""Decide which method can be attached to which family of models, and give the reason if it cannot.

The same rules (`_RULES`) serve `wrap`, for the user's settings, and the support matrix, for examples of every method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from tokdyn.adapters import ModelAdapter, known_adapters
from tokdyn.adapters.time import missing_time
from tokdyn.attach.sites import Site
from tokdyn.attach.width.layout import unfit
from tokdyn.compose import Placed, compose
from tokdyn.errors import CompositionError, InputError, UnsupportedModelError
from tokdyn.methods import METHODS, Chunking, Method
from tokdyn.methods.base import Sizes, Stage, Traits

_DEPTH = 28  # number of blocks assumed for a family when no model is given
_SUBLAYERS = {"attention": "attention", "mlp": "MLP"}


def unsupported(adapter: ModelAdapter, method: Method, depth: int = _DEPTH) -> str | None:
    """Return why a method with these settings cannot be attached to models of a family.

    Args:
        adapter: the adapter of the family.
        method: the method with its settings.
        depth: number of blocks of the model.

    Returns:
        A clause for a message, without a full stop; None if the method can be attached.
    """
    return _misfit(adapter, method, depth) or _clash(adapter, method, depth)


def _misfit(adapter: ModelAdapter, method: Method, depth: int) -> str | None:
    """Return the reason of the first rule that a method breaks; None if it breaks none."""
    traits = method.traits(depth)
    return next((reason for rule in _RULES if (reason := rule(adapter, method, traits))), None)


def _clash(adapter: ModelAdapter, method: Method, depth: int) -> str | None:
    """Return why a method cannot be combined with a model's own chunking; None if it can.

    `wrap` does not need this, because it composes the user's methods and the model's own.
    """
    try:
        compose((method, *own_methods(adapter)), depth)
    except CompositionError as error:
        return str(error).removesuffix(".")
    return None


def own_methods(adapter: ModelAdapter) -> tuple[Method, ...]:
    """Return methods that stand for what the models of a family do by themselves: Chunking for DC-DiT, else ()."""
    return (Chunking(),) if adapter.chunked else ()


def check(model: nn.Module, adapter: ModelAdapter, methods: Sequence[Method], sizes: Sizes) -> None:
    """Check that each of the methods can be attached to a model. Whether they go together is checked by `compose`.

    Args:
        model: the model.
        adapter: the adapter of the model.
        methods: the methods.
        sizes: depth, width and heads of the model.

    Raises:
        InputError: they are no methods in a list.
        UnsupportedModelError: one cannot; the message names the method, the model and the reason.
    """
    listed = isinstance(methods, Iterable) and not isinstance(methods, (Method, str))
    wrong = [each for each in methods if not isinstance(each, Method)] if listed else [methods]
    if wrong:
        what = "method" if listed else "list of methods"
        raise InputError(f"{wrong[0]!r} is not a {what}; give a list such as [tokdyn.TokenMerge(ratio=0.5)].")
    whole = None if adapter.whole is None else adapter.whole(model)
    for method in methods:
        reason = _misfit(adapter, method, sizes.depth)
        traits = method.traits(sizes.depth)
        if reason is None and traits.tokens != "full":
            reason = whole
        if reason is None and traits.needs_sizes and not (sizes.width and sizes.heads):
            reason = f"it needs the width and the number of heads; give the adapter {adapter.name!r} width= and heads="
        reason = reason or missing_time(model, adapter, traits.embedding)
        if reason is not None:
            raise UnsupportedModelError(f"{type(method).__name__} does not fit {type(model).__name__}: {reason}.")


def check_sublayers(model: nn.Module, methods: Sequence[Method], sites: Iterable[Site], depth: int) -> None:
    """Check that methods around attention or MLP find one in the blocks that they act on.

    Args:
        model: the model, for the message.
        methods: the methods.
        sites: all sites of the model.
        depth: number of blocks.

    Raises:
        UnsupportedModelError: none of these blocks has such a sublayer, so the method would have no effect.
    """
    present = {(site.kind, site.block) for site in sites}
    for method in methods:
        traits = method.traits(depth)
        first, last = traits.span or (0, depth - 1)
        for kind in traits.around:
            if not any((kind, block) in present for block in range(first, last + 1)):
                raise UnsupportedModelError(
                    f"{type(method).__name__} does not fit {type(model).__name__}: in blocks {first} to {last}, "
                    f"{_SUBLAYERS[kind]} is not a module of its own around which tokens could be merged; choose other "
                    "blocks, or another where=."
                )


def check_arguments(model: nn.Module, adapter: ModelAdapter, named: Mapping[str, Any], reduces: bool) -> None:
    """Check that a call has no argument that the adapter refuses: always, or with methods that reduce tokens.

    None and False pass, and so do attention arguments without an image prompt, such as a LoRA scale.

    Args:
        model: the model, for the message.
        adapter: the adapter of the model.
        named: the arguments of the call, by name.
        reduces: whether a method of the model reduces tokens.

    Raises:
        InputError: it has one; the message names the argument and the reason.
    """
    refused = {**(adapter.refuse if reduces else {}), **adapter.refuse_always}
    for name, reason in refused.items():
        value = named.get(name)
        if isinstance(value, Mapping):  # attention arguments, of which only image prompts are refused
            value = next((key for key in value if key.startswith("ip_")), None)
        if value is not None and value is not False:
            methods = "the methods of tokdyn" if name in adapter.refuse_always else "methods that reduce tokens"
            raise InputError(
                f"the argument {name} of {type(model).__name__} cannot be combined with {methods}: {reason}."
            )


def _unknown(adapter: ModelAdapter, method: Method, traits: Traits) -> str | None:
    """Refuse fewer tokens, methods inside of blocks and methods that need a grid, if the adapter declares none."""
    inside = traits.stage in (Stage.SUBLAYER, Stage.KERNEL)
    if adapter.grid is not None or not (inside or traits.tokens != "full" or traits.needs_grid):
        return None
    if not adapter.inferred:
        return f"its adapter {adapter.name!r} has no grid=; give it one, or use DepthSkip or FeatureCache"
    return (
        "no adapter is declared for it, and neither its token grid nor its arguments with one entry per token can be "
        "inferred; write an adapter as docs/adapters.md shows and call tokdyn.register_adapter on it, or use DepthSkip "
        "or FeatureCache"
    )


def _dense(adapter: ModelAdapter, method: Method, traits: Traits) -> str | None:
    """Refuse to leave tokens out of blocks that mix neighbouring cells."""
    merges = any(blocks.attention for blocks in adapter.blocks)  # around attention, which sees no neighbours
    if not adapter.dense or traits.tokens == "full" or (merges and traits.around == ("attention",)):
        return None
    cure = "TokenMerge(where='attention'), DepthSkip or FeatureCache" if merges else "DepthSkip or FeatureCache"
    return f"it leaves out tokens, but the blocks mix neighbouring cells, by a convolution for example; use {cure}"


def _complete(adapter: ModelAdapter, method: Method, traits: Traits) -> str | None:
    """Refuse to leave out tokens, or to merge them around sublayers that are not declared, where all are needed."""
    if adapter.complete is None or traits.tokens == "full":
        return None
    declared = all(any(getattr(blocks, kind) for blocks in adapter.blocks) for kind in traits.around)
    return None if traits.around and declared else adapter.complete


def _level(adapter: ModelAdapter, method: Method, traits: Traits) -> str | None:
    """Refuse settings that depend on the noise level if the adapter cannot read one."""
    if adapter.level is not None or not traits.needs_level:
        return None
    if adapter.inferred:
        return (
            "it depends on the noise level, but none of the model's arguments is called timestep, timesteps, t, time, "
            "sigma or noise_level; write an adapter as docs/adapters.md shows"
        )
    return "it depends on the noise level, but these models have none; use settings that do not depend on it"


def _sublayer(adapter: ModelAdapter, method: Method, traits: Traits) -> str | None:
    """Refuse to merge tokens around sublayers that are not modules of their own in any block."""
    missing = [
        _SUBLAYERS[kind] for kind in traits.around if not any(getattr(blocks, kind) for blocks in adapter.blocks)
    ]
    if not missing:
        return None
    return f"{' and '.join(missing)} of the blocks are not modules of their own; choose another where="


def _weighted(adapter: ModelAdapter, method: Method, traits: Traits) -> str | None:
    """Refuse to weight the keys of attention that has no softmax over the keys of all samples at once."""
    if adapter.softmax or not traits.weighs_keys:
        return None
    return (
        "weighted=True weights the keys of softmax attention, but here attention is linear, or computed for one sample "
        "after another, or over tokens of three kinds; leave weighted out"
    )


def _pruning(adapter: ModelAdapter, method: Method, traits: Traits) -> str | None:
    """Refuse to slice blocks if the adapter does not declare which weights belong to which head and channel."""
    if traits.prunes is None:
        return None
    for blocks in adapter.blocks:
        reason = unfit(blocks, traits.prunes, adapter.dense)
        if reason is not None:
            return f"the blocks in {blocks.path!r} {reason}"
    return None


_RULES: tuple[Callable[[ModelAdapter, Method, Traits], str | None], ...] = (
    _unknown, _pruning, _dense, _complete, _level, _sublayer, _weighted,
)  # fmt: skip


@dataclass(frozen=True)
class Support:
    """Whether a method can be attached to a family of models; one entry of the support matrix.

    Attributes:
        family: name of the adapter.
        method: name of the method.
        works: "yes" if all examples of the method can be attached, "partly" if some can, "no" if none can.
        refused: the reason for each example that cannot be attached, by the call that makes it, such as
            "TokenMerge(ratio=0.5)"; by the name of the method if none can, all for the same reason.
    """

    family: str
    method: str
    works: Literal["yes", "partly", "no"]
    refused: dict[str, str]


def support() -> list[Support]:
    """Compute the support matrix: one entry for each declared adapter and each registered method."""
    return [_support(adapter, method) for adapter in known_adapters() for method in METHODS.values()]


def _support(adapter: ModelAdapter, method: type[Method]) -> Support:
    reasons = {_as_call(example): unsupported(adapter, example) for example in method.examples()}
    refused = {settings: reason for settings, reason in reasons.items() if reason is not None}
    works: Any = "yes" if not refused else "no" if len(refused) == len(reasons) else "partly"
    if works == "no" and len(set(refused.values())) == 1:
        refused = {method.__name__: next(iter(refused.values()))}
    return Support(adapter.name, method.__name__, works, refused)


def _as_call(method: Method) -> str:
    """Write the call that makes a method, with the settings that were given."""
    given = ", ".join(f"{name}={getattr(method, name)!r}" for name in sorted(method.model_fields_set))
    return f"{type(method).__name__}({given})"


def reads_images(placed: Sequence[Placed], training: bool) -> bool:
    """Return whether a method that acts needs to know the generated tokens and their grid.

    Args:
        placed: the methods.
        training: whether methods act that act in training only.
    """
    needs = (each.traits.reads in ("count", "grid") and (training or "sample" in each.traits.phases) for each in placed)
    return any(needs)
