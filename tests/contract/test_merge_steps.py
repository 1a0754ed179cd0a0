"""TokenMerge(reuse_steps=...): a matching serves some steps of one sample and branch, and nothing else."""

import copy

import pytest
import torch

import tokdyn
from tests.contract.models import TINY, one_of
from tests.contract.test_merge import NAME, expected, inputs_of_attention
from tests.contract.test_trajectories import called, latents_name, other
from tokdyn import Chunking, CompositionError, FeatureCache, TokenDrop, TokenMerge
from tokdyn.ops.destinations import grid_destinations
from tokdyn.ops.merging import match, merge

MATCHING = "TokenMerge matching"
models = pytest.mark.parametrize("name", ["DiT", "FluxTransformer2DModel"])


def matched(model):
    """Which of the calls of the trajectory matched tokens."""
    return [MATCHING in trace.method_flops for trace in tokdyn.traces(model)]


def drifting(name, batch, steps):
    """(level, latents) of steps that differ so much that another matching is made of each."""
    x = TINY[name].inputs(batch)[latents_name(name)]
    return [(1.0 - 0.05 * step, x + 0.3 * step * other(x)) for step in range(steps)]


@models
@pytest.mark.parametrize("reuse", [1, 2])
@torch.no_grad()
def test_one_matching_serves_as_many_steps_as_are_set(name, reuse):
    model = tokdyn.wrap(TINY[name].build(), [TokenMerge(reuse_steps=3, reuse=reuse)])
    anew = tokdyn.wrap(TINY[name].build(), [TokenMerge(reuse=reuse)])
    for step, (level, x) in enumerate(drifting(name, 2, 7)):
        with tokdyn.trajectory(anew):
            fresh = called(anew, name, x, level)
        assert torch.equal(called(model, name, x, level), fresh) == (step % 3 == 0)
    assert matched(model) == [step % 3 == 0 for step in range(7)]


@torch.no_grad()
def test_attention_gets_tokens_merged_as_in_the_first_step():
    model, seen = tokdyn.wrap(TINY[NAME].build(), [TokenMerge(reuse_steps=2, reuse=4)]), []
    for level, x in drifting(NAME, 2, 3):
        inputs = {**TINY[NAME].inputs(2), **TINY[NAME].at(2, level), latents_name(NAME): x}
        handles = copy.copy(model.transformer_blocks)
        normed, given = inputs_of_attention(model, inputs)
        seen.append((normed[0], given[0]))
        for block in handles:
            block.norm1._forward_hooks.clear()
            block.attn1._forward_pre_hooks.clear()
    for source, (after, found) in zip((0, 0, 2), seen, strict=True):
        rows = seen[source][0].flatten(0, 1)
        plan = match(rows, [16, 16], grid_destinations(2, (4, 4), rows.device), 0.5)
        torch.testing.assert_close(found, merge(after.flatten(0, 1), plan).view(2, 8, -1), rtol=0, atol=1e-6)
    assert not torch.allclose(seen[1][1], expected(seen[1][0], seen[1][0]), atol=1e-3)


@models
@torch.no_grad()
def test_samples_that_begin_another_image_are_matched_anew_and_others_are_not(name):
    model = tokdyn.wrap(TINY[name].build(), [TokenMerge(reuse_steps=9)])
    alone = tokdyn.wrap(TINY[name].build(), [TokenMerge(reuse_steps=9)])
    (level, x), (later, moved) = drifting(name, 2, 2)
    called(model, name, x, level)
    mixed = torch.stack([moved[0], other(x, 3)[1]])
    found = called(model, name, mixed, later)
    for sample in range(2):
        tokdyn.reset(alone)
        one = one_of(TINY[name].inputs(2), sample)
        of_call = {latents_name(name), *TINY[name].at(1, level)}
        own = {key: value for key, value in one.items() if key not in of_call}
        if sample == 0:  # goes on
            called(alone, name, x[:1], level, **own)
        out = called(alone, name, mixed[sample : sample + 1], later, **own)
        torch.testing.assert_close(found[sample : sample + 1], out, rtol=0, atol=2e-6)


@models
@torch.no_grad()
def test_a_cancelled_trajectory_leaves_no_matching_for_the_next_image(name):
    model = tokdyn.wrap(TINY[name].build(), [TokenMerge(reuse_steps=9)])
    (level, x), (later, moved), *_ = drifting(name, 2, 2)
    called(model, name, x, level)
    called(model, name, moved, later)
    assert matched(model) == [True, False]
    called(model, name, other(x, 11), later - 0.1)
    assert matched(model) == [True]
    with tokdyn.trajectory(model, steps=5) as here:
        for here.step, (at, given) in enumerate(drifting(name, 2, 2)):
            called(model, name, given, at)
    with tokdyn.trajectory(model, steps=5) as here:  # the same image in a run of its own
        here.step = 0
        called(model, name, x, level)
    assert matched(model) == [True]


@torch.no_grad()
def test_branches_have_matchings_of_their_own_and_counting_changes_none():
    model = tokdyn.wrap(TINY["DiT"].build(), [TokenMerge(reuse_steps=2)])
    inputs = TINY["DiT"].inputs(2)
    with tokdyn.trajectory(model, steps=4) as here:
        for here.step, (level, x) in enumerate(drifting("DiT", 2, 4)):
            for here.branch, label in (("cond", 1), ("uncond", 10)):
                call = {
                    **inputs,
                    **TINY["DiT"].at(2, level),
                    "hidden_states": x,
                    "class_labels": torch.full((2,), label),
                }
                if here.step == 1:
                    tokdyn.flops(model, **{**call, "hidden_states": other(x)})
                model(**call)
    assert matched(model) == [True, True, False, False] * 2


@torch.no_grad()
def test_matchings_of_another_share_are_made_anew():
    model = tokdyn.wrap(TINY["DiT"].build(), [TokenMerge(ratio=((0.86, 0.3), (0.88, 0.6)), reuse_steps=9)])
    for level, x in drifting("DiT", 2, 5):  # at 1, 0.95 and 0.9 a share of 0.6, then 0.3
        called(model, "DiT", x, level)
    assert matched(model) == [True, False, False, True, False]


def test_in_training_every_call_matches():
    model = tokdyn.wrap(TINY["DiT"].build().train(), [TokenMerge(reuse_steps=9)])
    _, x = drifting("DiT", 2, 1)[0]
    for _ in range(2):
        called(model, "DiT", x, 0.5).sum().backward()
        assert matched(model) == [True]


def test_what_remembers_is_refused_where_the_tokens_change():
    assert TokenMerge(reuse_steps=2).traits(4).remembers
    assert not TokenMerge(reuse=2).traits(4).remembers
    for outer in (Chunking(target=2), TokenDrop()):
        with pytest.raises(CompositionError, match="TokenMerge remembers"):
            tokdyn.wrap(TINY["DiT"].build(), [outer, TokenMerge(reuse_steps=2)])
    tokdyn.wrap(TINY["DiT"].build(), [FeatureCache(threshold=0.1), TokenMerge(reuse_steps=2)])


@torch.no_grad()
def test_a_matching_does_not_outlive_the_mask_that_it_was_made_with():
    model = tokdyn.wrap(TINY["DiT"].build(), [TokenMerge(reuse_steps=9)])
    (level, x), (later, moved) = drifting("DiT", 2, 2)
    with tokdyn.trajectory(model, steps=3) as here:
        here.step = 0
        called(model, "DiT", x, level)
        here.step = 1
        with tokdyn.keeping(model, torch.ones(1, 1, dtype=torch.bool)):
            kept = called(model, "DiT", moved, later)
    with tokdyn.disabled(model):
        assert torch.equal(called(model, "DiT", moved, later), kept)
