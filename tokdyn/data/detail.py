"""Score how well the kept tokens cover the detail of an image, given a mask of the pixels that have detail."""

from __future__ import annotations

from dataclasses import dataclass

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
    rows, columns = grid
    batch, height, width = masks.shape
    if keep.shape != (batch, rows * columns):
        raise DataError(
            f"keep has shape {tuple(keep.shape)}, expected ({batch}, {rows * columns}) for {batch} masks on a "
            f"{rows}x{columns} grid."
        )
    if height % rows or width % columns:
        raise DataError(f"Masks of {height}x{width} pixels cannot be divided into {rows}x{columns} equal tokens.")
    detail = F.avg_pool2d(masks[:, None].double(), (height // rows, width // columns)).flatten(1)
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
