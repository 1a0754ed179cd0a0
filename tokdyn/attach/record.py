"""What happened in the calls of a wrapped model; `tokdyn.stats` shows it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class BlockCall:
    """One computation of one block, for some or all samples of a batch.

    Attributes:
        block: its number, counted over all stacks.
        samples: b, samples it was computed for.
        tokens: image tokens of each that it saw; of the one with the most where they differ.
        rows: image tokens of each sample, where packed rows let them differ.
        attention_rows: those of them that attention saw after merging.
        mlp_rows_each: those that the MLP saw.
        text: tokens of each that lay beside them in the same sequence or came in a stream of their own.
        attention: image tokens of each that attention saw; None if it saw what the block did.
        mlp: the same for the MLP.
    """

    block: int
    samples: int
    tokens: int
    text: int = 0
    attention: int | None = None
    mlp: int | None = None
    rows: tuple[int, ...] | None = None
    attention_rows: tuple[int, ...] | None = None
    mlp_rows_each: tuple[int, ...] | None = None


@dataclass
class Record:
    """One call of the model.

    Attributes:
        level: noise level of each sample, as the model was given it; 1 is pure noise.
        batch: B.
        cells: N, image tokens of a sample.
        branch: what the pipeline called this guidance branch, None if it did not say.
        calls: the blocks that ran, in order.
        reused: samples whose blocks were passed by because a cache repeated their effect.
        kept: image tokens that learned chunking kept of each sample; None without it.
    """

    level: Tensor | float = 0.0
    batch: int = 0
    cells: int = 0
    branch: str | None = None
    calls: list[BlockCall] = field(default_factory=list)
    reused: int = 0
    kept: tuple[int, ...] | None = None

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
        return 0 < self.batch == self.reused
