"""Two processes train wrapped models: what one process would, and nothing that keeps them apart goes unsaid.

Both are started once; they run a native model and one of diffusers under DistributedDataParallel, accelerate and FSDP.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tokdyn
from tests.contract.ecosystem import FIXED, RANDOM, equip, half, halves, step_loss
from tests.contract.models import TINY, sample
from tests.processes import launch
from tokdyn.methods import DepthSkip, FeatureCache, TokenMerge

WORKER = Path(__file__).parent / "parallel_worker.py"
NAMES = {"DiT": "DiT", "diffusers": "PixArtTransformer2DModel"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes wrote."""
    folder = tmp_path_factory.mktemp("parallel")
    launch(WORKER, str(folder), timeout=240)
    results = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    results[0]["folder"] = folder
    return results


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal up to the order of additions in fp32."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-6, msg=key)


def started(case: str, name: str, methods: list[Any], found: list[dict[str, Any]]) -> torch.nn.Module:
    """The model as both processes had it before the first step."""
    model = equip(TINY[name].build(), methods).train()
    model.load_state_dict(found[0][case]["start"])
    return model


@pytest.mark.parametrize("kind", NAMES)
def test_gradients_are_those_of_the_whole_batch(kind: str, found: list[dict[str, Any]]) -> None:
    case, name = f"fixed {kind}", NAMES[kind]
    model = started(case, name, FIXED, found)
    step_loss(model, name, TINY[name].inputs(4)).backward()
    expected = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    assert any(key.startswith("tokdyn.") for key in expected)
    for rank in range(2):
        close(found[rank][case]["gradients"], expected)


@pytest.mark.parametrize("kind", NAMES)
def test_random_methods_draw_for_each_process_and_gradients_are_the_mean(
    kind: str, found: list[dict[str, Any]]
) -> None:
    case, name = f"random {kind}", NAMES[kind]
    model, losses = started(case, name, RANDOM, found), []
    for rank, inputs in enumerate(halves(name)):
        torch.manual_seed(rank)
        loss = step_loss(model, name, inputs)
        losses.append(loss.item())
        (loss / 2).backward()
    expected = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    assert {key for key, _ in model.tokdyn.named_parameters(prefix="tokdyn")} <= set(expected)
    for rank in range(2):
        close(found[rank][case]["gradients"], expected)
        assert found[rank][case]["losses"][0] == pytest.approx(losses[rank], rel=1e-5)


@pytest.mark.parametrize("case", [f"{stack} {kind}" for stack in ("fixed", "random") for kind in NAMES])
def test_processes_stay_together(case: str, found: list[dict[str, Any]]) -> None:
    """Parts that started from other numbers are the first process's from the start, and equal after three steps."""
    for key in ("start", "end"):
        first, second = (found[rank][case][key] for rank in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
    first = found[0][case]
    assert any(not torch.equal(first["start"][name], first["end"][name]) for name in first["end"])
    assert first["calls"] == 1  # the last step


def test_accelerate_prepares_a_wrapped_model(found: list[dict[str, Any]]) -> None:
    one, two = (found[rank]["accelerated"] for rank in range(2))
    assert one["same"]
    assert one["kind"] == "DistributedDataParallel"
    assert all(torch.equal(one["end"][key], two["end"][key]) for key in one["end"])
    assert all(value.isfinite().all() for value in one["gradients"].values())
    again = tokdyn.load(TINY["DiT"].build(), found[0]["folder"] / "methods")
    assert all(torch.equal(value, one["end"][key]) for key, value in again.tokdyn.state_dict().items())


def test_sharded_weights_give_the_same(found: list[dict[str, Any]]) -> None:
    name = "DiT"
    model = equip(TINY[name].build(), FIXED).train()
    step_loss(model, name, TINY[name].inputs(4)).backward()
    expected = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    sampler = equip(TINY[name].build(), [FeatureCache(steps=(0, 2)), TokenMerge(), DepthSkip(blocks=(1,))])
    for rank in range(2):
        close(found[rank]["sharded"]["gradients"], expected)
        with torch.no_grad():
            tokdyn.reset(sampler)
            calls = [sample(sampler(**{**half(name, rank), **TINY[name].at(2, level)})) for level in (0.9, 0.6, 0.3)]
            plain = sample(TINY[name].build()(**half(name, rank)))
        torch.testing.assert_close(found[rank]["sharded"]["samples"], torch.stack(calls), rtol=0, atol=1e-6)
        torch.testing.assert_close(found[rank]["sharded"]["plain"], plain, rtol=0, atol=1e-6)


def test_what_would_keep_processes_apart_is_named(found: list[dict[str, Any]]) -> None:
    for rank in range(2):
        case, shards = found[rank]["fixed DiT"], found[rank]["sharded"]
        assert "calibrate_router" in case["calibration"]
        assert "DistributedDataParallel" in case["unwrapping"]
        assert "model.module, then DistributedDataParallel" in case["wrapping"]
        for key, method in (("levels", "DepthSkip"), ("gates", "DepthSkip"), ("cache", "FeatureCache")):
            assert shards[key].startswith(f"{method} "), key
        assert shards["ragged"].startswith("Chunking ")
        assert shards["late levels"].startswith("DepthSkip ")
        assert "fully_shard" in shards["late"]
        assert "FSDPDiT" in shards["unwrapping"]
