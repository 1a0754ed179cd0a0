"""Slice the weights of a block, so that the block's own code computes some heads and MLP channels only.

The block itself is not changed; see `tokdyn.attach.width.copies`. Sliced weights are kept until other heads or channels
are wanted or a weight has changed.
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

_COMPARED = 16  # elements of each weight that are compared, because a write to .data can be detected in no other way


@dataclass(frozen=True)
class Snapshot:
    """Detects whether a weight has changed since it was sliced.

    Attributes:
        weight: the weight.
        version: the number of in-place changes to it at that time.
        address: the address of its elements at that time.
        few: a view of some of its elements, which always has their present values.
        before: a copy of these elements from that time.
    """

    weight: Tensor
    version: int
    address: int
    few: Tensor
    before: Tensor

    @staticmethod
    def of(weight: Tensor) -> Snapshot:
        """Take a snapshot of a weight."""
        few = _few(weight)
        return Snapshot(weight, weight._version, weight.data_ptr(), few, few.clone())

    def same(self, weight: Tensor) -> bool:
        """Return whether `weight` is the same tensor, neither moved nor changed. Writes to `.data` are not detected."""
        return weight is self.weight and weight._version == self.version and weight.data_ptr() == self.address


def _few(weight: Tensor) -> Tensor:
    """Return a view of a few elements that are spread over a weight."""
    flat = weight.detach().view(-1) if weight.is_contiguous() else weight.detach()[0].reshape(-1)
    return flat[:: max(1, len(flat) // _COMPARED)][:_COMPARED]


def unwritten(snapshots: Iterable[Snapshot]) -> bool:
    """Return whether none of the weights was written to through `.data`. Synchronises with each device once."""
    by_device: dict[torch.device, list[Snapshot]] = {}
    for snapshot in snapshots:
        by_device.setdefault(snapshot.few.device, []).append(snapshot)
    return all(
        torch.equal(torch.cat([one.few for one in same]), torch.cat([one.before for one in same]))
        for same in by_device.values()
    )


class Selected(nn.Module):
    """Calls a module and selects some of its outputs.

    Args:
        inner: the module, which returns one tensor.
        index: (n,) int64 outputs to select, along the last axis.
    """

    def __init__(self, inner: nn.Module, index: Tensor) -> None:
        super().__init__()
        self.inner, self.index = inner, index

    def forward(self, x: Tensor) -> Tensor:
        """Return `inner(x)` (..., C) reduced to the selected outputs (..., n)."""
        out: Tensor = self.inner(x)
        return out.index_select(-1, self.index)


@dataclass(frozen=True)
class Slice:
    """The slices of one block's layers.

    Attributes:
        on: the heads and channels that the slices compute.
        sources: the modules that the slices replace, layers or the norms after them, by their paths from the block.
        snapshots: snapshots of their weights.
        modules: the slices, by the same paths.
        columns: (n,) int64 channels of the heads that are on, among those of all heads; None if all heads are on.
        sizes: number of channels of the heads that are on, and of the MLP channels that are on.
        without: for every sliced layer, the number of elements of its weight that the slice lacks.
    """

    on: On
    sources: dict[Names, nn.Module]
    snapshots: tuple[Snapshot, ...]
    modules: dict[Names, nn.Module]
    columns: Tensor | None
    sizes: dict[Kind, int]
    without: dict[Names, int]

    def holds(self, on: On, sources: dict[Names, nn.Module]) -> bool:
        """Return whether these are slices for the heads and channels `on`, of these modules with their present weights.

        Writes to `.data` are not detected; see `unwritten`.
        """
        if self.on != on or any(self.sources.get(names) is not module for names, module in sources.items()):
            return False
        weights = [weight for module in sources.values() for weight in weights_of(module)]
        if len(weights) != len(self.snapshots):
            return False
        return all(snapshot.same(weight) for snapshot, weight in zip(self.snapshots, weights, strict=True))


class Slices:
    """The latest slices of each block of a model. A copy of the model starts without slices."""

    def __init__(self) -> None:
        self._by_block: dict[int, Slice] = {}

    def __reduce__(self) -> Any:
        return Slices, ()

    def clear(self) -> None:
        """Drop all slices."""
        self._by_block = {}

    def check(self) -> None:
        """Drop all slices if a weight was written to through `.data`; to be called once in a call of the model."""
        if not unwritten(snapshot for one in self._by_block.values() for snapshot in one.snapshots):
            self.clear()

    def pruned(
        self, number: int, block: nn.Module, layout: Layout, on: On, sites: Mapping[int, Any]
    ) -> tuple[nn.Module, Slice] | None:
        """Build a copy of a block that computes some heads and channels only.

        Args:
            number: index of the block in the model.
            block: the block, which is not changed.
            layout: the layout of the block.
            on: the heads and channels to compute.
            sites: the sites of the model; the copies of attention and MLP keep theirs.

        Returns:
            The copy and its slices. None if the block cannot be sliced safely: a layer is not an nn.Linear, its weights
            are offloaded or require gradients, or a module has hooks.
        """
        sliceable = layout.width.sliceable
        sources = sources_of(block, layout, on) if sliceable is None or sliceable(block) else None
        if sources is None:
            self._by_block.pop(number, None)
            return None
        slices = self._by_block.get(number)
        if slices is None or not slices.holds(on, sources):
            self._by_block.pop(number, None)  # frees its memory before the new one is made
            slices = self._by_block[number] = _slice_layers(layout, sources, on)
        return pruned_copy(block, layout, slices, sites), slices


@torch.inference_mode(False)
@torch.no_grad()
def _slice_layers(layout: Layout, sources: dict[Names, nn.Module], on: On) -> Slice:
    """Slice `sources`, layers of a block and norms after them, for the heads and channels that are on."""
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
            pruned = _slice_linear(source, rows.to(device), None)
            modules[names] = Selected(pruned, torch.searchsorted(rows, again).to(device))
            without[names] = source.weight.numel() - pruned.weight.numel()
        else:
            rows_of = {"out": layer.out, "into": layer.into}
            index = {side: _index(kinds, kept, layout).to(device) if kinds else None for side, kinds in rows_of.items()}
            pruned = _slice_linear(source, index["out"], index["into"])
            modules[names] = pruned
            without[names] = source.weight.numel() - pruned.weight.numel()
    columns = None if all(on.heads) else kept["heads"]
    snapshots = tuple(Snapshot.of(weight) for source in sources.values() for weight in weights_of(source))
    sizes = {kind: len(index) for kind, index in kept.items()}
    return Slice(on, dict(sources), snapshots, modules, columns, sizes, without)


def _index(kinds: tuple[Kind, ...], kept: Mapping[Kind, Tensor], layout: Layout) -> Tensor:
    """Return the indices of a layer's outputs or inputs that stay.

    Args:
        kinds: what the outputs or inputs belong to, in order.
        kept: the channels of heads and of the MLP that stay.
        layout: the layout of the block.
    """
    parts, start = [], 0
    for kind in kinds:
        parts.append(kept[kind] + start)
        start += layout.total(kind)
    return torch.cat(parts)


def _shared(layer: Layer, layout: Layout, on: On) -> tuple[Tensor, Tensor]:
    """Return the outputs that a layer has to compute for the heads that are on, if several heads share its outputs.

    Returns:
        The outputs, each once, ascending; and for every channel of every head that is on the output that it is.
    """
    size = layout.sizes["heads"][0]
    groups = [head // layer.shared for head, is_on in enumerate(on.heads) if is_on]
    channels = torch.arange(size)
    again = torch.cat([group * size + channels for group in groups])
    return torch.unique(again), again


def _slice_linear(layer: Any, out: Tensor | None, into: Tensor | None) -> Any:
    """Build a linear layer with some outputs and some inputs of another, given as int64 indices; None keeps all."""
    weight, bias = layer.weight.detach(), layer.bias if layer.bias is None else layer.bias.detach()
    if out is not None:
        weight, bias = weight.index_select(0, out), bias if bias is None else bias.index_select(0, out)
    if into is not None:
        weight = weight.index_select(1, into)
    pruned: Any = shallow(layer, base_class(layer))
    pruned._parameters = {"weight": weight, "bias": bias}
    pruned.out_features, pruned.in_features = weight.shape
    return pruned


def select_channels(table: Any, index: Tensor) -> Any:
    """Select channels (n,) along the last axis of a tensor, or of each tensor in a tuple or list."""
    if isinstance(table, (tuple, list)):
        return type(table)(select_channels(part, index) for part in table)
    return table.index_select(-1, index.to(table.device))
