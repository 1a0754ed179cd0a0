"""What happened in the calls of a wrapped model; `tokdyn.stats` shows it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass
class BlockCall:
    """One computation of one block, for some or all samples of a batch.

    Attributes:
        block: its number, counted over all stacks.
        samples: b, samples it was computed for.
        tokens: image tokens of each that it saw; of the one with the most where they differ.
        rows: image tokens of each sample, where they differ.
        text: tokens of each that lay beside them in the same sequence or came in a stream of their own.
        context: tokens of an encoder that each attends to in attention of its own.
        attention: samples for which attention saw merged image tokens, and how many of each; the others' saw `tokens`.
        mlp: the same for the MLP.
        heads: share of the attention heads that were computed.
        channels: share of the channels of the MLP that were.
        mlp_rows: image tokens that the MLP saw of all samples together, where each chose its own; None if none did.
        which: the samples it was computed for, by their places in the batch; None for all.
        saved: FLOPs of all samples that layers did without, by where they are in the block; beside fewer tokens for the
            MLP as a whole, and the products of attention.
    """

    block: int
    samples: int
    tokens: int
    text: int = 0
    context: int = 0
    attention: list[tuple[int, int]] = field(default_factory=list)
    mlp: list[tuple[int, int]] = field(default_factory=list)
    heads: float = 1.0
    channels: float = 1.0
    mlp_rows: int | Tensor | None = None
    rows: tuple[int, ...] | None = None
    which: tuple[int, ...] | None = None
    saved: dict[str, int] = field(default_factory=dict)

    def save(self, layer: str, flops: int) -> None:
        """Note what a layer did without; a multiply-add is 2."""
        self.saved[layer] = self.saved.get(layer, 0) + flops

    def groups(self, merged: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Samples, and how many image tokens of each a branch saw; `merged` is `attention` or `mlp`."""
        if self.rows is not None and not merged:
            return [(1, tokens) for tokens in self.rows]
        rest = self.samples - sum(samples for samples, _ in merged)
        return [*merged, (rest, self.tokens)] if rest else merged

    def tokens_of(self, sample: int) -> int | None:
        """Image tokens that it saw of a sample of the batch; None if it was not computed for that one."""
        if self.which is not None and sample not in self.which:
            return None
        place = sample if self.which is None else self.which.index(sample)
        return self.tokens if self.rows is None else self.rows[place]

    def among(self, samples: range) -> tuple[BlockCall, int]:
        """What was computed for some samples of the batch, to be shared evenly by its own, and for how many of them."""
        which = range(self.samples) if self.which is None else self.which
        places = [place for place, sample in enumerate(which) if sample in samples]
        if self.rows is None or not places:
            return self, len(places)
        rows = tuple(self.rows[place] for place in places)
        attention, mlp = (
            [merged[place] for place in places] if len(merged) == self.samples else merged
            for merged in (self.attention, self.mlp)
        )
        seen = None if self.mlp_rows is None else round(int(self.mlp_rows) * len(places) / self.samples)
        saved = {layer: round(flops * len(places) / self.samples) for layer, flops in self.saved.items()}
        part = replace(self, samples=len(places), tokens=max(rows), rows=rows, which=None, mlp_rows=seen, saved=saved)
        return replace(part, attention=attention, mlp=mlp), len(places)

    def seen(self, merged: list[tuple[int, int]], rows: int | Tensor | None = None) -> float:
        """Image tokens that a branch saw of a sample, on average.

        Args:
            merged: `attention` or `mlp`.
            rows: of all samples together, where that is known.
        """
        total = sum(samples * tokens for samples, tokens in self.groups(merged))
        return float(total if rows is None else rows) / self.samples

    @property
    def key(self) -> Hashable:
        """Equal for computations that cost the same in equal blocks."""
        merged = tuple(self.attention), tuple(self.mlp)
        rows = None if self.mlp_rows is None else int(self.mlp_rows)
        saved = tuple(self.saved.items())
        return self.samples, self.tokens, self.rows, self.text, self.context, merged, self.heads, rows, saved


@dataclass
class Record:
    """One call of the model.

    Attributes:
        level: noise level of each sample, as the model was given it; 1 is pure noise, None where there is none.
        batch: B.
        cells: N, image tokens of a sample.
        text: tokens of each beside them.
        context: tokens of an encoder.
        training: gradients were wanted.
        branch: what the pipeline called this guidance branch, None if it did not say.
        guided: the batch holds the two branches of guidance as halves.
        calls: the blocks that ran, in order.
        reused: samples whose blocks were passed by because a cache repeated their effect.
        kept: image tokens that learned chunking kept of each sample; None without it.
        own: FLOPs of what the methods computed on top, by what it was; a multiply-add is 2.
        compared: samples for which a cache computed the modulated input of the first block.
        inside: FLOPs that were counted from the first block to the last, while `tokdyn.flops` counts.
    """

    level: Tensor | float | None = None
    batch: int = 0
    cells: int = 0
    text: int = 0
    context: int = 0
    training: bool = False
    branch: str | None = None
    guided: bool = False
    calls: list[BlockCall] = field(default_factory=list)
    reused: frozenset[int] = frozenset()
    kept: tuple[int, ...] | None = None
    own: dict[str, int] = field(default_factory=dict)
    compared: int = 0
    inside: int = 0

    def spend(self, what: str, flops: int) -> None:
        """Note what a method computed besides the blocks, in FLOPs of all samples; a multiply-add is 2."""
        self.own[what] = self.own.get(what, 0) + flops

    @property
    def clock(self) -> Tensor:
        """(B,) or (1,) fp32 noise levels; of tokens at different levels (B, N), the highest counts."""
        level = self.level
        found = level.float() if isinstance(level, torch.Tensor) else torch.tensor(float(level or 0.0))
        return found.flatten(1).amax(1) if found.dim() > 1 else found.reshape(-1)

    @property
    def blocks(self) -> list[int]:
        """The blocks that ran for at least one sample, in order."""
        return list(dict.fromkeys(call.block for call in self.calls))

    @property
    def tokens(self) -> list[int]:
        """Image tokens that each of these blocks saw, at most."""
        most: dict[int, int] = {}
        for call in self.calls:
            most[call.block] = max(call.tokens, most.get(call.block, 0))
        return list(most.values())

    @property
    def cached(self) -> bool:
        """All samples repeated what the blocks did before."""
        return 0 < self.batch == len(self.reused)
