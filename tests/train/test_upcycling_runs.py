"""Upcycling runs: phases, frozen parts, resuming bit for bit, several processes, and recipes that are rejected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tokdyn
from tokdyn.checkpoints import read
from tokdyn.errors import CheckpointError, InputError, RecipeError
from tokdyn.recipe import Recipe, resolve
from tokdyn.recipe.build import open_base
from tokdyn.recipe.from_base import facts_of, upcycling_recipe
from tokdyn.sample import SampleConfig, load_model, sample
from tokdyn.train import dry_run, schedule, train
from tokdyn.upcycling.phases import part_of

SMALL = {
    "data": {"kind": "shapes", "size": 16, "length": 64},
    "optimizer": {"lr": 1e-3},
    "training": {"batch_size": 4, "precision": "fp32", "log_every": 1, "checkpoint_every": 3, "keep_checkpoints": 9},
}
PHASES = [
    {"name": "blocks only", "steps": 2, "plan": "fixed", "teacher": 1.0, "diffusion": 0.0},
    {
        "name": "handover",
        "steps": 3,
        "plan": "handover",
        "teacher": 0.5,
        "output": 0.5,
        "frozen": ["embedders", "blocks"],
    },
    {"name": "finetune", "frozen": [], "lr": 0.5},
]
PARTS = ["embedders", "blocks", "router", "methods", "scaffold"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT that was trained for two steps."""
    folder = tmp_path_factory.mktemp("base") / "dit"
    model = {"kind": "dit", "name": "tiny/4", "hidden_size": 32, "depth": 2, "num_heads": 2}
    settings = {**SMALL, "model": model, "training": {**SMALL["training"], "steps": 2}, "out": str(folder)}
    assert train(resolve(settings)).finished
    return folder


def recipe(base: Path, out: Path, **changes: Any) -> Recipe:
    """Build a recipe of eight steps through three phases, with changes to its sections."""
    training = {**SMALL["training"], "steps": 8, **changes.pop("training", {})}
    upcycle = {"base": str(base), "phases": PHASES, **changes.pop("upcycle", {})}
    chunking = changes.pop("chunking", {"budget_warmup_steps": 4, "draw": "sample"})
    model = {"kind": "dcdit", "name": "base", **changes.pop("model", {})}
    sections = {**SMALL, "model": model, "training": training, "upcycle": upcycle, "chunking": chunking}
    return resolve({**sections, "out": str(out), **changes})


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upcycled") / "run"
    assert train(recipe(base, folder)).finished
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_phase_has_its_losses_and_its_learning_rate(whole: Path) -> None:
    rows = rows_of(whole)
    losses = [set(row) & {"teacher", "output"} for row in rows]
    assert losses == [{"teacher"}] * 2 + [{"teacher", "output"}] * 3 + [set()] * 3
    assert [row["lr"] for row in rows] == [1e-3] * 5 + [5e-4] * 3
    assert [row["kept"] for row in rows[:2]] == [0.25, 0.25]  # one cell of each patch
    assert all(row["tail_drop"] == 0 for row in rows[:4])


def test_the_learning_rate_of_a_run_has_the_factor_of_the_phase(base: Path, tmp_path: Path) -> None:
    made = recipe(base, tmp_path)
    assert schedule.run_learning_rate(made, 6, 8) == 0.5 * schedule.run_learning_rate(made, 0, 8)


@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_run_equals_one_that_never_stopped(
    base: Path, whole: Path, tmp_path: Path, step: int, assert_same_run: Callable[..., None]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "model")
    for later in (folder / "checkpoints").glob("step_*"):
        if int(later.name.removeprefix("step_")) > step:
            shutil.rmtree(later)
    moved = tmp_path / "elsewhere"
    shutil.copytree(base, moved)  # the base may lie elsewhere as long as its weights are the same
    assert train(recipe(moved, folder), resume=True).finished
    assert_same_run(whole, folder, 8)


def test_a_run_is_not_resumed_with_another_base(base: Path, whole: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(whole, folder)
    shutil.copytree(base, other)
    model = read(other)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.add_(1.0)
    model.save_pretrained(other / "model")
    shutil.rmtree(folder / "checkpoints" / "step_0000008")
    with pytest.raises(CheckpointError, match=rf"upcycle\.base {other / 'model'}"):
        train(recipe(other / "model", folder), resume=True)


def test_frozen_parts_do_not_move(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(recipe(base, folder, training={"checkpoint_every": 1, "keep_checkpoints": 9}))
    states = [read(folder / "checkpoints" / f"step_{step:07d}" / "model").state_dict() for step in range(1, 9)]
    first = read(base).state_dict()

    def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
        names = [name for name in after if name in before and before[name].shape == after[name].shape]
        return {part_of(name) for name in names if not torch.equal(before[name], after[name])}

    assert "embedders" not in moved(first, states[4])  # frozen in the first two phases
    assert moved(states[0], states[1]) == {"blocks", "scaffold", "router"}
    assert moved(states[1], states[4]) == {"scaffold", "router"}
    assert moved(states[5], states[7]) == {"embedders", "blocks", "scaffold", "router"}
    decoder = [name for name in states[0] if name.startswith(("decoder.", "final_layer."))]
    assert all(torch.equal(states[0][name], states[1][name]) for name in decoder)  # no loss of the first phase uses it


def test_report_and_base_are_saved_beside_the_weights(base: Path, whole: Path) -> None:
    report = json.loads((whole / "upcycle.json").read_text())
    assert report["base"] == str(base)
    assert report["frozen"]["names"] == []  # the last phase trains everything
    facts = json.loads((whole / "model" / "tokdyn.json").read_text())
    assert facts["upcycled"] == {"base": str(base), "sha256": report["sha256"]}
    model, objective, _ = load_model(whole)
    assert objective.kind == "noise"
    assert model.config.position_scale == 0.5


@pytest.mark.parametrize("kind", ["dit", "dcdit"])
def test_methods_train_with_the_student_and_are_saved_beside_it(
    base: Path, tmp_path: Path, kind: str, assert_same_run: Callable[..., None]
) -> None:
    """With DyDiT's losses, on a DiT and inside a DC-DiT; the run resumes bit for bit and can be sampled."""
    phases = [
        {"name": "with the base", "steps": 2, "plan": "fixed", "teacher": 1.0, "complete": 1.0},
        {"name": "gates", "frozen": ["blocks", "embedders", "scaffold", "router"], "lr": 100.0},
    ]
    methods = [{"method": "DynamicWidth", "target": 0.5, "warmup": 2}]
    changes = {"model": {"kind": kind}, "upcycle": {"phases": phases, "methods": methods}}
    changes |= {"chunking": None} if kind == "dit" else {}
    made = recipe(base, tmp_path / "run", **changes)
    train(made)
    rows = rows_of(tmp_path / "run")
    losses = [{"teacher", "complete", "DynamicWidth"} & set(row) for row in rows]
    assert losses == [{"teacher", "complete", "DynamicWidth"}] * 2 + [{"DynamicWidth"}] * 6
    assert [row["lr"] for row in rows] == [1e-3] * 2 + [pytest.approx(0.1)] * 6
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "run", resumed)
    shutil.rmtree(resumed / "model")
    for step in (6, 8):
        shutil.rmtree(resumed / "checkpoints" / f"step_{step:07d}")
    assert train(made.model_copy(update={"out": str(resumed)}), resume=True).finished
    assert_same_run(tmp_path / "run", resumed, 8)
    model, *_ = load_model(tmp_path / "run")
    assert [type(method).__name__ for method, _ in tokdyn.parts(model)] == ["DynamicWidth"]
    assert not hasattr(read(tmp_path / "run" / "model"), "tokdyn")
    assert list((tmp_path / "run" / "model" / "methods").glob("*.safetensors"))
    settings = SampleConfig(model=str(resumed), out=tmp_path / "out", count=2, steps=2, device="cpu")
    assert sample(settings).budgets[0].tflops_per_image > 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": {"name": "tiny"}}, r"model\.name=base .* upcycle\.base"),
        ({"model": {"kind": "dit"}, "chunking": None}, r"'dit' .* upcycle\.methods"),
        ({"upcycle": {"phases": [{"name": "a", "plan": "some"}]}}, r"upcycle\.phases\.0\.plan"),
    ],
)
def test_sections_that_do_not_fit_are_rejected(base: Path, tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        recipe(base, tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"data": {**SMALL["data"], "size": 32}}, RecipeError, r"sample_size=16.* 32.* data\.size"),
        ({"objective": {"kind": "flow"}}, RecipeError, r"objective\.kind=noise.* flow"),
        ({"model": {"depth": 3}}, InputError, "depth .* 2"),
        ({"model": {"position_scale": 0.3}}, InputError, "position_scale"),
        ({"training": {"steps": 5}}, RecipeError, "'finetune' .* 5 steps"),
        ({"upcycle": {"phases": [{"name": "a", "frozen": PARTS}]}}, RecipeError, r"upcycle\.phases"),
        ({"upcycle": {"base": "nowhere"}}, CheckpointError, "nowhere"),
    ],
)
def test_bases_that_do_not_fit_are_rejected(
    base: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        train(recipe(base, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("ema", "part"), [(True, "ema"), (False, "model")])
def test_the_averaged_weights_of_a_base_are_taken_unless_refused(
    base: Path, tmp_path: Path, ema: bool, part: str
) -> None:
    checkpoint = base / "checkpoints" / "step_0000002"
    made = recipe(checkpoint, tmp_path, upcycle={"ema": ema})
    opened, expected = open_base(made, (3, 16, 16), 10).state_dict(), read(checkpoint / part).state_dict()
    assert all(torch.equal(value, opened[name]) for name, value in expected.items())
    other = read(checkpoint / ("model" if ema else "ema")).state_dict()
    assert not all(torch.equal(value, opened[name]) for name, value in other.items())


def test_a_dc_dit_is_no_base(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="DCDiT"):
        train(recipe(whole, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_flow_is_upcycled_too(tmp_path: Path) -> None:
    model = {"kind": "dit", "name": "tiny/4", "hidden_size": 32, "depth": 1, "num_heads": 2}
    training = {**SMALL["training"], "steps": 2}
    base = {**SMALL, "model": model, "training": training, "objective": {"kind": "flow"}, "out": str(tmp_path / "flow")}
    train(resolve(base))
    words = ["training.steps=7", "training.batch_size=4", "training.precision=fp32", f"out={tmp_path / 'run'}"]
    words.append(f"upcycle.phases={json.dumps(PHASES)}")
    made = upcycling_recipe(str(tmp_path / "flow"), "shapes/upcycle", words)
    assert made.objective.kind == "flow"
    assert train(made).finished
    assert load_model(tmp_path / "run")[1].kind == "flow"


def test_a_dry_run_reports_what_is_copied(base: Path, tmp_path: Path) -> None:
    estimate = dry_run(recipe(base, tmp_path / "run"))
    assert estimate.upcycled is not None
    assert estimate.upcycled.flops_before > 0
    assert estimate.trainable < estimate.parameters
    assert estimate.seconds_per_step
    assert "copied" in dict(estimate.lines())
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_the_base_and_the_complete_prediction(base: Path, tmp_path: Path) -> None:
    """The base computes in 5 of 8 steps, the student without its methods in the other 3, forward and backward."""
    width = {"methods": [{"method": "DynamicWidth", "target": 0.6}]}
    alone = dry_run(recipe(base, tmp_path / "run", upcycle={"phases": [{"name": "finetune"}]}), time_steps=False)
    phases = [*PHASES[:2], {**PHASES[2], "complete": 1.0}]
    estimate = dry_run(recipe(base, tmp_path / "run", upcycle={"phases": phases, **width}), time_steps=False)
    assert estimate.upcycled is not None
    added = 5 / 8 * estimate.upcycled.flops_before + 3 / 8 * 3 * estimate.flops_forward
    assert estimate.flops_training == pytest.approx(alone.flops_training + added)
    assert estimate.upcycled.width == 0.6
    assert "60%" in str(estimate.upcycled)
    assert alone.upcycled is not None
    assert alone.upcycled.width is None


def test_the_warm_up_of_a_method_counts_steps(base: Path, tmp_path: Path) -> None:
    """Also with two calls per step: the target has fallen half way after four of eight steps."""
    width = {"methods": [{"method": "DynamicWidth", "target": 0.6, "warmup": 8}], "phases": [{"name": "finetune"}]}
    made = recipe(base, tmp_path / "run", upcycle=width, training={"steps": 4, "accumulation": 2})
    assert train(made).finished
    model, *_ = load_model(tmp_path / "run")
    ((method, module),) = tokdyn.parts(model)
    assert module.calls == 4
    assert float(module.target(method)) == pytest.approx(0.8)


def test_a_share_that_skipping_cannot_reach_is_rejected_before_training(base: Path, tmp_path: Path) -> None:
    upcycle = {"after": [{"method": "skip", "flops": 0.05}], "phases": [{"name": "finetune"}]}
    with pytest.raises(RecipeError, match=r"upcycle\.after: skip .* flops=0\.05"):
        train(recipe(base, tmp_path / "run", upcycle=upcycle))
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_length_has_phases_in_proportion(base: Path) -> None:
    made = upcycling_recipe(str(base), None, ["training.steps=2000"], ["dc", "dydit"])
    assert made.upcycle is not None
    assert made.chunking is not None
    assert [phase.steps for phase in made.upcycle.phases] == [200, 20, None]  # of 5,000 and 500 in 50,000
    assert made.chunking.budget_warmup_steps == 220
    assert made.upcycle.methods[0].build().warmup == 420
    shorter = upcycling_recipe(str(base), None, ["training.images=25600"])  # 100 steps of 256
    assert shorter.upcycle is not None
    assert shorter.upcycle.phases[0].steps == 10
    smaller = upcycling_recipe(str(base), None, ["training.images=25600", "training.batch_size=128"])
    assert smaller.upcycle is not None
    assert smaller.upcycle.phases[0].steps == 20


def test_settings_are_not_scaled(base: Path) -> None:
    words = ["training.steps=2000", "upcycle.phases=[{name: a, steps: 7}, {name: b}]", "chunking.budget_warmup_steps=9"]
    made = upcycling_recipe(str(base), None, words)
    assert made.upcycle is not None
    assert made.chunking is not None
    assert made.upcycle.phases[0].steps == 7
    assert made.chunking.budget_warmup_steps == 9


def test_data_and_objective_come_from_the_base(base: Path, tmp_path: Path) -> None:
    made = upcycling_recipe(str(base), "shapes/upcycle", ["training.steps=5"])
    assert (made.data.size, made.data.length) == (16, 64)
    assert made.objective.kind == "noise"
    assert made.training.steps == 5
    assert upcycling_recipe(str(base), settings=["data.size=8", "data.kind=shapes"]).data.size == 8
    assert facts_of("nowhere") == {}
    own = tmp_path / "mine.yaml"
    own.write_text(
        f"model: {{name: base}}\nupcycle: {{base: {base}}}\ndata: {{kind: shapes, size: 16, length: 999}}\n"
        "training: {steps: 9000}\n"
    )
    assert upcycling_recipe(None, str(own)).data.length == 999  # a file of the user's wins over the base


def test_recipes_and_methods_that_do_not_fit_are_rejected(base: Path) -> None:
    with pytest.raises(RecipeError, match=r"'demo' .* upcycle"):
        upcycling_recipe(None, "demo")
    with pytest.raises(RecipeError, match=r"upcycle\.after and --method cache"):
        upcycling_recipe(str(base), None, ["upcycle.after=[]"], ["cache"])
    with pytest.raises(RecipeError, match=r"'shapes/upcycle' .* --method dc"):
        upcycling_recipe(str(base), "shapes/upcycle", [], ["dc"])
