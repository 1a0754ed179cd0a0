"""Choosing which blocks to skip at which noise level, from how little they change their input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokdyn.errors import InputError


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    """1 - mean cosine between a block's input and output, for every sample (ShortGPT, arXiv 2403.03853, eq. 1).

    Args:
        before: (B, N, D).
        after: (B, N, D).

    Returns:
        (B,) fp32, 0 for a block that only scales its tokens.
    """
    return 1.0 - F.cosine_similarity(before.float(), after.float(), dim=-1).flatten(1).mean(1)


def choose_skips(
    influence: Tensor, cost: Sequence[float], other: float, flops: float, protected: Sequence[int] = ()
) -> tuple[tuple[int, ...], ...]:
    """The blocks to skip at each noise level, for a share of the FLOPs of all levels together.

    Takes away the least influence per FLOP first, until the target is met.

    Args:
        influence: (levels, blocks).
        cost: FLOPs of each block.
        other: FLOPs of everything that is not a block.
        flops: FLOPs to end up with, as a share of what running everything costs, in (0, 1].
        protected: blocks that always run.

    Returns:
        For each level the blocks that are skipped, rising.

    Raises:
        InputError: the target is out of reach, or the numbers do not fit.
    """
    levels, blocks = influence.shape
    if len(cost) != blocks or not 0.0 < flops <= 1.0:
        raise InputError(
            f"there are {len(cost)} costs for {blocks} blocks and the target is {flops}; expected one cost for each "
            "block and a share of the FLOPs in (0, 1]."
        )
    whole = levels * (other + sum(cost))
    least = levels * (other + sum(cost[block] for block in protected))
    if flops * whole < least:
        raise InputError(
            f"{flops:g} of the FLOPs cannot be reached: what always runs costs {least / whole:.3g}; ask for more."
        )
    free = [block for block in range(blocks) if block not in set(protected)]
    rows = [(float(influence[level, block]) / cost[block], level, block) for level in range(levels) for block in free]
    skipped: list[list[int]] = [[] for _ in range(levels)]
    spent = float(whole)
    for _, level, block in sorted(rows):
        if spent <= flops * whole:
            break
        skipped[level].append(block)
        spent -= cost[block]
    return tuple(tuple(sorted(row)) for row in skipped)


def gate(logit: Tensor, training: bool, temperature: float = 5.0, noise: Tensor | None = None) -> Tensor:
    """A learned decision, 0 or 1, that passes its gradient through a sigmoid (straight-through).

    Args:
        logit: any shape.
        training: adds Gumbel noise and keeps the gradient; otherwise the decision is logit > 0.
        temperature: of the sigmoid that gradients see.
        noise: difference of two Gumbel numbers, the logit's shape; drawn from torch's generator if None.

    Returns:
        0 or 1, the type and shape of logit.
    """
    if not training:
        return (logit > 0).to(logit.dtype)
    if noise is None:
        uniform = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6)
        noise = torch.logit(uniform)  # distributed as the difference of two Gumbel numbers
    soft = torch.sigmoid((logit + noise) / temperature)
    hard = (logit + noise > 0).to(logit.dtype)
    return hard + soft - soft.detach()
