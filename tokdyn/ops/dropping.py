"""Dropping random tokens from a span of blocks while training (TREAD, arXiv 2501.04765)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokdyn.errors import InputError


def kept_count(count: int, rate: float) -> int:
    """Tokens left of `count` at a rate in [0, 1): never fewer than one.

    Raises:
        InputError: the rate is no share below 1.
    """
    if not 0.0 <= rate < 1.0:
        raise InputError(f"the rate is {rate}, expected a share of the tokens in [0, 1).")
    return max(1, count - int(count * rate))


def random_subset(
    batch: int, count: int, rate: float, device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> Tensor:
    """Indices of the tokens that stay, drawn for each sample, in rising order.

    Args:
        batch: B.
        count: N, tokens of a sample.
        rate: share to drop.
        device: where the indices are needed.
        generator: where the randomness comes from; torch's own if None.

    Returns:
        (B, K) int64 with K of `kept_count`.
    """
    kept = kept_count(count, rate)
    order = torch.rand(batch, count, device=device, generator=generator).argsort(dim=1)
    return order[:, :kept].sort(dim=1).values


def take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens at an index: (B, N, ...) and (B, K) to (B, K, ...)."""
    batch, count = x.shape[:2]
    flat = (index + torch.arange(batch, device=index.device)[:, None] * count).flatten()
    return x.reshape(batch * count, *x.shape[2:]).index_select(0, flat).view(*index.shape, *x.shape[2:])


def put_back(kept: Tensor, full: Tensor, index: Tensor) -> Tensor:
    """The full tokens with those at the index replaced: those that were dropped pass by the span unchanged."""
    batch, count = full.shape[:2]
    flat = (index + torch.arange(batch, device=index.device)[:, None] * count).flatten()
    rows = full.reshape(batch * count, *full.shape[2:])
    return rows.index_copy(0, flat, kept.to(full.dtype).flatten(0, 1)).view_as(full)
