"""The handlers of DepthSkip: gates that skip blocks by the noise level of each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tokdyn.attach.context import CallContext
from tokdyn.attach.handlers.base import Gate, Plan, handles
from tokdyn.attach.view import TokenView
from tokdyn.methods import DepthSkip, Sizes, SkipGates
from tokdyn.methods.drawing import gate_noise, over_batch
from tokdyn.ops.skipping import gate
from tokdyn.trace.calls import per_sample


@dataclass(eq=False)
class TableGate(Gate):
    """Gates given by a table: each row lists the blocks that are skipped between two noise levels.

    Attributes:
        method: the settings, with the table.
        depth: number of blocks of the model.
    """

    method: DepthSkip
    depth: int

    def always(self, context: CallContext, block: int) -> bool | None:
        """Return whether the table skips the block, if it does so at all noise levels or at none; else None."""
        rows = [(low, high) for low, high, blocks in self.method.rows(self.depth) if block in blocks]
        return False if not rows else True if (0.0, 1.0) in rows else None

    def skips(self, context: CallContext, view: TokenView, block: int) -> Sequence[bool]:
        """Look up the noise level of each sample in the table."""
        levels = context.levels(view)
        skipped = {level: block in self.method.skipped(level, self.depth) for level in set(levels)}
        return [skipped[level] for level in levels]

    def weight(self, context: CallContext, view: TokenView, block: int) -> Tensor | None:
        """Return None: the whole change of a block that runs is added."""
        return None


@dataclass(eq=False)
class LearnedGate(Gate):
    """Learned gates: in sampling open or shut, in training random 0 or 1 with a gradient.

    Attributes:
        method: the settings.
        module: the trained parts, which compute logits from the noise level.
        sizes: depth, width and heads of the model.
        slot: in sampling, which samples skip which block; in training, the gates that were drawn.
    """

    method: DepthSkip
    module: SkipGates
    sizes: Sizes
    slot: int

    def always(self, context: CallContext, block: int) -> bool | None:
        """Return False in training, where every block runs; None in sampling."""
        return False if context.training else None

    def skips(self, context: CallContext, view: TokenView, block: int) -> Sequence[bool]:
        """Return for each sample whether the gate is shut; the gates of all blocks are computed at the first one."""
        shut: list[tuple[float, ...]] | None = context.slots[self.slot]
        if shut is None:
            columns = (self._logits(context, view) <= 0).T.tolist()
            shut = [per_sample(column, view.batch, "the timestep") for column in columns]
            context.slots[self.slot] = shut
        return [bool(value) for value in shut[block]]

    def weight(self, context: CallContext, view: TokenView, block: int) -> Tensor | None:
        """Return None in sampling; in training draw the (B,) gates of the block, 0 or 1 with a gradient.

        The first block of a call draws the gates of all blocks, and adds the loss on the share of the FLOPs.
        """
        if not context.training:
            return None
        drawn: Tensor | None = context.slots[self.slot]
        if drawn is None:
            logits = self._logits(context, view).expand(view.batch, -1)
            noise = gate_noise(context.training, view.samples, logits.shape[1:], logits.device, self.slot)
            drawn = gate(logits, training=True, noise=noise)
            cost = drawn.new_tensor(self.sizes.weights) / sum(self.sizes.weights)
            share = over_batch("DepthSkip", (drawn * cost).sum(dim=1)).mean()
            context.add_loss("DepthSkip", self.method.loss_weight * 2.0 * (share - self.method.target) ** 2)
            context.slots[self.slot] = drawn
        return drawn[:, block]

    def _logits(self, context: CallContext, view: TokenView) -> Tensor:
        """Compute the (B, depth) or (1, depth) logits of the gates, which are open above 0."""
        score = self.module.score
        levels = context.level_tensor(view, view.device)
        context.trace.spend("DepthSkip gates", 2 * len(levels) * score.in_features * score.out_features)
        logits: Tensor = self.module(levels)
        return logits


@handles(DepthSkip)
def build(plan: Plan) -> Sequence[object]:
    """Build learned gates if the method has trainable parts, else gates from its table."""
    if plan.module is not None:
        return [LearnedGate(plan.method, plan.module, plan.sizes, plan.slot)]
    return [TableGate(plan.method, plan.sizes.depth)]
