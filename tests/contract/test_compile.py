"""torch.compile sees through the wrapping: one graph, the same outputs, wherever the plain model is one graph."""

from functools import cache

import pytest
import torch
import torch._dynamo.testing
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

import tokdyn
from tests.contract.models import TINY, sample, works
from tests.contract.widths import random_gates
from tokdyn.attach import wrap
from tokdyn.methods import Chunking, DepthSkip, DynamicWidth, TokenMerge

STACKS = {
    "nothing": [],
    "merge": [TokenMerge()],
    "weighted": [TokenMerge(seed=3, weighted=True, reuse=2)],
    "chunk": [Chunking(target=3), TokenMerge(ratio=0.3)],
    "width": [DynamicWidth()],
    "both": [TokenMerge(where="both"), DepthSkip(blocks=(1,))],
}


BROKEN = (torch._dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode)


def compiled(model, inputs):
    torch._dynamo.reset()
    return sample(torch.compile(model, fullgraph=True, backend="eager")(**inputs))


@cache
def plain_is_one(name):
    """Whether the model without methods compiles; asked where one with methods does not, for that takes a while."""
    try:
        compiled(TINY[name].build(), TINY[name].inputs(2))
    except BROKEN:
        return False
    return True


@pytest.mark.parametrize("methods", STACKS)
@pytest.mark.parametrize("name", sorted(TINY))
@torch.no_grad()
def test_one_graph(name, methods):
    inputs = TINY[name].inputs(2)
    if not works(name, STACKS[methods]):
        pytest.skip("refused")
    model = wrap(TINY[name].build(), STACKS[methods])
    if methods == "width":
        random_gates(model)
    expected = sample(model(**inputs))
    try:
        found = compiled(model, inputs)
    except BROKEN:
        if plain_is_one(name):
            raise
        pytest.skip("the plain model is not one graph")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["DiT", "PixArtTransformer2DModel"])
@torch.no_grad()
def test_calls_are_remembered_without_compiling_again(name):
    """Statistics grow with every call, and what a graph reads must not."""
    torch._dynamo.reset()
    model = wrap(TINY[name].build(), STACKS["chunk"])
    counter = torch._dynamo.testing.CompileCounter()
    fast = torch.compile(model, fullgraph=True, backend=counter)
    for level in (0.9, 0.7, 0.5, 0.3):
        fast(**{**TINY[name].inputs(2), **TINY[name].at(2, level)})
    assert counter.frame_count == 1
    run = tokdyn.stats(model)
    assert [call.level for call in run.calls] == pytest.approx([0.9, 0.7, 0.5, 0.3])
    assert len({call.flops for call in run.calls}) == 1
    model._reset_stateful_cache()
    fast(**{**TINY[name].inputs(2), **TINY[name].at(2, 0.2)})
    assert counter.frame_count == 1
    assert len(tokdyn.stats(model).calls) == 1
