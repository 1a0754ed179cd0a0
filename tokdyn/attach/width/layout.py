"""Which outputs and inputs of a block's layers belong to which attention head and MLP channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from tokdyn.adapters.base import Blocks, ModelAdapter
from tokdyn.adapters.structure import Rows, rows_of
from tokdyn.adapters.width import Kind, SlicedLayer, Width
from tokdyn.errors import UnsupportedModelError
from tokdyn.methods.base import Method, Pruning
from tokdyn.ops.width import group_sizes

_UNSEEN = "do not show their tokens before norm and modulation; use DynamicWidth(token_input='mlp')"

Names = tuple[str, ...]
"""Where a module is, from the block."""


class On(NamedTuple):
    """Which heads and which groups of MLP channels are computed; at least one of each."""

    heads: tuple[bool, ...]
    channels: tuple[bool, ...]

    def of(self, kind: Kind) -> tuple[bool, ...]:
        """Select one of the two."""
        return self.heads if kind == "heads" else self.channels


@dataclass(frozen=True)
class Layer:
    """A layer that can be sliced.

    Attributes:
        names: where it is.
        out: what its outputs belong to, in order, each with as many as it has; () if to neither.
        into: the same for its inputs.
        split: how many outputs or inputs belong to heads, where those of channels come behind them; 0 elsewhere.
        shared: how many heads share each of those that its outputs hold.
        norm: a norm over all heads that comes after it and needs all its outputs.
        rows: over which tokens it runs: those of the image, of text in a stream of its own, or both in one sequence.
        numbers: in its weight, by what decides whether they are needed.
    """

    names: Names
    out: tuple[Kind, ...]
    into: tuple[Kind, ...]
    split: int
    shared: int
    norm: Names | None
    rows: Rows
    numbers: dict[Kind, int]


@dataclass(frozen=True)
class Layout:
    """The sizes of one block.

    Attributes:
        width: what its adapter says.
        sizes: channels of each attention head, and of each group of MLP channels.
        layers: those that it has.
        beside: attentions over the image tokens alone, beside the first.
        parallel: one layer leads out of the heads and the channels of the MLP, which is no module of its own.
    """

    width: Width
    sizes: dict[Kind, tuple[int, ...]]
    layers: tuple[Layer, ...]
    beside: int
    parallel: bool

    def total(self, kind: Kind) -> int:
        """Count the channels of all heads, or of the MLP."""
        return sum(self.sizes[kind])

    def flops(self, image: int, text: int) -> tuple[int, int]:
        """Compute the FLOPs of attention and of the MLP for one sample, as far as gates decide; a multiply-add is 2."""
        rows = {"image": image, "text": text, "joint": image + text}
        pairs = (image + text) ** 2 + self.beside * image**2
        spent: dict[Kind, int] = {"heads": 4 * pairs * self.total("heads"), "channels": 0}
        for layer in self.layers:
            for kind, numbers in layer.numbers.items():
                spent[kind] += 2 * numbers * rows[layer.rows]
        return spent["heads"], spent["channels"]


def layouts_of(model: nn.Module, adapter: ModelAdapter, methods: Sequence[Method]) -> tuple[Layout, ...]:
    """Lay out all blocks, if a method prunes them.

    Raises:
        UnsupportedModelError: the model has no layers that such a method could cut.
    """
    depth = sum(len(list(model.get_submodule(blocks.path).children())) for blocks in adapter.blocks)
    pruning = next((prunes for each in methods if (prunes := each.traits(depth).prunes) is not None), None)
    if pruning is None:
        return ()
    found = []
    for blocks in adapter.blocks:
        reason = unfit(blocks, pruning, adapter.dense)
        modules: Any = model.get_submodule(blocks.path)
        for block in modules if reason is None else ():
            layout = layout_of(block, blocks, adapter.heads(model))
            reason = unfit(
                blocks, pruning, adapter.dense, layout is not None, bool(layout and layout.sizes["channels"])
            )
            if reason is None and pruning.stream:
                reason = None if hasattr(block, blocks.stream or "") else _UNSEEN  # of another model of that layout
            if layout is None or reason is not None:
                break
            found.append(layout)
        if reason is not None:
            raise UnsupportedModelError(
                f"DynamicWidth does not fit {type(model).__name__}: the blocks in {blocks.path!r} {reason}."
            )
    return tuple(found)


def unfit(
    blocks: Blocks, pruning: Pruning, dense: bool, heads: bool = True, channels: bool | None = None
) -> str | None:
    """Say why blocks cannot be pruned that way, and what can be done; None if they can.

    Args:
        blocks: of the model.
        pruning: what a method prunes.
        dense: the blocks look at neighbouring cells.
        heads: their attention can be cut, as far as is known.
        channels: so can their MLP; None leaves it to what the adapter says.
    """
    if blocks.width is None or not heads:
        return "have no attention that it knows how to cut; declare Blocks.width in their adapter, or use DepthSkip"
    channels = blocks.width.hidden is not None if channels is None else channels
    settings = [name for name, fits in (("channels", channels), ("tokens", not dense)) if not fits]
    cure = f"use DynamicWidth({', '.join(f'{name}=False' for name in settings)})"
    if pruning.tokens and dense:
        return f"look at neighbouring cells, so that no token can be kept from the MLP; {cure}"
    if pruning.tokens and not (blocks.mlp or blocks.width.parallel):
        return "call their MLP on image and text in turn; use DynamicWidth(tokens=False)"
    if pruning.stream and blocks.stream is None:
        return _UNSEEN
    if pruning.channels and not channels:
        return f"have an MLP whose channels cannot be cut; {cure}"
    return None


def layout_of(block: nn.Module, blocks: Blocks, heads: int) -> Layout | None:
    """Lay out what can be sliced in a block; None if nothing is known of it.

    Args:
        block: of the blocks.
        blocks: says where its layers are.
        heads: H.
    """
    width = blocks.width
    inner = None if width is None else _number(block, width.inner)
    if width is None or not inner or inner % heads:
        return None
    hidden = _number(block, width.hidden) if width.hidden else 0
    if any(width.hidden == f"{cut.path}.in_features" and len(cut.into) > 1 for cut in width.layers):
        hidden -= inner
    totals: dict[Kind, int] = {"heads": inner, "channels": hidden}
    layers = []
    for cut in width.layers:
        module: Any = reach(block, tuple(cut.path.split(".")))
        if module is None or not all(totals[kind] for kind in (*cut.out, *cut.into)):
            continue
        layer = _layer(block, module, cut, totals, heads, rows_of(cut.path, block, blocks))
        if layer is None:
            return None
        layers.append(layer)
    sizes: dict[Kind, tuple[int, ...]] = {
        "heads": (inner // heads,) * heads,
        "channels": group_sizes(hidden, heads) if hidden else (),
    }
    attentions = sum(reach(block, tuple(path.split("."))) is not None for path in width.attention)
    return Layout(width, sizes, tuple(layers), attentions - 1, width.parallel)


def reach(block: nn.Module, names: Names) -> nn.Module | None:
    """Return the module in a place; None if there is none."""
    found: nn.Module | None = block
    for name in names:
        found = None if found is None else found._modules.get(name)
    return found


def _layer(
    block: nn.Module, module: Any, cut: SlicedLayer, totals: dict[Kind, int], heads: int, rows: Rows
) -> Layer | None:
    """Measure a layer; None if its sizes do not add up."""
    outputs, inputs = int(module.out_features), int(module.in_features)
    out, into = _filled(cut.out, outputs, totals), _filled(cut.into, inputs, totals)
    shared = totals[cut.out[0]] // outputs if len(cut.out) == 1 and outputs < totals[cut.out[0]] else 1
    if out and sum(totals[kind] for kind in out) != outputs * shared:
        return None
    if into and sum(totals[kind] for kind in into) != inputs:
        return None
    norm = None if cut.norm is None else tuple(cut.norm.split("."))
    across = norm is not None and _normalized(reach(block, norm)) == outputs > totals["heads"] // heads
    numbers: dict[Kind, int] = {}
    for kind in () if across else out:
        numbers[kind] = numbers.get(kind, 0) + totals[kind] // shared * inputs
    for kind in into:
        numbers[kind] = numbers.get(kind, 0) + totals[kind] * outputs
    mixed = next((kinds for kinds in (out, into) if len(set(kinds)) > 1), ())
    split = mixed.count("heads") * totals["heads"]
    names = tuple(cut.path.split("."))
    return Layer(names, out, into, split, shared, norm if across else None, rows, numbers)


def _filled(kinds: tuple[Kind, ...], size: int, totals: dict[Kind, int]) -> tuple[Kind, ...]:
    """Repeat a single kind as often as there is room."""
    return kinds * max(1, size // totals[kinds[0]]) if len(kinds) == 1 else kinds


def _normalized(norm: Any) -> int | None:
    """Count the channels that a norm takes together; None if the module is no norm."""
    shape = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", None)
    return shape[0] if isinstance(shape, tuple) and len(shape) == 1 else None


def _number(block: nn.Module, path: str) -> int:
    """Follow dotted attributes of a block to a number; 0 if they lead nowhere."""
    found: Any = block
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, int) else 0
