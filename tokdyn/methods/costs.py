"""Compute the FLOPs of what methods compute besides the blocks; a multiply-add is 2 FLOPs.

Matrix products, convolutions and Fourier transforms count; sums, norms and activations do not.
"""

from __future__ import annotations

import math

from tokdyn.methods.routers import RouterName
from tokdyn.ops.dechunk import BAND
from tokdyn.tokens import Grid, cells


def router_flops(router: RouterName, count: int, width: int) -> int:
    """Compute the FLOPs of a router on one image.

    Args:
        router: the name of the router.
        count: N, cells of the grid.
        width: D.
    """
    if router == "random":
        return 0
    if router == "cosine":
        return 2 * count * width * (2 * width + 9)
    inner = max(1, width // 4)
    return 2 * count * inner * (width + 18 * inner + 1)


def residual_flops(count: int, width: int) -> int:
    """Compute the FLOPs of Chunking's residual projection on one image of `count` cells and width D."""
    return 2 * count * width * width


def smoothing_flops(grid: Grid, width: int) -> int:
    """Compute the FLOPs of de-chunking's smoothing on the grid of one image of width D.

    Each axis of up to `BAND` cells is a product with a square band matrix, on D features and one weight per cell.
    Longer axes are smoothed by shifted sums, which are not counted.
    """
    return 2 * cells(grid) * (width + 1) * sum(size for size in grid if size <= BAND)


def matching_flops(pairs: int, width: int) -> int:
    """Compute the FLOPs of comparing the tokens of one image with the destinations that they may be merged into.

    Args:
        pairs: number of pairs of tokens, from `Destinations.pairs`.
        width: D, or the number of channels that are compared.
    """
    return 2 * pairs * width


def filter_flops(grid: Grid, width: int) -> int:
    """Compute the FLOPs of SeaCache's filter on the features of one image: a Fourier transform and its inverse.

    Each of D transforms of N real values is taken to be `2.5 N log2 N` additions and multiplications, half of what is
    usual for complex values, whatever algorithm computes it.

    Args:
        grid: of N cells.
        width: D.
    """
    count = cells(grid)
    return 2 * width * round(2.5 * count * math.log2(count))
