"""Blocks that are compiled one by one, as diffusers' compile_repeated_blocks does, with every method.

What methods do around a block stays outside of its graph, decisions of caches and gates among it; merging is inside.
More blocks than torch.compile makes graphs of one function (8) share a few, and no step makes another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import tokdyn
from tests.contract.ecosystem import equip, predict
from tests.contract.kit import Tiny, of_diffusers, randomized
from tests.contract.models import TINY
from tests.contract.widths import blocks_of
from tokdyn import Chunking, DepthSkip, DiT, DynamicWidth, FeatureCache, TokenDrop, TokenMerge

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
LEVELS = (0.9, 0.7, 0.5, 0.2)
CURVE = ((0.0, 0.2), (1.0, 0.6))
STACKS: dict[str, tuple[list[Any], int]] = {
    "nothing": ([], 1),
    "cache-steps": ([FeatureCache(steps=(0, 2), num_steps=4)], 1),
    "cache-threshold": ([FeatureCache(threshold=0.3)], 1),
    "cache-first": ([FeatureCache(threshold=0.5, indicator="first_block")], 1),
    "skip": ([DepthSkip(table=((0.0, 0.5, (3,)), (0.5, 1.0, (4, 5))))], 1),
    "gates": ([DepthSkip(learned=True)], 1),
    "chunk": ([Chunking(target=2, router="cosine")], 1),
    "merge": ([TokenMerge(ratio=0.5)], 2),
    "merge-weighted": ([TokenMerge(ratio=0.5, where="both", seed=3, weighted=True)], 2),
    "merge-important": ([TokenMerge(ratio=0.5, where="mlp", important=True)], 2),
    "merge-reuse": ([TokenMerge(ratio=0.5, reuse=3)], 3),
    "merge-some": ([TokenMerge(ratio=0.5, blocks=(3, 9))], 3),
    "stack": ([FeatureCache(threshold=0.3), Chunking(target=2), TokenMerge(ratio=0.3), DepthSkip(blocks=(4,))], 2),
    "merge-curve": ([TokenMerge(ratio=CURVE)], 0),
    "width": ([DynamicWidth()], 0),
    "width-stack": ([TokenMerge(ratio=0.3), DynamicWidth(token_input="stream")], 0),
}
"""Methods, and the graphs that all blocks of one kind share: none where other things are computed in every step."""
QUICK = ("merge-reuse", "stack", "width")


def deep_dit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 4, "hidden_size": 16, "num_heads": 2, "num_classes": 10}
    return randomized(DiT(patch_size=2, depth=10, **sizes))


def deep_flux() -> nn.Module:
    return of_diffusers(
        "FluxTransformer2DModel",
        patch_size=1, in_channels=4, num_layers=5, num_single_layers=9, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


DEEP: dict[str, Tiny] = {
    "DiT": replace(TINY["DiT"], build=deep_dit),
    "FluxTransformer2DModel": replace(TINY["FluxTransformer2DModel"], build=deep_flux),
}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No graph of one test is there in the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_blocks(model: nn.Module) -> Any:
    """Compile every block by itself, in one graph; what is returned counts the graphs."""
    counter = CompileCounterWithBackend("eager")
    for block in blocks_of(model):
        block.compile(fullgraph=True, backend=counter)
    return counter


@torch.no_grad()
def steps(model: Any, name: str) -> Tensor:
    """(S, B, ...) what a model predicts along a trajectory of its own."""
    found = torch.stack([predict(model, name, level) for level in LEVELS])
    tokdyn.reset(model)
    return found


def held(model: nn.Module) -> list[set[str]]:
    return [set(vars(module)) for module in model.modules()]


@torch.no_grad()
@pytest.mark.parametrize("name", ["DiT", pytest.param("FluxTransformer2DModel", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "stack", [pytest.param(each, marks=[] if each in QUICK else pytest.mark.slow) for each in STACKS]
)
def test_a_few_graphs_serve_all_blocks_and_steps(name: str, stack: str) -> None:
    methods, graphs = STACKS[stack]
    if name != "DiT" and stack == "width-stack":
        pytest.skip("only the DiT of tokdyn shows its tokens before the norm")
    plain, model = (equip(DEEP[name].build(), methods) for _ in range(2))
    before, counter = held(model), compile_blocks(model)
    expected = steps(plain, name)
    for _ in range(2):
        torch.testing.assert_close(steps(model, name), expected, rtol=0, atol=1e-5)
        classes, kinds = (1, 1) if name == "DiT" else (2, 3)  # the first single block gets other strides than the rest
        assert counter.frame_count <= graphs * kinds + classes * (stack == "cache-first")  # for a part of the batch
        assert (counter.frame_count > 0) == (graphs > 0)
    if methods:
        predict(plain, name)
        predict(model, name)
        one, other = (tokdyn.stats(each).calls[-1] for each in (plain, model))
        assert (other.flops, other.dense, other.blocks) == (one.flops, one.dense, one.blocks)
    assert [kept - {"_compiled_call_impl"} for kept in held(model)] == before


@pytest.mark.slow
@torch.no_grad()
def test_compiling_may_come_before_wrapping_and_stays_after_unwrapping() -> None:
    name, methods = "DiT", [TokenMerge(ratio=0.5)]
    expected = steps(equip(DEEP[name].build(), methods), name)
    model = DEEP[name].build()
    plain, counter = predict(model, name), compile_blocks(model)
    equip(model, methods)
    torch.testing.assert_close(steps(model, name), expected, rtol=0, atol=1e-5)
    graphs = counter.frame_count
    assert graphs == 2
    with tokdyn.disabled(model):
        torch.testing.assert_close(predict(model, name), plain, rtol=0, atol=1e-5)
    tokdyn.unwrap(model)
    torch.testing.assert_close(predict(model, name), plain, rtol=0, atol=1e-5)
    assert counter.frame_count > graphs


@torch.no_grad()
def test_dynamic_width_saves_in_blocks_that_are_compiled() -> None:
    """They run as they are, on slices of their weights, and not compiled with masks, which save nothing."""
    model = equip(DEEP["DiT"].build(), [DynamicWidth()])
    counter = compile_blocks(model)
    predict(model, "DiT")
    call = tokdyn.stats(model).calls[-1]
    assert call.heads < 1.0
    assert call.channels < 1.0
    assert counter.frame_count == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "methods",
    [[TokenDrop(rate=0.5)], [TokenMerge(ratio=0.5), DepthSkip(learned=True)]],
    ids=["drop", "merge-gates"],
)
def test_compiled_blocks_learn_the_same(methods: list[Any]) -> None:
    """Dropping tokens and drawing gates happen around the blocks."""
    gradients = []
    for compiled in (False, True):
        model = equip(DEEP["DiT"].build(), methods).train()
        counter = compile_blocks(model) if compiled else None
        for _ in range(2):
            model.zero_grad()
            torch.manual_seed(1)
            (predict(model, "DiT").square().mean() + sum(tokdyn.losses(model).values())).backward()
        gradients.append([each.grad for each in model.parameters() if each.grad is not None])
    assert counter is not None
    assert 0 < counter.frame_count <= 3
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
