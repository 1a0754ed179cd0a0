"""Which method works on which family of models, and why not.

`unsupported` is the one source: `wrap` asks it about the user's settings, and the support matrix about the examples of
every method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from tokdyn.adapters import ModelAdapter, known_adapters
from tokdyn.attach.sites import Site
from tokdyn.attach.width.layout import unfit
from tokdyn.compose import compose
from tokdyn.errors import CompositionError, InputError, UnsupportedModelError
from tokdyn.methods import METHODS, Chunking, Method
from tokdyn.methods.base import Sizes, Stage, Traits

_DEPTH = 28  # of a model that stands for all
_SUBLAYERS = {"attention": "attention", "mlp": "MLP"}


def unsupported(adapter: ModelAdapter, method: Method, depth: int = _DEPTH) -> str | None:
    """Say why a method with these settings cannot be attached to models of a family; None if it can.

    Args:
        adapter: of the family.
        method: the settings.
        depth: blocks of the model.
    """
    return _misfit(adapter, method, depth) or _clash(adapter, method, depth)


def _misfit(adapter: ModelAdapter, method: Method, depth: int) -> str | None:
    """Say what of a method does not fit the models."""
    traits = method.traits(depth)
    return next((reason for rule in _RULES if (reason := rule(adapter, method, traits))), None)


def _clash(adapter: ModelAdapter, method: Method, depth: int) -> str | None:
    """Say what does not go together with a model's own chunking; `wrap` leaves that to `compose`."""
    try:
        compose((method, *own_methods(adapter)), depth)
    except CompositionError as error:
        return str(error).removesuffix(".")
    return None


def own_methods(adapter: ModelAdapter) -> tuple[Method, ...]:
    """List what the models of a family do without being wrapped."""
    return (Chunking(),) if adapter.chunked else ()


def check(model: nn.Module, adapter: ModelAdapter, methods: Sequence[Method], sizes: Sizes) -> None:
    """Refuse methods that cannot be attached to a model.

    Raises:
        UnsupportedModelError: names the method, the model and why.
    """
    whole = None if adapter.whole is None else adapter.whole(model)
    for method in methods:
        reason = _misfit(adapter, method, sizes.depth)
        traits = method.traits(sizes.depth)
        if reason is None and traits.tokens != "full":
            reason = whole
        if reason is None and traits.needs_sizes and not (sizes.width and sizes.heads):
            reason = f"it needs to know the width and the heads; give the adapter {adapter.name!r} width= and heads="
        if reason is not None:
            raise UnsupportedModelError(f"{type(method).__name__} does not fit {type(model).__name__}: {reason}.")


def check_sublayers(model: nn.Module, methods: Sequence[Method], sites: Iterable[Site], depth: int) -> None:
    """Refuse methods around sublayers that none of the blocks in question has.

    Raises:
        UnsupportedModelError: the method would have no effect.
    """
    present = {(site.kind, site.block) for site in sites}
    for method in methods:
        traits = method.traits(depth)
        first, last = traits.span or (0, depth - 1)
        for kind in traits.around:
            if not any((kind, block) in present for block in range(first, last + 1)):
                raise UnsupportedModelError(
                    f"{type(method).__name__} does not fit {type(model).__name__}: none of its blocks {first} to "
                    f"{last} has an {_SUBLAYERS[kind]} of its own to merge around; choose other blocks, or another "
                    "where."
                )


def check_arguments(model: nn.Module, adapter: ModelAdapter, named: Mapping[str, Any]) -> None:
    """Refuse arguments that hold something for every cell, where blocks may see fewer tokens.

    Raises:
        InputError: names the argument and why.
    """
    for name, reason in adapter.refuse.items():
        value = named.get(name)
        if isinstance(value, Mapping):  # attention arguments: a LoRA scale is welcome
            value = next((key for key in value if key.startswith("ip_")), None)
        if value is not None and value is not False:
            raise InputError(f"{name} cannot be used with fewer tokens in {type(model).__name__}: {reason}.")


def _unknown(adapter: ModelAdapter, method: Method, traits: Traits) -> str | None:
    """Fewer tokens, or narrower blocks, need a declared adapter."""
    if adapter.grid is not None or (traits.tokens == "full" and traits.stage != Stage.KERNEL):
        return None
    if not adapter.inferred:
        return f"its adapter {adapter.name!r} has no grid=; give it one, or use DepthSkip or FeatureCache"
    return (
        "no adapter knows it, and where its tokens lie on the grid and what else has an entry for each of them cannot "
        "be inferred; write an adapter as docs/adapters.md shows and call tokdyn.register_adapter on it, or use "
        "DepthSkip or FeatureCache"
    )


def _dense(adapter: ModelAdapter, method: Method, traits: Traits) -> str | None:
    """Tokens cannot be left out of blocks that look at neighbouring cells."""
    if not adapter.dense or traits.around == ("attention",) or traits.tokens == "full":
        return None
    return (
        "it leaves out tokens, but the blocks look at neighbouring cells; use TokenMerge(where='attention'), DepthSkip "
        "or FeatureCache"
    )


def _level(adapter: ModelAdapter, method: Method, traits: Traits) -> str | None:
    """What depends on the noise level needs one."""
    if adapter.level is not None or not traits.needs_level:
        return None
    if adapter.inferred:
        return (
            "it depends on the noise level, but none of the model's arguments is called timestep, timesteps, t, time, "
            "sigma or noise_level; write an adapter as docs/adapters.md shows"
        )
    return "it depends on the noise level, and these models have none; use settings that do not"


def _sublayer(adapter: ModelAdapter, method: Method, traits: Traits) -> str | None:
    """A method around sublayers needs blocks that have them."""
    missing = [
        _SUBLAYERS[kind] for kind in traits.around if not any(getattr(blocks, kind) for blocks in adapter.blocks)
    ]
    return f"the blocks have no {' and no '.join(missing)} of their own to merge around" if missing else None


def _weighted(adapter: ModelAdapter, method: Method, traits: Traits) -> str | None:
    """Keys can be weighed in softmax attention."""
    if adapter.softmax or not traits.weighs_keys:
        return None
    return "weighted=True weighs the keys of softmax attention, and this is linear attention; leave weighted out"


def _pruning(adapter: ModelAdapter, method: Method, traits: Traits) -> str | None:
    """Blocks can be pruned where the adapter says what belongs to which head and channel."""
    if traits.prunes is None:
        return None
    for blocks in adapter.blocks:
        reason = unfit(blocks, traits.prunes, adapter.dense)
        if reason is not None:
            return f"the blocks in {blocks.path!r} {reason}"
    return None


_RULES: tuple[Callable[[ModelAdapter, Method, Traits], str | None], ...] = (
    _unknown, _pruning, _dense, _level, _sublayer, _weighted,
)  # fmt: skip


@dataclass(frozen=True)
class Support:
    """How far a method works on a family.

    Attributes:
        family: name of the adapter.
        method: name of the method.
        works: with all settings, with some, or with none.
        refused: for each kind of settings that is refused, as one writes it, why; the name of the method for all.
    """

    family: str
    method: str
    works: Literal["yes", "partly", "no"]
    refused: dict[str, str]


def support() -> list[Support]:
    """Fill the matrix of families and methods from the adapters."""
    return [_support(adapter, method) for adapter in known_adapters() for method in METHODS.values()]


def _support(adapter: ModelAdapter, method: type[Method]) -> Support:
    examples = method.examples()
    reasons = {_as_call(each): unsupported(adapter, each) for each in examples}
    refused = {settings: reason for settings, reason in reasons.items() if reason is not None}
    works: Any = "yes" if not refused else "no" if len(refused) == len(reasons) else "partly"
    if works == "no" and len(set(refused.values())) == 1:
        refused = {method.__name__: next(iter(refused.values()))}
    return Support(adapter.name, method.__name__, works, refused)


def _as_call(method: Method) -> str:
    """Write the call that makes a method, with what differs from the defaults."""
    given = ", ".join(f"{name}={getattr(method, name)!r}" for name in sorted(method.model_fields_set))
    return f"{type(method).__name__}({given})"
