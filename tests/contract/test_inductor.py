"""Compiled for real: what inductor makes of a wrapped block and of DC-DiT's parts computes and learns the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn

import tokdyn
from tests.contract.kit import randomized
from tests.contract.models import TINY, sample
from tests.contract.widths import random_gates
from tokdyn import Chunking, DCDiT, DepthSkip, DiT, DynamicWidth, TokenMerge

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore::DeprecationWarning")
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}  # of sums in another order
STACKS = {
    "merge": [TokenMerge(ratio=0.4, where="both"), DepthSkip(blocks=(1,))],
    "weighted": [TokenMerge(ratio=0.5, weighted=True, seed=3)],
    "chunk": [Chunking(target=2), TokenMerge(ratio=0.3)],
    "width": [DynamicWidth()],
}


quick = pytest.mark.parametrize("learning", [False, pytest.param(True, marks=pytest.mark.slow)])
slow = pytest.mark.parametrize("learning", [pytest.param(each, marks=pytest.mark.slow) for each in (False, True)])


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No graph of one test is there in the next, and no processes are started to compile one kernel."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


def shallow(depth: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"sample_size": (4, 6), "in_channels": 4, "hidden_size": 16, "num_heads": 2, "num_classes": 3}
    return randomized(DiT(patch_size=1, depth=depth, **sizes))


def inputs() -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.tensor([900, 300]),
        "class_labels": torch.tensor([0, 2]),
    }


def results(model: nn.Module, function: Callable[[], Tensor], learning: bool) -> dict[str, Tensor]:
    """What a function of a model gives, and the gradients of a sum that weighs its values differently."""
    if not learning:
        with torch.no_grad():
            return {"value": function()}
    model.zero_grad()
    value = function()
    (value * torch.linspace(-1, 1, value.numel()).view_as(value)).sum().backward()
    grads = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return {"value": value.detach(), **grads}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **ROUNDING, msg=lambda text, name=name: f"{name}: {text}")


@quick
def test_a_wrapped_block(learning: bool) -> None:
    """Merging in a block that is compiled in place, as regional compilation does, and skipping of another."""
    methods = [TokenMerge(ratio=0.4), DepthSkip(blocks=(1,))]
    model = tokdyn.wrap(shallow(2), methods).eval()
    expected = results(model, lambda: sample(model(**inputs())), learning)
    model.blocks[0].compile(fullgraph=True)
    same(results(model, lambda: sample(model(**inputs())), learning), expected)
    assert not torch.equal(sample(shallow(2)(**inputs())), expected["value"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "methods"),
    [
        *(("DiT", methods) for methods in STACKS),
        ("FluxTransformer2DModel", "chunk"), ("SD3Transformer2DModel", "weighted"), ("WanTransformer3DModel", "merge"),
    ],
)  # fmt: skip
def test_whole_wrapped_models(name: str, methods: str) -> None:
    model, given = random_gates(tokdyn.wrap(TINY[name].build(), STACKS[methods])).eval(), TINY[name].inputs(2)
    with torch.no_grad():
        expected = sample(model(**given))
        found = sample(torch.compile(model, fullgraph=True)(**given))
    torch.testing.assert_close(found, expected, **ROUNDING)


@pytest.fixture
def dcdit() -> Any:
    torch.manual_seed(0)
    sizes = {"sample_size": (4, 6), "in_channels": 4, "hidden_size": 16, "num_heads": 2, "num_classes": 3}
    return randomized(DCDiT(depth=1, target=2.0, **sizes))


@slow
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_scaffold(dcdit: Any, part: str, learning: bool) -> None:
    expected = results(dcdit, lambda: dcdit(**inputs()).sample, learning)
    module = getattr(dcdit, part)
    module.compile(fullgraph=True, dynamic=False)
    same(results(dcdit, lambda: dcdit(**inputs()).sample, learning), expected)


@quick
def test_the_router(dcdit: Any, learning: bool) -> None:
    """Every decision and the ratio loss, in one graph."""
    chunking, steps, kept = dcdit.chunking, torch.tensor([900, 300]), []
    tokens = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(2))

    def decide() -> Tensor:
        routing = chunking.route(tokens, (4, 6), steps, torch.tensor([0.0, 0.5]))
        kept.append(routing.keep)
        return torch.cat([routing.probability.flatten(), routing.losses["ratio"][None]])

    same(results(chunking, torch.compile(decide, fullgraph=True), learning), results(chunking, decide, learning))
    assert torch.equal(*kept)


@slow
def test_dechunking(dcdit: Any, learning: bool) -> None:
    """Smoothing, the nearest kept cells and the straight-through gate, for the packing of one call."""
    chunking, steps = dcdit.chunking, torch.tensor([900, 300])
    tokens = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        routing = chunking.route(tokens, (4, 6), steps)
    rows, packing = chunking.chunk(tokens, routing)

    def spread() -> Tensor:
        out: Tensor = chunking.dechunk(rows, tokens, routing, packing)
        return out

    same(results(chunking, torch.compile(spread, fullgraph=True), learning), results(chunking, spread, learning))


@slow
def test_a_block_on_packed_tokens(dcdit: Any, learning: bool) -> None:
    """For any number of kept tokens, as training compiles it."""

    def dropping(drop: float) -> Callable[[], Tensor]:
        return lambda: dcdit(**inputs(), tail_drop=drop).sample

    expected = [results(dcdit, dropping(drop), learning) for drop in (0.0, 0.5)]
    dcdit.blocks[0].compile(dynamic=True)
    for drop, each in zip((0.0, 0.5), expected, strict=True):
        same(results(dcdit, dropping(drop), learning), each)
