"""A block computed for some heads and MLP channels alone: the same code on sliced weights.

The block itself is not changed. A narrow one is a shallow copy: the modules on the way to the layers that are cut are
copied without their weights, everything else is shared. The copy is made for every call, so that it cannot miss what
happens to the block; the sliced weights are kept until other heads are asked for or a weight changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokdyn.adapters.width import Kind
from tokdyn.attach.instance import base_class
from tokdyn.attach.layout import Layer, Layout, Names, reach
from tokdyn.ops.width import kept_channels


class On(NamedTuple):
    """Which of the heads, and of the groups of MLP channels, are on; at least one of each that there are."""

    heads: tuple[bool, ...]
    channels: tuple[bool, ...]

    def of(self, kind: Kind) -> tuple[bool, ...]:
        """One of them."""
        return self.heads if kind == "heads" else self.channels


_SAMPLES = 16  # numbers of each weight that are compared: what writes to .data leaves no other trace


class Selected(nn.Module):
    """A module whose outputs are selected.

    Args:
        inner: any module.
        index: (n,) int64, along the last axis of what it returns.
    """

    def __init__(self, inner: nn.Module, index: Tensor) -> None:
        super().__init__()
        self.inner, self.index = inner, index

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., n)."""
        out: Tensor = self.inner(x)
        return out.index_select(-1, self.index)


@dataclass(frozen=True)
class Seen:
    """A weight as it was when it was sliced.

    Attributes:
        weight: itself.
        version: counts what was done to it in place.
        address: of its numbers.
        few: some of its numbers, as they are now.
        were: the same as they were.
    """

    weight: Tensor
    version: int
    address: int
    few: Tensor
    were: Tensor

    @staticmethod
    def of(weight: Tensor) -> Seen:
        """The weight as it is."""
        few = _few(weight)
        return Seen(weight, weight._version, weight.data_ptr(), few, few.clone())

    def same(self, weight: Tensor) -> bool:
        """Whether nothing has replaced, moved or changed it, writes to `.data` excepted."""
        return weight is self.weight and weight._version == self.version and weight.data_ptr() == self.address


def _few(weight: Tensor) -> Tensor:
    """Some of the numbers of a weight, from all over it."""
    flat = weight.detach().view(-1) if weight.is_contiguous() else weight.detach()[0].reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES]


@dataclass(frozen=True)
class Slice:
    """What was sliced of a block.

    Attributes:
        on: for which heads and channels.
        sources: the layers, and the norms behind them.
        seen: their weights.
        modules: what takes the place of which module.
        columns: channels of the heads that are on; None if all are.
        sizes: how many heads and channels are on.
    """

    on: On
    sources: dict[Names, nn.Module]
    seen: tuple[Seen, ...]
    modules: dict[Names, nn.Module]
    columns: Tensor | None
    sizes: dict[Kind, int]

    def holds(self, on: On, sources: dict[Names, nn.Module]) -> bool:
        """Whether it is still what is asked for."""
        if self.on != on or any(self.sources.get(names) is not module for names, module in sources.items()):
            return False
        weights = (weight for names in sources for weight in _weights(sources[names]))
        return all(seen.same(weight) for seen, weight in zip(self.seen, weights, strict=True))


class Slices:
    """The slices of a model's blocks, the last of each. Copies of the model start without."""

    def __init__(self) -> None:
        self._of: dict[int, Slice] = {}

    def __reduce__(self) -> Any:
        return Slices, ()

    def clear(self) -> None:
        """Let all weights go."""
        self._of = {}

    def check(self) -> None:
        """Forget everything if a weight was written to behind its back; asked once in a call of the model."""
        seen: dict[torch.device, list[Seen]] = {}
        for one in self._of.values():
            for each in one.seen:
                seen.setdefault(each.few.device, []).append(each)
        for here in seen.values():
            if not torch.equal(torch.cat([each.few for each in here]), torch.cat([each.were for each in here])):
                self.clear()
                return

    def narrow(
        self, number: int, block: nn.Module, layout: Layout, on: On, roles: Mapping[int, Any]
    ) -> tuple[nn.Module, Slice] | None:
        """A block that computes some heads and channels alone.

        Args:
            number: of the block in the model.
            block: stays as it is.
            layout: of the block.
            on: what is computed.
            roles: of the model's parts; copies of attention and MLP keep theirs.

        Returns:
            The block and its slice; None if it cannot be sliced: a layer is no plain linear layer, its weights are not
            there or want gradients, or hooks hold on to the modules.
        """
        known = layout.width.known
        sources = _sources(block, layout, on) if known is None or known(block) else None
        if sources is None:
            self._of.pop(number, None)
            return None
        found = self._of.get(number)
        if found is None or not found.holds(on, sources):
            self._of.pop(number, None)  # before the new one is made
            found = self._of[number] = _sliced(layout, sources, on)
        return _copy(block, layout, found, roles), found


def _weights(module: nn.Module) -> list[Tensor]:
    return [value for value in module._parameters.values() if value is not None]


def _sources(block: nn.Module, layout: Layout, on: On) -> dict[Names, nn.Module] | None:
    """The modules that are replaced, in order; None if one of them, or of those around it, cannot be."""
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
    """Whether nothing holds on to this very object: a hook, a forward of its own, or compiled code."""
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
    """Whether it is a linear layer, no subclass, whose weights can be used without calling it."""
    if base_class(module) is not nn.Linear or module._parameters.get("weight") is None or not _free(module):
        return False
    return all(type(weight) in (nn.Parameter, Tensor) and not weight.is_meta for weight in _weights(module))


def _plain(module: nn.Module) -> bool:
    """Whether a linear layer can be sliced: a slice follows its weights, but gives them no gradients."""
    wanted = torch.is_grad_enabled()
    return readable(module) and not any(
        weight.is_inference() or (wanted and weight.requires_grad) for weight in _weights(module)
    )


@torch.inference_mode(False)
@torch.no_grad()
def _sliced(layout: Layout, sources: dict[Names, nn.Module], on: On) -> Slice:
    """Slice the weights."""
    kept = {kind: kept_channels(on.of(kind), sizes) for kind, sizes in layout.sizes.items() if sizes}
    modules: dict[Names, nn.Module] = {}
    for layer in layout.layers:
        names = layer.norm or layer.names
        if names not in sources:
            continue
        source = sources[names]
        device = next((weight.device for weight in _weights(source)), torch.device("cpu"))
        if layer.norm is not None:
            modules[names] = Selected(source, _shared(layer, layout, on)[1].to(device))
        elif layer.shared > 1:
            rows, again = _shared(layer, layout, on)
            narrow = _cut(source, rows.to(device), None)
            modules[names] = Selected(narrow, _places(rows, again).to(device))
        else:
            rows_of = {"out": layer.out, "into": layer.into}
            index = {side: _index(kinds, kept, layout).to(device) if kinds else None for side, kinds in rows_of.items()}
            modules[names] = _cut(source, index["out"], index["into"])
    columns = None if all(on.heads) else kept["heads"]
    seen = tuple(Seen.of(weight) for source in sources.values() for weight in _weights(source))
    return Slice(on, dict(sources), seen, modules, columns, {kind: len(index) for kind, index in kept.items()})


def _index(kinds: tuple[Kind, ...], kept: Mapping[Kind, Tensor], layout: Layout) -> Tensor:
    """Which outputs or inputs of a layer stay."""
    parts, start = [], 0
    for kind in kinds:
        parts.append(kept[kind] + start)
        start += layout.total(kind)
    return torch.cat(parts)


def _shared(layer: Layer, layout: Layout, on: On) -> tuple[Tensor, Tensor]:
    """For heads that share keys and values: the outputs that are needed, and that for every channel of every head."""
    size = layout.sizes["heads"][0]
    groups = [head // layer.shared for head, there in enumerate(on.heads) if there]
    channels = torch.arange(size)
    again = torch.cat([group * size + channels for group in groups])
    return torch.unique(again), again


def _places(rows: Tensor, again: Tensor) -> Tensor:
    """Where each of the outputs wanted is among those that are computed."""
    return torch.searchsorted(rows, again)


def _cut(layer: Any, out: Tensor | None, into: Tensor | None) -> nn.Module:
    """A linear layer with some of the outputs and inputs of another."""
    weight, bias = layer.weight.detach(), layer.bias if layer.bias is None else layer.bias.detach()
    if out is not None:
        weight, bias = weight.index_select(0, out), bias if bias is None else bias.index_select(0, out)
    if into is not None:
        weight = weight.index_select(1, into)
    narrow: Any = _shallow(layer, base_class(layer))
    narrow._parameters = {"weight": weight, "bias": bias}
    narrow.out_features, narrow.in_features = weight.shape
    return narrow  # type: ignore[no-any-return]


def _copy(block: nn.Module, layout: Layout, found: Slice, roles: Mapping[int, Any]) -> nn.Module:
    """The block with slices in the place of layers."""
    copies: dict[Names, nn.Module] = {(): _shallow(block, base_class(block))}

    def copied(names: Names) -> nn.Module:
        if names not in copies:
            above = copied(names[:-1])._modules
            original = above[names[-1]]
            assert original is not None
            copies[names] = above[names[-1]] = _part(original, roles.get(id(original)))
        return copies[names]

    for names, module in found.modules.items():
        role = roles.get(id(found.sources[names])) if layout.parallel else None
        put = module
        if role is not None:  # of a layer, which has fewer outputs or inputs now
            left = role.layer.split * found.sizes["heads"] // layout.total("heads")
            put = _shallow(module, type(found.sources[names]))
            vars(put)["_tokdyn_role"] = replace(role, layer=replace(role.layer, split=left))
        copied(names[:-1])._modules[names[-1]] = put
    width = layout.width
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


def _part(module: nn.Module, role: Any) -> nn.Module:
    """A shallow copy of a part of a block, which keeps its role without being known by its id."""
    if role is None:
        return _shallow(module, base_class(module))
    other = _shallow(module, type(module))
    vars(other)["_tokdyn_role"] = role
    return other


def _shallow(module: nn.Module, kind: type) -> nn.Module:
    """The same module as another object, of that class, with a list of parts of its own."""
    made: Any = kind
    other: nn.Module = made.__new__(made)
    vars(other).update(vars(module))
    vars(other)["_modules"] = dict(module._modules)
    vars(other).pop("forward", None)  # bound to the module
    return other
