"""torch.compile of models whose blocks arrange tokens in ways of their own."""

from __future__ import annotations

import pytest
import torch

import tokdyn
from tests.contract.coverage_arranged import ARRANGED
from tests.contract.stacks import acting
from tests.contract.test_coverage_arranged import outputs, works
from tokdyn import Chunking, DepthSkip, DynamicWidth, TokenMerge
from tokdyn.methods import Method

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:flex_attention called without")]
STACKS: dict[str, list[Method]] = {
    "skip": [DepthSkip(blocks=(1,))],
    "merge-mlp": [TokenMerge(ratio=0.5, where="mlp")],
    "merge": [TokenMerge(ratio=0.5)],
    "chunk": [Chunking(target=2)],
    "width": [DynamicWidth()],
}
BROKEN = {"WanAnimate2Transformer3DModel"}  # diffusers' own forward reads sizes from tensors: several graphs
PAIRS = [
    (name, stack)
    for name in sorted(ARRANGED)
    for stack, methods in STACKS.items()
    if works(ARRANGED[name].build(), *methods)
]


@pytest.mark.parametrize(("name", "stack"), PAIRS)
@torch.no_grad()
def test_compiled_models_compute_the_same(name: str, stack: str) -> None:
    """In one graph, where the plain model is one."""
    model = acting(tokdyn.wrap(ARRANGED[name].build(), STACKS[stack]))
    expected = outputs(model, ARRANGED[name].inputs(2))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=name not in BROKEN, backend="eager")
    for found, value in zip(outputs(compiled, ARRANGED[name].inputs(2)), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=1e-6)
    computed = [[block.block for block in trace.blocks] for trace in tokdyn.traces(model)]
    assert computed[-1] == computed[0]
