"""FLOPs of what methods compute besides the blocks: matrix products and convolutions, a multiply-add is 2 FLOPs."""

from __future__ import annotations

from tokdyn.methods.routers import RouterName
from tokdyn.ops.dechunk import BAND
from tokdyn.tokens import Grid, cells


def router_flops(router: RouterName, count: int, width: int) -> int:
    """A router on one image.

    Args:
        router: its name.
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
    """The residual projection of learned chunking on one image of N cells and width D."""
    return 2 * count * width * width


def smoothing_flops(grid: Grid, width: int) -> int:
    """Smoothing on the grid of one image: a square band matrix per axis, on the D features and the weights.

    Longer axes are smoothed by shifted sums, and lists of neighbours by weighted ones: neither is a matrix product.
    """
    return 2 * cells(grid) * (width + 1) * sum(size for size in grid if size <= BAND)


def matching_flops(count: int, buckets: int, full: bool, width: int) -> int:
    """Comparing the tokens of one image with the destinations that they may be merged into.

    Args:
        count: tokens.
        buckets: K, destinations.
        full: there is a token in every cell of the grid; then destinations are not compared with each other.
        width: D.
    """
    return 2 * (count - buckets if full else count) * buckets * width
