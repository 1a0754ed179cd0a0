"""Chunking: its settings as data, and the module around a stretch of blocks."""

import pytest
import torch
from pydantic import ValidationError

from tests.ops.reference import dense_dechunk
from tokdyn.errors import InputError
from tokdyn.methods import Chunking, ChunkingModule


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
