"""torch.compile around and within pipelines: one graph for all steps at fixed counts, in any order with wrapping.

Two blocks each, since tracing takes a second a block: DiT for whole models, Flux for its blocks one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import tokdyn
from tests.contract.ecosystem import equip, predict
from tests.contract.models import TINY, of_diffusers
from tests.contract.pipelines import PIPES, build, images
from tokdyn.errors import UnsupportedModelError
from tokdyn.methods import Chunking, DepthSkip, TokenMerge

FIXED = [Chunking(target=2), TokenMerge(ratio=0.3), DepthSkip(blocks=(0,))]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No graph of one test is there in the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(name: str, **layers: int) -> Any:
    """A pipeline whose model has two blocks."""
    pipe = build(name)
    config = {key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")}
    pipe.register_modules(transformer=of_diffusers(type(pipe.transformer).__name__, **{**config, **layers}))
    return pipe


def test_a_compiled_model_in_a_pipeline() -> None:
    pipe, counter = small("DiT", num_layers=2), CompileCounter()
    plain = images(pipe, "DiT")
    model = equip(pipe.transformer, FIXED)
    expected = images(pipe, "DiT")
    pipe.transformer = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(images(pipe, "DiT"), expected, rtol=0, atol=1e-5)
        assert [call.blocks for call in tokdyn.stats(pipe.transformer).calls] == [(1,)] * 4
    assert counter.frame_count == 1
    with pytest.raises(UnsupportedModelError, match=r"OptimizedModule .* model\._orig_mod, then torch\.compile"):
        tokdyn.wrap(pipe.transformer, [TokenMerge()])
    pipe.transformer = tokdyn.unwrap(model)
    assert torch.equal(images(pipe, "DiT"), plain)


@pytest.mark.parametrize("first", ["wrap", pytest.param("compile", marks=pytest.mark.slow)])
def test_a_model_that_is_compiled_in_place(first: str) -> None:
    pipe, counter = small("DiT", num_layers=2), CompileCounter()
    model = pipe.transformer
    plain = images(pipe, "DiT")
    if first == "compile":
        model.compile(backend=counter, fullgraph=True)
    equip(model, FIXED)
    if first == "wrap":
        expected = images(pipe, "DiT")
        model.compile(backend=counter, fullgraph=True)
    else:
        with torch.compiler.set_stance("force_eager"):
            expected = images(pipe, "DiT")
    assert not torch.equal(expected, plain)
    for _ in range(2):
        torch.testing.assert_close(images(pipe, "DiT"), expected, rtol=0, atol=1e-5)
    assert counter.frame_count == 1
    assert [call.blocks for call in tokdyn.stats(model).calls] == [(1,)] * 4
    tokdyn.unwrap(model)
    torch.testing.assert_close(images(pipe, "DiT"), plain, rtol=0, atol=1e-5)


def test_blocks_that_are_compiled_one_by_one() -> None:
    """Regional compilation: what methods do around a block stays outside, so caches and levels work with it."""
    name, counter = "Flux", CompileCounter()
    pipe = small(name, num_layers=1, num_single_layers=1)
    methods = [tokdyn.FeatureCache(threshold=0.05), TokenMerge(ratio=0.3), DepthSkip(blocks=(1,), levels=(0.5, 1.0))]
    equip(pipe.transformer, methods)
    expected = images(pipe, name)
    pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    torch.testing.assert_close(images(pipe, name), expected, rtol=0, atol=1e-5)
    assert PIPES[name].branches == ("cond", "uncond")
    frames = counter.frame_count
    assert frames > 0
    torch.testing.assert_close(images(pipe, name), expected, rtol=0, atol=1e-5)
    assert counter.frame_count == frames


@pytest.mark.slow
def test_another_size_is_another_graph_and_no_stale_one() -> None:
    model = equip(TINY["DiT"].build(), [TokenMerge(ratio=0.5), DepthSkip(blocks=(0, 1, 2))])
    expected = [predict(model, "DiT", batch=batch) for batch in (2, 1)]
    compiled = torch.compile(model, backend="eager", dynamic=False)
    for _ in range(2):
        for batch, value in zip((2, 1), expected, strict=True):
            torch.testing.assert_close(predict(compiled, "DiT", batch=batch), value, rtol=0, atol=1e-6)
