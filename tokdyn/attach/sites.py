"""Which part of the model each attached module is, found once when a model is wrapped and again in a copy of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from tokdyn.adapters.base import ModelAdapter, Stack
from tokdyn.attach.class_swap import base_class
from tokdyn.attach.width.layout import Layer, Layout, reach
from tokdyn.errors import UnsupportedModelError


@dataclass(frozen=True)
class Role:
    """One attached module.

    Attributes:
        kind: what it is.
        block: its block, counted over all stacks.
        stack: where its block is.
        names: arguments of its forward, in order.
        layer: what a layer's outputs and inputs belong to; None for other parts.
    """

    kind: Literal["block", "attention", "mlp", "stream", "layer"]
    block: int
    stack: Stack
    names: tuple[str, ...]
    layer: Layer | None = None

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def by_name(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[dict[str, Any]], Any]:
        """The call as one that takes all arguments by name, and hands them on as they were given here."""

        def calling(named: dict[str, Any]) -> Any:
            return call(*(named[name] for name in self.names[: len(args)]), **{key: named[key] for key in kwargs})

        return calling


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, without self."""
    forward: Any = base_class(module).__dict__.get("forward") or type(module).forward
    return tuple(inspect.signature(forward).parameters)[1:]


def blocks_of(model: nn.Module, stack: Stack) -> list[nn.Module]:
    """The blocks of a stack.

    Raises:
        UnsupportedModelError: the model has none in that place.
    """
    try:
        found = model.get_submodule(stack.path)
    except AttributeError:
        found = nn.Identity()
    if not isinstance(found, (nn.ModuleList, nn.Sequential)):
        raise UnsupportedModelError(
            f"the adapter of {type(model).__name__} says that its blocks are in {stack.path!r}, and there is no list "
            "of modules there; correct the adapter."
        )
    return list(found)


def _checked(block: nn.Module, stack: Stack) -> tuple[str, ...]:
    """Names of a block's arguments.

    Raises:
        UnsupportedModelError: those that the adapter speaks of are not among them.
    """
    names = argument_names(block)
    for name in (stack.tokens, stack.text):
        if name is not None and name not in names:
            raise UnsupportedModelError(
                f"the adapter says that the blocks in {stack.path!r} hold tokens in {name!r}, but "
                f"{type(block).__name__} takes {', '.join(names)}; correct the adapter."
            )
    return names


def find_roles(
    model: nn.Module, adapter: ModelAdapter, branches: bool, layouts: Sequence[Layout] = (), stream: bool = False
) -> dict[int, Role]:
    """The role of every block, by the id of the module.

    Args:
        model: any.
        adapter: of the model.
        branches: find attention and MLP of the blocks too.
        layouts: of the blocks, to find their layers too.
        stream: find where their tokens pass between attention and MLP too.
    """
    roles: dict[int, Role] = {}
    number = 0
    for stack in adapter.stacks:
        for block in blocks_of(model, stack):
            roles[id(block)] = Role("block", number, stack, _checked(block, stack))
            parts = [("attention", stack.attention), ("mlp", stack.mlp)]
            if stream and stack.stream is not None:
                parts.append(("stream", (stack.stream,)))
            for kind, names in parts if branches else ():
                part = next((getattr(block, name) for name in names if hasattr(block, name)), None)
                if part is not None:
                    roles[id(part)] = Role(kind, number, stack, argument_names(part))  # type: ignore[arg-type]
            if layouts:
                roles |= layer_roles(block, roles[id(block)], layouts[number])
            number += 1
    return roles


def layer_roles(block: nn.Module, role: Role, layout: Layout) -> dict[int, Role]:
    """The roles of the layers of a block whose inputs or outputs may be set to zero, as they are now."""
    found = {}
    for layer in layout.layers:
        part = reach(block, layer.names)
        if part is not None and (layer.into or (layout.parallel and "channels" in layer.out)):
            found[id(part)] = Role("layer", role.block, role.stack, (), layer)
    return found
