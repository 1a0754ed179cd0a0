"""torch.compile sees through the wrapping: one graph, the same outputs, wherever the plain model is one graph."""

import pytest
import torch

from tests.contract.models import TINY, sample, works
from tests.contract.widths import random_gates
from tokdyn.attach.api import wrap
from tokdyn.methods import Chunking, DepthSkip, DynamicWidth, TokenMerge

STACKS = {
    "nothing": [],
    "merge": [TokenMerge()],
    "chunk": [Chunking(target=3), TokenMerge(ratio=0.3)],
    "width": [DynamicWidth()],
    "both": [TokenMerge(where="both"), DepthSkip(blocks=(1,))],
}


def compiled(model, inputs):
    torch._dynamo.reset()
    return sample(torch.compile(model, fullgraph=True, backend="eager")(**inputs))


@pytest.mark.parametrize("methods", STACKS)
@pytest.mark.parametrize("name", sorted(TINY))
@torch.no_grad()
def test_one_graph(name, methods):
    inputs = TINY[name].inputs(2)
    try:
        compiled(TINY[name].build(), inputs)
    except torch._dynamo.exc.TorchDynamoException:
        pytest.skip("the plain model is not one graph")
    if not works(name, STACKS[methods]):
        pytest.skip("refused")
    if "img_ids" in inputs and methods != "nothing":
        pytest.skip("the grid is read from position ids, which are data")
    model = wrap(TINY[name].build(), STACKS[methods])
    if methods == "width":
        random_gates(model)
    expected = sample(model(**inputs))
    torch.testing.assert_close(compiled(model, inputs), expected, rtol=0, atol=1e-6)
