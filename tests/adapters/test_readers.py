"""Grids of generated images and of references, read from position ids, coordinates and timesteps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokdyn.adapters.readers import grid_from_coordinates, grid_from_ids, with_clean_frames
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
    assert with_clean_frames((4, 2, 3), timestep) == expected


def test_clean_frames_of_a_video_follow_conditions_before_it() -> None:
    tokens = ImageTokens((4, 2, 3), ((1, 2, 3),), leading=1)
    found = with_clean_frames(tokens, torch.cat([torch.zeros(1, 6), clean(1, 0, 0, 0)], dim=1))
    assert found == ImageTokens((3, 2, 3), ((1, 2, 3), (1, 2, 3)), leading=2)


@pytest.mark.parametrize(
    "timestep",
    [clean(0, 1, 0, 0), clean(*[1, 0] * 12, cells=1), torch.cat([clean(1, 0, 0, 0), clean(0, 0, 0, 1)])],
    ids=["in the middle", "some cells", "samples"],
)
def test_other_clean_tokens_are_refused(timestep: Tensor) -> None:
    with pytest.raises(InputError, match="timestep 0"):
        with_clean_frames((4, 2, 3), timestep)
