"""The memory of a distillation is worked out before its first step, and what the allocator counts is close to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.models import TINY
from tests.contract.quantised import WAYS
from tests.memory import allocated
from tests.upcycling.elastic import FAMILIES, opened, recorded, student_of
from tokdyn import Chunking, wrap
from tokdyn.upcycling import DistilSettings, distil
from tokdyn.upcycling.memory import memory_of, size_of
from tokdyn.upcycling.students import prepare

LORA = DistilSettings(steps=2, trained="lora", rank=4, tail_drops=(0.0,))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Flux", {}),
        *(
            pytest.param(name, changes, marks=pytest.mark.slow)
            for name in FAMILIES
            for changes in ({}, {"gradient_checkpointing": True}, {"trained": "methods", "rank": None})
            if (name, changes) != ("Flux", {})
        ),
    ],
)
def test_it_is_within_a_tenth_of_what_is_allocated(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    pipe = opened(name)
    calls = recorded(pipe, name, steps=1)
    student, settings = student_of(pipe.transformer), LORA.model_copy(update=changes)
    prepare(student, settings)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    memory = memory_of(student, settings, calls)
    assert all(torch.equal(value, student.state_dict()[key]) for key, value in before.items())
    found = allocated(lambda: distil(student, calls, tmp_path / "run", settings))
    small = 8192  # the state of a random generator (5,056 bytes) and scalars, which no real model notices
    assert memory.moments + memory.step == pytest.approx(found, rel=0.1, abs=small)


@pytest.mark.slow
def test_recomputing_needs_less() -> None:
    call = {**TINY["SD3Transformer2DModel"].inputs(4)}
    model = student_of(TINY["SD3Transformer2DModel"].build())
    kept = memory_of(model, LORA, [call])
    recomputed = memory_of(model, LORA.model_copy(update={"gradient_checkpointing": True}), [call])
    assert recomputed.step < 0.7 * kept.step
    assert recomputed.weights == kept.weights


@pytest.mark.slow
def test_the_largest_call_at_the_largest_budget_decides() -> None:
    tiny = TINY["FluxTransformer2DModel"]
    model = student_of(tiny.build())
    one, four = (memory_of(model, LORA, [tiny.inputs(count)]) for count in (1, 4))
    both = memory_of(model, LORA, [tiny.inputs(1), tiny.inputs(4), tiny.inputs(1)])
    assert one.step < four.step == both.step
    less = memory_of(model, LORA.model_copy(update={"tail_drops": (0.5,)}), [tiny.inputs(4)])
    assert less.step < four.step


def test_weights_and_what_the_optimizer_keeps_are_counted() -> None:
    tiny = TINY["FluxTransformer2DModel"]
    model = student_of(tiny.build())
    memory = memory_of(model, LORA, [tiny.inputs(1)], others=[torch.nn.Linear(10, 10), None])
    trained = [value for name, value in model.named_parameters() if name.startswith("tokdyn.") or "lora_" in name]
    assert memory.moments == 2 * 4 * sum(value.numel() for value in trained)
    assert memory.weights == size_of([*model.parameters(), *model.buffers()]) + 4 * 110
    assert memory.calls == size_of([tiny.inputs(1)])
    assert memory.total == memory.weights + memory.moments + memory.calls + memory.step
    assert "MiB" in str(memory)


@pytest.mark.parametrize("way", WAYS)
def test_quantised_weights_count_as_they_are_stored(way: str) -> None:
    tiny = TINY["SD3Transformer2DModel"]
    plain = memory_of(wrap(tiny.build(), [Chunking(target=2)]), LORA, [tiny.inputs(1)])
    small = memory_of(wrap(WAYS[way](tiny.build()), [Chunking(target=2)]), LORA, [tiny.inputs(1)])
    assert small.weights < 0.8 * plain.weights
    assert small.step == pytest.approx(plain.step, rel=0.1)
