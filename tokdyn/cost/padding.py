"""What attention of tokdyn's own blocks computes on rows that are only there to fill up a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch

from tokdyn.ops.attention import computed_pairs


def paddings(calls: Sequence[tuple[float, Sequence[int]]], device: torch.device, head_width: int) -> set[int]:
    """What padded rows may have cost, in FLOPs above 0: it depends on the type, and on whether gradients were wanted.

    Args:
        calls: of attention: FLOPs of one pair of query and key, and the rows of the samples.
        device: of the model.
        head_width: d = D / H.
    """
    found = set()
    types = torch.float32, torch.bfloat16, torch.float16
    for dtype, learning, biased in product(types, (False, True), (False, True)):
        beyond = 0
        for flops, rows in calls:
            pairs = computed_pairs(rows, device, dtype, head_width, learning, biased) - sum(n * n for n in rows)
            beyond += round(flops * pairs)
        found.add(beyond)
    return found - {0}
