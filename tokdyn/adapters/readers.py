"""Functions and texts that the adapters of several families use: readers of the token grid and of the noise level.

A reader that looks at values, and not only at shapes, synchronises with their device. In a graph of torch.compile it
reads them while the graph is made, and the graph asserts that they stay.

`CONTROL_REASON` and `IMAGE_PROMPT_REASON` are reasons for `ModelAdapter.refuse`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.adapters.base import Arguments
from tokdyn.errors import InputError
from tokdyn.tokens import Grid, ImageTokens, beside, cells

CONTROL_REASON = (
    "its residuals have one entry per cell and are added where tokens may be missing; leave the control out"
)
IMAGE_PROMPT_REASON = "image prompts and other attention arguments may have one entry per cell; leave them out"


def patch_grid(model: nn.Module, call: Arguments) -> Grid:
    """Return the grid of latents (B, C, rows, columns): both sizes divided by the patch size in the model's config."""
    size = model.config["patch_size"]  # type: ignore[index]
    rows, columns = call["hidden_states"].shape[-2:]
    return rows // size, columns // size


def timestep_level(
    name: str = "timestep", scale: float = 1000.0, backwards: bool = False
) -> Callable[[nn.Module, Arguments], Any]:
    """Return a function for `ModelAdapter.level`, for models whose timestep runs from 0, the image, to `scale`, noise.

    Args:
        name: the name of the timestep argument.
        scale: the timestep of pure noise.
        backwards: whether the timestep runs the other way, from 0, pure noise, to `scale`, the image.
    """

    def level(model: nn.Module, call: Arguments) -> Tensor | float:
        value = call[name]
        part = (value.float() if isinstance(value, torch.Tensor) else float(value)) / scale
        return 1.0 - part if backwards else part

    return level


def grid_from_ids(ids: Tensor) -> Grid | ImageTokens:
    """Read the grid of the generated image, and those of reference images, from position ids.

    Args:
        ids: (N, axes) or (B, N, axes) ids of all cells in raster order, image after image. The first three axes are the
            number of the image, which is another for references than for the generated image, and row and column.

    Raises:
        InputError: the ids are no such ids, or differ between samples.
    """
    read = _constant_grids(ids)
    if torch.compiler.is_compiling():  # within a larger graph, which was compiled for this grid
        image = ids.reshape(-1, *ids.shape[-2:])[0, :, :3]
        extent = torch.tensor(read[0], device=ids.device)
        same = (_extent(image) == extent).all() & ((image[:, 0] == image[0, 0]).sum() == cells(read[1]))
        torch._assert_async(same, "this graph was compiled for another token grid; compile the model alone instead.")
    return ImageTokens(*read[1:]) if read[2] else read[1]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant_grids(ids: Tensor) -> tuple[Grid, Grid, tuple[Grid, ...]]:
    """Return the numbers of images, rows and columns that the ids span, and the grids of all images."""
    samples = ids.reshape(-1, *ids.shape[-2:])[:, :, :3]
    image, extent = samples[0], _extent(samples[0])
    place = image[:, 1:] - image[:, 1:].amin(0)
    raster = place[:, 0] * extent[2] + place[:, 1] == torch.arange(len(image), device=ids.device)
    *spans, whole, alike = torch.stack([*extent, raster.all(), (samples == image).all()]).tolist()
    sizes = tuple(int(size) for size in spans)
    if not alike:
        raise InputError("the samples have different position ids; call the model with samples that share theirs.")
    if whole and sizes[0] == 1 and cells(sizes) == len(image):
        return sizes, sizes[1:], ()
    generated, *references = _rasters(image)
    if any(number == generated[0] for number, _ in references):
        raise InputError(
            f"the position ids of the {len(image)} image tokens form no grids; expected the cells of the generated "
            "image in raster order, and after them those of reference images with other numbers on the first axis."
        )
    return sizes, generated[1], tuple(grid for _, grid in references)


def _extent(ids: Tensor) -> Tensor:
    """Return the (3,) numbers of images, rows and columns that the ids span."""
    return ids[:, :3].amax(0) - ids[:, :3].amin(0) + 1


def _rasters(ids: Tensor) -> list[tuple[float, Grid]]:
    """Split ids (N, 3) into images; return of each its number and its rows and columns."""
    places = ids.double().cpu()
    ends = (places.diff(dim=0) != places.new_tensor([0, 0, 1])).any(dim=1).nonzero().flatten().tolist()
    lines = [place + 1 for place in ends]  # where lines of neighbouring columns begin
    images: list[tuple[list[float], int, int]] = []  # the line that would come next, rows and columns
    for first, stop in zip([0, *lines], [*lines, len(places)], strict=True):
        number, row, column = places[first].tolist()
        if images and images[-1][0] == [number, row, column] and images[-1][2] == stop - first:
            images[-1] = [number, row + 1, column], images[-1][1] + 1, stop - first
        else:
            images.append(([number, row + 1, column], 1, stop - first))
    return [(following[0], (rows, columns)) for following, rows, columns in images]


def grid_from_coordinates(places: Tensor) -> Grid | ImageTokens:
    """Read the grid of a video, and those of frames that it is conditioned on, from the coordinates of their tokens.

    Args:
        places: (B, 3, N) coordinates on the axes of frames, rows and columns. The video comes last and begins at an
            earlier frame than what comes before it.

    Raises:
        InputError: the coordinates of the video form no grid, or samples have different ones.
    """
    if not bool((places == places[:1]).all()):
        raise InputError("the samples have different video_coords; call the model with samples that share theirs.")
    here = places[0].cpu()
    starts = [0, *((here[0].diff() < 0).nonzero().flatten() + 1).tolist(), here.shape[1]]
    grids: list[Grid] = []
    for first, stop in pairwise(starts):
        sizes = tuple(len(axis.unique()) for axis in here[:, first:stop])
        grids.append(sizes if cells(sizes) == stop - first else (stop - first,))
    if len(grids[-1]) == 1:
        raise InputError(
            f"the last {grids[-1][0]} places in video_coords form no grid of frames, rows and columns; leave "
            "video_coords out, or use FeatureCache or DepthSkip."
        )
    *references, grid = grids
    return ImageTokens(grid, tuple(references), leading=len(references)) if references else grid


def with_clean_frames(read: Grid | ImageTokens, timestep: Any) -> Grid | ImageTokens:
    """Take the first and last frames of a video for references if their tokens have timestep 0 and others have not.

    Args:
        read: what was read so far, with a grid of (frames, rows, columns).
        timestep: a timestep for each token, (B, N); anything else leaves `read` as it is.

    Raises:
        InputError: the clean tokens are no such frames, or samples have different ones.
    """
    if not isinstance(timestep, Tensor) or timestep.dim() != 2 or timestep.shape[1] == 1:
        return read
    tokens = read if isinstance(read, ImageTokens) else ImageTokens(read)
    before, _ = beside(tokens)
    own = timestep[:, before : before + cells(tokens.grid)] == 0
    first, last = _constant_clean_frames(own.reshape(len(own), tokens.grid[0], -1))
    frames, *rest = tokens.grid
    if torch.compiler.is_compiling():
        same = own.sum() == len(own) * cells((first + last, *rest))
        torch._assert_async(same, "this graph was compiled for other clean frames; compile the model alone instead.")
    if not first + last:
        return read
    leading = tokens.references[: tokens.leading] + (((first, *rest),) if first else ())
    trailing = (((last, *rest),) if last else ()) + tokens.references[tokens.leading :]
    return ImageTokens((frames - first - last, *rest), leading + trailing, len(leading))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant_clean_frames(clean: Tensor) -> tuple[int, int]:
    """Return how many frames at the beginning and at the end are clean, from (B, F, R * C) bool."""
    clean = clean.cpu()
    frames = clean[0, :, 0].tolist()
    if all(frames):
        frames = [False] * len(frames)
    first = frames.index(False)
    last = frames[::-1].index(False)
    if bool((clean != clean[:1, :, :1]).any()) or any(frames[first : len(frames) - last]):
        raise InputError(
            "some tokens have timestep 0, but they are not the first or last frames of all samples, so that the others "
            "form no grid; call the model with such samples, or use FeatureCache or DepthSkip."
        )
    return first, last
