"""Boundary maps: what is recorded during sampling, and how images are shaded."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tokdyn.diffusion.objective import Objective
from tokdyn.diffusion.records import StepState
from tokdyn.report.maps import MapRecorder, draw_maps, shade
from tokdyn.report.pixels import to_pixels

STEPS, BATCH, GRID = 7, 3, (4, 6)


def steps() -> list[StepState]:
    """Make a trajectory of random masks and of predictions that are easy to check."""
    draw = torch.Generator().manual_seed(0)
    states = []
    for index in range(STEPS):
        keep = torch.rand(2 * BATCH, 24, generator=draw) > 0.6  # both guidance branches
        x = torch.randn(BATCH, 3, 8, 12, generator=draw)
        level, timestep = 1 - index / STEPS, torch.full((BATCH,), 1000.0 * (1 - index / STEPS))
        routing = SimpleNamespace(keep=keep, grid=GRID)
        velocity = torch.randn(x.shape, generator=draw)
        states.append(StepState(index, timestep, level, x, velocity, routing, Objective(kind="flow")))
    return states


def record(**settings: object) -> MapRecorder:
    recorder = MapRecorder(STEPS, **settings)
    for step in steps():
        recorder(step)
    return recorder


def test_recorder_counts_every_step_and_keeps_some_of_them():
    maps = record(images=2, frames=3).maps()
    keeps = torch.stack([step.routing.keep[:2].view(2, *GRID) for step in steps()])
    torch.testing.assert_close(maps.frequency, keeps.float().mean(0))
    assert [frame.index for frame in maps.frames] == [0, 3, 6]
    for frame in maps.frames:
        assert torch.equal(frame.keep, keeps[frame.index])
        torch.testing.assert_close(frame.picture, steps()[frame.index].x0()[:2])


def test_recorder_keeps_noisy_images_on_request_and_no_more_than_there_are():
    maps = record(images=9, frames=99, background="noisy").maps()
    assert len(maps.frames) == STEPS
    assert maps.frequency.shape == (BATCH, *GRID)
    assert torch.equal(maps.frames[2].picture, steps()[2].x)


@pytest.mark.parametrize("size", [(8, 12), (4, 6), (2, 3), (64, 96)])
def test_kept_cells_keep_their_colour_and_dropped_ones_do_not(size):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    keep = rng.random(GRID) > 0.5
    shaded = shade(image, keep)
    factor = shaded.shape[0] // size[0]
    assert min(shaded.shape[0] // GRID[0], shaded.shape[1] // GRID[1]) >= 8
    cell = shaded.shape[0] // GRID[0]
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            inner = np.s_[row * cell + 1 : (row + 1) * cell - 1, column * cell + 1 : (column + 1) * cell - 1]
            original = image.repeat(factor, 0).repeat(factor, 1)[inner]
            assert np.array_equal(shaded[inner], original) == keep[row, column]


COLOURS = [(255, 255, 255), (0, 0, 0), (120, 120, 120), (255, 0, 0), (30, 60, 200), (90, 90, 90), (150, 150, 150)]


@pytest.mark.parametrize("colour", COLOURS)
def test_dropped_cells_are_told_apart_on_any_image(colour):
    """Dropped cells have a texture and kept ones have none; between them lies a white line beside a black one."""
    keep = np.zeros((3, 3), dtype=bool)
    keep[1, 1] = True
    shaded = shade(np.full((48, 48, 3), colour, dtype=np.uint8), keep)
    kept, dropped = shaded[17:31, 17:31], shaded[:15, :15]
    assert (kept == colour).all()
    assert dropped.astype(float).mean(axis=2).std() > 15
    assert (shaded[16, 16:32] == 255).all()
    assert (shaded[15, 16:32] == 0).all()


def test_all_kept_is_the_image_itself():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(shade(image, np.ones((4, 4), dtype=bool)), image)


@pytest.mark.parametrize("name", ["日本", "caf\udce9", "$5$ \\frac{", "great white shark, white shark, man-eater"])
def test_any_name_can_be_drawn(tmp_path, name):
    """Folder names become row titles; matplotlib warns of missing glyphs, and warnings are errors here."""
    maps = record(images=1, frames=2).maps()
    finals = to_pixels(torch.zeros(1, 3, 8, 12))
    assert draw_maps(maps, finals, to_pixels, tmp_path / "maps.png", [name], title=name).is_file()


def test_low_images_take_low_rows(tmp_path):
    """The page grows with the height of the images: to about a third for a third of the height."""
    heights = []
    for rows in (12, 4):
        finals = np.zeros((3, rows, 12, 3), dtype=np.uint8)
        path = draw_maps(record(images=3).maps(), finals, to_pixels, tmp_path / f"{rows}.png", ["a"] * 3)
        with Image.open(path) as image:
            heights.append(image.height)
    assert heights[1] < 0.6 * heights[0]


@pytest.mark.parametrize("images", [1, 3])
def test_picture_is_drawn(tmp_path, images):
    maps = record(images=images, frames=4).maps()
    finals = to_pixels(torch.zeros(images, 3, 8, 12))
    path = draw_maps(maps, finals, to_pixels, tmp_path / "new" / "maps.png", ["name"] * images)
    with Image.open(path) as image:
        assert image.width > image.height / 3
        assert len(np.unique(np.asarray(image).reshape(-1, image.mode.count("A") + 3), axis=0)) > 20
