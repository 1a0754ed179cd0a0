"""Computing some attention heads and some groups of MLP channels alone (DyDiT, arXiv 2410.03456)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

_ALIGNED = 8  # channels; matrix products are slower when their sizes are no multiples of it


def group_sizes(channels: int, groups: int) -> tuple[int, ...]:
    """How many channels each of `groups` groups holds: as equal as multiples of 8 allow, where there are that many."""
    step = _ALIGNED if channels >= 2 * _ALIGNED * groups else 1
    ends = [round(channels * group / (groups * step)) * step for group in range(groups)] + [channels]
    return tuple(end - start for start, end in pairwise(ends))


def kept_channels(on: Sequence[bool], sizes: Sequence[int]) -> Tensor:
    """The channels of the groups that are on.

    Args:
        on: of each group.
        sizes: channels of each group.

    Returns:
        Indices, int64, rising.
    """
    return spread(torch.tensor([list(on)]), sizes)[0].nonzero().flatten()


def spread(mask: Tensor, sizes: Sequence[int]) -> Tensor:
    """A value for each group (B, G) as one for each of its channels (B, C)."""
    if len(set(sizes)) == 1:
        return mask.repeat_interleave(sizes[0], dim=1)
    return mask.repeat_interleave(torch.tensor(sizes, device=mask.device), dim=1, output_size=sum(sizes))


def with_text(image: Tensor, text: int, place: str) -> Tensor:
    """Values (B, M) of image tokens, and 1 for text tokens beside them, which come behind if `place` is "first"."""
    if not text:
        return image
    words = image.new_ones(len(image), text)
    return torch.cat([image, words] if place == "first" else [words, image], dim=1)


def flops_share(heads: Tensor, channels: Tensor, tokens: Tensor, attention: Tensor, mlp: Tensor) -> Tensor:
    """The FLOPs that ran as a share of those of full attention and MLP (arXiv 2410.03456).

    Args:
        heads: (B, L) share of the heads of each block that is on.
        channels: (B, L) share of the MLP channels.
        tokens: (B, L) share of the tokens that the MLP sees.
        attention: (B, L) FLOPs of attention with all heads.
        mlp: (B, L) FLOPs of the MLP with all channels and tokens; 0 in both where a block does not run.

    Returns:
        (B,).
    """
    whole = (attention + mlp).sum(dim=1)
    return (attention * heads + mlp * channels * tokens).sum(dim=1) / whole.clamp_min(torch.finfo(whole.dtype).tiny)


def flops_loss(share: Tensor, target: Tensor | float) -> Tensor:
    """2 (mean - target)^2, zero where the share of the FLOPs is on average what it should be.

    Args:
        share: (B,).
        target: in (0, 1].
    """
    return 2.0 * (share.mean() - target) ** 2
