"""Compute the FLOPs of blocks from their structure and the trace of a call; a multiply-add is 2 FLOPs.

Matrix products, convolutions and the two products of attention are included, as in `tokdyn.flops`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from tokdyn.adapters.structure import Layers, Pairs, Structure
from tokdyn.trace.calls import BlockTrace, CallTrace

PARTS = ("adaLN", "projections", "attention", "cross-attention", "mlp", "other")
"""The parts by which FLOPs of blocks are listed, in this order."""


def block_flops(structure: Structure, call: BlockTrace) -> Counter[str]:
    """Compute the FLOPs of one computation of one block, of all its samples together.

    Args:
        structure: the structure of the block.
        call: the trace of the computation.

    Returns:
        FLOPs by part; see `PARTS`.
    """
    groups = {"block": call.groups([]), "attention": call.groups(call.attention), "mlp": call.groups(call.mlp)}
    total: Counter[str] = Counter()
    for layers in structure.layers:
        total[layers.part] += layers.flops * _rows(layers, structure, call, groups[layers.owner])
    for name, flops in call.saved.items():
        total[dict(structure.parts)[name]] -= flops
    for pairs in structure.pairs:
        share = 1.0 if pairs.kind in ("context", "joint_context") else call.heads
        total[pairs.part] += round(share * sum(n * _pair_flops(pairs, rows, call) for n, rows in groups[pairs.owner]))
    return total


def _rows(layers: Layers, structure: Structure, call: BlockTrace, groups: Sequence[tuple[int, int]]) -> int:
    """Return the number of rows, of all samples together, that layers run over.

    `groups` has pairs (samples, image tokens of each) of the module that the layers are in.
    """
    image = sum(samples * tokens for samples, tokens in groups)
    if layers.owner == "mlp" and call.mlp_rows is not None:
        image = int(call.mlp_rows)
    text = call.context if structure.context_text is None else min(structure.context_text, call.context)
    return {
        "image": image,
        "joint": image + call.samples * call.text,
        "text": call.samples * call.text,
        "context": call.samples * call.context,
        "context_text": call.samples * text,
        "context_image": call.samples * (call.context - text),
        "sample": call.samples,
    }[layers.rows]


def _pair_flops(pairs: Pairs, tokens: int, call: BlockTrace) -> int:
    """Compute the FLOPs of both products of an attention, for one sample with a number of image tokens."""
    if pairs.kind == "linear":  # arXiv 2410.10629: value key^T with a row of ones for the normaliser, then query
        return 4 * tokens * (pairs.head + 1) * pairs.width
    joint = tokens + call.text
    queries = tokens if pairs.kind in ("image", "context") else joint
    keys = {"joint": joint, "image": tokens}.get(pairs.kind, call.context)
    return 4 * queries * keys * pairs.width


class Costs:
    """Computes what calls of a model cost, and remembers the cost of equal computations.

    Args:
        structures: the structures of the model's blocks.
    """

    def __init__(self, structures: Sequence[Structure]) -> None:
        self._structures = structures
        self._kinds = [structures.index(one) for one in structures]
        self._known: dict[object, Counter[str]] = {}

    def of(self, call: BlockTrace) -> Counter[str]:
        """Return the FLOPs of one computation of a block, by part."""
        key = (self._kinds[call.block], call.key)
        if key not in self._known:
            self._known[key] = block_flops(self._structures[call.block], call)
        return self._known[key]

    def spent(self, trace: CallTrace) -> Counter[str]:
        """Return the FLOPs of all blocks that ran in a call of the model, by part."""
        return _sum(self.of(call) for call in trace.blocks)

    def dense(self, trace: CallTrace) -> Counter[str]:
        """Return the FLOPs of a call in which all blocks compute all tokens at full width, by part."""
        whole = (
            BlockTrace(block, trace.batch, trace.cells, trace.text, trace.context)
            for block in range(len(self._structures))
        )
        return _sum(self.of(call) for call in whole)

    def methods(self, trace: CallTrace) -> Counter[str]:
        """Return the FLOPs that methods added to a call, by what they computed, such as "Chunking router"."""
        total = Counter(trace.method_flops)
        if trace.compared and self._structures[0].indicator:
            total["FeatureCache indicator"] += trace.compared * self._structures[0].indicator
        return total


def _sum(costs: Iterable[Counter[str]]) -> Counter[str]:
    """Add up FLOPs by part, in the order of `PARTS` and without parts of 0 FLOPs."""
    total: Counter[str] = Counter()
    for cost in costs:
        total.update(cost)
    return Counter({part: total[part] for part in PARTS if total[part]})
