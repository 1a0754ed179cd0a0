"""Build a shallow copy of a block whose linear layers are replaced by slices.

Modules on the path to these layers are copied without their weights; everything else is shared with the block. The copy
is made for every call, so that it always reflects the present state of the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokdyn.adapters.width import Kind
from tokdyn.attach.class_swap import base_class
from tokdyn.attach.width.layout import Layout, Names, On, reach


class Replacements(Protocol):
    """Which modules replace which; see the attributes of `tokdyn.attach.width.slices.Slice`."""

    @property
    def on(self) -> On: ...  # noqa: D102

    @property
    def sources(self) -> dict[Names, nn.Module]: ...  # noqa: D102

    @property
    def modules(self) -> dict[Names, nn.Module]: ...  # noqa: D102

    @property
    def sizes(self) -> dict[Kind, int]: ...  # noqa: D102


def sources_of(block: nn.Module, layout: Layout, on: On) -> dict[Names, nn.Module] | None:
    """Return the modules of a block to replace by slices, by their names on the path from the block.

    Args:
        block: the block.
        layout: the layout of the block.
        on: the heads and channels to compute.

    Returns:
        The modules; None if one of them, or a module on the path to it, cannot be replaced safely.
    """
    whole: dict[Kind, bool] = {"heads": all(on.heads), "channels": all(on.channels)}
    sources: dict[Names, nn.Module] = {}
    free: dict[Names, nn.Module] = {(): block}
    if not _free(block, compiled=True):
        return None
    for layer in layout.layers:
        if all(whole[kind] for kind in layer.out or layer.into):
            continue
        names = layer.norm or layer.names
        for end in range(1, len(names) + 1):
            if names[:end] in free:
                continue
            module = free[names[: end - 1]]._modules.get(names[end - 1])
            if module is None or not _free(module):
                return None
            free[names[:end]] = module
        if layer.norm is None and not _sliceable(free[names]):
            return None
        sources[names] = free[names]
    return sources


def _free(module: nn.Module, compiled: bool = False) -> bool:
    """Return whether a copy can stand in for a module: it has no hook, no forward of its own, no compiled code.

    `compiled` is whether it may have compiled code, which its copy does not run.
    """
    held = vars(module)
    if held["_forward_hooks"] or held["_forward_pre_hooks"] or held["_backward_hooks"] or held["_backward_pre_hooks"]:
        return False
    own = held.get("forward")  # hooks that were removed leave the class's own function there, bound to the module
    if own is not None and (getattr(own, "__func__", None), getattr(own, "__self__", None)) != (
        type(module).forward,
        module,
    ):
        return False
    return compiled or held.get("_compiled_call_impl") is None


def readable(module: nn.Module) -> bool:
    """Return whether a module is an nn.Linear whose weights can be used directly, without calling the module."""
    if base_class(module) is not nn.Linear or module._parameters.get("weight") is None or not _free(module):
        return False
    return all(type(weight) in (nn.Parameter, Tensor) and not weight.is_meta for weight in weights_of(module))


def _sliceable(module: nn.Module) -> bool:
    """Return whether a linear layer can be sliced: a slice passes no gradients on to the weights that it is made of."""
    wanted = torch.is_grad_enabled()
    return readable(module) and not any(
        weight.is_inference() or (wanted and weight.requires_grad) for weight in weights_of(module)
    )


def pruned_copy(block: nn.Module, layout: Layout, slices: Replacements, sites: Mapping[int, Any]) -> nn.Module:
    """Build a shallow copy of a block whose layers are replaced by slices, and whose numbers of heads fit them.

    Args:
        block: the block, which is not changed.
        layout: the layout of the block.
        slices: the slices.
        sites: the sites of the model; copies of modules in it keep their sites.
    """
    copies: dict[Names, nn.Module] = {(): shallow(block, base_class(block))}

    def copied(names: Names) -> nn.Module:
        if names not in copies:
            above = copied(names[:-1])._modules
            original = above[names[-1]]
            assert original is not None
            copies[names] = above[names[-1]] = _copy_with_site(original, sites.get(id(original)))
        return copies[names]

    for names, module in slices.modules.items():
        site = sites.get(id(slices.sources[names])) if layout.parallel else None
        replacement = module
        if site is not None:  # the site of a layer, which has fewer outputs or inputs now
            left = site.layer.split * slices.sizes["heads"] // layout.total("heads")
            replacement = shallow(module, type(slices.sources[names]))
            vars(replacement)["_tokdyn_site"] = replace(site, layer=replace(site.layer, split=left))
        copied(names[:-1])._modules[names[-1]] = replacement
    width = layout.width
    own = {name: slices.sizes.get("channels", 0) for name in width.hiddens if name in vars(block)}
    vars(copies[()]).update(own)
    if width.per_head and not all(slices.on.heads):
        parameters: dict[str, Any] = dict(block._parameters)
        parameters |= {name: block.get_parameter(name)[torch.tensor(slices.on.heads)] for name in width.per_head}
        vars(copies[()])["_parameters"] = parameters
    for path in width.attention:
        names = tuple(path.split("."))
        if reach(block, names) is None:
            continue
        numbers = vars(copied(names))
        changed = [(width.hiddens, slices.sizes.get("channels", 0))]
        if not all(slices.on.heads):  # slices compute keys and values of every head, also where heads shared them
            changed += [(width.counts, sum(slices.on.heads)), (width.inners, slices.sizes["heads"])]
        for attributes, value in changed:
            numbers.update({name: value for name in attributes if name in numbers})
    return copies[()]


def _copy_with_site(module: nn.Module, site: Any) -> nn.Module:
    """Copy a module with its site, which is stored in the copy because sites are looked up by the id of a module."""
    if site is None:
        return shallow(module, base_class(module))
    other = shallow(module, type(module))
    vars(other)["_tokdyn_site"] = site
    return other


def shallow(module: nn.Module, kind: type) -> nn.Module:
    """Copy a module as an object of the class `kind`, with a dictionary of submodules of its own.

    Everything else, such as parameters, is shared with the module.
    """
    untyped: Any = kind
    other: nn.Module = untyped.__new__(untyped)
    vars(other).update(vars(module))
    vars(other)["_modules"] = dict(module._modules)
    for name in ("forward", "_compiled_call_impl"):  # bound to the original
        vars(other).pop(name, None)
    return other


def weights_of(module: nn.Module) -> list[Tensor]:
    """Return the parameters that a module holds itself, without those of submodules."""
    return [value for value in module._parameters.values() if value is not None]
