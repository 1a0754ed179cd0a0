"""Turn a mask of a picture into one of its token grid: the tokens that no method may merge or leave out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokdyn.errors import InputError
from tokdyn.tokens import Grid, cells


def fit_mask(mask: Tensor, grid: Grid, batch: int) -> Tensor:
    """Fit a mask to the token grid of a batch.

    A token is kept if any entry of the mask that overlaps its cell is true.

    Args:
        mask: bool; (N,) one entry for each token, or a grid of any size with as many axes as the token grid, such as
            (rows, columns); a picture (rows, columns) stands for every frame of a video. Or one of either for each
            sample, on a first axis; (B, N) is taken for the former. If there are fewer than B samples, they repeat: a
            pipeline draws the branches of guidance one behind the other, in one batch.
        grid: 1 to 3 sizes, N cells.
        batch: B.

    Returns:
        (B, N) bool.

    Raises:
        InputError: the mask has neither of these shapes, or a number of samples that does not divide B.
    """
    count = cells(grid)
    each = mask.dim() == 2 and len(mask) > 0 and batch % len(mask) == 0
    if (mask.dim() == 1 or each) and mask.shape[-1] == count:
        fitted = mask.reshape(-1, count)
    else:
        own = mask[None] if mask.dim() == 2 and len(grid) == 3 else mask  # a picture for all frames
        samples = own if own.dim() == len(grid) + 1 else own[None]
        if samples.dim() != len(grid) + 1 or 0 in samples.shape:
            axes = ("columns", "rows, columns", "frames, rows, columns")[len(grid) - 1]
            raise InputError(
                f"the mask of tokens to keep has shape {tuple(mask.shape)}, but the tokens form a grid of "
                f"{' x '.join(map(str, grid))}; give ({axes}) of any size, ({count},), or one of them for each sample."
            )
        volume = samples.reshape(len(samples), 1, *(1,) * (3 - len(grid)), *samples.shape[1:])
        pooled = F.adaptive_max_pool3d(volume.float(), (1,) * (3 - len(grid)) + tuple(grid))
        fitted = pooled.view(len(samples), count) > 0
    if batch % len(fitted):
        raise InputError(
            f"the mask of tokens to keep is for {len(fitted)} samples, but the batch holds {batch}; give one mask for "
            "all, or one for each image."
        )
    return fitted.repeat(batch // len(fitted), 1)


def mask_of(kept: Tensor, grid: Grid, samples: tuple[int, ...], part: Grid | None = None) -> Tensor:
    """Select the mask of some samples, or of the parts that attention splits samples into.

    Args:
        kept: (B, N) bool, from `fit_mask`.
        grid: the grid of N cells.
        samples: positions of b samples in the batch; of each part, the position of its sample.
        part: the grid of a part: that of a frame, or the frames at one place; None if samples are whole.

    Returns:
        (b, n) bool, with n cells of a sample or part.
    """
    if part is None or part == grid:
        return kept[list(samples)]
    frames = kept.view(len(kept), grid[0], -1)
    parts = frames if part == grid[1:] else frames.transpose(1, 2)
    return parts[list(dict.fromkeys(samples))].flatten(0, 1).contiguous()


def check_eager() -> None:
    """Refuse a mask in a graph of torch.compile, which cannot count its tokens.

    Raises:
        InputError: a call is being compiled.
    """
    if torch.compiler.is_compiling():
        raise InputError(
            "tokdyn.keeping counts the tokens of its mask in every call, which no graph of torch.compile can; call the "
            "model within torch.compiler.set_stance('force_eager'), which compiles nothing, or leave out the mask."
        )
