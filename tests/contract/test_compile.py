"""torch.compile sees through the wrapping: one graph, the same outputs, wherever the plain model is one graph."""

from functools import cache

import pytest
import torch
import torch._dynamo.testing
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

import tokdyn
from tests.contract.kit import shallow
from tests.contract.models import TINY, sample
from tests.contract.stacks import ACTIVE, PAIRS, acting
from tokdyn.attach import wrap

COMPILED = ("merge", "merge-both", "merge-weighted", "skip", "chunk", "chunk-merge", "width", "chunk-width")
"""Stacks without decisions that leave the graph."""
QUICK = {"DCDiT", "DiT", "FluxTransformer2DModel", "SanaTransformer2DModel", "WanTransformer3DModel"}
"""Models that are compiled by default, of all kinds of blocks."""
BROKEN = (torch._dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode)


def compiled(model, inputs):
    torch._dynamo.reset()
    return sample(torch.compile(model, fullgraph=True, backend="eager")(**inputs))


@cache
def plain_is_one(name):
    """Whether the model without methods compiles; asked where one with methods does not, for that takes a while."""
    try:
        compiled(shallow(TINY[name].build()), TINY[name].inputs(2))
    except BROKEN:
        return False
    return True


@pytest.mark.pairwise("laws", cost=100)
@pytest.mark.parametrize(
    ("name", "methods"),
    [pytest.param(*pair, marks=[] if pair[0] in QUICK else pytest.mark.slow) for pair in PAIRS if pair[1] in COMPILED],
)
@torch.no_grad()
def test_one_graph(name, methods):
    inputs = TINY[name].inputs(2)
    model = acting(wrap(shallow(TINY[name].build()), ACTIVE[methods]))
    expected = sample(model(**inputs))
    try:
        found = compiled(model, inputs)
    except BROKEN:
        if plain_is_one(name):
            raise
        pytest.skip("the plain model is not one graph")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_an_empty_wrap_is_one_graph():
    inputs = TINY["DiT"].inputs(2)
    model = shallow(TINY["DiT"].build())
    torch.testing.assert_close(compiled(wrap(model, []), inputs), sample(model(**inputs)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["DiT", pytest.param("PixArtTransformer2DModel", marks=pytest.mark.slow)])
@torch.no_grad()
def test_calls_are_remembered_without_compiling_again(name):
    """Statistics grow with every call, and what a graph reads must not."""
    torch._dynamo.reset()
    model = wrap(shallow(TINY[name].build()), ACTIVE["chunk-merge"])
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
