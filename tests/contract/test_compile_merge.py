"""Compiled models that merge tokens: calls after the first, every way to compile, and grids that position ids say."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.contract.kit import shallow
from tests.contract.models import TINY, ids, sample
from tests.contract.widths import blocks_of
from tokdyn.attach import traces, wrap
from tokdyn.methods import DepthSkip, TokenMerge


def through_torch(model, **how):
    return torch.compile(model, **how)


def through_module(model, **how):
    model.compile(**how)
    return model


def through_blocks(model, **how):
    """As diffusers' compile_repeated_blocks does."""
    for block in blocks_of(model):
        block.compile(**how)
    return model


@pytest.mark.parametrize(
    ("name", "through"),
    [
        ("DiTTransformer2DModel", through_torch),
        pytest.param("DiTTransformer2DModel", through_module, marks=pytest.mark.slow),
        pytest.param("DiTTransformer2DModel", through_blocks, marks=pytest.mark.slow),
        pytest.param("SD3Transformer2DModel", through_torch, marks=pytest.mark.slow),
        ("SD3Transformer2DModel", through_blocks),
    ],
)
@torch.no_grad()
def test_later_calls_use_the_same_graph(name, through):
    """At other noise levels, with other destinations, and whatever the statistics hold by then."""
    tiny, methods = TINY[name], [TokenMerge(seed=3, weighted=True, reuse=2), DepthSkip(blocks=(1,))]
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("eager")
    model, plain = (wrap(shallow(tiny.build(), 3), methods) for _ in range(2))
    run, graphs = through(model, fullgraph=True, backend=backend), set()
    for level in (0.9, 0.9, 0.4, 0.1):
        inputs = {**tiny.inputs(2), **tiny.at(2, level)}
        torch.testing.assert_close(sample(run(**inputs)), sample(plain(**inputs)), rtol=0, atol=1e-6)
        graphs.add(backend.frame_count)
    assert graphs == {2 if through is through_blocks else 1}  # one of three blocks is never called
    assert [[block.block for block in call.blocks] for call in traces(model)] == [
        [block.block for block in call.blocks] for call in traces(plain)
    ]


def positions(name, rows, columns):
    """Position ids of Flux and, with one axis more, of Flux 2."""
    places = ids(rows, columns)
    return places if name == "FluxTransformer2DModel" else torch.cat([places, torch.zeros(len(places), 1)], dim=1)


@pytest.mark.parametrize(
    ("name", "through", "backend"),
    [
        pytest.param("FluxTransformer2DModel", through_torch, "eager", marks=pytest.mark.slow),
        pytest.param("FluxTransformer2DModel", through_module, "aot_eager", marks=pytest.mark.slow),
        pytest.param("Flux2Transformer2DModel", through_torch, "aot_eager", marks=pytest.mark.slow),
        ("Flux2Transformer2DModel", through_module, "eager"),
    ],
)
@torch.no_grad()
def test_a_grid_that_position_ids_say_is_noticed(name, through, backend):
    """Equal shapes, other aspect ratios: a graph for one grid is not used for another."""
    torch._dynamo.reset()
    model, plain = (wrap(shallow(TINY[name].build()), [TokenMerge()]) for _ in range(2))
    run, outputs = through(model, fullgraph=True, backend=backend), []
    for grid in ((4, 5), (5, 4), (4, 5)):
        inputs = {**TINY[name].inputs(2), "img_ids": positions(name, *grid)}
        outputs.append(sample(run(**inputs)))
        torch.testing.assert_close(outputs[-1], sample(plain(**inputs)), rtol=0, atol=1e-6)
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@torch.no_grad()
def test_within_a_larger_graph_another_grid_is_an_error(backend):
    """There, ids are read when the graph is made; the graph checks that they still say the same."""
    name = "FluxTransformer2DModel"
    torch._dynamo.reset()
    model = wrap(shallow(TINY[name].build()), [TokenMerge()])
    inputs = TINY[name].inputs(2)
    expected = sample(model(**inputs))

    @torch.compile(fullgraph=True, backend=backend)
    def twice(**given):
        return 2 * sample(model(**given))

    torch.testing.assert_close(twice(**inputs), 2 * expected, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"graph .*token grid"):
        twice(**{**inputs, "img_ids": positions(name, 5, 4)})
