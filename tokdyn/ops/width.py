"""Compute only some attention heads and some groups of MLP channels (DyDiT, arXiv 2410.03456)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

_ALIGNED = 8  # channels; matrix products whose sizes are not multiples of it are slower


def group_sizes(channels: int, groups: int) -> tuple[int, ...]:
    """Split channels into groups that are as equal as multiples of 8 allow, if there are enough channels."""
    step = _ALIGNED if channels >= 2 * _ALIGNED * groups else 1
    ends = [round(channels * group / (groups * step)) * step for group in range(groups)] + [channels]
    return tuple(end - start for start, end in pairwise(ends))


def kept_channels(on: Sequence[bool], sizes: Sequence[int]) -> Tensor:
    """List the channels of the groups that are on.

    Args:
        on: whether each group is on.
        sizes: number of channels of each group.

    Returns:
        Indices, int64, in rising order.
    """
    return spread(torch.tensor([list(on)]), sizes)[0].nonzero().flatten()


def spread(mask: Tensor, sizes: Sequence[int]) -> Tensor:
    """Repeat a value for each group (B, G) for each of its channels (B, C)."""
    if len(set(sizes)) == 1:
        return mask.repeat_interleave(sizes[0], dim=1)
    return mask.repeat_interleave(torch.tensor(sizes, device=mask.device), dim=1, output_size=sum(sizes))


def with_text(image: Tensor, text: int, place: str) -> Tensor:
    """Extend values (B, M) of image tokens by ones for text tokens, after them if the image's place is "first"."""
    if not text:
        return image
    ones = image.new_ones(len(image), text)
    return torch.cat([image, ones] if place == "first" else [ones, image], dim=1)


def flops_share(heads: Tensor, channels: Tensor, tokens: Tensor, attention: Tensor, mlp: Tensor) -> Tensor:
    """Compute the FLOPs that run as a share of those of full attention and MLP (arXiv 2410.03456).

    Args:
        heads: (B, L) share of the heads that are on, in each of L blocks.
        channels: (B, L) share of the MLP channels that are on.
        tokens: (B, L) share of the tokens that the MLP sees.
        attention: (B, L) FLOPs of attention with all heads; a multiply-add is 2.
        mlp: (B, L) FLOPs of the MLP with all channels and tokens. Both are 0 where a block does not run.

    Returns:
        (B,).
    """
    whole = (attention + mlp).sum(dim=1)
    return (attention * heads + mlp * channels * tokens).sum(dim=1) / whole.clamp_min(torch.finfo(whole.dtype).tiny)


def flops_loss(share: Tensor, target: Tensor | float) -> Tensor:
    """Compute `2 (mean - target)^2`, zero where the mean share of the FLOPs is the target.

    Args:
        share: (B,).
        target: in (0, 1].
    """
    return 2.0 * (share.mean() - target) ** 2
