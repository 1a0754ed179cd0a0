"""FLOPs of what methods compute: those that PyTorch counts while they compute it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tokdyn import ops
from tokdyn.methods import Chunking, DynamicWidth, Sizes
from tokdyn.methods.costs import matching_flops, residual_flops, router_flops, smoothing_flops
from tokdyn.methods.routers import build_router
from tokdyn.ops.dechunk import BAND, smooth
from tokdyn.ops.destinations import destinations, grid_destinations
from tokdyn.ops.merging import match


def counted(function, *args):
    with ops.plain(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["spatial_predictability", "cosine", "random"])
@pytest.mark.parametrize(("grid", "width"), [((6, 5), 16), ((3, 7), 2)])
def test_routers(name, grid, width):
    router, count = build_router(name, width, 4.0).eval(), grid[0] * grid[1]
    found = counted(router, torch.randn(1, width, *grid), torch.zeros(1))
    assert router_flops(name, count, width) == found


def test_the_residual_projection():
    module = Chunking().build(Sizes(16, 2, (1,)))
    assert residual_flops(30, 16) == counted(module.residual, torch.randn(1, 30, 16))


@pytest.mark.parametrize("grid", [(7,), (3, 5), (2, 3, 4), (BAND, 2), (BAND + 1, 2)])
def test_smoothing_on_the_grid(grid):
    count = torch.Size(grid).numel()
    packing = ops.pack(torch.ones(1, count, dtype=torch.bool), grid)
    assert smoothing_flops(grid, 6) == counted(smooth, torch.randn(count, 6), torch.full((count,), 0.7), packing, 1.0)


@pytest.mark.parametrize("full", [True, False])
def test_matching(full):
    into = grid_destinations(1, (6, 6), torch.device("cpu"))
    if not full:
        keep = torch.arange(36)[None] != 7
        packing = ops.pack(keep, (6, 6))
        into = destinations(packing.cell, packing.sample, 1, packing.grid)
    count = len(into.mask)
    found = counted(match, torch.randn(count, 8), (count,), into, 0.3)
    assert matching_flops(into.pairs(count, alike=True), 8) == found


@pytest.mark.parametrize("settings", [{}, {"heads": False}, {"embedding": 24}, {"channels": False, "embedding": 8}])
def test_gates_of_dynamic_width(settings):
    gates = DynamicWidth(**settings).build(Sizes(32, 4, (1, 1, 1)))
    assert gates.level_flops == counted(gates, torch.tensor([0.3]))
    assert gates.token_flops * 5 == counted(gates.token_logits, 0, torch.randn(1, 5, 32))


def test_gates_that_are_not_there_cost_nothing():
    sizes = Sizes(32, 4, (1, 1, 1))
    assert DynamicWidth(tokens=False).build(sizes).token_flops == 0
    assert DynamicWidth(heads=False, channels=False, embedding=8).build(sizes).level_flops == 0
