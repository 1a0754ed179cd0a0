"""TokenMerge at work: what attention is given is what the functions of tokdyn.ops say, whichever way it is chosen."""

import pytest
import torch

from tests.contract.models import TINY, one_of, sample
from tokdyn.attach import unwrap, wrap
from tokdyn.methods import DepthSkip, TokenMerge
from tokdyn.ops.destinations import destinations
from tokdyn.ops.merging import match, merge

NAME = "DiTTransformer2DModel"
TABLE = ((0.0, 0.25, (1,)), (0.25, 0.5, (0, 2)), (0.5, 0.75, (3,)))


def inputs_of_attention(model, inputs):
    """What the norm before attention returns, and what attention is called with, block by block."""
    normed, given = [], []
    for block in model.transformer_blocks:
        block.norm1.register_forward_hook(lambda module, args, out: normed.append(out[0]))
        block.attn1.register_forward_pre_hook(lambda module, args, kwargs: given.append(args[0]), with_kwargs=True)
    model(**inputs)
    return normed, given


def expected(x, after, ratio=0.5, **choices):
    """`after` as its tokens are merged when `x` is compared, from the plain functions; on a grid of 4x4."""
    batch, count, width = x.shape
    rows = x.reshape(-1, width)
    cell = torch.arange(count).repeat(batch)
    if choices.pop("important", False):
        choices["importance"] = rows.norm(dim=1)
    into = destinations(cell, torch.arange(batch).repeat_interleave(count), batch, (4, 4), **choices)
    plan = match(rows, [count] * batch, into, ratio)
    return merge(after.reshape(-1, width), plan).view(batch, -1, width)


@pytest.mark.parametrize(
    ("settings", "choices"),
    [
        ({}, {}),
        ({"bucket": 4, "ratio": 0.7}, {"bucket": 4, "ratio": 0.7}),
        ({"important": True}, {"important": True}),
        ({"seed": 7}, {"seed": 7, "step": 500}),
        ({"reuse": 2}, {}),
        ({"reuse": 3, "seed": 1}, {"seed": 1, "step": 500}),
    ],
)
@torch.no_grad()
def test_attention_gets_what_the_functions_say(settings, choices):
    model, inputs = TINY[NAME].build(), TINY[NAME].inputs(2)
    inputs["timestep"] = torch.tensor([500, 500])
    normed, given = inputs_of_attention(wrap(model, [TokenMerge(**settings)]), inputs)
    assert len(normed) == len(given) == 4
    for block, (after, found) in enumerate(zip(normed, given, strict=True)):
        first = block - block % settings.get("reuse", 1)
        wanted = expected(normed[first], after, **choices)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)  # fp32
    assert given[0].shape[1] == 16 - min(
        int(16 * settings.get("ratio", 0.5)), 16 - 16 // settings.get("bucket", 2) ** 2
    )


@torch.no_grad()
def test_important_destinations_are_others_than_the_first():
    model, inputs = TINY[NAME].build(), TINY[NAME].inputs(1)
    outputs = [sample(wrap(TINY[NAME].build(), [TokenMerge(important=flag)])(**inputs)) for flag in (False, True)]
    assert not torch.equal(*outputs)
    normed, given = inputs_of_attention(wrap(model, [TokenMerge(ratio=0.7, important=True)]), inputs)
    lengths = normed[0][0].norm(dim=1).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)  # by bucket of 2x2
    kept = lengths.argmax(1)
    assert kept.tolist() != [0, 0, 0, 0]
    corners = torch.tensor([0, 2, 8, 10])
    rows = corners + torch.tensor([0, 1, 4, 5])[kept]  # where the longest of each bucket lie
    apart = sorted(set(range(16)) - set(rows.tolist()))
    unchanged = [row for row in apart if any(torch.allclose(normed[0][0, row], token) for token in given[0][0])]
    assert len(unchanged) == 16 - 4 - 11  # of 12 that are no destinations, int(16 * 0.7) = 11 were merged away


@pytest.mark.parametrize("name", ["DiT", "FluxTransformer2DModel", "SD3Transformer2DModel"])
@pytest.mark.parametrize("curve", [0.5, ((0.1, 0.2), (0.9, 0.6))])
@torch.no_grad()
def test_with_seed_and_reuse_samples_at_different_levels_are_as_if_alone(name, curve):
    """Samples skip different blocks, so that they are matched in different ones; destinations follow the level."""
    methods, tiny = [TokenMerge(ratio=curve, seed=2, reuse=3, weighted=True), DepthSkip(table=TABLE)], TINY[name]
    levels = (0.3, 0.9, 0.1, 0.6)
    inputs = {**tiny.inputs(4), **{k: torch.cat([tiny.at(1, x)[k] for x in levels]) for k in tiny.at(1, 0.5)}}
    together = sample(wrap(tiny.build(), methods)(**inputs))
    for i, level in enumerate(levels):
        alone = sample(wrap(tiny.build(), methods)(**{**one_of(tiny.inputs(4), i), **tiny.at(1, level)}))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=2e-6)


@torch.no_grad()
def test_random_destinations_follow_the_noise_level():
    inputs = {**TINY[NAME].inputs(2), "timestep": torch.tensor([200, 500])}
    (normed, *_), (given, *_) = inputs_of_attention(wrap(TINY[NAME].build(), [TokenMerge(seed=7)]), inputs)
    early, late = (expected(normed, normed, seed=7, step=step) for step in (500, 200))
    torch.testing.assert_close(given, torch.stack([late[0], early[1]]), rtol=0, atol=1e-6)
    assert not torch.allclose(given[0], early[0], atol=1e-3)


@torch.no_grad()
def test_a_ratio_of_zero_needs_to_know_nothing_of_the_tokens():
    model, inputs = TINY["FluxTransformer2DModel"].build(), TINY["FluxTransformer2DModel"].inputs(2)
    inputs["img_ids"] = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))  # form no grid
    inputs["controlnet_block_samples"] = [torch.randn(2, 20, 32)] * 2  # refused where tokens are reduced
    plain = sample(model(**inputs))
    for methods in ([TokenMerge(ratio=0.0)], [TokenMerge(ratio=0.0, partition="grid"), DepthSkip()]):
        assert torch.equal(sample(wrap(model, methods)(**inputs)), plain)
        unwrap(model)
