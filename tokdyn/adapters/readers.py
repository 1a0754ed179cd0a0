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
from einops import rearrange
from torch import Tensor, nn

from tokdyn.adapters.base import Arguments
from tokdyn.errors import InputError
from tokdyn.tokens import Grid, ImageTokens, cells

CONTROL_REASON = (
    "its residuals have one entry per cell and are added where tokens may be missing; leave the control out"
)
IMAGE_PROMPT_REASON = "image prompts and other attention arguments may have one entry per cell; leave them out"


def patch_grid(model: nn.Module, call: Arguments) -> Grid:
    """Return the grid of latents (B, C, rows, columns): both sizes divided by the patch size in the model's config."""
    size = model.config["patch_size"]  # type: ignore[index]
    rows, columns = call["hidden_states"].shape[-2:]
    return rows // size, columns // size


def shapes_grid(model: nn.Module, call: Arguments) -> Grid:
    """Return the grid of a call whose `img_shapes` has (frames, rows, columns) of the image of every sample."""
    shapes = {tuple(map(tuple, shape if isinstance(shape, list) else [shape])) for shape in call["img_shapes"]}
    if len(shapes) > 1 or len(next(iter(shapes))) > 1:
        raise InputError(
            f"img_shapes holds several images or sizes; a wrapped {type(model).__name__} takes one image per sample, "
            "of one size, with methods that reduce tokens."
        )
    ((grid,),) = shapes
    return grid[1:] if grid[0] == 1 else grid


def video_grid(model: nn.Module, call: Arguments) -> Grid:
    """Return the grid of latents (B, C, frames, rows, columns): each size divided by that of a patch.

    The patch size in the model's config is one number for rows and columns, with that for frames in `patch_size_t`, or
    one number for each axis.
    """
    config: Any = model.config
    size = config["patch_size"]
    patch = (config.get("patch_size_t") or 1, size, size) if isinstance(size, int) else size
    return tuple(length // part for length, part in zip(call["hidden_states"].shape[-3:], patch, strict=True))


def channels_last_grid(model: nn.Module, call: Arguments) -> Grid:
    """Return the grid of latents (B, frames, rows, columns, C): each size divided by that of a patch."""
    patch = model.config["patch_size"]  # type: ignore[index]
    return tuple(length // part for length, part in zip(call["hidden_states"].shape[1:4], patch, strict=True))


def frame_level(scale: float = 1000.0) -> Callable[[nn.Module, Arguments], Tensor]:
    """Return a function for `ModelAdapter.level`, for models in which frames or tokens may differ in their timestep.

    The level of a sample is that of its noisiest token. The timestep runs from 0, the image, to `scale`, noise.
    """

    def level(model: nn.Module, call: Arguments) -> Tensor:
        value: Tensor = call["timestep"].float() / scale
        return value.flatten(1).amax(dim=1) if value.dim() > 1 else value

    return level


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
    grids = _grids_between(here, here[0].diff() < 0)
    if len(grids[-1]) == 1:
        raise InputError(
            f"the last {grids[-1][0]} places in video_coords form no grid of frames, rows and columns; leave "
            "video_coords out, or use FeatureCache or DepthSkip."
        )
    *references, grid = grids
    return ImageTokens(grid, tuple(references), leading=len(references)) if references else grid


def grid_of_patches(spans: Tensor) -> Grid:
    """Read the grid of a video from the spans (B, 3, N, 2) of its patches in time and in the two axes of the frame.

    The video comes first; what follows it does not begin where its last frame ends.
    """
    begins, ends = spans[0, ..., 0].cpu(), spans[0, ..., 1].cpu()
    later = (begins[0] != begins[0, 0]).tolist()
    frame = later.index(True) if True in later else len(later)
    below = (begins[1, :frame] != begins[1, 0]).tolist()
    columns = below.index(True) if True in below else frame
    frames = 1
    while (frames + 1) * frame <= begins.shape[1] and torch.isclose(
        begins[0, frames * frame], ends[0, frames * frame - 1]
    ):
        frames += 1
    return frames, frame // columns, columns


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def grids_behind(begins: Tensor, level: Tensor | None) -> tuple[Grid, ...]:
    """Return the grids of images whose tokens follow a video, each with a noise level of its own.

    Args:
        begins: (B, 3, N) where their patches begin in time and in the two axes of the frame.
        level: (B, N) how noisy they are; None if all are equally noisy.
    """
    time, row, column = begins[0].cpu().diff()
    back = (time < 0) | ((time == 0) & ((row < 0) | ((row == 0) & (column <= 0))))
    changes = torch.zeros_like(back) if level is None else (level.diff(dim=1) != 0).any(0).cpu()
    return tuple(_grids_between(begins[0].cpu(), back | changes))


def _grids_between(places: Tensor, changes: Tensor) -> list[Grid]:
    """Return the grids of places (3, N), of which those after `changes` (N - 1) begin another.

    The grid of n places that form none is (n,).
    """
    grids: list[Grid] = []
    for first, stop in pairwise([0, *(changes.nonzero().flatten() + 1).tolist(), places.shape[1]]):
        sizes = tuple(len(axis.unique()) for axis in places[:, first:stop])
        grids.append(sizes if cells(sizes) == stop - first else (stop - first,))
    return grids


def with_given_frames(read: Grid | ImageTokens, level: Any, strengths: bool = False) -> Grid | ImageTokens:
    """Take the first and last frames of a video for references if they are given and the others are generated.

    Args:
        read: what was read so far, with a grid of (frames, rows, columns).
        level: how noisy the generated grid's frames, or cells, are in every sample: (B, frames * n) numbers of which
            each frame has n, or 0 for what is given and anything else for what is generated. Any other value, such as
            a timestep for each sample, leaves `read` as it is.
        strengths: whether all frames are given that are less noisy than others; else those are whose level is 0.

    Raises:
        InputError: what is given are no such frames, or samples have different ones.
    """
    if not isinstance(level, Tensor) or level.dim() != 2 or level.shape[1] == 1:
        return read
    tokens = read if isinstance(read, ImageTokens) else ImageTokens(read)
    frames, *rest = tokens.grid
    level = rearrange(level, "b (f n) -> b f n", f=frames)
    given = level < level.flatten(1).amax(1)[:, None, None] if strengths else level == 0
    given = given & ~given.all()
    first, last = _constant_given_frames(given, level)
    if torch.compiler.is_compiling():
        same = given.sum() == given[:, : sum(first) + sum(last)].numel()
        torch._assert_async(same, "this graph was compiled for other given frames; compile the model alone instead.")
    if not first + last:
        return read
    leading = tokens.references[: tokens.leading] + tuple((count, *rest) for count in first)
    trailing = tuple((count, *rest) for count in last) + tokens.references[tokens.leading :]
    return ImageTokens((frames - sum(first) - sum(last), *rest), leading + trailing, len(leading))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant_given_frames(given: Tensor, level: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Count the frames that are given at the beginning and at the end, (B, F, n) bool, in parts of equal levels."""
    frames = given[0, :, 0].tolist()
    first = frames.index(False) if False in frames else len(frames)
    stop = len(frames) - frames[::-1].index(False) if False in frames else len(frames)
    if bool((given != given[:1, :, :1]).any()) or any(frames[first:stop]):
        raise InputError(
            "some tokens have timestep 0 or a condition of their own, but they are not the first or last frames of all "
            "samples, so that the others form no grid; call the model with such samples, or use FeatureCache or "
            "DepthSkip."
        )
    changes = (level[:, 1:, 0] != level[:, :-1, 0]).any(0).tolist() if first or stop < len(frames) else []
    return _parts(changes, 0, first), _parts(changes, stop, len(frames))


def _parts(changes: list[bool], first: int, stop: int) -> tuple[int, ...]:
    """Return the lengths of the parts of a range of places; `changes[i]` begins another one after place i."""
    ends = [place + 1 for place in range(first, stop - 1) if changes[place]]
    return tuple(end - begin for begin, end in pairwise([first, *ends, stop])) if first < stop else ()
