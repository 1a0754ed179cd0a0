"""Compute the FLOPs of blocks from their structure and the trace of a call; a multiply-add is 2 FLOPs.

Matrix products, convolutions and the two products of attention are included, as in `tokdyn.flops`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import ceil

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
    given = {name: int(count) for name, count in call.given}
    total: Counter[str] = Counter()
    for layers in structure.layers:
        if _runs(layers.needs, given):
            total[layers.part] += round(layers.flops * _rows(layers, structure, call, groups[layers.owner], given))
    for name, flops in call.saved.items():
        total[dict(structure.parts)[name]] -= flops
    for pairs in structure.pairs:
        if _runs(pairs.needs, given):
            share = call.heads if pairs.sliced else 1.0
            spent = sum(n * _pair_flops(pairs, rows, structure, call, given) for n, rows in groups[pairs.owner])
            total[pairs.part] += round(share * spent)
    return total


def _runs(needs: Sequence[str], given: Mapping[str, int]) -> bool:
    """Return whether a block runs layers that depend on arguments; see `Products.needs`."""
    return all(not given[name[4:]] if name.startswith("not ") else given[name] for name in needs)


def _rows(
    layers: Layers, structure: Structure, call: BlockTrace, groups: Sequence[tuple[int, int]], given: Mapping[str, int]
) -> float:
    """Return the number of rows, of all samples together, that layers run over.

    `groups` has pairs (samples, image tokens of each) of the module that the layers are in, and `given` the rows of
    further arguments of the block.
    """
    image = sum(samples * tokens for samples, tokens in groups)
    if layers.owner == "mlp" and call.mlp_rows is not None:
        image = int(call.mlp_rows)
    if not layers.experts:
        return layers.share * _count(layers.rows, image, call.samples, call, structure, given)
    return sum(
        n
        * layers.experts
        * max(1, ceil(layers.share * _count(layers.rows, tokens, 1, call, structure, given) / layers.experts))
        for n, tokens in groups
    )


def _count(
    rows: str, image: int, samples: int, call: BlockTrace, structure: Structure, given: Mapping[str, int]
) -> int:
    """Count rows of some samples of a call that have `image` image tokens together; see `Layers.rows`."""
    name, _, without = rows.partition(" - ")
    text = call.context if structure.context_text is None else min(structure.context_text, call.context)
    stream = call.text if structure.text is None else given[structure.text] // call.samples
    counts = {
        "image": image,
        "joint": image + samples * call.text,
        "sequence": image + samples * (call.text - stream),
        "text": samples * stream,
        "context": samples * call.context,
        "context_text": samples * text,
        "context_image": samples * (call.context - text),
        "sample": samples,
        "round": samples * call.rounds,
    }
    count = counts[name] if name in counts else given[name] * samples // call.samples
    return count - (given[without] * samples // call.samples if without else 0)


def _pair_flops(pairs: Pairs, tokens: int, structure: Structure, call: BlockTrace, given: Mapping[str, int]) -> int:
    """Compute the FLOPs of the products of an attention, for one sample with a number of image tokens."""
    if pairs.kind == "padded":  # arXiv 2410.10629: value key^T with a row of ones for the normaliser, then query
        return 4 * tokens * (pairs.head + 1) * pairs.width
    if pairs.kind == "summed":
        return (4 * pairs.head + 2) * tokens * pairs.width
    joint = tokens + call.text
    if pairs.kind == "mask":
        return 2 * joint * joint
    if pairs.kind == "between":
        queries, keys = (_count(rows, tokens, 1, call, structure, given) for rows in (pairs.queries, pairs.keys))
        return 4 * queries * keys * pairs.width
    count = {
        "joint": joint * joint,
        "image": tokens * tokens,
        "keys": tokens * joint,
        "prefix": tokens * joint + call.text * call.text,
        "context": tokens * call.context,
        "joint_context": joint * call.context,
    }[pairs.kind]
    return 4 * count * pairs.width


class Costs:
    """Computes what calls of a model cost, and remembers the cost of equal computations.

    Args:
        structures: the structures of the model's blocks.
    """

    def __init__(self, structures: Sequence[Structure]) -> None:
        self._structures = structures
        self._kinds = [structures.index(one) for one in structures]
        self._known: dict[object, Counter[str]] = {}
        self._seen: dict[object, dict[int, BlockTrace]] = {}

    def of(self, call: BlockTrace) -> Counter[str]:
        """Return the FLOPs of one computation of a block, by part."""
        key = (self._kinds[call.block], call.key)
        if key not in self._known:
            self._known[key] = block_flops(self._structures[call.block], call)
        return self._known[key]

    def spent(self, trace: CallTrace) -> Counter[str]:
        """Return the FLOPs of all blocks that ran in a call of the model, by part."""
        return _sum(self.of(call) for call in trace.blocks)

    def learn(self, trace: CallTrace) -> dict[int, BlockTrace]:
        """Remember what the blocks that ran in a call got besides image tokens; return that of all calls like it."""
        seen = self._seen.setdefault(_first(trace).key, {})
        seen.update((call.block, call.dense(trace.batch, trace.cells)) for call in trace.blocks)
        return seen

    def dense(self, trace: CallTrace) -> Counter[str]:
        """Return the FLOPs of a call in which all blocks compute all tokens at full width, by part.

        What a block that did not run would get besides image tokens is taken from an earlier call like this one, or
        else from the nearest block that is built like it, or else from the first block.
        """
        seen = self.learn(trace)
        return _sum(
            self.of(seen.get(block) or replace(self._nearest(seen, block) or _first(trace), block=block))
            for block in range(len(self._structures))
        )

    def _nearest(self, seen: Mapping[int, BlockTrace], block: int) -> BlockTrace | None:
        """Return what the nearest block that is built like this one got; None if there is none."""
        alike = [other for other in seen if self._kinds[other] == self._kinds[block]]
        return seen[min(alike, key=lambda other: (abs(other - block), other))] if alike else None

    def methods(self, trace: CallTrace) -> Counter[str]:
        """Return the FLOPs that methods added to a call, by what they computed, such as "Chunking router"."""
        total = Counter(trace.method_flops)
        indicator = self._structures[0].indicator
        if trace.compared and indicator:
            given = {name: int(count) for name, count in trace.first.given} if trace.first else {}
            per_sample = {"sample": 1.0, "round": trace.rounds} | {n: count / trace.batch for n, count in given.items()}
            total["FeatureCache indicator"] += round(
                trace.compared * sum(per_sample[rows] * flops for rows, flops in indicator)
            )
        return total


def _first(trace: CallTrace) -> BlockTrace:
    """Return what the first block gets in a call without methods."""
    sizes = trace.batch, trace.cells, trace.text, trace.context
    return trace.first or BlockTrace(0, *sizes, rounds=trace.rounds)


def _sum(costs: Iterable[Counter[str]]) -> Counter[str]:
    """Add up FLOPs by part, in the order of `PARTS` and without parts of 0 FLOPs."""
    total: Counter[str] = Counter()
    for cost in costs:
        total.update(cost)
    return Counter({part: total[part] for part in PARTS if total[part]})
