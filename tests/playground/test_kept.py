"""What is watched of a wrapped model is what its blocks computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tokdyn
from tests.sampling import tiny
from tokdyn import Chunking, DiT, FeatureCache, TokenMerge
from tokdyn.playground.kept import watching

GRID, CELLS = (6, 8), 48


def call(model, level=500, seed=0):
    x = torch.randn(2, 3, *GRID, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(x, timestep=torch.full((2,), level), class_labels=torch.tensor([1, 4])).sample


def rows_in(rows, others):
    """For each row whether it is among the others, bit by bit."""
    return (rows[:, None] == others[None]).all(dim=2).any(dim=1).numpy()


def test_the_cells_that_chunking_selects_are_those_that_enter_the_blocks():
    model, seen = tiny(0, DiT, depth=2), {}
    model.x_embedder.register_forward_hook(lambda module, inputs, out: seen.update(all=out))
    model.blocks[0].register_forward_pre_hook(
        lambda module, args, named: seen.update(kept=(args or tuple(named.values()))[0]), with_kwargs=True
    )
    tokdyn.wrap(model, [Chunking(target=4)])
    with watching(model) as kept:
        before = call(model)
        found = kept.take()
    assert found.shape == GRID
    assert found.sum() == tokdyn.traces(model)[-1].kept[0] < CELLS
    entered = seen["kept"][0]
    dense = seen["all"][0] if seen["all"].dim() == 3 else seen["all"].flatten(2).transpose(1, 2)[0]
    placed = dense + model.pos_embed[0] if hasattr(model, "pos_embed") else dense
    assert np.array_equal(found.ravel(), rows_in(placed, entered))
    assert torch.equal(call(model), before)  # nothing is watched any more, and nothing has changed


def test_cells_that_must_not_be_merged_are_computed_by_themselves():
    model, mask = tiny(0, DiT, depth=2), torch.zeros(GRID, dtype=torch.bool)
    mask[1:4, 2:5] = True
    tokdyn.wrap(model, [TokenMerge(ratio=0.5)])
    with watching(model) as kept:
        plain = call(model)
        free = kept.take()
        with tokdyn.keeping(model, mask):
            call(model)
        held = kept.take()
    merged = CELLS // 2
    assert CELLS - 2 * merged <= free.sum() < CELLS - merged  # each of these has one to be merged into
    assert held[mask].all()
    assert not free[mask].all()
    assert torch.equal(call(model), plain)


def test_nothing_is_computed_in_a_cached_step_and_all_in_others():
    model = tokdyn.wrap(tiny(0, DiT, depth=2), [FeatureCache(steps=(0, 2))])
    found = []
    with watching(model) as kept, tokdyn.trajectory(model, steps=3) as here:
        for step in range(3):
            here.step = step
            call(model, 900 - 300 * step)
            found.append(kept.take())
    assert found[0] is None
    assert found[1].shape == GRID
    assert not found[1].any()
    assert found[2] is None
    assert tokdyn.stats(model).cached == 1


def test_a_selection_and_a_merging_act_together():
    model = tokdyn.wrap(tiny(0, DiT, depth=2), [Chunking(target=2), TokenMerge(ratio=0.3)])
    with watching(model) as kept:
        call(model)
        both = kept.take()
    tokdyn.unwrap(model)
    torch.manual_seed(0)
    assert both.sum() < CELLS // 2


@pytest.mark.parametrize("branch", ["uncond", "cond"])
def test_the_unconditional_branch_is_not_shown(branch):
    model = tokdyn.wrap(tiny(0, DiT, depth=2), [TokenMerge(ratio=0.5)])
    with watching(model) as kept, tokdyn.trajectory(model, steps=1) as here:
        here.step, here.branch = 0, branch
        call(model)
        assert (kept.take() is None) == (branch == "uncond")
