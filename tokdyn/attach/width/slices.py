"""Slice the weights of a block, so that its own code computes some heads and MLP channels alone.

The block itself is not changed; see `tokdyn.attach.width.copies`. The sliced weights are kept until other heads are
asked for or a weight changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.adapters.width import Kind
from tokdyn.attach.class_swap import base_class
from tokdyn.attach.width.copies import pruned_copy, shallow, sources_of, weights_of
from tokdyn.attach.width.layout import Layer, Layout, Names, On
from tokdyn.ops.width import kept_channels

_COMPARED = 16  # elements of each weight that are compared: a write to .data leaves no other trace


@dataclass(frozen=True)
class Snapshot:
    """Detects weights that changed since they were sliced.

    Attributes:
        weight: itself.
        version: counts its in-place changes.
        address: of its elements.
        few: a view of some of its elements.
        were: their values when it was sliced.
    """

    weight: Tensor
    version: int
    address: int
    few: Tensor
    were: Tensor

    @staticmethod
    def of(weight: Tensor) -> Snapshot:
        """Take a snapshot of a weight."""
        few = _few(weight)
        return Snapshot(weight, weight._version, weight.data_ptr(), few, few.clone())

    def same(self, weight: Tensor) -> bool:
        """Whether nothing has replaced, moved or changed the weight, writes to `.data` excepted."""
        return weight is self.weight and weight._version == self.version and weight.data_ptr() == self.address


def _few(weight: Tensor) -> Tensor:
    """View some elements of a weight, from all over it."""
    flat = weight.detach().view(-1) if weight.is_contiguous() else weight.detach()[0].reshape(-1)
    return flat[:: max(1, len(flat) // _COMPARED)][:_COMPARED]


def unwritten(snapshots: Iterable[Snapshot]) -> bool:
    """Whether no weight was written to through `.data`; the host waits for each accelerator once."""
    places: dict[torch.device, list[Snapshot]] = {}
    for each in snapshots:
        places.setdefault(each.few.device, []).append(each)
    return all(
        torch.equal(torch.cat([each.few for each in here]), torch.cat([each.were for each in here]))
        for here in places.values()
    )


class Selected(nn.Module):
    """Select outputs of a module.

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
class Slice:
    """What was sliced of a block.

    Attributes:
        on: for which heads and channels.
        sources: the layers, and the norms behind them.
        snapshots: their weights.
        modules: what takes the place of which module.
        columns: channels of the heads that are on; None if all are.
        sizes: how many heads and channels are on.
        without: for every layer that was cut, the numbers of its weight that are not in the slice.
    """

    on: On
    sources: dict[Names, nn.Module]
    snapshots: tuple[Snapshot, ...]
    modules: dict[Names, nn.Module]
    columns: Tensor | None
    sizes: dict[Kind, int]
    without: dict[Names, int]

    def holds(self, on: On, sources: dict[Names, nn.Module]) -> bool:
        """Whether the slice is still the one that is asked for."""
        if self.on != on or any(self.sources.get(names) is not module for names, module in sources.items()):
            return False
        weights = [weight for module in sources.values() for weight in weights_of(module)]
        if len(weights) != len(self.snapshots):
            return False
        return all(snapshot.same(weight) for snapshot, weight in zip(self.snapshots, weights, strict=True))


class Slices:
    """The latest slice of each block of a model. Copies of the model start without."""

    def __init__(self) -> None:
        self._of: dict[int, Slice] = {}

    def __reduce__(self) -> Any:
        return Slices, ()

    def clear(self) -> None:
        """Forget all slices."""
        self._of = {}

    def check(self) -> None:
        """Forget all slices if a weight was written to through `.data`; called once a call of the model."""
        if not unwritten(each for one in self._of.values() for each in one.snapshots):
            self.clear()

    def pruned(
        self, number: int, block: nn.Module, layout: Layout, on: On, sites: Mapping[int, Any]
    ) -> tuple[nn.Module, Slice] | None:
        """Build a block that computes some heads and channels alone.

        Args:
            number: of the block in the model.
            block: stays as it is.
            layout: of the block.
            on: what is computed.
            sites: of the model; copies of attention and MLP keep theirs.

        Returns:
            The block and its slice; None if it cannot be sliced: a layer is no plain linear layer, its weights are not
            there or want gradients, or hooks hold on to the modules.
        """
        sliceable = layout.width.sliceable
        sources = sources_of(block, layout, on) if sliceable is None or sliceable(block) else None
        if sources is None:
            self._of.pop(number, None)
            return None
        found = self._of.get(number)
        if found is None or not found.holds(on, sources):
            self._of.pop(number, None)  # before the new one is made
            found = self._of[number] = _sliced(layout, sources, on)
        return pruned_copy(block, layout, found, sites), found


@torch.inference_mode(False)
@torch.no_grad()
def _sliced(layout: Layout, sources: dict[Names, nn.Module], on: On) -> Slice:
    """Slice the weights."""
    kept = {kind: kept_channels(on.of(kind), sizes) for kind, sizes in layout.sizes.items() if sizes}
    modules: dict[Names, nn.Module] = {}
    without: dict[Names, int] = {}
    for layer in layout.layers:
        names = layer.norm or layer.names
        if names not in sources:
            continue
        source: Any = sources[names]
        device = next((weight.device for weight in weights_of(source)), torch.device("cpu"))
        if layer.norm is not None:
            modules[names] = Selected(source, _shared(layer, layout, on)[1].to(device))
        elif layer.shared > 1:
            rows, again = _shared(layer, layout, on)
            pruned = _cut(source, rows.to(device), None)
            modules[names] = Selected(pruned, _places(rows, again).to(device))
            without[names] = source.weight.numel() - pruned.weight.numel()
        else:
            rows_of = {"out": layer.out, "into": layer.into}
            index = {side: _index(kinds, kept, layout).to(device) if kinds else None for side, kinds in rows_of.items()}
            pruned = _cut(source, index["out"], index["into"])
            modules[names] = pruned
            without[names] = source.weight.numel() - pruned.weight.numel()
    columns = None if all(on.heads) else kept["heads"]
    snapshots = tuple(Snapshot.of(weight) for source in sources.values() for weight in weights_of(source))
    sizes = {kind: len(index) for kind, index in kept.items()}
    return Slice(on, dict(sources), snapshots, modules, columns, sizes, without)


def _index(kinds: tuple[Kind, ...], kept: Mapping[Kind, Tensor], layout: Layout) -> Tensor:
    """List the outputs or inputs of a layer that stay."""
    parts, start = [], 0
    for kind in kinds:
        parts.append(kept[kind] + start)
        start += layout.total(kind)
    return torch.cat(parts)


def _shared(layer: Layer, layout: Layout, on: On) -> tuple[Tensor, Tensor]:
    """List the outputs needed by heads that share keys and values, and the output of every channel of every head."""
    size = layout.sizes["heads"][0]
    groups = [head // layer.shared for head, there in enumerate(on.heads) if there]
    channels = torch.arange(size)
    again = torch.cat([group * size + channels for group in groups])
    return torch.unique(again), again


def _places(rows: Tensor, again: Tensor) -> Tensor:
    """Find each wanted output among those that are computed."""
    return torch.searchsorted(rows, again)


def _cut(layer: Any, out: Tensor | None, into: Tensor | None) -> Any:
    """Build a linear layer with some of the outputs and inputs of another."""
    weight, bias = layer.weight.detach(), layer.bias if layer.bias is None else layer.bias.detach()
    if out is not None:
        weight, bias = weight.index_select(0, out), bias if bias is None else bias.index_select(0, out)
    if into is not None:
        weight = weight.index_select(1, into)
    pruned: Any = shallow(layer, base_class(layer))
    pruned._parameters = {"weight": weight, "bias": bias}
    pruned.out_features, pruned.in_features = weight.shape
    return pruned
