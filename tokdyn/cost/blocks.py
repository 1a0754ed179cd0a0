"""FLOPs of blocks from their structure and what happened, without running them; a multiply-add is 2 FLOPs.

Counted are matrix products, convolutions and the two products of attention, as in `tokdyn.flops`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from tokdyn.adapters.structure import Layers, Pairs, Structure
from tokdyn.trace.calls import BlockTrace, CallTrace

PARTS = ("adaLN", "projections", "attention", "cross-attention", "mlp", "other")
"""What the cost of blocks is listed under, in this order."""


def block_flops(structure: Structure, call: BlockTrace) -> Counter[str]:
    """FLOPs of one computation of one block, for all samples it was computed for.

    Args:
        structure: of the block.
        call: what happened.

    Returns:
        FLOPs by part, see `PARTS`.
    """
    seen = {"block": call.groups([]), "attention": call.groups(call.attention), "mlp": call.groups(call.mlp)}
    found: Counter[str] = Counter()
    for layers in structure.layers:
        found[layers.part] += layers.flops * _rows(layers, structure, call, seen[layers.owner])
    for name, flops in call.saved.items():
        found[dict(structure.parts)[name]] -= flops
    for pairs in structure.pairs:
        share = call.heads if pairs.kind != "context" else 1.0
        found[pairs.part] += round(share * sum(n * _pair_flops(pairs, rows, call) for n, rows in seen[pairs.owner]))
    return found


def _rows(layers: Layers, structure: Structure, call: BlockTrace, seen: Sequence[tuple[int, int]]) -> int:
    """Rows of all samples that layers run over."""
    image = sum(samples * tokens for samples, tokens in seen)
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
    """Both products of attention of one sample with that many image tokens."""
    if pairs.kind == "linear":  # arXiv 2410.10629: value key^T with a row of ones for the normaliser, then query
        return 4 * tokens * (pairs.head + 1) * pairs.width
    joint = tokens + call.text
    queries, keys = {"joint": (joint, joint), "image": (tokens, tokens), "context": (tokens, call.context)}[pairs.kind]
    return 4 * queries * keys * pairs.width


class Costs:
    """What calls of a model cost; equal computations are worked out once.

    Args:
        structures: of its blocks.
    """

    def __init__(self, structures: Sequence[Structure]) -> None:
        self._structures = structures
        self._kinds = [structures.index(each) for each in structures]
        self._known: dict[object, Counter[str]] = {}

    def of(self, call: BlockTrace) -> Counter[str]:
        """FLOPs of a computation of a block by part."""
        key = (self._kinds[call.block], call.key)
        if key not in self._known:
            self._known[key] = block_flops(self._structures[call.block], call)
        return self._known[key]

    def spent(self, trace: CallTrace) -> Counter[str]:
        """FLOPs of the blocks that ran in a call of the model, by part."""
        return _sum(self.of(call) for call in trace.blocks)

    def dense(self, trace: CallTrace) -> Counter[str]:
        """The same if every block had seen everything, at full width."""
        whole = (
            BlockTrace(block, trace.batch, trace.cells, trace.text, trace.context)
            for block in range(len(self._structures))
        )
        return _sum(self.of(call) for call in whole)

    def methods(self, trace: CallTrace) -> Counter[str]:
        """FLOPs of what the methods did on top, by what it was."""
        found = Counter(trace.method_flops)
        if trace.compared and self._structures[0].indicator:
            found["FeatureCache indicator"] += trace.compared * self._structures[0].indicator
        return found


def _sum(costs: Iterable[Counter[str]]) -> Counter[str]:
    """The sum, in the order of `PARTS` and without what costs nothing."""
    total: Counter[str] = Counter()
    for cost in costs:
        total.update(cost)
    return Counter({part: total[part] for part in PARTS if total[part]})
