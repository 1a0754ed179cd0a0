"""How well a choice of tokens covers the places where the detail is."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from tokdyn.errors import DataError


@dataclass(frozen=True)
class DetailScore:
    """A token choice measured against the truth about detail; all values are means over samples.

    Attributes:
        recall: share of the detail pixels that lie in kept tokens.
        kept: share of the tokens that are kept, which is the recall expected from keeping as many at random.
        best: recall of the best choice of as many tokens per sample.
    """

    recall: float
    kept: float
    best: float

    @property
    def lift(self) -> float:
        """Recall as a multiple of chance: 1 is what a random choice reaches."""
        return self.recall / self.kept if self.kept else 0.0


def detail_score(keep: Tensor, grid: tuple[int, int], masks: Tensor) -> DetailScore:
    """Scores which tokens are kept against where the detail is.

    Args:
        keep: (B, N) bool, True where a token is kept, N tokens in raster order.
        grid: (rows, columns) of tokens, N = rows * columns.
        masks: (B, H, W) bool, True where there is detail; rows divide H and columns divide W.

    Returns:
        The score. Samples without detail are left out.
    """
    rows, columns = grid
    batch, height, width = masks.shape
    if keep.shape != (batch, rows * columns):
        raise DataError(
            f"keep is {tuple(keep.shape)}, but {batch} masks on a {rows}x{columns} grid need "
            f"({batch}, {rows * columns})."
        )
    if height % rows or width % columns:
        raise DataError(f"Masks of {height}x{width} pixels cannot be divided into {rows}x{columns} equal tokens.")
    detail = F.avg_pool2d(masks[:, None].double(), (height // rows, width // columns)).flatten(1)
    present = detail.sum(1) > 0
    if not present.any():
        raise DataError("None of the masks marks any detail, so there is nothing to score.")
    keep, detail = keep[present].to(detail.device), detail[present]
    total = detail.sum(1)
    recall = (detail * keep).sum(1) / total
    reach = detail.sort(dim=1, descending=True).values.cumsum(1)
    count = keep.sum(1, keepdim=True)
    best = (reach.gather(1, (count - 1).clamp(min=0)) * (count > 0)).squeeze(1) / total
    return DetailScore(float(recall.mean()), float(keep.double().mean()), float(best.mean()))
