"""Score how well kept tokens, or the scores of tokens, find the detail of an image, given a mask of its pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokdyn.errors import DataError


@dataclass(frozen=True)
class DetailScore:
    """The score of a choice of kept tokens; all values are means over samples, between 0 and 1.

    Attributes:
        recall: share of the detail pixels that lie in kept tokens.
        kept: kept share, which is also the expected recall of a random choice of equally many tokens.
        best: largest recall that equally many tokens per sample can reach.
    """

    recall: float
    kept: float
    best: float

    @property
    def lift(self) -> float:
        """Recall divided by that of a random choice of equally many tokens; 0 if no tokens are kept."""
        return self.recall / self.kept if self.kept else 0.0


def detail_score(keep: Tensor, grid: tuple[int, int], masks: Tensor) -> DetailScore:
    """Score kept tokens against masks of the detail.

    Args:
        keep: (B, N) bool, True for kept tokens, N tokens in raster order.
        grid: (rows, columns) of tokens, N = rows * columns.
        masks: (B, H, W) bool, True for pixels with detail; H is a multiple of rows and W of columns.

    Returns:
        The score over the samples that have any detail.

    Raises:
        DataError: the shapes contradict each other, or no mask marks any detail.
    """
    detail = detail_shares(grid, masks)
    _check_shape("keep", keep, grid, masks)
    present = detail.sum(1) > 0
    if not present.any():
        raise DataError("None of the masks marks any detail: give at least one that does.")
    keep, detail = keep[present].to(detail.device), detail[present]
    total = detail.sum(1)
    recall = (detail * keep).sum(1) / total
    reach = detail.sort(dim=1, descending=True).values.cumsum(1)
    count = keep.sum(1, keepdim=True)
    best = (reach.gather(1, (count - 1).clamp(min=0)) * (count > 0)).squeeze(1) / total
    return DetailScore(float(recall.mean()), float(keep.double().mean()), float(best.mean()))


def detail_area(scores: Tensor, grid: tuple[int, int], masks: Tensor) -> float:
    """Compute the area under the ROC curve of scores that should be high where an image has detail.

    The area is the probability that a random pixel with detail has a higher score than a random pixel without, where a
    tie counts half. Scores that know nothing have 0.5 in expectation. All pixels of a token share its score, so that
    the largest possible area, that of `detail_shares`, is below 1 if some tokens have both kinds of pixels.

    Args:
        scores: (B, N) any real numbers, such as boundary probabilities, N tokens in raster order.
        grid: (rows, columns) of tokens, N = rows * columns.
        masks: (B, H, W) bool, True for pixels with detail; H is a multiple of rows and W of columns.

    Returns:
        The mean over the samples that have pixels of both kinds.

    Raises:
        DataError: the shapes contradict each other, or no sample has pixels of both kinds.
    """
    detail = detail_shares(grid, masks)
    _check_shape("scores", scores, grid, masks)
    areas = []
    for score, share in zip(scores.double().to(detail.device), detail, strict=True):
        levels, place = torch.unique(score, return_inverse=True)
        with_detail, without = (score.new_zeros(len(levels)).index_add(0, place, each) for each in (share, 1.0 - share))
        lower = without.cumsum(0) - without / 2.0
        pairs = share.sum() * (1.0 - share).sum()
        if pairs > 0:
            areas.append(float((with_detail * lower).sum() / pairs))
    if not areas:
        raise DataError("None of the masks marks some pixels and leaves others: give at least one that does.")
    return sum(areas) / len(areas)


def detail_shares(grid: tuple[int, int], masks: Tensor) -> Tensor:
    """Return the share of the pixels of each token that have detail.

    Args:
        grid: (rows, columns) of tokens, N = rows * columns.
        masks: (B, H, W) bool, True for pixels with detail; H is a multiple of rows and W of columns.

    Returns:
        (B, N) float64, between 0 and 1.

    Raises:
        DataError: the masks cannot be divided into so many tokens.
    """
    rows, columns = grid
    height, width = masks.shape[1:]
    if height % rows or width % columns:
        raise DataError(f"Masks of {height}x{width} pixels cannot be divided into {rows}x{columns} equal tokens.")
    return F.avg_pool2d(masks[:, None].double(), (height // rows, width // columns)).flatten(1)


def _check_shape(name: str, values: Tensor, grid: tuple[int, int], masks: Tensor) -> None:
    """Raise a DataError unless there is one value for each token of each mask."""
    expected = (len(masks), grid[0] * grid[1])
    if values.shape != expected:
        raise DataError(
            f"{name} has shape {tuple(values.shape)}, expected {expected} for {len(masks)} masks on a "
            f"{grid[0]}x{grid[1]} grid."
        )
