"""Depth skipping: which blocks at which noise level, and gates that start open."""

import math

import pytest
import torch

from tokdyn.errors import InputError
from tokdyn.methods import DepthSkip, Sizes, SkipGates


def test_blocks_are_skipped_between_their_levels_both_included():
    skip = DepthSkip(blocks=(-1, 3, 3), levels=(0.25, 0.5))
    assert skip.rows(12) == ((0.25, 0.5, (3, 11)),)
    for level, expected in ((0.2, set()), (0.25, {3, 11}), (0.4, {3, 11}), (0.5, {3, 11}), (0.6, set())):
        assert skip.skipped(level, 12) == expected


def test_rows_of_a_table_add_up_where_they_meet():
    skip = DepthSkip(table=((0.0, 0.5, (1, -2)), (0.5, 1.0, (2,))))
    assert skip.skipped(0.3, 4) == {1, 2}
    assert skip.skipped(0.5, 4) == {1, 2}
    assert skip.skipped(0.7, 4) == {2}
    assert skip.skipped(0.0, 5) == {1, 3}


@pytest.mark.parametrize("block", [-13, 12, 40])
def test_a_block_that_the_model_lacks_is_named(block):
    with pytest.raises(InputError, match=f"no block {block} .*12 blocks.*0 to 11"):
        DepthSkip(blocks=(0, block)).rows(12)
    assert DepthSkip(blocks=(-12, 11)).skipped(0.5, 12) == {0, 11}


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_gates_are_linear_in_the_sines_and_cosines_of_the_level_and_start_open(weights):
    gates = DepthSkip(learned=True).build(Sizes(8, 2, (1, 1, 1))).to(weights)
    assert isinstance(gates, SkipGates)
    level = torch.tensor([0.0, 0.3, 1.0])
    assert torch.equal(gates(level), torch.full((3, 3), SkipGates.OPEN))
    torch.nn.init.normal_(gates.score.weight)
    half = SkipGates.FREQUENCIES // 2
    for row, logits in zip(level.tolist(), gates(level), strict=True):
        angles = [1000 * row * 10000 ** (-k / half) for k in range(half)]
        basis = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=torch.float64)
        expected = gates.score.weight.double() @ basis + gates.score.bias.double()
        torch.testing.assert_close(logits.double(), expected, rtol=0, atol=2e-2)  # fp32 angles up to 1000
    with torch.autocast("cpu", torch.bfloat16):
        assert gates(level).dtype == torch.float32


def test_a_gate_that_starts_open_is_seldom_drawn_shut():
    """A learned skip explores: once in 150 calls."""
    assert 1 / (1 + math.exp(SkipGates.OPEN)) == pytest.approx(1 / 150, rel=0.02)
    assert SkipGates.FREQUENCIES == 256
