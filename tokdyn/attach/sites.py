"""Which modules of a model are blocks, sublayers and layers: found when it is wrapped, and again in a copy of it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from tokdyn.adapters.base import Blocks, ModelAdapter
from tokdyn.attach.class_swap import base_class
from tokdyn.attach.width.layout import Layer, Layout, reach
from tokdyn.errors import UnsupportedModelError


@dataclass(frozen=True)
class Site:
    """One module whose calls go through the handlers.

    Attributes:
        kind: what it is; "stream" is an identity that the tokens pass between attention and MLP.
        block: index of its block, counted over all lists of blocks.
        blocks: the list that its block is in.
        names: arguments of its forward, in order.
        layer: what the outputs and inputs of a layer belong to; None for other modules.
    """

    kind: Literal["block", "attention", "mlp", "stream", "layer"]
    block: int
    blocks: Blocks
    names: tuple[str, ...]
    layer: Layer | None = None


Sites = dict[int, Site]
"""Sites by the id of their module; a module that took the place of another one is added when it is seen."""


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Name the arguments of a module's forward, without self."""
    forward: Any = base_class(module).__dict__.get("forward") or type(module).forward
    return tuple(inspect.signature(forward).parameters)[1:]


def blocks_of(model: nn.Module, blocks: Blocks) -> list[nn.Module]:
    """List the blocks of a blocks.

    Raises:
        UnsupportedModelError: the model has none in that place.
    """
    try:
        modules = model.get_submodule(blocks.path)
    except AttributeError:
        modules = nn.Identity()
    if not isinstance(modules, (nn.ModuleList, nn.Sequential)):
        raise UnsupportedModelError(
            f"the adapter of {type(model).__name__} says that its blocks are in {blocks.path!r}, and there is no list "
            "of modules there; correct the adapter."
        )
    return list(modules)


def find_sites(
    model: nn.Module,
    adapter: ModelAdapter,
    sublayers: bool,
    layouts: Sequence[Layout] = (),
    stream: bool = False,
) -> Sites:
    """Find the sites of a model.

    Args:
        model: any.
        adapter: of the model.
        sublayers: find attention and MLP of the blocks too.
        layouts: of the blocks, to find their layers too.
        stream: find where their tokens pass between attention and MLP too.

    Raises:
        UnsupportedModelError: a block does not take the arguments that the adapter speaks of.
    """
    sites: Sites = {}
    number = 0
    for blocks in adapter.blocks:
        for block in blocks_of(model, blocks):
            site = sites[id(block)] = Site("block", number, blocks, _block_arguments(block, blocks))
            kinds = [("attention", blocks.attention), ("mlp", blocks.mlp)]
            if stream and blocks.stream is not None:
                kinds.append(("stream", (blocks.stream,)))
            for kind, names in kinds if sublayers else ():
                module = next((getattr(block, name) for name in names if hasattr(block, name)), None)
                if module is not None:
                    sites[id(module)] = Site(kind, number, blocks, argument_names(module))  # type: ignore[arg-type]
            if layouts:
                sites |= layer_sites(block, site, layouts[number])
            number += 1
    return sites


def layer_sites(block: nn.Module, site: Site, layout: Layout) -> Sites:
    """Find the layers of a block whose inputs or outputs may be set to zero, as they are now."""
    sites: Sites = {}
    for layer in layout.layers:
        module = reach(block, layer.names)
        if module is not None and (layer.into or (layout.parallel and "channels" in layer.out)):
            sites[id(module)] = Site("layer", site.block, site.blocks, (), layer)
    return sites


def _block_arguments(block: nn.Module, blocks: Blocks) -> tuple[str, ...]:
    """Name a block's arguments and check that those of the adapter are among them."""
    names = argument_names(block)
    for name in (blocks.tokens, blocks.text):
        if name is not None and name not in names:
            raise UnsupportedModelError(
                f"the adapter says that the blocks in {blocks.path!r} hold tokens in {name!r}, but "
                f"{type(block).__name__} takes {', '.join(names)}; correct the adapter."
            )
    return names
