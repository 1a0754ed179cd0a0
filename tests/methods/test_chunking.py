"""Chunking: its settings as data, and the module around a stretch of blocks."""

import copy
import math

import pytest
import torch
from pydantic import ValidationError

from tests.ops.reference import dense_dechunk
from tokdyn.errors import InputError
from tokdyn.methods import Chunking, ChunkingModule, Sizes


def module(width=8, **settings):
    chunking = ChunkingModule(Chunking(**settings), width).double()
    chunking.router.calibrate(chunking.logits(*inputs(width)), 4.0)
    return chunking


def inputs(width=8):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(3, 30, width, generator=generator, dtype=torch.float64),
        (5, 6),
        torch.tensor([1, 500, 900]),
    )


def test_settings_are_frozen_strict_and_survive_json():
    config = Chunking(target=16, router="cosine", sigma=None)
    assert Chunking.model_validate_json(config.model_dump_json()) == config
    assert hash(config) == hash(Chunking(target=16.0, router="cosine", sigma=None))
    with pytest.raises(ValidationError, match="frozen"):
        config.target = 4.0
    for wrong in ({"targets": 4}, {"target": 0.5}, {"router": "learned"}, {"sigma": -1.0}):
        with pytest.raises(InputError, match=f"^Chunking.*{next(iter(wrong))}.*\\.$"):
            Chunking(**wrong)


@pytest.mark.parametrize("sigma", [None, 1.0, 2.5])
def test_the_grid_comes_back_as_the_dense_formula_says(sigma):
    chunking = module(sigma=sigma)
    tokens, grid, steps = inputs()
    routing = chunking.route(tokens, grid, steps, drop=torch.tensor([0.0, 0.4, 1.0]))
    rows, packing = chunking.chunk(tokens, routing)
    assert torch.equal(rows, tokens[routing.keep])
    out = chunking.dechunk(rows, tokens, routing, packing)
    expected = dense_dechunk(rows, routing.probability, routing.keep, grid, sigma or 1e-3)
    # Without smoothing the kernel is a single cell, up to its 1e-8 in the denominator over p >= 0.5.
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12 if sigma else 1e-6)
    with torch.no_grad():
        torch.nn.init.normal_(chunking.residual.weight)
        torch.nn.init.normal_(chunking.residual.bias)
        added = chunking.dechunk(rows, tokens, routing, packing) - out
    torch.testing.assert_close(added, chunking.residual(tokens), rtol=0, atol=1e-12)


def test_the_gate_hands_the_gradient_to_the_decision_that_was_taken():
    """d loss / d p is out * d loss / d y where the natural decision was to keep, and minus that where it was not."""
    chunking = module(sigma=None)
    tokens, grid, steps = inputs()
    routing = chunking.route(tokens, grid, steps, drop=0.5)
    routing.probability.retain_grad()
    rows, packing = chunking.chunk(tokens, routing)
    out = chunking.dechunk(rows, tokens, routing, packing)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    sign = torch.where(routing.natural_keep, 1.0, -1.0)
    torch.testing.assert_close(routing.probability.grad, sign * (out * weight).sum(-1).detach(), rtol=0, atol=1e-12)


def test_routing_counts_and_losses():
    chunking = module(force_ends=True, target=16.0)
    routing = chunking.route(*inputs(), drop=0.0)
    assert routing.keep is routing.natural_keep
    assert routing.keep[:, [0, -1]].all()
    assert torch.equal(routing.kept, routing.keep.sum(1))
    f, g = routing.keep.double().mean(), routing.probability.mean()
    expected = 16 / 15 * ((1 - f) * (1 - g) + 15 * f * g)
    torch.testing.assert_close(routing.losses["ratio"].double(), expected, rtol=0, atol=1e-6)  # computed in fp32


def test_nothing_is_built_where_all_tokens_are_kept():
    sizes = Sizes(8, 2, (1,))
    assert Chunking(target=1.0).build(sizes) is None
    built = Chunking(target=1.5, router="random").build(sizes)
    assert torch.equal(built.residual(torch.randn(2, 8)), torch.zeros(2, 8))  # the residual starts at zero
    assert built.router.bias.item() == pytest.approx(-math.log(0.5))  # the router knows the target


def test_tokens_of_a_plan_are_kept_and_the_losses_stay_the_routers():
    chunking = module()
    tokens, grid, steps = inputs()
    free = chunking.route(tokens, grid, steps)
    plan = torch.zeros(3, 30, dtype=torch.bool)
    plan[0, [2, 5, 7, 11]] = True  # samples 1 and 2 have no plan
    routing = chunking.route(tokens, grid, steps, plan=plan)
    assert torch.equal(routing.keep[0], plan[0])
    assert torch.equal(routing.keep[1:], free.keep[1:])
    assert torch.equal(routing.decided, routing.keep)
    assert torch.equal(routing.natural_keep, free.natural_keep)
    assert torch.equal(routing.losses["ratio"], free.losses["ratio"])
    assert free.decided is None
    dropped = chunking.route(tokens, grid, steps, drop=0.5, plan=plan)
    assert dropped.kept.tolist()[0] == 2
    assert torch.equal(dropped.decided, routing.decided)  # what was decided before tail drop
    worst = plan[0] & ~dropped.keep[0]
    assert routing.probability[0][worst].max() <= routing.probability[0][dropped.keep[0]].min()


def test_the_gate_follows_the_plan_where_there_is_one():
    chunking = module(sigma=None)
    tokens, grid, steps = inputs()
    natural = chunking.route(tokens, grid, steps).natural_keep
    plan = ~natural
    routing = chunking.route(tokens, grid, steps, plan=plan)
    routing.probability.retain_grad()
    rows, packing = chunking.chunk(tokens, routing)
    out = chunking.dechunk(rows, tokens, routing, packing)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    sign = torch.where(plan, 1.0, -1.0)
    torch.testing.assert_close(routing.probability.grad, sign * (out * weight).sum(-1).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("grid", "maps"), [((30,), [(1, 30)]), ((5, 6), [(5, 6)]), ((2, 3, 5), [(3, 5)] * 2)])
@pytest.mark.parametrize("router", ["spatial_predictability", "cosine", "random"])
def test_logits_look_at_the_frames_of_a_grid_one_by_one(grid, maps, router):
    chunking = ChunkingModule(Chunking(router=router), 8).double().eval()
    tokens, _, steps = inputs()
    found = chunking.logits(tokens, grid, steps)
    assert found.shape == (3, 30)
    if router == "random":
        assert len(set(found[0].tolist())) == 30  # frames differ
        return
    per = 30 // len(maps)
    for frame, (rows, columns) in enumerate(maps):
        part = tokens[:, frame * per : (frame + 1) * per].transpose(1, 2).reshape(3, 8, rows, columns)
        expected = chunking.router(part, steps).flatten(1)
        torch.testing.assert_close(found[:, frame * per : (frame + 1) * per], expected, rtol=0, atol=1e-12)


def test_routers_and_residuals_compute_in_fp32_whatever_the_model_does():
    chunking = ChunkingModule(Chunking(), 8).bfloat16()
    tokens, grid, steps = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        routing = chunking.route(tokens.bfloat16(), grid, steps)
        rows, packing = chunking.chunk(tokens.bfloat16(), routing)
        assert routing.probability.dtype == torch.float32
        assert chunking.dechunk(rows, tokens.bfloat16(), routing, packing).dtype == torch.bfloat16
        assert chunking.dechunk(rows, tokens.bfloat16(), routing, packing, torch.float32).dtype == torch.float32


def test_autocast_changes_no_decision_and_no_residual():
    chunking = ChunkingModule(Chunking(), 8)
    torch.nn.init.normal_(chunking.residual.weight)
    tokens, grid, steps = (each.float() if isinstance(each, torch.Tensor) else each for each in inputs())
    routing = chunking.route(tokens, grid, steps)
    rows, packing = chunking.chunk(tokens, routing)
    out = chunking.dechunk(rows, tokens, routing, packing)
    exact = copy.deepcopy(chunking).double().dechunk(rows.double(), tokens.double(), routing, packing)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        cast = chunking.route(tokens, grid, steps)
        assert torch.equal(cast.probability, routing.probability)
        assert torch.equal(chunking.dechunk(rows, tokens, routing, packing), out)


def test_without_gradients_the_values_are_the_same():
    chunking = module()
    tokens, grid, steps = inputs()
    routing = chunking.route(tokens, grid, steps, drop=0.3)
    rows, packing = chunking.chunk(tokens, routing)
    out = chunking.dechunk(rows, tokens, routing, packing)
    with torch.no_grad():
        torch.testing.assert_close(chunking.dechunk(rows, tokens, routing, packing), out.detach(), rtol=0, atol=1e-12)
