"""wrap, unwrap, disabled, stats: what a user calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tokdyn.adapters import adapter_for
from tokdyn.adapters.base import ModelAdapter
from tokdyn.attach import instance
from tokdyn.attach.actors.depth_skip import Skipping
from tokdyn.attach.actors.feature_cache import Cache, FirstBlock
from tokdyn.attach.actors.token_drop import Dropping
from tokdyn.attach.actors.token_merge import Merge
from tokdyn.attach.roles import Role, argument_names, find_roles
from tokdyn.attach.run import Actors, Bracket, Branch, Gate, Record, Run
from tokdyn.compose import Placed, compose
from tokdyn.errors import InputError, UnsupportedModelError
from tokdyn.methods import DepthSkip, FeatureCache, Method, TokenDrop, TokenMerge
from tokdyn.methods.base import resolve

Model = TypeVar("Model", bound=nn.Module)
_RECORDS = 1000  # calls that are remembered: more than a trajectory has, and no more while training


class Attachment(nn.Module):
    """What a wrapped model carries: its methods, their trainable parts, their memory. Registered as `model.tokdyn`."""

    def __init__(self, adapter: ModelAdapter, methods: Sequence[Method], names: tuple[str, ...], depth: int) -> None:
        super().__init__()
        self.adapter, self.methods, self.names = adapter, tuple(methods), names
        self.placed = compose(methods, depth)
        self.actors = _actors(self.placed, depth)
        self.reduces = any(each.traits.tokens != "full" for each in self.placed)
        self.enabled = True
        self.records: list[Record] = []
        self._roles: dict[int, Role] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the roles: they know the parts of this model, not those of a copy."""
        return {**self.__dict__, "_roles": {}}

    def roles(self, model: nn.Module) -> dict[int, Role]:
        """Roles of the model's parts; a copy of the model finds its own."""
        if not self._roles:
            self._roles = find_roles(model, self.adapter, branches=bool(self.actors.branches))
        return self._roles

    def clear(self) -> None:
        """Forget the trajectory and its statistics."""
        self.records = []
        for bracket in self.actors.brackets:
            if isinstance(bracket, Cache):
                bracket.memory.clear()


def _actors(placed: Sequence[Placed], depth: int) -> Actors:
    """The methods at work, outermost first."""
    brackets: list[Bracket] = []
    gates: list[Gate] = []
    branches: list[Branch] = []
    for each in placed:
        method = each.method
        if isinstance(method, FeatureCache):
            if method.indicator == "first_block":
                brackets += [FirstBlock(), Cache(method, 1, depth - 1)]
            else:
                brackets.append(Cache(method, 0, depth - 1))
        elif isinstance(method, TokenDrop):
            assert each.traits.span is not None
            brackets.append(Dropping(method, *each.traits.span))
        elif isinstance(method, DepthSkip):
            gates.append(Skipping(method, depth))
        elif isinstance(method, TokenMerge):
            first, last = (0, depth - 1) if method.blocks is None else resolve(method.blocks, depth)
            branches.append(Merge(method, first, last))
        else:
            raise UnsupportedModelError(f"{each.name} cannot be attached to models yet.")
    return Actors(tuple(brackets), tuple(gates), tuple(branches))


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
    if attachment_of(model) is not None:
        raise InputError(f"this {type(model).__name__} is wrapped already; call tokdyn.unwrap on it first.")
    adapter = adapter_for(model)
    attachment = Attachment(
        adapter, methods, argument_names(model), sum(len(getattr(model, stack.path)) for stack in adapter.stacks)
    )
    _check_dense(model, attachment)
    roles = attachment.roles(model)
    model.tokdyn = attachment
    instance.attach(model, _call_model, _reset_stateful_cache, save_pretrained)
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


def unwrap(model: Model) -> Model:
    """Take all methods off. The class, the state dict and the outputs are what they were.

    Raises:
        InputError: the model is not wrapped.
    """
    attached(model)
    del model.tokdyn
    for part in model.modules():
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
    """What a model carries.

    Raises:
        InputError: it is not wrapped.
    """
    found = attachment_of(model)
    if found is None:
        raise InputError(f"this {type(model).__name__} is not wrapped; call tokdyn.wrap(model, methods) first.")
    return found


def _call_model(model: nn.Module, plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of the model: a run of its own."""
    attachment = attachment_of(model)
    if attachment is None or not attachment.enabled or not attachment.methods:
        before = instance.enter(None)
        try:
            return plain(model, *args, **kwargs)
        finally:
            instance.enter(before)
    adapter = attachment.adapter
    named = {**dict(zip(attachment.names, args, strict=False)), **kwargs}
    if attachment.reduces:
        _refuse(model, adapter, named)
    level = adapter.level(model, named)
    run = Run(
        model,
        adapter,
        attachment.roles(model),
        attachment.actors,
        lambda: adapter.grid(model, named),
        lambda: _levels(level),
    )
    before = instance.enter(run)
    bound = _bind_checkpointing(model, run)
    try:
        out = plain(model, *args, **kwargs)
    finally:
        instance.enter(before)
        for part, function in bound:
            part._gradient_checkpointing_func = function
    run.record.level = level
    attachment.records = [*attachment.records[1 - _RECORDS :], run.record]
    return out


def _reset_stateful_cache(model: nn.Module, hidden: Any, *args: Any, **kwargs: Any) -> None:
    """What diffusers' pipelines call when they have made their images."""
    attached(model).clear()
    if hidden is not None:
        hidden(model, *args, **kwargs)


def save_pretrained(model: nn.Module, hidden: Any, *args: Any, **kwargs: Any) -> Any:
    """The model as it was before it was wrapped; `tokdyn.save` writes the methods."""
    attachment = model._modules.pop("tokdyn")
    try:
        return hidden(model, *args, **kwargs)
    finally:
        model._modules["tokdyn"] = attachment


def _refuse(model: nn.Module, adapter: ModelAdapter, named: Mapping[str, Any]) -> None:
    """Refuse arguments that hold something for every cell where there may be fewer tokens."""
    for name, reason in adapter.refuse.items():
        value = named.get(name)
        if isinstance(value, Mapping):  # attention arguments: a LoRA scale is welcome
            value = next((key for key in value if key.startswith("ip_")), None)
        if value is not None:
            raise InputError(f"{name} cannot be used with fewer tokens in {type(model).__name__}: {reason}.")


def _levels(level: Tensor | float) -> tuple[float, ...]:
    """Noise levels on the host."""
    values = level.flatten().tolist() if isinstance(level, torch.Tensor) else [float(level)]
    return tuple(values)


def _call_part(part: nn.Module, plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of a block by its model, or of an attention or MLP by its block."""
    run: Run | None = instance.current()
    if run is None or id(part) not in run.roles:
        return plain(part, *args, **kwargs)
    role = run.roles[id(part)]

    def call(*a: Any, **k: Any) -> Any:
        return plain(part, *a, **k)

    if role.kind == "block":
        return run.block(part, role, call, args, kwargs)
    return run.branch(role, call, args, kwargs)


def _bind_checkpointing(model: nn.Module, run: Run) -> list[tuple[nn.Module, Any]]:
    """Let gradient checkpointing compute blocks again in the run that they belong to; returns what was there.

    Brackets and gates act outside of what is computed again, so nothing is drawn, decided or counted twice.
    """
    bound = []
    for part in model.modules():
        function = part.__dict__.get("_gradient_checkpointing_func")
        if function is not None:
            bound.append((part, function))
            part._gradient_checkpointing_func = _checkpointing(function, run)
    return bound


def _checkpointing(function: Any, run: Run) -> Any:
    def checkpoint(block: nn.Module, *args: Any) -> Any:
        if id(block) not in run.roles:
            return function(block, *args)

        def saving(*a: Any) -> Any:
            here = run.index, run.level  # of this block, for the time when it is computed again

            def plain(*again: Any) -> Any:
                before, now = instance.enter(run), (run.index, run.level)
                run.index, run.level = here
                try:
                    return instance.base_class(block).__call__(block, *again)
                finally:
                    run.index, run.level = now
                    instance.enter(before)

            return function(plain, *a)

        return run.block(block, run.roles[id(block)], saving, args, {})

    return checkpoint


def stats(model: nn.Module) -> Mapping[str, Any]:
    """What happened in the calls since the trajectory began, the last thousand at most."""
    return {"calls": list(attached(model).records)}
