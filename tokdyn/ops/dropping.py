"""Drop random tokens from a span of blocks (TREAD, arXiv 2501.04765), and hash integers to random bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokdyn.errors import InputError

_MASK = 0xFFFFFFFF


def kept_count(count: int, rate: float) -> int:
    """Count the tokens that are left of `count` at a drop rate in [0, 1), at least one.

    Raises:
        InputError: the rate lies outside [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise InputError(f"the rate is {rate}, expected a share of the tokens in [0, 1).")
    return max(1, count - int(count * rate))


def random_subset(
    batch: int, count: int, rate: float, device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> Tensor:
    """Draw the tokens that stay, for each sample, in rising order.

    Args:
        batch: B.
        count: N, tokens per sample.
        rate: share to drop.
        device: of the result.
        generator: source of randomness; None is torch's global one.

    Returns:
        (B, K) int64 with K of `kept_count`.
    """
    noise = torch.rand(batch, count, device=device, generator=generator)
    return subset(noise, (count,) * batch, (kept_count(count, rate),) * batch)


def subset(noise: Tensor, lengths: Sequence[int], kept: Sequence[int]) -> Tensor:
    """Select the tokens with the smallest noise of each sample, in rising order.

    Args:
        noise: (B, N).
        lengths: how many of the N entries of each sample are tokens.
        kept: how many of them to select.

    Returns:
        (B, K) int64 with K the largest of `kept`; a sample that keeps fewer has other tokens after its own.
    """
    count, longest = noise.shape[1], max(kept)
    if min(lengths) < count:
        real = torch.arange(count, device=noise.device) < torch.tensor(lengths, device=noise.device)[:, None]
        noise = noise.masked_fill(~real, torch.inf)
    order = noise.argsort(dim=1, stable=True)[:, :longest]
    if min(kept) == longest:
        return order.sort(dim=1).values
    surplus = torch.arange(longest, device=noise.device) >= torch.tensor(kept, device=noise.device)[:, None]
    return (order + surplus * count).sort(dim=1).values.remainder(count)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Take the tokens at an index: (B, N, ...) and (B, K) to (B, K, ...)."""
    batch, count = x.shape[:2]
    flat = (index + torch.arange(batch, device=index.device)[:, None] * count).flatten()
    return x.reshape(batch * count, *x.shape[2:]).index_select(0, flat).view(*index.shape, *x.shape[2:])


def put_back(kept: Tensor, full: Tensor, index: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """Replace the tokens at an index; the others, which were dropped, stay what they were before the span.

    Args:
        kept: (B, K, ...).
        full: (B, N, ...).
        index: (B, K) int64.
        lengths: how many of the K entries of each sample count; None is all.
    """
    batch, count = full.shape[:2]
    flat = (index + torch.arange(batch, device=index.device)[:, None] * count).flatten()
    rows, new = full.reshape(batch * count, *full.shape[2:]), kept.to(full.dtype).flatten(0, 1)
    if lengths is not None and min(lengths) < index.shape[1]:
        longest = index.shape[1]
        places = [row * longest + at for row, length in enumerate(lengths) for at in range(length)]
        counted = torch.tensor(places, device=index.device)
        flat, new = flat.index_select(0, counted), new.index_select(0, counted)
    return rows.index_copy(0, flat, new).view_as(full)


def drop_guidance(strong: Tensor, weak: Tensor, scale: float = 1.5) -> Tensor:
    """Compute `weak + scale * (strong - weak)` for two predictions of a model, the weak one with more tokens dropped.

    Args:
        strong: the prediction with few tokens dropped, any shape.
        weak: the prediction with many tokens dropped.
        scale: 1 is the strong prediction.
    """
    return torch.lerp(weak, strong, scale)


def mix(number: Tensor) -> Tensor:
    """Hash int64 numbers to 32 well-mixed bits (Wang's multiply-xorshift, with 32-bit arithmetic)."""
    number = number & _MASK
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        number = ((number ^ (number >> shift)) * factor) & _MASK
    return number ^ (number >> 16)
