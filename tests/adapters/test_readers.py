"""Grids of generated images and of references, read from position ids, coordinates and timesteps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokdyn.adapters.readers import (
    grid_from_coordinates,
    grid_from_ids,
    grid_of_patches,
    grids_behind,
    with_given_frames,
)
from tokdyn.errors import InputError
from tokdyn.tokens import ImageTokens


def image(number: float, rows: int, columns: int, first: tuple[float, float] = (0, 0)) -> Tensor:
    """(N, 3) position ids of an image whose first cell has these ids of row and column."""
    down, right = (torch.arange(float(size)) + start for size, start in zip((rows, columns), first, strict=True))
    return torch.cat([torch.full((rows * columns, 1), number), torch.cartesian_prod(down, right)], dim=1)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([image(0, 3, 5)], (3, 5)),
        ([image(1, 3, 5, (512, 512))], (3, 5)),
        ([image(0, 1, 7)], (1, 7)),
        ([image(0, 3, 5), image(1, 3, 5)], ImageTokens((3, 5), ((3, 5),))),
        ([image(0, 3, 5), image(10, 2, 2), image(20, 4, 6)], ImageTokens((3, 5), ((2, 2), (4, 6)))),
        ([image(0, 3, 5), image(1, 2, 4), image(1, 2, 4, (0, 4))], ImageTokens((3, 5), ((2, 4), (2, 4)))),
        ([image(0, 3, 5), image(1, 2, 4), image(1, 3, 2, (2, 0))], ImageTokens((3, 5), ((2, 4), (3, 2)))),
        ([image(0, 1, 4), image(1, 1, 4)], ImageTokens((1, 4), ((1, 4),))),
        ([image(0, 4, 1), image(1, 2, 1)], ImageTokens((4, 1), ((2, 1),))),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_position_ids_tell_images_apart(images: list[Tensor], expected: object, dtype: torch.dtype) -> None:
    """Numbers up to 256 are exact in bf16; 512 and its neighbours in steps of 4 are not."""
    ids = torch.cat(images)
    if dtype == torch.bfloat16 and ids.max() > 256:
        pytest.skip("rounded")
    ids = torch.cat([ids, torch.zeros(len(ids), 1)], dim=1).to(dtype)
    assert grid_from_ids(ids) == expected
    assert grid_from_ids(ids[None].expand(2, -1, -1)) == expected


@pytest.mark.parametrize(
    "ids",
    [
        torch.cat([image(0, 3, 5), image(0, 3, 5)]),
        torch.cat([image(0, 3, 5), image(0, 3, 5, (0, 5))]),
        torch.cat([image(0, 3, 5), image(1, 2, 2), image(0, 3, 5)]),
        image(0, 3, 5)[torch.arange(15).view(3, 5).T.flatten()],
        image(0, 3, 5)[:-1],
        0.5 * image(0, 3, 5),
        torch.stack([image(0, 3, 4), image(0, 4, 3)]),
    ],
    ids=["twice", "beside itself", "around", "by columns", "incomplete", "by halves", "samples"],
)
def test_other_ids_are_refused(ids: Tensor) -> None:
    with pytest.raises(InputError):
        grid_from_ids(ids)


def video(frames: int, first: float) -> Tensor:
    """(3, N) coordinates of frames with 2 x 3 cells."""
    places = torch.cartesian_prod(torch.arange(float(frames)), torch.arange(2.0), torch.arange(3.0)).T.clone()
    places[0] = ((8 * places[0] - 7).clamp(min=0) + first) / 25
    places[1:] *= 32
    return places


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([video(4, 0)], (4, 2, 3)),
        ([video(1, 0)], (1, 2, 3)),
        ([video(1, 9), video(4, 0)], ImageTokens((4, 2, 3), ((1, 2, 3),), leading=1)),
        ([video(1, 40), video(2, 9), video(4, 0)], ImageTokens((4, 2, 3), ((1, 2, 3), (2, 2, 3)), leading=2)),
    ],
)
def test_coordinates_tell_conditions_from_the_video(parts: list[Tensor], expected: object) -> None:
    places = torch.cat(parts, dim=1)
    assert grid_from_coordinates(places[None].expand(2, -1, -1)) == expected


def test_other_coordinates_are_refused() -> None:
    with pytest.raises(InputError, match="video_coords"):
        grid_from_coordinates(torch.rand(1, 3, 12))
    with pytest.raises(InputError, match="samples"):
        grid_from_coordinates(torch.stack([video(2, 0), video(2, 1)]))


def clean(*frames: int, cells: int = 6) -> Tensor:
    """(1, N) timesteps, 0 in frames of which 1 is given."""
    return 500.0 * (1 - torch.tensor(frames).repeat_interleave(cells))[None]


@pytest.mark.parametrize(
    ("timestep", "expected"),
    [
        (torch.tensor([500.0]), (4, 2, 3)),
        (torch.tensor([[500.0], [0.0]]), (4, 2, 3)),
        (clean(0, 0, 0, 0), (4, 2, 3)),
        (clean(1, 1, 1, 1), (4, 2, 3)),
        (clean(1, 0, 0, 0), ImageTokens((3, 2, 3), ((1, 2, 3),), leading=1)),
        (clean(1, 1, 0, 1), ImageTokens((1, 2, 3), ((2, 2, 3), (1, 2, 3)), leading=1)),
        (clean(0, 0, 1, 1), ImageTokens((2, 2, 3), ((2, 2, 3),))),
    ],
)
def test_clean_frames_at_the_ends_are_references(timestep: Tensor, expected: object) -> None:
    assert with_given_frames((4, 2, 3), timestep) == expected


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ([1, 1, 1, 1], (4, 2, 3)),
        ([0, 1, 1, 1], ImageTokens((3, 2, 3), ((1, 2, 3),), leading=1)),
        ([0, 0, 0.5, 1], ImageTokens((1, 2, 3), ((2, 2, 3), (1, 2, 3)), leading=2)),
        ([0.5, 1, 0.5, 0.2], ImageTokens((1, 2, 3), ((1, 2, 3), (1, 2, 3), (1, 2, 3)), leading=1)),
    ],
)
def test_frames_that_are_less_noisy_are_references_by_strength(level: list[float], expected: object) -> None:
    """Samples may stand at other noise levels; frames of different strengths are references of their own."""
    noise = torch.tensor(level).repeat_interleave(6)[None] * torch.tensor([[900.0], [300.0]])
    assert with_given_frames((4, 2, 3), noise, strengths=True) == expected


def test_given_frames_may_have_one_level_each() -> None:
    expected = ImageTokens((3, 2, 3), ((1, 2, 3),), leading=1)
    assert with_given_frames((4, 2, 3), clean(1, 0, 0, 0, cells=1)) == expected


def spans(frames: int, rows: int, columns: int, first: float, last: float = 8.0) -> Tensor:
    """(1, 3, N, 2) spans of patches of a video at 25 frames per second, of which each frame lasts `last` frames."""
    sizes = (torch.arange(float(size)) for size in (frames, rows, columns))
    places = torch.cartesian_prod(*sizes).T
    begins = torch.cat([8 * places[:1] + first, 32 * places[1:]])
    found = torch.stack([begins, begins + torch.tensor([last, 32.0, 32.0])[:, None]], dim=2)[None]
    found[:, 0] /= 25
    return found


def test_a_video_ends_where_what_follows_does_not_begin() -> None:
    """A picture at the last frame of the video is none of its frames."""
    whole = spans(3, 2, 4, -7)
    whole[:, 0, :, 0] = whole[:, 0, :, 0].clamp(min=0)  # the first frame lasts one
    for behind in ([], [spans(1, 2, 4, 16, 1)], [spans(1, 2, 4, 9, 1), spans(3, 1, 2, 0)]):
        assert grid_of_patches(torch.cat([whole, *behind], dim=2)) == (3, 2, 4)


@pytest.mark.parametrize(
    ("images", "levels", "expected"),
    [
        ([spans(1, 2, 4, 9, 1)], None, ((1, 2, 4),)),
        ([spans(1, 2, 4, 9, 1), spans(1, 2, 4, 9, 1)], None, ((1, 2, 4), (1, 2, 4))),
        ([spans(1, 2, 4, 9, 1), spans(1, 2, 4, 17, 1)], None, ((2, 2, 4),)),
        ([spans(1, 2, 4, 9, 1), spans(1, 2, 4, 17, 1)], [0.0, 0.5], ((1, 2, 4), (1, 2, 4))),
        ([spans(2, 2, 4, 9), spans(3, 1, 2, 0)], [0.0, 0.0], ((2, 2, 4), (3, 1, 2))),
        ([spans(1, 2, 4, 9), spans(1, 1, 3, 17)], None, ((11,),)),
    ],
)
def test_images_behind_a_video_are_told_apart(
    images: list[Tensor], levels: list[float] | None, expected: object
) -> None:
    """By their places, and by their noise level."""
    counts = torch.tensor([each.shape[2] for each in images])
    noise = None if levels is None else torch.tensor(levels).repeat_interleave(counts)[None]
    assert grids_behind(torch.cat(images, dim=2)[..., 0], noise) == expected


def test_clean_frames_of_a_video_follow_conditions_before_it() -> None:
    tokens = ImageTokens((4, 2, 3), ((1, 2, 3),), leading=1)
    found = with_given_frames(tokens, clean(1, 0, 0, 0))
    assert found == ImageTokens((3, 2, 3), ((1, 2, 3), (1, 2, 3)), leading=2)


@pytest.mark.parametrize(
    "timestep",
    [clean(0, 1, 0, 0), clean(*[1, 0] * 12, cells=1), torch.cat([clean(1, 0, 0, 0), clean(0, 0, 0, 1)])],
    ids=["in the middle", "some cells", "samples"],
)
def test_other_clean_tokens_are_refused(timestep: Tensor) -> None:
    with pytest.raises(InputError, match="timestep 0"):
        with_given_frames((4, 2, 3), timestep)
