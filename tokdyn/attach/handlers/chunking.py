"""Chunking at work: the blocks see the tokens that a router asks for, and their effect is spread over the grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokdyn.attach.handlers.budgets import drops
from tokdyn.attach.run import Run
from tokdyn.methods import Chunking, ChunkingModule
from tokdyn.methods.costs import residual_flops, router_flops, smoothing_flops
from tokdyn.ops import ratio_loss, select
from tokdyn.ops.dechunk import smooths_on_grid
from tokdyn.ops.dropping import take
from tokdyn.ops.pack import pack_index
from tokdyn.ops.routing import most_probable, tail_drop
from tokdyn.tokens import Routing

_SLACK = 1e-6  # a share of 0.29 in fp32 is a little less than that, and 100 tokens should still lose 29


@dataclass(frozen=True)
class Chunk:
    """A bracket around all blocks.

    What is spread is the change that the blocks made, h - x: a cell without a token of its own keeps what it had before
    them and gets the change of the nearest kept one. Where every token is kept, nothing is smoothed and the residual
    projection is still zero, the model computes what it did before.
    """

    method: Chunking
    module: ChunkingModule
    first: int
    last: int

    def open(self, run: Run, x: Tensor) -> Tensor:
        """Keep the most probable tokens of each sample: (B, N, D) to (B, M, D)."""
        if self.method.target == 1.0:
            return x
        batch, count, width = x.shape
        run.record.spend("Chunking router", batch * router_flops(self.method.router, count, width))
        logits = self.module.logits(x, run.grid, 1000.0 * run.clock(x.device).expand(len(x)))
        if run.attachment.calibrating:
            before = self.module.router.bias.detach().clone()
            self.module.router.calibrate(logits.detach(), self.method.target)
            logits = logits + (self.module.router.bias - before).to(logits)
        probability, natural = select(torch.sigmoid(logits), self.method.force_ends)
        if self.method.ragged:
            keep = tail_drop(probability, natural, torch.tensor(drops(run, self.method.tail_drop), device=x.device))
            lengths = tuple(keep.sum(dim=1).tolist())
        else:
            kept = max(1, round(count / self.method.target))
            lengths = tuple(
                kept - min(int(kept * (drop + _SLACK)), kept - 1) for drop in drops(run, self.method.tail_drop)
            )
        index = most_probable(probability, lengths)
        if run.training:
            run.add_loss("Chunking", self.method.loss_weight * ratio_loss(probability, natural, self.method.target))
        run.record.kept = lengths
        run.kept[id(self)] = (x, index, lengths, Routing(probability, natural, natural, run.grid))
        run.index = index
        run.lengths = lengths if len(set(lengths)) > 1 else None
        return take(x, index)

    def close(self, run: Run, x: Tensor) -> Tensor:
        """Spread the change of the kept tokens: (B, M, D) to (B, N, D)."""
        if id(self) not in run.kept:
            return x
        start, index, lengths, routing = run.kept.pop(id(self))
        run.index = run.lengths = None
        packing = pack_index(index, lengths, routing.grid)
        change = (x - take(start, index)).reshape(-1, x.shape[-1])
        if len(set(lengths)) > 1:
            longest = index.shape[1]
            rows = [row * longest + place for row, length in enumerate(lengths) for place in range(length)]
            change = change.index_select(0, torch.tensor(rows, device=x.device))
        keep = torch.zeros_like(routing.keep).flatten().index_fill(0, packing.index, True).view_as(routing.keep)
        batch, count, width = start.shape
        run.record.spend("Chunking residual", batch * residual_flops(count, width))
        if self.method.sigma and smooths_on_grid(change, routing.grid):
            run.record.spend("Chunking de-chunk", batch * smoothing_flops(routing.grid, width))
        seen = Routing(routing.probability, keep, routing.natural_keep, routing.grid)
        whole: Tensor = start + self.module.dechunk(change, start, seen, packing)
        return whole
