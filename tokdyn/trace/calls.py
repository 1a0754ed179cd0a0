"""What happened in one call of a wrapped model, block by block; `tokdyn.stats` and `tokdyn.flops` read it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokdyn.errors import InputError
from tokdyn.trace.observation import Observation


@dataclass
class BlockTrace:
    """One computation of one block, for some or all samples of a batch.

    Attributes:
        block: index of the block, counted over all lists of blocks.
        samples: b, samples it was computed for.
        tokens: image tokens it saw of each sample; of the longest sample where they differ.
        text: text tokens of each sample that it saw, in the same sequence or in a stream of their own.
        context: tokens of an encoder that each sample attends to in cross-attention.
        attention: (samples, tokens) of those whose attention saw merged image tokens; the others' saw `tokens`.
        mlp: the same for the MLP.
        heads: share of the attention heads that were computed.
        channels: share of the MLP channels that were computed.
        mlp_rows: image tokens that the MLP saw of all samples together, where each sample chose its own; else None.
        rows: image tokens of each sample, where they differ.
        which: places in the batch of the samples it was computed for; None for all.
        saved: FLOPs of all samples that pruned layers did without, by the layer's path in the block (multiply-add = 2).
            A smaller `mlp_rows` and the products of attention are not in it.
        rounds: embeddings of timesteps of each sample, where image and reference tokens have different ones.
        given: rows of further arguments of the block that FLOPs depend on, of all samples together, by name.
        whole: the same for the whole batch and all image tokens.
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
    rounds: int = 1
    given: tuple[tuple[str, int | Tensor], ...] = ()
    whole: tuple[tuple[str, int | Tensor], ...] = ()

    def save(self, layer: str, flops: int) -> None:
        """Add FLOPs that a layer did without; a multiply-add is 2."""
        self.saved[layer] = self.saved.get(layer, 0) + flops

    def groups(self, merged: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """List (samples, image tokens of each) that a sublayer saw; `merged` is `attention` or `mlp`."""
        if self.rows is not None and not merged:
            return [(1, tokens) for tokens in self.rows]
        rest = self.samples - sum(samples for samples, _ in merged)
        return [*merged, (rest, self.tokens)] if rest else merged

    def tokens_of(self, sample: int) -> int | None:
        """Count the image tokens it saw of a sample of the batch; None if it was not computed for that one."""
        if self.which is not None and sample not in self.which:
            return None
        place = sample if self.which is None else self.which.index(sample)
        return self.tokens if self.rows is None else self.rows[place]

    def among(self, samples: range) -> tuple[BlockTrace, int]:
        """Restrict it to some samples of the batch.

        Returns:
            The trace to share evenly over its own samples, and how many of the wanted samples are among them.
        """
        which = range(self.samples) if self.which is None else self.which
        places = [place for place, sample in enumerate(which) if sample in samples]
        if self.rows is None or not places:
            return self, len(places)
        rows = tuple(self.rows[place] for place in places)
        attention, mlp = (
            [merged[place] for place in places] if len(merged) == self.samples else merged
            for merged in (self.attention, self.mlp)
        )
        mlp_rows = None if self.mlp_rows is None else round(int(self.mlp_rows) * len(places) / self.samples)
        saved = {layer: round(flops * len(places) / self.samples) for layer, flops in self.saved.items()}
        part = replace(
            self, samples=len(places), tokens=max(rows), rows=rows, which=None, mlp_rows=mlp_rows, saved=saved
        )
        return replace(part, attention=attention, mlp=mlp), len(places)

    def mean_tokens(self, merged: list[tuple[int, int]], rows: int | Tensor | None = None) -> float:
        """Average the image tokens that a sublayer saw of a sample.

        Args:
            merged: `attention` or `mlp`.
            rows: image tokens of all samples together, where that is known.
        """
        total = sum(samples * tokens for samples, tokens in self.groups(merged))
        return float(total if rows is None else rows) / self.samples

    def dense(self, batch: int, cells: int) -> BlockTrace:
        """Return the trace of the same block with all `batch` samples, all `cells` image tokens and no method."""
        return BlockTrace(
            self.block, batch, cells, self.text, self.context, rounds=self.rounds, given=self.whole, whole=self.whole
        )

    @property
    def key(self) -> Hashable:
        """Equal for computations that cost the same in equal blocks."""
        merged = tuple(self.attention), tuple(self.mlp)
        rows = None if self.mlp_rows is None else int(self.mlp_rows)
        saved = tuple(self.saved.items())
        given = tuple((name, int(count)) for name, count in self.given)
        sizes = self.samples, self.rounds, self.tokens, self.rows, self.text, self.context, given
        return *sizes, merged, self.heads, rows, saved


@dataclass
class CallTrace:
    """One call of the model.

    Attributes:
        level: noise level of each sample as the model got it; 1 is pure noise, None where there is none.
        batch: B; 0 in a trace that stands for no call.
        cells: N, image tokens of a sample, those of reference images included.
        text: text tokens of each sample.
        context: tokens of an encoder that each sample attends to in cross-attention.
        rounds: embeddings of timesteps of each sample.
        first: what the first block would compute of all samples and image tokens without methods; None if it gets
            packed tokens.
        training: whether the model was in training mode and gradients were wanted.
        observed: what could be seen of the call from outside; None in training and in graphs of torch.compile.
        branch: name that the pipeline gave to the guidance branch, None if it gave none.
        halves: whether a method took the halves of the batch for the two branches of guidance.
        blocks: traces of the blocks that ran, in order.
        cached: samples whose blocks were skipped because a cache added their remembered effect.
        kept: generated tokens that learned chunking kept of each sample; None without it.
        shortfalls: where a method left out fewer tokens than its settings ask for, by its name: the share that is asked
            for, the tokens that it left out, and those that there were, of the first such sample; in training, of a
            method that learns a share of the FLOPs, those that it could leave out at most, and all of them.
        method_flops: FLOPs of what the methods computed besides the blocks, by what it was; a multiply-add is 2.
        compared: samples for which a cache computed the modulated input of the first block.
        counted: FLOPs that were counted from the first block to the last, while `tokdyn.flops` counts.
        cache_bytes: memory of the effects that a cache keeps after the call, of its branch.
    """

    level: Tensor | float | None = None
    batch: int = 0
    cells: int = 0
    text: int = 0
    context: int = 0
    rounds: int = 1
    first: BlockTrace | None = None
    training: bool = False
    observed: Observation | None = None
    branch: str | None = None
    halves: bool = False
    blocks: list[BlockTrace] = field(default_factory=list)
    cached: frozenset[int] = frozenset()
    kept: tuple[int, ...] | None = None
    shortfalls: dict[str, tuple[float, int, int]] = field(default_factory=dict)
    method_flops: dict[str, int] = field(default_factory=dict)
    compared: int = 0
    counted: int = 0
    cache_bytes: int = 0

    def spend(self, what: str, flops: int) -> None:
        """Add FLOPs of what a method computed besides the blocks, for all samples; a multiply-add is 2."""
        self.method_flops[what] = self.method_flops.get(what, 0) + flops

    def fall_short(self, what: str, asked: Sequence[Any], reached: Sequence[int], sizes: Sequence[int]) -> None:
        """Note it if a method leaves out fewer tokens, or FLOPs, than it is asked to, by more than rounding.

        Args:
            what: name of the method.
            asked: share of the tokens to leave out, for each sample; what is no number, such as a curve, is passed by.
            reached: tokens left out, for each sample.
            sizes: tokens that there were, for each sample.
        """
        for share, count, size in zip(asked, reached, sizes, strict=True):
            if isinstance(share, float) and (count < int(size * share) or (share > 0 and not count)):
                self.shortfalls.setdefault(what, (share, count, size))

    def absorb(self, other: CallTrace) -> None:
        """Add what methods noted in a blank trace of the same call."""
        for what, flops in other.method_flops.items():
            self.spend(what, flops)
        self.shortfalls = {**other.shortfalls, **self.shortfalls}

    def blank(self) -> CallTrace:
        """Make a trace of the same call in which nothing has happened, to be thrown away."""
        return CallTrace(self.level, self.batch, self.cells, training=self.training, branch=self.branch)

    @property
    def levels(self) -> Tensor:
        """(B,) or (1,) fp32 noise levels; where tokens have levels of their own (B, N), the highest of each sample."""
        return levels_of(self.level)


def levels_of(level: Tensor | float | None) -> Tensor:
    """(B,) or (1,) fp32 noise levels of what an adapter says; see `CallTrace.levels`."""
    values = level.float() if isinstance(level, torch.Tensor) else torch.tensor(float(level or 0.0))
    return values if values.dim() == 1 else values.flatten(1).amax(1) if values.dim() > 1 else values.reshape(1)


def per_sample(values: Sequence[float], batch: int, what: str) -> tuple[float, ...]:
    """Return a value for each sample from one value for all or one for each.

    Args:
        values: one value, or as many as samples.
        batch: B.
        what: name of the values, for the message.

    Raises:
        InputError: their number is neither 1 nor B.
    """
    if len(values) == 1:
        return tuple(values) * batch
    if len(values) != batch:
        raise InputError(f"{what} has {len(values)} entries, but the batch holds {batch} samples; give 1 or {batch}.")
    return tuple(values)
