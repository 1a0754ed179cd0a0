"""What a step takes is worked out without computing, and real steps of small models hold and compute as much."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.memory import allocated
from tests.scaling.steps import recipe, step, work
from tokdyn.cost.counter import operator_formulas
from tokdyn.errors import RecipeError
from tokdyn.ops.precision import CPU_HALVES
from tokdyn.recipe import load
from tokdyn.scaling import ScalingSettings, worked_out
from tokdyn.scaling.work import shards
from tokdyn.train.ema import Ema
from tokdyn.train.setup import open_optimizer

CASES = [
    ("dit", {}),
    ("dcdit", {}),
    ("dcdit", {"gradient_checkpointing": True}),
    ("dcdit", {"precision": "bf16"}),
    ("dit", {"precision": "bf16", "gradient_checkpointing": True}),
]


def size(tensors: Any) -> int:
    """Bytes of tensors."""
    return sum(each.numel() * each.element_size() for each in tensors)


@pytest.mark.parametrize(("kind", "training"), CASES)
def test_a_step_holds_what_is_worked_out(kind: str, training: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator counts temporaries of single operators too, so a tenth more or less is allowed."""
    monkeypatch.setitem(CPU_HALVES, torch.bfloat16, True)  # as every GPU has them
    of = recipe(kind, **training)
    model, run = step(of)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    saved: dict[int, int] = {}
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    expected = work(of).activations
    assert expected == pytest.approx(allocated(run), rel=0.1)
    assert expected > 0.9 * sum(saved.values())  # what autograd keeps is most of it


@pytest.mark.parametrize("kind", ["dit", "dcdit"])
def test_weights_gradients_moments_and_averages_are_those_of_a_run(kind: str) -> None:
    of = recipe(kind)
    model, run = step(of)
    average, optimizer = Ema(model, 0.99, False), open_optimizer(model, of.optimizer)
    run()
    optimizer.step()
    moments = [each for state in optimizer.state.values() for name, each in state.items() if name != "step"]
    memory = worked_out(work(of), ScalingSettings(gpus=1)).memory
    assert memory["weights"] == size(model.parameters())
    assert memory["gradients"] == size(each.grad for each in model.parameters() if each.grad is not None)
    assert memory["moments"] == size(moments)
    assert memory["averaged weights"] == size(average.model.parameters())
    assert memory["buffers of collectives"] == 0  # one process sends nothing


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("kind", ["dit", "dcdit"])
def test_flops_are_those_that_torch_counts(kind: str, recomputed: bool) -> None:
    """Three forward passes are the usual count; torch leaves out gradients of the input, and counts attention anew."""
    of = recipe(kind, gradient_checkpointing=recomputed)
    _, run = step(of)
    counter = FlopCounterMode(display=False, custom_mapping=operator_formulas())
    with counter:
        run()
    assert work(of).flops == pytest.approx(counter.get_total_flops() / of.training.batch_size, rel=0.06)


def test_published_models_take_seconds_and_no_memory() -> None:
    of = load("imagenet/dc-dit-xl-256", ["training.batch_size=64"])
    found = work(of, gpus=64)
    assert found.micro_batch == 1
    assert shards(found.weights, 1) == 4 * 689_589_513
    assert len(found.units) == 28
    assert found.flops == pytest.approx(3 * 0.1942e12, rel=0.05)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(RecipeError, match="batch_size"):
        work(recipe("dit"), gpus=3)
