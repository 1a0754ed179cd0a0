"""Find out which outputs and inputs of a block's layers belong to which attention head and MLP channel.

The result, the layout of a block, is what slicing and masking its layers is based on.
"""

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

_NO_STREAM = "do not show their tokens before norm and modulation; use DynamicWidth(token_input='mlp')"

Names = tuple[str, ...]
"""The path of a module from its block, one name for each level."""


class On(NamedTuple):
    """Which attention heads and which groups of MLP channels are computed, one bool each.

    At least one head and one group are; `channels` is () if the block has no MLP that can be sliced.
    """

    heads: tuple[bool, ...]
    channels: tuple[bool, ...]

    def of(self, kind: Kind) -> tuple[bool, ...]:
        """Return `heads` or `channels`."""
        return self.heads if kind == "heads" else self.channels


@dataclass(frozen=True)
class Layer:
    """A linear layer that can be sliced.

    Attributes:
        names: its path from the block.
        out: what its outputs belong to, in order: each "heads" stands for the channels of all heads, each "channels"
            for those of the MLP. () if they belong to neither.
        into: the same for its inputs.
        split: number of outputs or inputs that belong to heads if channels of the MLP follow them in the same layer,
            else 0.
        shared: number of heads that share each head among its outputs; 1 unless several heads share keys and values.
        norm: path of a norm that spans all heads and needs all outputs of the layer, so that the output of the norm is
            sliced instead; None if there is none.
        rows: the tokens it runs over: "image", "text" in a stream of their own, or "joint" in one sequence.
        elements: number of elements of its weight that heads and that channels decide about.
    """

    names: Names
    out: tuple[Kind, ...]
    into: tuple[Kind, ...]
    split: int
    shared: int
    norm: Names | None
    rows: Rows
    elements: dict[Kind, int]


@dataclass(frozen=True)
class Layout:
    """The layers and sizes of one block, as far as it can be sliced.

    Attributes:
        width: the adapter's declaration.
        sizes: number of channels of each attention head, and of each group of MLP channels.
        layers: the layers that can be sliced and that this block has.
        beside: number of further attentions, over the image tokens only.
        parallel: whether attention and MLP run in parallel and end in one common layer. The MLP is not a module of its
            own then.
    """

    width: Width
    sizes: dict[Kind, tuple[int, ...]]
    layers: tuple[Layer, ...]
    beside: int
    parallel: bool

    def total(self, kind: Kind) -> int:
        """Return the number of channels of all heads together, or of the MLP."""
        return sum(self.sizes[kind])

    def flops(self, image: int, text: int, stream: int, parts: int = 1) -> tuple[int, int]:
        """Compute the FLOPs that gates decide about, for one sample; a multiply-add is 2.

        Args:
            image: number of image tokens.
            text: number of text tokens.
            stream: how many of them are in a stream of their own.
            parts: number of equal parts of the image tokens that do not attend to each other.

        Returns:
            FLOPs of attention, and FLOPs of the MLP.
        """
        both = image + text
        rows = {"image": image, "text": stream, "joint": both, "sequence": both - stream}  # no encoder's
        pairs = (both**2 + self.beside * image**2) // parts
        spent: dict[Kind, int] = {"heads": 4 * pairs * self.total("heads"), "channels": 0}
        for layer in self.layers:
            for kind, elements in layer.elements.items():
                spent[kind] += 2 * elements * rows.get(layer.rows, 0)
        return spent["heads"], spent["channels"]


def layouts_of(model: nn.Module, adapter: ModelAdapter, methods: Sequence[Method]) -> tuple[Layout, ...]:
    """Lay out all blocks of a model if one of the methods prunes blocks.

    Returns:
        One layout for each block, in the order in which they run; () if no method prunes blocks.

    Raises:
        UnsupportedModelError: a block cannot be pruned the way that the method needs.
    """
    depth = sum(len(list(model.get_submodule(blocks.path).children())) for blocks in adapter.blocks)
    pruning = next((prunes for method in methods if (prunes := method.traits(depth).prunes) is not None), None)
    if pruning is None:
        return ()
    layouts = []
    for blocks in adapter.blocks:
        reason = unfit(blocks, pruning, adapter.dense)
        modules: Any = model.get_submodule(blocks.path)
        for block in modules if reason is None else ():
            layout = layout_of(block, blocks, adapter.heads(model))
            reason = unfit(
                blocks, pruning, adapter.dense, layout is not None, bool(layout and layout.sizes["channels"])
            )
            if reason is None and pruning.stream:
                reason = None if hasattr(block, blocks.stream or "") else _NO_STREAM  # a fork of the public DiT
            if layout is None or reason is not None:
                break
            layouts.append(layout)
        if reason is not None:
            raise UnsupportedModelError(
                f"DynamicWidth does not fit {type(model).__name__}: the blocks in {blocks.path!r} {reason}."
            )
    return tuple(layouts)


def unfit(
    blocks: Blocks, pruning: Pruning, dense: bool, heads: bool = True, channels: bool | None = None
) -> str | None:
    """Return why blocks cannot be pruned the way that a method needs.

    Args:
        blocks: the adapter's declaration of the blocks.
        pruning: what the method prunes.
        dense: whether the blocks mix neighbouring cells.
        heads: whether their attention can be sliced, as far as is known.
        channels: whether their MLP can; None asks the declaration.

    Returns:
        A clause for a message that begins with a verb and ends in a remedy; None if the blocks can be pruned.
    """
    if blocks.width is None or not heads:
        return "have no attention that it knows how to slice; declare Blocks.width in their adapter, or use DepthSkip"
    channels = blocks.width.hidden is not None if channels is None else channels
    settings = [name for name, fits in (("channels", channels), ("tokens", not dense)) if not fits]
    cure = f"use DynamicWidth({', '.join(f'{name}=False' for name in settings)})"
    if pruning.tokens and dense:
        return f"mix neighbouring cells, so that no token can be left out of the MLP; {cure}"
    if pruning.tokens and not (blocks.mlp or blocks.width.parallel):
        return "have no MLP that is a module of its own and gets the image tokens alone; use DynamicWidth(tokens=False)"
    if pruning.stream and blocks.stream is None:
        return _NO_STREAM
    if pruning.channels and not channels:
        return f"have an MLP whose channels cannot be sliced; {cure}"
    return None


def layout_of(block: nn.Module, blocks: Blocks, heads: int) -> Layout | None:
    """Lay out a block; None if its sizes are not those that the adapter declares.

    Args:
        block: the block.
        blocks: the adapter's declaration of the list that it is in.
        heads: H, its number of attention heads.
    """
    width = blocks.width
    inner = None if width is None else _number(block, width.inner)
    if width is None or not inner or inner % heads:
        return None
    hidden = _number(block, width.hidden) if width.hidden else 0
    if any(width.hidden == f"{declared.path}.in_features" and len(declared.into) > 1 for declared in width.layers):
        hidden -= inner
    totals: dict[Kind, int] = {"heads": inner, "channels": hidden}
    layers = []
    for declared in width.layers:
        module: Any = reach(block, tuple(declared.path.split(".")))
        if module is None or not all(totals[kind] for kind in (*declared.out, *declared.into)):
            continue
        layer = _layer(block, module, declared, totals, heads, rows_of(declared.path, block, blocks))
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
    """Return the module at a path from the block; None if there is none."""
    module: nn.Module | None = block
    for name in names:
        module = None if module is None else module._modules.get(name)
    return module


def _layer(
    block: nn.Module, module: Any, declared: SlicedLayer, totals: dict[Kind, int], heads: int, rows: Rows
) -> Layer | None:
    """Measure a layer; None if its numbers of outputs and inputs are not those that its declaration implies.

    Args:
        block: the block.
        module: the layer.
        declared: its declaration.
        totals: number of channels of all heads, and of the MLP.
        heads: H.
        rows: the tokens it runs over.
    """
    outputs, inputs = int(module.out_features), int(module.in_features)
    out, into = _filled(declared.out, outputs, totals), _filled(declared.into, inputs, totals)
    few = len(declared.out) == 1 and outputs < totals[declared.out[0]]
    shared = totals[declared.out[0]] // outputs if few else 1
    if out and sum(totals[kind] for kind in out) != outputs * shared:
        return None
    if into and sum(totals[kind] for kind in into) != inputs:
        return None
    norm = None if declared.norm is None else tuple(declared.norm.split("."))
    across = norm is not None and _normalized(reach(block, norm)) == outputs > totals["heads"] // heads
    elements: dict[Kind, int] = {}
    for kind in () if across else out:
        elements[kind] = elements.get(kind, 0) + totals[kind] // shared * inputs
    for kind in into:
        elements[kind] = elements.get(kind, 0) + totals[kind] * outputs
    mixed = next((kinds for kinds in (out, into) if len(set(kinds)) > 1), ())
    split = mixed.count("heads") * totals["heads"]
    names = tuple(declared.path.split("."))
    return Layer(names, out, into, split, shared, norm if across else None, rows, elements)


def _filled(kinds: tuple[Kind, ...], size: int, totals: dict[Kind, int]) -> tuple[Kind, ...]:
    """Repeat a single kind as often as its channels fit into `size` outputs or inputs; keep several kinds."""
    return kinds * max(1, size // totals[kinds[0]]) if len(kinds) == 1 else kinds


def _normalized(norm: Any) -> int | None:
    """Return the number of channels that a norm normalises together; None if that cannot be read."""
    shape = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", None)
    return shape[0] if isinstance(shape, tuple) and len(shape) == 1 else None


def _number(block: nn.Module, path: str) -> int:
    """Return the integer at dotted attributes of a block; 0 if there is none."""
    value: Any = block
    for name in path.split("."):
        value = getattr(value, name, None)
    return value if isinstance(value, int) else 0
