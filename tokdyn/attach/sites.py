"""Find the modules of a model whose calls go through the handlers: its blocks, their sublayers and layers.

Modules are found when the model is wrapped, and again in a copy of the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from tokdyn.adapters.base import Blocks, ModelAdapter
from tokdyn.adapters.structure import submodule
from tokdyn.adapters.time import time_embedder
from tokdyn.attach.class_swap import attach, attach_like, base_class, current, is_attached
from tokdyn.attach.width.layout import Layer, Layout, reach
from tokdyn.errors import UnsupportedModelError


@dataclass(frozen=True)
class Site:
    """The role of one module whose calls go through the handlers.

    Attributes:
        kind: the role; "stream" is an identity module through which tokens pass between attention and MLP
            (`Blocks.stream`), and "layer" a linear layer that DynamicWidth slices or masks.
        block: index of the block that the module is or is in, counted over all lists of blocks.
        blocks: the adapter's declaration of the list that this block is in.
        names: names of the arguments of the module's forward, in order; () for a layer.
        layer: which outputs and inputs of a layer belong to heads and MLP channels; None for other modules.
        tokens: name of the argument that holds the image tokens; "" for a layer.
        returned: position and name of the arguments that a skipped block returns as they are; () for other modules.
    """

    kind: Literal["block", "attention", "mlp", "stream", "layer"]
    block: int
    blocks: Blocks
    names: tuple[str, ...]
    layer: Layer | None = None
    tokens: str = field(init=False)
    returned: tuple[tuple[int, str], ...] = field(init=False)

    def __post_init__(self) -> None:
        given = {"tokens": self.blocks.tokens, "text": self.blocks.text or ""}
        named = [given.get(name, name) for name in self.blocks.returns] if self.kind == "block" else []
        places = tuple((self.names.index(name) if name in self.names else len(self.names), name) for name in named)
        own = self.blocks.tokens if self.blocks.tokens in self.names else next(iter(self.names), "")
        object.__setattr__(self, "returned", places)
        object.__setattr__(self, "tokens", own)

    def unchanged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a skipped block returns: the tokens of all streams that it was given."""
        if len(self.returned) == 1:
            place, name = self.returned[0]
            return args[place] if place < len(args) else kwargs.get(name)
        given = [args[place] if place < len(args) else kwargs.get(name) for place, name in self.returned]
        return tuple(given)


Sites = dict[int, Site]
"""Sites by the id of their module. A module that replaces another after wrapping is added when its block is called."""


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments of a module's forward, in order and without self."""
    forward: Any = base_class(module).__dict__.get("forward") or type(module).forward
    return tuple(inspect.signature(forward).parameters)[1:]


def blocks_of(model: nn.Module, blocks: Blocks) -> list[nn.Module]:
    """Return the modules in one of a model's lists of blocks.

    Raises:
        UnsupportedModelError: there is no list of modules at `blocks.path`.
    """
    try:
        modules = model.get_submodule(blocks.path)
    except AttributeError:
        modules = nn.Identity()
    if not isinstance(modules, (nn.ModuleList, nn.Sequential)):
        raise UnsupportedModelError(
            f"the adapter of {type(model).__name__} declares blocks in {blocks.path!r}, but the model has no "
            "nn.ModuleList or nn.Sequential there; correct the path in the adapter."
        )
    return list(modules)


def find_sites(
    model: nn.Module,
    adapter: ModelAdapter,
    sublayers: bool,
    layouts: Sequence[Layout] = (),
    stream: bool = False,
) -> Sites:
    """Find the blocks of a model and, on request, the modules inside of them that methods need.

    Args:
        model: the model, wrapped or not.
        adapter: the adapter of the model.
        sublayers: whether to find attention and MLP of the blocks too.
        layouts: one for each block, to find the layers that can be sliced or masked too; () leaves the layers out.
        stream: whether to find the modules of kind "stream" too, if `sublayers` is set.

    Raises:
        UnsupportedModelError: there are no blocks where the adapter declares them, or a block lacks an argument that
            the adapter names.
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
                module = next((found for name in names if (found := submodule(block, name)) is not None), None)
                if module is not None:
                    sites[id(module)] = Site(kind, number, blocks, argument_names(module))  # type: ignore[arg-type]
            if layouts:
                sites |= layer_sites(block, site, layouts[number])
            number += 1
    return sites


def attach_time_embedder(model: nn.Module, adapter: ModelAdapter) -> None:
    """Let the module that embeds the timestep note what it returns, for methods that read it."""
    embedder = time_embedder(model, adapter)
    if embedder is not None and not is_attached(embedder):
        attach(embedder, _note_time)


def _note_time(module: nn.Module, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the module that embeds the timestep; the first call of it in a call of the model is noted."""
    out, frame = plain(module, *args, **kwargs), current()
    if frame is not None and frame.context.readings.time is None:
        frame.context.readings.time = out[0] if isinstance(out, tuple) else out
    return out


def layer_sites(block: nn.Module, site: Site, layout: Layout) -> Sites:
    """Find the layers that a block has now and whose inputs or outputs may be multiplied by masks.

    Args:
        block: the module.
        site: the site of the block.
        layout: the layout of the block.
    """
    sites: Sites = {}
    for layer in layout.layers:
        module = reach(block, layer.names)
        if module is not None and (layer.into or (layout.parallel and "channels" in layer.out)):
            sites[id(module)] = Site("layer", site.block, site.blocks, (), layer)
    return sites


def attach_layers(sites: Sites, block: nn.Module, site: Site, layout: Layout, only_tokens: bool = False) -> None:
    """Attach the layers of a block that are not attached yet, such as LoRA layers added after wrapping.

    Args:
        sites: the sites of the model, which are updated.
        block: the block, which is attached.
        site: the site of the block.
        layout: the layout of the block.
        only_tokens: whether tokens of the MLP are selected, but neither heads nor channels are masked. Layers are then
            needed only if the MLP is not a module of its own.
    """
    if only_tokens and not layout.parallel:
        return
    for key, layer_site in layer_sites(block, site, layout).items():
        assert layer_site.layer is not None
        module = reach(block, layer_site.layer.names)
        assert module is not None
        known = sites.get(key)  # may belong to a deleted layer whose id is used again
        if known is not None and known.layer is layer_site.layer and is_attached(module):
            continue
        for inside in module.modules():  # an adapter layer replaced the layer that it holds now
            sites.pop(id(inside), None)
        attach_like(module, block)
        sites[key] = layer_site


def _block_arguments(block: nn.Module, blocks: Blocks) -> tuple[str, ...]:
    """Return the names of a block's arguments, after checking that the adapter's names are among them."""
    names = argument_names(block)
    for name in (blocks.tokens, blocks.text, *blocks.streams):
        if name is not None and name not in names:
            raise UnsupportedModelError(
                f"the adapter says that the blocks in {blocks.path!r} take tokens as the argument {name!r}, but "
                f"{type(block).__name__} takes {', '.join(names)}; correct the adapter."
            )
    return names
