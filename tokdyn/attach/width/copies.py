"""Build a shallow copy of a block whose linear layers are replaced by slices.

The modules on the way to these layers are copied without their weights, everything else is shared. The copy is made for
every call, so that it cannot miss what happens to the block.
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


class Places(Protocol):
    """What takes the place of what; see `tokdyn.attach.width.slices.Slice`."""

    @property
    def on(self) -> On: ...  # noqa: D102

    @property
    def sources(self) -> dict[Names, nn.Module]: ...  # noqa: D102

    @property
    def modules(self) -> dict[Names, nn.Module]: ...  # noqa: D102

    @property
    def sizes(self) -> dict[Kind, int]: ...  # noqa: D102


def sources_of(block: nn.Module, layout: Layout, on: On) -> dict[Names, nn.Module] | None:
    """List the modules to replace, in order; None if one of them, or a module around one, cannot be replaced."""
    whole: dict[Kind, bool] = {"heads": all(on.heads), "channels": all(on.channels)}
    found: dict[Names, nn.Module] = {}
    free: dict[Names, nn.Module] = {(): block}
    if not _free(block):
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
        if layer.norm is None and not _plain(free[names]):
            return None
        found[names] = free[names]
    return found


def _free(module: nn.Module) -> bool:
    """Whether nothing holds on to this very object: no hook, no forward of its own, no compiled code."""
    held = vars(module)
    if held["_forward_hooks"] or held["_forward_pre_hooks"] or held["_backward_hooks"] or held["_backward_pre_hooks"]:
        return False
    own = held.get("forward")  # hooks that were taken off leave the class's own function there, bound to the module
    if own is not None and (getattr(own, "__func__", None), getattr(own, "__self__", None)) != (
        type(module).forward,
        module,
    ):
        return False
    return held.get("_compiled_call_impl") is None


def readable(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer whose weights can be used without calling it."""
    if base_class(module) is not nn.Linear or module._parameters.get("weight") is None or not _free(module):
        return False
    return all(type(weight) in (nn.Parameter, Tensor) and not weight.is_meta for weight in weights_of(module))


def _plain(module: nn.Module) -> bool:
    """Whether a linear layer can be sliced: a slice follows its weights, but gives them no gradients."""
    wanted = torch.is_grad_enabled()
    return readable(module) and not any(
        weight.is_inference() or (wanted and weight.requires_grad) for weight in weights_of(module)
    )


def pruned_copy(block: nn.Module, layout: Layout, found: Places, sites: Mapping[int, Any]) -> nn.Module:
    """Build a copy of a block with slices in the place of layers."""
    copies: dict[Names, nn.Module] = {(): shallow(block, base_class(block))}

    def copied(names: Names) -> nn.Module:
        if names not in copies:
            above = copied(names[:-1])._modules
            original = above[names[-1]]
            assert original is not None
            copies[names] = above[names[-1]] = _part(original, sites.get(id(original)))
        return copies[names]

    for names, module in found.modules.items():
        site = sites.get(id(found.sources[names])) if layout.parallel else None
        put = module
        if site is not None:  # of a layer, which has fewer outputs or inputs now
            left = site.layer.split * found.sizes["heads"] // layout.total("heads")
            put = shallow(module, type(found.sources[names]))
            vars(put)["_tokdyn_site"] = replace(site, layer=replace(site.layer, split=left))
        copied(names[:-1])._modules[names[-1]] = put
    width = layout.width
    own = {name: found.sizes.get("channels", 0) for name in width.hiddens if name in vars(block)}
    vars(copies[()]).update(own)
    for path in width.attention:
        names = tuple(path.split("."))
        if reach(block, names) is None:
            continue
        numbers = vars(copied(names))
        heads = sum(found.on.heads)
        for attributes, value in (
            (width.counts, heads),
            (width.inners, found.sizes["heads"]),
            (width.hiddens, found.sizes.get("channels", 0)),
        ):
            numbers.update({name: value for name in attributes if name in numbers})
    return copies[()]


def _part(module: nn.Module, site: Any) -> nn.Module:
    """Copy a part of a block, which keeps its site without being known by its id."""
    if site is None:
        return shallow(module, base_class(module))
    other = shallow(module, type(module))
    vars(other)["_tokdyn_site"] = site
    return other


def shallow(module: nn.Module, kind: type) -> nn.Module:
    """Copy a module as an object of a class, with a dictionary of submodules of its own; everything else is shared."""
    made: Any = kind
    other: nn.Module = made.__new__(made)
    vars(other).update(vars(module))
    vars(other)["_modules"] = dict(module._modules)
    vars(other).pop("forward", None)  # bound to the module
    return other


def weights_of(module: nn.Module) -> list[Tensor]:
    """List the parameters that a module holds itself."""
    return [value for value in module._parameters.values() if value is not None]
