"""Read from the layers of a block which matrix products it computes.

A `Structure` says for each linear layer and convolution which rows it runs over (image tokens, text tokens, samples,
...) and what one row costs, and lists the attentions of the block. `tokdyn.cost` multiplies this by the token counts of
a call. A multiply-add is 2 FLOPs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd

from tokdyn.adapters.base import Blocks, ModelAdapter
from tokdyn.adapters.products import DEFAULT_PRODUCTS, Experts, Patterns, Products

Rows = str
"""What the rows of a layer are: "image" tokens, "text" tokens, both in one sequence ("joint"), all tokens in the
argument that holds the image tokens ("sequence"), every "sample", the embeddings of timesteps, of which a sample may
have several ("round"), or the tokens of an encoder: all of them ("context"), or only text ("context_text") or image
embeddings ("context_image"). Otherwise the rows of an argument of the block, as in `Products.over`; "text - name" is
text tokens without as many of them as an argument says."""

Owner = Literal["attention", "mlp", "block"]
"""Which module's image tokens are meant. Attention and MLP may get fewer than the block, if a method merges tokens."""

_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
"""Fused layers of diffusers' attention, each with the layers that it replaces, which are kept but do not run."""


@dataclass(frozen=True)
class Layers:
    """The layers of a block that run over the same rows and are listed together.

    Attributes:
        part: the entry under which their FLOPs are listed.
        rows: what their rows are.
        owner: whose image tokens the rows are.
        flops: FLOPs of all these layers for one row.
        needs: conditions on arguments of the block without which they do not run; see `Products.needs`.
        experts: number of experts that choose as many rows of a sample as a `share` of them, and 0 for other layers.
        share: experts per row.
    """

    part: str
    rows: Rows
    owner: Owner
    flops: int
    needs: tuple[str, ...] = ()
    experts: int = 0
    share: float = 1.0


@dataclass(frozen=True)
class Pairs:
    """The two matrix products of one attention, of queries with keys and of attention weights with values.

    Attributes:
        part: the entry under which their FLOPs are listed.
        kind: "joint" attends among image and text tokens, "image" among image tokens only, "keys" from image tokens to
            image and text tokens, "prefix" the same and among text tokens, "context" from image tokens to an encoder's
            tokens, "joint_context" from text tokens too, "between" from `queries` to `keys`; "padded" and "summed"
            multiply keys with values first, see `Products.linear`; "mask" multiplies only a mask of "joint".
        width: H d, the channels of all heads together.
        head: d, the channels of one head.
        owner: whose image tokens take part.
        sliced: whether DynamicWidth slices its heads.
        queries: for "between", what attends, as in `Layers.rows`.
        keys: for "between", what is attended to, likewise.
        needs: conditions on arguments of the block without which it does not run; see `Products.needs`.
    """

    part: str
    kind: Literal["joint", "image", "keys", "prefix", "context", "joint_context", "between", "padded", "summed", "mask"]
    width: int
    head: int
    owner: Owner
    sliced: bool = True
    queries: Rows = ""
    keys: Rows = ""
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Structure:
    """The matrix products of one block.

    Attributes:
        layers: its linear layers and convolutions.
        pairs: its attentions.
        indicator: FLOPs per row of the layers that compute what FeatureCache compares, by what their rows are.
        text: argument that holds text tokens in a stream of their own, if further tokens lie beside the image tokens.
        context_text: number of text tokens among the encoder's tokens; see `Products`.
        parts: for each layer, by its path from the block, the entry under which its FLOPs are listed.
    """

    layers: tuple[Layers, ...]
    pairs: tuple[Pairs, ...]
    indicator: tuple[tuple[Rows, int], ...] = ()
    text: str | None = None
    context_text: int | None = None
    parts: tuple[tuple[str, str], ...] = ()


def structures(model: nn.Module, adapter: ModelAdapter) -> tuple[Structure, ...] | None:
    """Read the structures of all blocks of a model, in the order in which they run.

    Returns:
        One structure per block; None if the adapter does not declare the products of a block or an attention cannot be
        read.
    """
    result = []
    for blocks in adapter.blocks:
        for block in model.get_submodule(blocks.path):  # type: ignore[attr-defined]
            one = structure(block, blocks)
            if one is None:
                return None
            result.append(one)
    return tuple(result)


def structure(block: nn.Module, blocks: Blocks) -> Structure | None:
    """Read the structure of one block; None if its products are not declared or an attention cannot be read."""
    products = blocks.products
    if products is None:
        return None
    flops: defaultdict[tuple[str, Rows, Owner, tuple[str, ...]], int] = defaultdict(int)
    indicator: defaultdict[Rows, int] = defaultdict(int)
    parts = []
    experts = () if products.experts is None else products.experts(block)
    for name, cost in _running_layers(block):
        if any(_inside(name, each.path) for each in experts):
            continue
        part, rows, owner = _classify(name, block, blocks, products)
        cost *= 2 if _matches(name, products.twice) else 1
        flops[part, rows, owner, _needs(name, products)] += cost
        parts.append((name, part))
        if blocks.modulated is not None and _matches(name, products.indicator):
            indicator[rows] += cost
    pairs = list(_attentions(block, blocks, products))
    if None in pairs:
        return None
    layers = [Layers(*place[:3], cost, place[3]) for place, cost in flops.items()]
    layers += [layer for each in experts for layer in _expert_layers(each, block, blocks, products)]
    return Structure(
        tuple(layers),
        tuple(pair for pair in pairs if pair),
        tuple(indicator.items()),
        blocks.text if blocks.image != "all" else None,
        products.context_text,
        tuple(parts),
    )


def _expert_layers(experts: Experts, block: nn.Module, blocks: Blocks, products: Products) -> Iterator[Layers]:
    """Yield the layers of experts, and of the router that is not a layer of its own."""
    part, rows, owner = _classify(experts.path, block, blocks, products)
    yield Layers(part, rows, owner, experts.flops, (), experts.count, experts.share)
    if experts.router:
        yield Layers(part, rows, owner, experts.router)


def _needs(name: str, products: Products) -> tuple[str, ...]:
    """Return the conditions on arguments of a block without which a layer or an attention does not run."""
    return tuple(argument for argument, patterns in products.needs.items() if _matches(name, patterns))


def rows_of(name: str, block: nn.Module, blocks: Blocks) -> Rows:
    """Return what the rows of a layer are, given its path from the block."""
    return _classify(name, block, blocks, blocks.products or DEFAULT_PRODUCTS)[1]


def _running_layers(block: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the path and the FLOPs per row of every linear layer and convolution that a call of the block runs."""
    modules = dict(block.named_modules())
    for name, module in modules.items():
        if not isinstance(module, (nn.Linear, _ConvNd)) or "processor" in name.split("."):
            continue
        if not _is_fused(name, modules) and not _is_idle_lora(name, modules):
            elements = (
                module.in_features * module.out_features if isinstance(module, nn.Linear) else module.weight.numel()
            )
            yield name, 2 * elements


def _is_fused(name: str, modules: dict[str, nn.Module]) -> bool:
    """Tell whether a fused layer runs in place of this one."""
    path, _, own = name.removesuffix(".base_layer").rpartition(".")
    holder: Any = modules.get(path)
    if not getattr(holder, "fused_projections", False):
        return False
    return any(own in replaced and hasattr(holder, fused) for fused, replaced in _FUSED.items())


def _is_idle_lora(name: str, modules: dict[str, nn.Module]) -> bool:
    """Tell whether a layer belongs to a LoRA of peft that is switched off or merged into its base layer."""
    for kind in (".lora_A.", ".lora_B."):
        path, infix, adapter = name.partition(kind)
        if infix:
            holder: Any = modules[path]
            return bool(holder.disable_adapters or holder.merged or adapter not in holder.active_adapters)
    return False


def _classify(name: str, block: nn.Module, blocks: Blocks, products: Products) -> tuple[str, Rows, Owner]:
    """Return the entry under which a layer is listed, what its rows are and whose image tokens they are."""
    over = next((argument for argument, patterns in products.over.items() if _matches(name, patterns)), None)
    if over is not None:
        part, _, whose = _classify(name, block, blocks, replace(products, over={}))
        return part, over, whose
    top, _, rest = name.partition(".")
    across = next(
        (each for each in products.between if each.path not in products.cross and _inside(name, each.path)), None
    )
    if across is not None:
        part = "projections" if across.queries == across.keys else "cross-attention"
        is_key = name[len(across.path) + 1 :].startswith(("to_k", "to_v"))
        rows = across.queries if not is_key else f"{across.keys} - {across.without}" if across.without else across.keys
        return part, rows, "block"
    if _matches(name, products.sample):
        return "adaLN", "round" if _matches(name, products.rounds) else "sample", "block"
    if top in products.cross:
        return (
            "cross-attention",
            _cross_attention_rows(rest, getattr(block, top), products.crosses_joint(block)),
            "block",
        )
    owner: Owner = "block"
    if _inside(name, _first_of(block, blocks.attention)):
        part, owner = "projections", "attention"
    elif top in products.beside:
        return "projections", "image", "block"
    elif _inside(name, _first_of(block, blocks.mlp)):
        part, owner = "mlp", "mlp"
    else:
        part = "mlp" if _matches(name, products.mlp) else "other"
    if _matches(name, products.text):
        return part, "text", owner
    joint = (blocks.image != "all" and blocks.text is None) or _matches(name, products.is_joint(block))
    if owner == "attention":
        joint |= blocks.inside is not None or (
            blocks.text is not None and not _has_text_layers(block, blocks, products)
        )
    elif owner == "mlp":
        joint |= blocks.inside_mlp is not None
    return part, "joint" if joint else "image" if blocks.image == "all" else "sequence", owner


def _has_text_layers(block: nn.Module, blocks: Blocks, products: Products) -> bool:
    """Tell whether attention has separate layers for text tokens."""
    attention = _first_of(block, blocks.attention) or ""
    names = (name for name, _ in block.get_submodule(attention).named_modules())
    return any(_matches(f"{attention}.{name}", products.text) for name in names)


def _cross_attention_rows(name: str, attention: Any, joint: bool) -> Rows:
    """Return what the rows of a layer of cross-attention are, given its path from the attention."""
    if name.startswith(("add_", "to_added_")):
        return "context_image"
    if name.startswith(("to_k", "to_v")):
        return "context" if getattr(attention, "add_k_proj", None) is None else "context_text"
    return "joint" if joint else "image"


def _attentions(block: nn.Module, blocks: Blocks, products: Products) -> Iterator[Pairs | None]:
    """Yield the attentions of a block; None in place of one whose number of channels cannot be read."""
    own = _first_of(block, blocks.attention)
    kind = products.linear or _pairs_of(blocks, products)
    declared = [] if own is None else [(own, kind, "attention", "attention", "", "")]
    declared += [(name, "image", "attention", "block", "", "") for name in products.beside]
    across = "joint_context" if products.crosses_joint(block) else "context"
    declared += [(name, across, "cross-attention", "block", "", "") for name in products.cross]
    for each in products.between:
        keys = f"{each.keys} - {each.without}" if each.without else each.keys
        part = "attention" if each.queries == each.keys else "cross-attention"
        declared.append((each.path, "between", part, "block", each.queries, keys))
    for name, kind, part, owner, queries, keys in declared:
        attention: Any = submodule(block, name)
        if attention is not None:
            sliced = part == "attention" or (blocks.width is not None and name in blocks.width.attention)
            width = (products.channels or _query_channels)(attention)
            heads = getattr(attention, "heads", None) or getattr(attention, "num_heads", None)
            known = (part, kind, width, width // int(heads or 1), owner, sliced and kind != "between")
            yield Pairs(*known, queries, keys, _needs(name, products)) if width else None  # type: ignore[arg-type]
    if products.pair_mask is not None:
        yield Pairs("attention", "mask", 1, 1, "attention", False, needs=(products.pair_mask,))


def _pairs_of(blocks: Blocks, products: Products) -> str:
    """Return which tokens attend to which in the attention of a block; see `Pairs.kind`."""
    if blocks.text is None and blocks.image == "all" and blocks.inside is None:
        return "image"
    return {"all": "joint", "text": "prefix", "none": "keys"}[products.text_sees]


def _query_channels(attention: Any) -> int:
    """Return H d, the channels of the queries of an attention; 0 if they cannot be read."""
    shares_of = (("to_q", 1), ("to_query", 1), ("q_proj", 1), ("qkv", 3), ("to_qkv", 3), ("img_attn_qkv", 3))
    for name, shares in shares_of:
        layer = getattr(attention, name, None)
        if layer is not None:
            return int(layer.out_features) // shares
    return int(getattr(attention, "inner_dim", 0))


def _first_of(block: nn.Module, names: tuple[str, ...]) -> str | None:
    """Return the first of these attributes that the block has."""
    return next((name for name in names if submodule(block, name) is not None), None)


def submodule(block: nn.Module, path: str) -> nn.Module | None:
    """Return the submodule of a block at dotted attributes; None if there is none."""
    module: Any = block
    for name in path.split("."):
        module = getattr(module, name, None)
    return module if isinstance(module, nn.Module) else None


def _inside(name: str, path: str | None) -> bool:
    """Tell whether a layer lies in the submodule at a path, or is that submodule."""
    return path is not None and f"{name}.".startswith(f"{path}.")


def _matches(name: str, patterns: Patterns) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
