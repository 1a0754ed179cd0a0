"""Embeddings of positions and timesteps: their formulas, written number by number."""

import math

import pytest
import torch

from tokdyn.errors import InputError
from tokdyn.ops import sincos_position, timestep_frequencies


@pytest.mark.parametrize(("grid", "width"), [((5,), 6), ((2, 3), 8), ((2, 3, 4), 12)])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_positions_are_sines_and_cosines_of_each_axis_fastest_first(grid, width, scale):
    found = sincos_position(grid, width, scale)
    assert found.dtype == torch.float32
    assert found.shape == (math.prod(grid), width)
    half = width // len(grid) // 2
    for cell, row in enumerate(found.tolist()):
        expected, rest = [], cell
        for size in reversed(grid):
            rest, place = divmod(rest, size)
            angles = [scale * place * 10000 ** (-k / half) for k in range(half)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert row == pytest.approx(expected, abs=1e-6)  # fp32


def test_a_coarse_grid_lies_within_the_fine_one():
    fine = sincos_position((4, 6), 8, 0.5).view(4, 6, 8)
    torch.testing.assert_close(fine[::2, ::2].reshape(6, 8), sincos_position((2, 3), 8))


def test_positions_are_computed_in_fp64():
    """An angle of 2000 has an error of 1e-4 in fp32, and so would its sine."""
    row = sincos_position((3001,), 4, 0.7)[3000].double()
    angles = [0.7 * 3000, 0.7 * 3000 / 100]
    torch.testing.assert_close(
        row, torch.tensor([*map(math.sin, angles), *map(math.cos, angles)]).double(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(("grid", "width"), [((4,), 5), ((4, 4), 6), ((2, 2, 2), 8)])
def test_a_width_that_does_not_divide_raises(grid, width):
    with pytest.raises(InputError, match=f"{width}.*{2 * len(grid)}"):
        sincos_position(grid, width)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("period", [10000.0, 100.0])
def test_timesteps_are_cosines_and_sines_of_geometric_frequencies(shift, period):
    steps = [0.0, 1.5, 40.0]
    found = timestep_frequencies(torch.tensor(steps), 10, shift, period)
    for step, row in zip(steps, found.tolist(), strict=True):
        angles = [step * period ** (-k / (5 - shift)) for k in range(5)]
        assert row == pytest.approx([*map(math.cos, angles), *map(math.sin, angles)], abs=1e-4)


def test_timesteps_have_their_usual_frequencies_unless_told_otherwise():
    steps = torch.tensor([3, 900])
    assert torch.equal(timestep_frequencies(steps, 8), timestep_frequencies(steps.float(), 8, 0, 10000.0))
