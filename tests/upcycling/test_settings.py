"""Sections of an upcycling run: their defaults, the values they take, and methods on the command line."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from tokdyn.errors import RecipeError
from tokdyn.methods import DynamicWidth
from tokdyn.upcycling import DistilSettings
from tokdyn.upcycling.pipeline_settings import PipelineConfig
from tokdyn.upcycling.settings import (
    DISTILLED,
    AfterSettings,
    AttachedMethod,
    PhaseSettings,
    UpcycleSettings,
    split_methods,
)

NEEDED: dict[type[BaseModel], dict[str, Any]] = {
    PhaseSettings: {"name": "a"},
    AfterSettings: {"method": "merge"},
    UpcycleSettings: {"base": "x"},
    DistilSettings: {},
    PipelineConfig: {"base": "x"},
}


@pytest.mark.parametrize(
    ("kind", "defaults"),
    [
        (
            PhaseSettings,
            {
                "steps": None,
                "plan": "learned",
                "teacher": 0.0,
                "output": 0.0,
                "diffusion": 1.0,
                "complete": 0.0,
                "frozen": ("embedders",),
                "lr": 1.0,
            },
        ),
        (AfterSettings, {"flops": None, "ratio": 0.3, "steps": 50, "guidance": 1.0, "count": 8}),
        (UpcycleSettings, {"ema": True, "methods": (), "after": (), "phases": DISTILLED}),
        (
            DistilSettings,
            {
                "steps": 1000,
                "calls": 1,
                "lr": 1e-3,
                "warmup_steps": 0,
                "clip": 1.0,
                "trained": "methods",
                "rank": None,
                "tail_drops": None,
                "gradient_checkpointing": False,
                "seed": 0,
                "checkpoint_every": 100,
            },
        ),
    ],
)
def test_a_recipe_that_leaves_a_setting_out_means_its_default(kind, defaults) -> None:
    found = kind(**NEEDED[kind])
    assert {name: getattr(found, name) for name in type(found).model_fields if name not in NEEDED[kind]} == defaults


def test_the_usual_phases_distil_hand_over_and_finetune() -> None:
    rows = [(p.name, p.steps, p.plan, p.teacher, p.output, p.diffusion, p.frozen, p.lr) for p in DISTILLED]
    assert rows == [
        ("distill", 5000, "fixed", 1.0, 0.0, 1.0, ("embedders",), 1.0),
        ("handover", 500, "handover", 1.0, 0.0, 1.0, ("embedders",), 1.0),
        ("finetune", None, "learned", 0.0, 0.0, 1.0, ("embedders",), 1.0),
    ]


LIMITS: list[tuple[type[BaseModel], str, list[Any], list[Any]]] = [
    (PhaseSettings, "name", ["a"], [""]),
    (PhaseSettings, "steps", [None, 1], [0]),
    (PhaseSettings, "plan", ["fixed", "handover", "learned"], ["free"]),
    *[(PhaseSettings, name, [0.0, 2.0], [-0.1]) for name in ("teacher", "output", "complete")],
    (PhaseSettings, "diffusion", [0.1], [-0.1, 0.0]),  # without any other loss
    (PhaseSettings, "frozen", [(), ("embedders", "blocks", "router", "methods", "scaffold")], [("head",)]),
    (PhaseSettings, "lr", [0.01, 1.0], [0.0]),
    (AfterSettings, "ratio", [0.01, 0.99], [0.0, 1.0]),
    (AfterSettings, "steps", [1], [0]),
    (AfterSettings, "guidance", [1.0, 4.0], [0.9]),
    (AfterSettings, "count", [1], [0]),
    (UpcycleSettings, "base", ["x"], [""]),
    (UpcycleSettings, "phases", [(PhaseSettings(name="a"),)], [()]),
    (DistilSettings, "steps", [1], [0]),
    (DistilSettings, "calls", [1], [0]),
    (DistilSettings, "warmup_steps", [0], [-1]),
    (DistilSettings, "trained", ["methods", "all"], ["blocks"]),
    (DistilSettings, "checkpoint_every", [1], [0]),
    (PipelineConfig, "target", [1.01, 4.0], [1.0, 0.5]),
    (PipelineConfig, "sampling_steps", [None, 1], [0]),
    (PipelineConfig, "guidance", [None, 0.0], [-0.1]),
    (PipelineConfig, "steps", [1], [0]),
    (PipelineConfig, "calls", [1], [0]),
    (PipelineConfig, "lr", [1e-6, 0.5], [0.0, -0.1]),
    (PipelineConfig, "warmup_steps", [0], [-1]),
    (PipelineConfig, "trained", ["methods", "all"], ["blocks"]),
    (PipelineConfig, "seed", [0, 2**62 - 1], [-1, 2**62]),
    (PipelineConfig, "checkpoint_every", [1], [0]),
    (PipelineConfig, "precision", ["fp32", "bf16"], ["fp16"]),
    (PipelineConfig, "speed", [], [3]),
]


@pytest.mark.parametrize(("kind", "name", "good", "bad"), LIMITS)
def test_settings_take_the_values_of_their_range_and_no_others(kind, name, good, bad) -> None:
    for value in good:
        assert getattr(kind(**{**NEEDED[kind], name: value}), name) == value
    for value in bad:
        with pytest.raises(ValidationError, match=name):
            kind(**{**NEEDED[kind], name: value})


def test_any_loss_is_enough_for_a_phase() -> None:
    for name in ("teacher", "output", "complete"):
        assert PhaseSettings(name="a", diffusion=0.0, **{name: 0.5}).diffusion == 0.0


@pytest.mark.parametrize("method", ["cache", "FeatureCache", "skip", "depth-skip"])
def test_methods_that_are_calibrated_aim_at_a_share_of_the_flops(method: str) -> None:
    assert AfterSettings(method=method, flops=0.5).flops == 0.5
    for flops in (0.0, 1.0):
        with pytest.raises(ValidationError, match="flops"):
            AfterSettings(method=method, flops=flops)
    if method in ("cache", "FeatureCache"):
        assert AfterSettings(method=method).method == "cache"
    else:
        with pytest.raises(ValidationError, match=r"flops=0\.7"):
            AfterSettings(method=method)


def test_attached_methods_are_built_from_their_settings_by_any_name() -> None:
    for name in ("DynamicWidth", "dydit", "dynamic_width"):
        attached = AttachedMethod(method=name, target=0.4, embedding=8)
        assert attached.build() == DynamicWidth(target=0.4, embedding=8)
    with pytest.raises(ValidationError, match="colour"):
        AttachedMethod(method="dydit", colour=1)


def test_a_method_may_be_attached_once() -> None:
    twice = ({"method": "dydit"}, {"method": "DynamicWidth", "target": 0.5})
    with pytest.raises(ValidationError, match="DynamicWidth, DynamicWidth"):
        UpcycleSettings(base="x", methods=twice)
    both = UpcycleSettings(base="x", after=({"method": "cache"}, {"method": "merge"}))
    assert [each.method for each in both.after] == ["cache", "merge"]


def test_a_phase_may_train_the_complete_model_where_there_are_methods() -> None:
    settings = UpcycleSettings(
        base="x", methods=({"method": "dydit"},), phases=(PhaseSettings(name="a", complete=1.0, diffusion=0.0),)
    )
    assert settings.phases[0].complete == 1.0
    assert not settings.needs_teacher


@pytest.mark.parametrize(
    ("methods", "named"),
    [
        (["dc=4"], "dc=4"),
        (["token"], "token"),
        (["skip=half"], r"skip=half.*'half'.*skip=0\.7"),
        (["dc", "Chunking"], "dc, Chunking"),
        (["skip=0.3", "skip=0.4"], r"skip=0\.3, skip=0\.4"),
    ],
)
def test_methods_that_cannot_be_read_are_named(methods: list[str], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        split_methods(methods)


def test_methods_keep_their_order_and_their_numbers() -> None:
    assert split_methods([]) == ([], [])
    trained, after = split_methods(["cache=0.4", "dydit", "tome=0.25", "dc"])
    assert trained == ["dydit", "dc"]
    assert after == [{"method": "cache", "flops": 0.4}, {"method": "merge", "ratio": 0.25}]


def test_sections_cannot_be_changed() -> None:
    settings: Any
    for settings in (AttachedMethod(method="dydit", target=0.4), PipelineConfig(base="x")):
        name = next(iter(type(settings).model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(settings, name, getattr(settings, name))
