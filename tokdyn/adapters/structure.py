"""What a block multiplies, read from its layers once: all that its cost depends on besides the call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd

from tokdyn.adapters.base import USUAL, ModelAdapter, Patterns, Products, Stack

Rows = Literal["image", "text", "joint", "context", "words", "pictures", "sample"]
Owner = Literal["attention", "mlp", "block"]
"""Whose image tokens: what attention saw, what the MLP saw, or what the block did. Methods may merge in between."""

_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
"""Layers of diffusers' attention that take the place of others, which stay where they are but are not called."""


@dataclass(frozen=True)
class Layers:
    """Layers that run over the same rows.

    Attributes:
        part: what their cost is listed under.
        rows: one row for each of these.
        owner: whose image tokens.
        flops: for one row, multiply-add = 2.
    """

    part: str
    rows: Rows
    owner: Owner
    flops: int


@dataclass(frozen=True)
class Pairs:
    """The two products of one attention.

    Attributes:
        part: what their cost is listed under.
        kind: queries and keys are image and text tokens, or image tokens alone, or the keys are an encoder's tokens; or
            keys and values are multiplied first.
        width: H d, channels of all heads together.
        head: d.
        owner: whose image tokens.
    """

    part: str
    kind: Literal["joint", "image", "context", "linear"]
    width: int
    head: int
    owner: Owner


@dataclass(frozen=True)
class Structure:
    """The products of one block.

    Attributes:
        layers: linear layers and convolutions.
        pairs: products of attention.
        indicator: FLOPs for one sample of what a feature cache compares, multiply-add = 2.
        words: see `Products`.
        parts: what the cost of each layer is listed under, by where it is in the block.
    """

    layers: tuple[Layers, ...]
    pairs: tuple[Pairs, ...]
    indicator: int = 0
    words: int | None = None
    parts: tuple[tuple[str, str], ...] = ()


def structures(model: nn.Module, adapter: ModelAdapter) -> tuple[Structure, ...] | None:
    """The products of every block, counted over all stacks; None where the adapter does not know them."""
    found = []
    for stack in adapter.stacks:
        for block in model.get_submodule(stack.path):  # type: ignore[attr-defined]
            one = structure(block, stack)
            if one is None:
                return None
            found.append(one)
    return tuple(found)


def structure(block: nn.Module, stack: Stack) -> Structure | None:
    """The products of one block; None where the adapter does not know them."""
    products = stack.products
    if products is None:
        return None
    flops: defaultdict[tuple[str, Rows, Owner], int] = defaultdict(int)
    indicator = 0
    parts = []
    for name, cost in _layers(block):
        place = _place(name, block, stack, products)
        flops[place] += cost
        parts.append((name, place[0]))
        if stack.modulated is not None and _matches(name, products.indicator):
            indicator += cost
    pairs = list(_pairs(block, stack, products))
    if None in pairs:
        return None
    layers = tuple(Layers(*place, cost) for place, cost in flops.items())
    return Structure(layers, tuple(each for each in pairs if each), indicator, products.words, tuple(parts))


def _layers(block: nn.Module) -> Iterator[tuple[str, int]]:
    """Name and FLOPs a row of every layer of a block that is called."""
    parts = dict(block.named_modules())
    for name, part in parts.items():
        if not isinstance(part, (nn.Linear, _ConvNd)) or "processor" in name.split("."):
            continue
        if not _replaced(name, parts) and _adapter_runs(name, parts):
            numbers = part.in_features * part.out_features if isinstance(part, nn.Linear) else part.weight.numel()
            yield name, 2 * numbers


def rows_of(name: str, block: nn.Module, stack: Stack) -> Rows:
    """The rows that a layer of a block runs over."""
    return _place(name, block, stack, stack.products or USUAL)[1]


def _replaced(name: str, parts: dict[str, nn.Module]) -> bool:
    """Whether a fused layer runs in its place."""
    path, _, own = name.removesuffix(".base_layer").rpartition(".")
    holder: Any = parts.get(path)
    if not getattr(holder, "fused_projections", False):
        return False
    return any(own in replaced and hasattr(holder, fused) for fused, replaced in _FUSED.items())


def _adapter_runs(name: str, parts: dict[str, nn.Module]) -> bool:
    """Whether a layer is no adapter of peft, or one that is switched on and not merged into its base."""
    for kind in (".lora_A.", ".lora_B."):
        path, found, adapter = name.partition(kind)
        if found:
            holder: Any = parts[path]
            return not holder.disable_adapters and not holder.merged and adapter in holder.active_adapters
    return True


def _place(name: str, block: nn.Module, stack: Stack, products: Products) -> tuple[str, Rows, Owner]:
    """What a layer is listed under, and the rows that it runs over."""
    top, _, rest = name.partition(".")
    if _matches(name, products.sample):
        return "adaLN", "sample", "block"
    if top in products.cross:
        return "cross-attention", _cross(rest, getattr(block, top)), "block"
    owner: Owner = "block"
    if top == _first(block, stack.attention):
        part, owner = "projections", "attention"
    elif top in products.beside:
        return "projections", "image", "block"
    elif top == _first(block, stack.mlp):
        part, owner = "mlp", "mlp"
    else:
        part = "mlp" if _matches(name, products.mlp) else "other"
    if _matches(name, products.text):
        return part, "text", owner
    joint = stack.image != "all" or _matches(name, products.joint)
    if owner == "attention":
        joint |= stack.inside is not None or (stack.text is not None and not _has_text(block, top, products))
    elif owner == "mlp":
        joint |= stack.inside_mlp is not None
    return part, "joint" if joint else "image", owner


def _has_text(block: nn.Module, attention: str, products: Products) -> bool:
    """Whether attention has layers for the text tokens."""
    return any(
        _matches(f"{attention}.{name}", products.text) for name, _ in block.get_submodule(attention).named_modules()
    )


def _cross(name: str, attention: Any) -> Rows:
    """Rows of a layer of attention to an encoder's tokens."""
    if name.startswith(("add_", "to_added_")):
        return "pictures"
    if name.startswith(("to_k", "to_v")):
        return "context" if getattr(attention, "add_k_proj", None) is None else "words"
    return "image"


def _pairs(block: nn.Module, stack: Stack, products: Products) -> Iterator[Pairs | None]:
    """The attentions of a block, None for one whose width cannot be read."""
    own = _first(block, stack.attention)
    chosen = [] if own is None else [(own, "linear" if products.linear else "joint", "attention", "attention")]
    chosen += [(name, "image", "attention", "block") for name in products.beside]
    chosen += [(name, "context", "cross-attention", "block") for name in products.cross]
    for name, kind, part, owner in chosen:
        attention = getattr(block, name, None)
        if attention is not None:
            width = _width(attention)
            heads = getattr(attention, "heads", None) or getattr(attention, "num_heads", None)
            yield Pairs(part, kind, width, width // int(heads or 1), owner) if width else None  # type: ignore[arg-type]


def _width(attention: Any) -> int:
    """H d of an attention: what its queries have; 0 if it cannot be read."""
    for name, shares in (("to_q", 1), ("q_proj", 1), ("qkv", 3), ("to_qkv", 3)):
        layer = getattr(attention, name, None)
        if layer is not None:
            return int(layer.out_features) // shares
    return int(getattr(attention, "inner_dim", 0))


def _first(block: nn.Module, names: tuple[str, ...]) -> str | None:
    """The attribute that a block has, in order of preference."""
    return next((name for name in names if hasattr(block, name)), None)


def _matches(name: str, patterns: Patterns) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
