"""Statistics of a trajectory: steps, guidance branches, what was kept, run and repeated, and how it is printed."""

import json

import pytest
import torch

import tokdyn
from tests.contract.models import TINY, latents, sample
from tokdyn import Chunking, DepthSkip, FeatureCache, InputError, TokenDrop, TokenMerge

NAMED = {"FluxTransformer2DModel", "WanTransformer3DModel"}


def trajectory(model, name, levels, batch=2, calls=1, **changes):
    """Call a model at falling noise levels, as a sampler does."""
    tiny = TINY[name]
    with torch.no_grad():
        for level in levels:
            for _ in range(calls):
                model(**{**tiny.inputs(batch), **tiny.at(batch, level), **changes})


def test_steps_of_a_trajectory():
    model = tokdyn.wrap(TINY["DiT"].build(), [FeatureCache(steps=(0, 2)), DepthSkip(blocks=(1,), levels=(0.5, 1.0))])
    trajectory(model, "DiT", (0.9, 0.7, 0.4, 0.1))
    run = tokdyn.stats(model)
    assert run.model == "DiT"
    assert [step.step for step in run.steps] == [0, 1, 2, 3]
    assert [step.level for step in run.steps] == pytest.approx([0.9, 0.7, 0.4, 0.1])
    assert [call.blocks for call in run.calls] == [(0, 2, 3), (), (0, 1, 2, 3), ()]
    assert [call.cached for call in run.calls] == [False, True, False, True]
    assert run.cached == 2
    assert [call.kept for call in run.calls] == [(24, 24), (None, None), (24, 24), (None, None)]
    block = run.calls[2].block_flops / 4
    assert [call.block_flops for call in run.calls] == [3 * block, 0, 4 * block, 0]
    assert {call.dense_flops for call in run.calls} == {4 * block}
    assert run.block_flops == 7 * block
    assert run.flops == run.block_flops + run.method_flops
    assert run.share == run.flops / (16 * block)
    assert run.steps[1].share == run.steps[1].method_flops / (4 * block)


def test_a_new_trajectory_begins():
    model = tokdyn.wrap(TINY["DiT"].build(), [TokenMerge()])
    trajectory(model, "DiT", (0.9, 0.5))
    trajectory(model, "DiT", (0.8, 0.6, 0.2))  # the noise level rises
    assert [call.level for call in tokdyn.stats(model).calls] == pytest.approx([0.8, 0.6, 0.2])
    model._reset_stateful_cache()  # what pipelines do when they have made their images
    assert len(tokdyn.stats(model).calls) == 3
    trajectory(model, "DiT", (0.1,))  # lower, but of another trajectory
    assert [call.level for call in tokdyn.stats(model).calls] == pytest.approx([0.1])
    trajectory(model, "DiT", (0.05,), batch=3)  # another batch
    assert [call.samples for call in tokdyn.stats(model).calls] == [3]
    tokdyn.reset(model)
    assert tokdyn.stats(model).calls == ()
    assert str(tokdyn.stats(model)) == "DiT: no calls since it was wrapped or reset"
    with pytest.raises(InputError, match=r"tokdyn\.wrap"):
        tokdyn.stats(tokdyn.unwrap(model))
    with pytest.raises(InputError, match=r"tokdyn\.wrap"):
        tokdyn.reset(model)


def test_training_calls_stand_alone():
    model = tokdyn.wrap(TINY["DiT"].build(), [TokenDrop(rate=0.5, blocks=(1, 2))]).train()
    for level in (0.9, 0.7, 0.5):
        sample(model(**{**TINY["DiT"].inputs(2), **TINY["DiT"].at(2, level)}))
    (call,) = tokdyn.stats(model).calls
    assert call.tokens == (24, 12, 12, 24)
    assert call.kept == (12, 12)
    trajectory(model.eval(), "DiT", (0.4,))
    (call,) = tokdyn.stats(model).calls
    assert call.kept == (24, 24)


@pytest.mark.parametrize("name", sorted(NAMED))
def test_branches_in_calls_of_their_own(name):
    model = tokdyn.wrap(TINY[name].build(), [TokenMerge()])
    trajectory(model, name, (0.9, 0.5), calls=2)
    assert [(call.step, call.branch) for call in tokdyn.stats(model).calls] == [
        (0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond"),
    ]  # fmt: skip
    tokdyn.reset(model)
    trajectory(model, name, (0.9, 0.5))  # without guidance
    assert [call.branch for call in tokdyn.stats(model).calls] == [0, 0]
    tokdyn.reset(model)
    trajectory(model, name, (0.9,), calls=3)  # no guidance that is known
    assert [call.branch for call in tokdyn.stats(model).calls] == [0, 1, 2]
    tokdyn.reset(model)
    for level in (0.9, 0.5):
        for branch in ("uncond", "cond"):
            with model.cache_context(branch):
                trajectory(model, name, (level,))
    assert [(call.step, call.branch) for call in tokdyn.stats(model).calls] == [
        (0, "uncond"), (0, "cond"), (1, "uncond"), (1, "cond"),
    ]  # fmt: skip
    assert [step.calls[0].branch for step in tokdyn.stats(model).steps] == ["uncond", "uncond"]


@pytest.mark.parametrize(
    ("name", "order"), [("DiT", ("cond", "uncond")), ("SD3Transformer2DModel", ("uncond", "cond"))]
)
def test_branches_as_halves_of_a_batch(name, order):
    """Where the methods must know the halves they are told apart, otherwise if the caller says so."""
    model = tokdyn.wrap(TINY[name].build(), [DepthSkip(table=((0.0, 0.5, (1,)),))])
    tiny = TINY[name]
    mixed = {key: torch.cat([tiny.at(1, level)[key] for level in (0.9, 0.9, 0.3, 0.9)]) for key in tiny.at(1, 0.5)}
    with torch.no_grad():
        model(**{**tiny.inputs(4), **mixed})
    (whole,) = tokdyn.stats(model).calls
    first, second = tokdyn.stats(model, guided=True).calls
    assert (whole.branch, first.branch, second.branch) == (0, *order)
    assert first.samples == second.samples == 2
    block = whole.dense_flops // 16 if name == "DiT" else None
    if block:  # whose blocks are alike: one of them is skipped for the third sample
        assert (first.block_flops, second.block_flops) == (8 * block, 7 * block)
    assert first.block_flops + second.block_flops == whole.block_flops
    assert first.dense_flops == second.dense_flops == whole.dense_flops // 2


@torch.no_grad()
def test_samples_of_one_call_differ():
    """Kept tokens and repeated samples are told for every sample."""
    tiny = TINY["DiT"]
    model = tokdyn.wrap(tiny.build(), [FeatureCache(threshold=0.5), Chunking(target=2)])
    tokdyn.set_tail_drop(model, torch.tensor([0.0, 0.5, 1.0]))
    inputs = tiny.inputs(3)
    model(**{**inputs, **tiny.at(3, 0.9)})
    inputs["hidden_states"][0] = 5 * latents(9, 4, 8, 12)[8]  # this one changes too much to be repeated
    model(**{**inputs, **tiny.at(3, 0.88)})
    first, second = tokdyn.stats(model).calls
    assert first.kept == (12, 6, 1)
    assert first.attention_tokens == first.mlp_tokens == pytest.approx(19 / 3)
    assert second.reused == 2
    assert not second.cached
    assert second.kept == (12, None, None)
    assert "1 to 12, mean 6.3" in str(tokdyn.stats(model))


def test_merged_tokens_are_told_by_branch():
    model = tokdyn.wrap(TINY["DiT"].build(), [TokenMerge(ratio=0.5, blocks=(0, 1))])
    trajectory(model, "DiT", (0.5,))
    (call,) = tokdyn.stats(model).calls
    assert call.kept == (24, 24)
    assert call.attention_tokens == (12 + 12 + 24 + 24) / 4
    assert call.mlp_tokens == 24


def test_the_table_fits_and_the_rest_is_for_machines():
    methods = [
        FeatureCache(threshold=0.3, num_steps=150),
        Chunking(target=2),
        TokenMerge(ratio=0.3),
        DepthSkip(blocks=(2,)),
    ]
    model = tokdyn.wrap(TINY["DiT"].build(), methods)
    tokdyn.set_tail_drop(model, {"cond": 0.0, "uncond": 0.5})
    trajectory(model, "DiT", [1 - step / 150 for step in range(150)])
    run = tokdyn.stats(model)
    text = str(run)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split() == [
        "step", "branch", "noise", "tokens", "in", "attention", "in", "MLP", "blocks", "reused", "GFLOPs", "dense",
        "share", "ms",
    ]  # fmt: skip
    assert "... 200 calls ..." in lines
    assert f"150 steps, 300 calls, {run.cached} of them reused" in lines[-4]
    assert f"GFLOPs dense: {run.share:.1%}" in lines[-2]
    found = json.loads(json.dumps(run.as_dict()))
    assert found["flops"] == run.flops == sum(call["flops"] for call in found["calls"])
    assert found["calls"][1]["branch"] == "uncond"
    assert found["calls"][0]["parts"].keys() == {"adaLN", "projections", "attention", "mlp"}
    with pytest.raises(AttributeError, match="cannot assign"):
        run.calls[0].step = 3


@torch.no_grad()
def test_the_last_calls_are_remembered():
    model = tokdyn.wrap(TINY["DiT"].build(), [DepthSkip(blocks=(0, 1, 2, 3))])
    trajectory(model, "DiT", [1 - step / 600 for step in range(600)], batch=1)
    assert len(tokdyn.stats(model).calls) == 512
