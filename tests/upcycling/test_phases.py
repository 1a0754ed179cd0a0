"""Phases of an upcycling run as functions of the step, the parts that they freeze, and sections that are rejected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

import tokdyn
from tests.upcycling.models import small_base
from tokdyn.errors import RecipeError
from tokdyn.upcycling.conversion import build_student
from tokdyn.upcycling.phases import PhaseBatch, always_frozen, count_steps, drop_frozen_gradients, freeze, part_of
from tokdyn.upcycling.settings import DISTILLED, AttachedMethod, PhaseSettings, UpcycleSettings, split_methods

PARTS = ("embedders", "blocks", "router", "methods", "scaffold")
SETTINGS = UpcycleSettings(
    base="base",
    phases=(
        PhaseSettings(name="blocks", steps=2, plan="fixed", teacher=1.0, diffusion=0.0),
        PhaseSettings(name="handover", steps=3, plan="handover", frozen=("embedders", "blocks")),
        PhaseSettings(name="finetune", frozen=("blocks",), lr=0.5),
    ),
)


def test_the_phase_follows_from_the_step() -> None:
    names = [SETTINGS.phase(step)[0].name for step in (0, 1, 2, 4, 5, 500)]
    assert names == ["blocks", "blocks", "handover", "handover", "finetune", "finetune"]
    assert [SETTINGS.phase(step)[1] for step in (1, 3, 500)] == pytest.approx([1 / 2, 1 / 3, 0.0])
    assert [share for _, share in SETTINGS.shares(10)] == pytest.approx([0.2, 0.3, 0.5])
    assert [share for _, share in SETTINGS.shares(4)] == pytest.approx([0.5, 0.5, 0.0])
    assert sum(phase.steps or 0 for phase in DISTILLED) == 5500


def test_the_handover_moves_samples_from_the_plan_to_the_router() -> None:
    share = [PhaseBatch.draw(SETTINGS, 0, step, 0, 600).on_fixed_plan.float().mean().item() for step in range(6)]
    assert share == pytest.approx([1, 1, 1, 2 / 3, 1 / 3, 0], abs=0.06)  # three standard deviations of 600 draws


def test_samples_on_the_plan_do_not_depend_on_the_division_into_batches() -> None:
    whole = PhaseBatch.draw(SETTINGS, 0, 3, 0, 12).on_fixed_plan
    parts = [PhaseBatch.draw(SETTINGS, 0, 3, first, 4).on_fixed_plan for first in (0, 4, 8)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, PhaseBatch.draw(SETTINGS, 1, 3, 0, 12).on_fixed_plan)


def test_samples_move_back_and_forth_between_plan_and_router_from_step_to_step() -> None:
    """Were the draws those of the step before, a sample that left the plan would never come back."""
    one, other = (PhaseBatch.draw(SETTINGS, 0, step, 0, 200).on_fixed_plan for step in (3, 4))
    assert (other & ~one).any()
    assert torch.equal(one, PhaseBatch.draw(SETTINGS, 0, 3, 0, 200).on_fixed_plan)


def test_losses_have_the_weights_of_their_phase() -> None:
    phase = PhaseSettings(name="a", teacher=0.25, output=0.5, complete=2.0)
    batch: Any = PhaseBatch(phase, torch.ones(1, dtype=torch.bool))
    with pytest.raises(AttributeError):
        batch.phase = None
    assert [batch.weight(name) for name in ("teacher", "output", "complete", "DynamicWidth")] == [0.25, 0.5, 2.0, 1.0]


def test_every_parameter_belongs_to_a_part() -> None:
    student = tokdyn.upcycle(small_base(), ["dc", "dydit"], width_target=0.5)
    parts: dict[str, set[str]] = {}
    for name, _ in student.named_parameters():
        parts.setdefault(part_of(name), set()).add(name.partition(".")[0])
    assert parts["embedders"] == {"t_embedder", "y_embedder"}
    assert parts["blocks"] == {"blocks"}
    assert parts["router"] == {"chunking"}
    assert parts["methods"] == {"tokdyn"}
    assert {"x_embedder", "encoder", "decoder", "final_layer"} <= parts["scaffold"]


def test_only_parts_frozen_in_every_phase_are_frozen_for_the_run() -> None:
    assert always_frozen(SETTINGS) == set()
    frozen = always_frozen(SETTINGS.model_copy(update={"phases": SETTINGS.phases[:2]}))
    assert frozen == {"embedders"}
    student = tokdyn.upcycle(small_base(), "dc")
    freeze(student, ["blocks"])
    learning = {part_of(name) for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert learning == {"embedders", "router", "scaffold"}
    assert not student.pos_embed.requires_grad
    with pytest.raises(RecipeError, match=", ".join(sorted(PARTS))):
        freeze(student, PARTS)


def test_gradients_of_frozen_parts_are_dropped() -> None:
    model = torch.nn.ModuleDict({"blocks": torch.nn.Linear(1, 1), "decoder": torch.nn.Linear(1, 1)})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    drop_frozen_gradients(model, SETTINGS.phases[1])
    assert [parameter.grad is None for parameter in model.parameters()] == [True, True, False, False]


def test_the_warm_up_of_a_method_counts_steps_whatever_it_counted_before() -> None:
    method = AttachedMethod(method="DynamicWidth", target=0.6, warmup=8)
    student = build_student(SETTINGS.model_copy(update={"methods": (method,)}), small_base(), chunked=True)
    ((built, module),) = tokdyn.parts(student)
    module.calls.fill_(30)  # as after ten steps of three micro-batches in an earlier version
    count_steps(student, 4)
    assert float(module.target(built)) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"methods": [{"method": "DynamicWidth", "target": 2}]}, "target"),
        ({"methods": [{"method": "FeatureCache"}]}, "DynamicWidth"),
        ({"after": [{"method": "cache"}, {"method": "cache"}]}, "cache, cache"),
        ({"after": [{"method": "skip"}]}, "flops=0.7"),
        ({"after": [{"method": "merge", "flops": 0.5}]}, "ratio"),
        ({"phases": [{"name": "a", "complete": 1}]}, r"complete .* upcycle\.methods"),
        ({"phases": [{"name": "a", "steps": 1, "complete": 1}, {"name": "b"}]}, r"complete .* upcycle\.methods"),
        ({"phases": [{"name": "a"}, {"name": "b"}]}, "'a' .* steps"),
        ({"phases": [{"name": "a", "steps": 1}, {"name": "b"}, {"name": "c"}]}, "'b' .* steps"),
        ({"phases": [{"name": "a", "steps": 1}, {"name": "b", "steps": 3}]}, "'b' .* steps"),
        ({"phases": [{"name": "a", "steps": 3}]}, "'a' .* steps"),
        ({"phases": [{"name": "a", "diffusion": 0}]}, "'a' .* teacher, output, diffusion or complete"),
        ({"phases": [{"name": "a", "plan": "some"}]}, "'fixed', 'handover' or 'learned'"),
    ],
)
def test_sections_that_do_not_fit_are_rejected(section: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        UpcycleSettings.model_validate({"base": "x", **section})


def test_the_base_is_needed_where_a_phase_compares_with_it() -> None:
    assert SETTINGS.needs_teacher
    assert not SETTINGS.model_copy(update={"phases": SETTINGS.phases[2:]}).needs_teacher
    compared = PhaseSettings(name="a", output=1.0)
    assert SETTINGS.model_copy(update={"phases": (compared,)}).needs_teacher


def test_methods_are_split_into_trained_and_attached_ones() -> None:
    trained, after = split_methods(["dc", "skip=0.7", "merge=0.2", "cache"])
    assert trained == ["dc"]
    assert after == [{"method": "skip", "flops": 0.7}, {"method": "merge", "ratio": 0.2}, {"method": "cache"}]
