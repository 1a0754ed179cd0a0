"""Choose which blocks to skip at which noise level, by how little they change their input or by learned gates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokdyn.errors import InputError


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    """Compute 1 - the mean cosine between a block's input and output (ShortGPT, arXiv 2403.03853, eq. 1).

    Args:
        before: (B, N, D).
        after: (B, N, D).

    Returns:
        (B,) fp32; 0 for a block that only scales its tokens.
    """
    return 1.0 - F.cosine_similarity(before.float(), after.float(), dim=-1).flatten(1).mean(1)


def choose_skips(
    influence: Tensor,
    cost: Sequence[float] | Tensor,
    other: float | Tensor,
    flops: float,
    protected: Sequence[int] = (),
) -> tuple[tuple[int, ...], ...]:
    """Choose the blocks to skip at each noise level, for a share of the FLOPs of all levels together.

    Skips blocks in the order of their influence per FLOP, the least first, until the target is met.

    Args:
        influence: (levels, blocks).
        cost: FLOPs of each block (a multiply-add is 2), (blocks,), or (levels, blocks) if levels differ; blocks that
            cost nothing are not skipped.
        other: FLOPs of everything but the blocks, a number or (levels,).
        flops: FLOPs to end up with, as a share of running everything, in (0, 1].
        protected: blocks that are never skipped.

    Returns:
        The skipped blocks of each level, in rising order.

    Raises:
        InputError: the target cannot be reached or lies outside (0, 1], or there is not one cost for each block.
    """
    levels, blocks = influence.shape
    costs = torch.as_tensor(cost, dtype=torch.float64, device="cpu")
    if costs.shape[-1:] != (blocks,) or not 0.0 < flops <= 1.0:
        raise InputError(
            f"there are {costs.shape[-1]} costs for {blocks} blocks and flops is {flops}; expected one cost for each "
            "block and a share of the FLOPs in (0, 1]."
        )
    table = costs.expand(levels, blocks).tolist()
    spent, goal = skip_budget(costs.expand(levels, blocks), other, flops, protected)
    free = [block for block in range(blocks) if block not in set(protected)]
    cells = [(level, block) for level in range(levels) for block in free if table[level][block] > 0]
    skipped: list[list[int]] = [[] for _ in range(levels)]
    for level, block in sorted(cells, key=lambda cell: (float(influence[cell]) / table[cell[0]][cell[1]], *cell)):
        if spent <= goal:
            break
        skipped[level].append(block)
        spent -= table[level][block]
    return tuple(tuple(sorted(row)) for row in skipped)


def skip_budget(
    cost: Tensor, other: float | Tensor, flops: float, protected: Sequence[int] = ()
) -> tuple[float, float]:
    """Return the FLOPs of running everything and the FLOPs of the target; a multiply-add is 2.

    Args:
        cost: (levels, blocks) fp64.
        other: FLOPs of everything but the blocks, a number or (levels,).
        flops: share of them to end up with.
        protected: blocks that are never skipped.

    Raises:
        InputError: the parts that always run cost more than the target.
    """
    rest = torch.as_tensor(other, dtype=torch.float64, device="cpu").expand(len(cost)).sum()
    whole = float(rest + cost.sum())
    least = float(rest + cost[:, sorted(set(protected))].sum())
    if flops * whole < least:
        raise InputError(
            f"{flops:g} of the FLOPs cannot be reached: what always runs takes {least / whole:.3g}; ask for more."
        )
    return whole, flops * whole


def gate(logit: Tensor, training: bool, temperature: float = 5.0, noise: Tensor | None = None) -> Tensor:
    """Take a learned decision, 0 or 1, that has the gradient of a sigmoid (straight-through).

    Args:
        logit: any shape.
        training: add noise and keep the gradient; otherwise the decision is `logit > 0`.
        temperature: of the sigmoid that the gradient is taken from.
        noise: of `gumbel_difference`; None draws it.

    Returns:
        0 or 1, in the type and shape of logit.
    """
    if not training:
        return (logit > 0).to(logit.dtype)
    noise = gumbel_difference(logit) if noise is None else noise.to(logit)
    soft = torch.sigmoid((logit + noise) / temperature)
    hard = (logit + noise > 0).to(logit.dtype)
    return hard + (soft - soft.detach())  # in this order the value is exact


def gumbel_difference(like: Tensor) -> Tensor:
    """Draw differences of two Gumbel variables, which are logistic, in the shape and type of a tensor."""
    return logistic(torch.rand_like(like))


def logistic(uniform: Tensor) -> Tensor:
    """Turn uniform numbers in [0, 1) into logistic ones, the differences of two Gumbel variables."""
    return torch.logit(uniform.clamp(1e-6, 1 - 1e-6))
