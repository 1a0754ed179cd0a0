"""Video and audio classes: every method that works acts and leaves the model as it is at rate 0; the laws hold."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch

import tokdyn
from tests.contract.coverage_videos import VIDEOS, WITHOUT_BATCH
from tests.contract.kit import SHARED
from tests.contract.widths import random_gates
from tokdyn import Chunking, DepthSkip, DynamicWidth, FeatureCache, TokenDrop, TokenMerge
from tokdyn.adapters import adapter_for
from tokdyn.attach import dropping, unsupported
from tokdyn.testing import Case, check_adapter
from tokdyn.testing.laws import computed_flops_are_the_counted_ones, samples_do_not_depend_on_each_other
from tokdyn.tokens import cells, total

pytestmark = [  # diffusers' own: of names that it is giving up, and of Mochi, which asks for fp32 autocast on the CPU
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    pytest.mark.filterwarnings("ignore:flex_attention called without"),
]
DEAR = {"Kandinsky6SRTransformer3DModel"}  # flex attention without a compiler, whose FLOPs are not computed
every = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in DEAR else []) for name in sorted(VIDEOS)]
)
NEUTRAL = [[], [TokenMerge(ratio=0.0), DepthSkip()], [Chunking(target=1.0)], [FeatureCache(threshold=0.0)]]


def works(model, *methods):
    return all(unsupported(adapter_for(model), method) is None for method in methods)


def shared(name):
    return SHARED | WITHOUT_BATCH | ({"timestep"} if name.startswith("MiniMaxH3") else set())


def outputs(model, call):
    """All tensors that a model predicts: of the video, and of the sound where there is one."""
    return [value for value in model(**call, return_dict=False) if value is not None]


def depth(model):
    return sum(len(model.get_submodule(blocks.path)) for blocks in adapter_for(model).blocks)


@every
@torch.no_grad()
def test_all_methods_that_work_act_and_change_nothing_at_rate_0(name):
    model, call = VIDEOS[name].build(), VIDEOS[name].inputs(2)
    plain, images = outputs(model, call), adapter_for(model).image_tokens(model, call)
    whole, size = total(images), cells(images.grid)
    for methods in NEUTRAL:
        if works(model, *methods):
            tokdyn.wrap(model, methods)
            assert all(torch.equal(*pair) for pair in zip(outputs(model, call), plain, strict=True))
            tokdyn.unwrap(model)

    def run(method):
        tokdyn.wrap(model, [method])
        with dropping(model, 0.5) if isinstance(method, TokenDrop) else nullcontext():
            found = outputs(random_gates(model), call)
        blocks = tokdyn.traces(model)[-1].blocks
        assert not torch.equal(found[0], plain[0])
        assert all(value.isfinite().all() for value in found)
        tokdyn.unwrap(model)
        return blocks

    if works(model, Chunking(target=2)):
        assert {block.tokens for block in run(Chunking(target=2))} == {whole - size + round(size / 2)}
    if works(model, TokenDrop(rate=0.5)):
        assert {block.tokens for block in run(TokenDrop(rate=0.5, blocks=(0, -1)))} == {whole - size // 2}
    if works(model, TokenMerge(ratio=0.5)):
        assert all(block.attention[0][1] < whole for block in run(TokenMerge(ratio=0.5)))
    assert len(run(DepthSkip(blocks=(1,)))) == depth(model) - 1
    for width in (DynamicWidth(), DynamicWidth(tokens=False), DynamicWidth(tokens=False, channels=False)):
        if works(model, width):
            assert any(block.heads < 1 or block.mlp_rows is not None for block in run(width))
            break
    assert all(torch.equal(*pair) for pair in zip(outputs(model, call), plain, strict=True))


@every
@torch.no_grad()
def test_a_cached_step_restores_every_stream(name):
    """Just after a computed step, a cached one predicts nearly what a computed one would; without blocks it is far."""
    tiny = VIDEOS[name]
    model, call = tiny.build(), tiny.inputs(2)
    first, second = ({**call, **tiny.at(2, level)} for level in (0.5, 0.4999))
    moving = {next(iter(call)), "audio_hidden_states", "r_timestep", "timestep_r"} & call.keys()
    second |= {name: 0.9999 * call[name] for name in moving}
    exact = outputs(model, second)
    tokdyn.wrap(model, [DepthSkip(blocks=tuple(range(depth(model))))])
    without = outputs(model, second)
    tokdyn.unwrap(model)
    tokdyn.wrap(model, [FeatureCache(threshold=float("inf"))])
    outputs(model, first)
    found = outputs(model, second)
    assert tokdyn.traces(model)[-1].cached == {0, 1}
    for cached, computed, skipped in zip(found, exact, without, strict=True):
        assert (cached - computed).abs().max() < 0.1 * (skipped - computed).abs().max()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in DEAR or place % 2 else [])
        for place, name in enumerate(sorted(VIDEOS))
    ],
)
def test_samples_are_independent_and_flops_are_counted(name):
    model = VIDEOS[name].build()
    stacks = [Chunking(target=2), TokenMerge(ratio=0.3)], [TokenMerge(ratio=0.3)], [DepthSkip(blocks=(1,))]
    methods = next(stack for stack in stacks if works(model, *stack))
    case = Case(lambda: copy.deepcopy(model), VIDEOS[name].inputs(3), tuple(methods), shared(name), 1e-5)
    samples_do_not_depend_on_each_other(case)
    if name not in DEAR:
        computed_flops_are_the_counted_ones(case)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(VIDEOS.keys() - DEAR))
def test_the_laws_hold(name):
    assert len(check_adapter(VIDEOS[name].build(), VIDEOS[name].inputs(2), shared=shared(name), tolerance=1e-5)) >= 5
