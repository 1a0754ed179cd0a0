"""Upcycling runs: phases, what is frozen, resuming bit for bit, several processes, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import processes
from tokdyn.checkpoints import read
from tokdyn.errors import CheckpointError, RecipeError
from tokdyn.recipe import Recipe, dump, resolve
from tokdyn.recipe.from_base import facts_of, upcycling
from tokdyn.sample import load_model
from tokdyn.train import dry_run, schedule, train
from tokdyn.upcycling.phases import Guidance, hold, part_of
from tokdyn.upcycling.settings import DISTILLED, UpcycleSettings

WORKER = Path(__file__).parent / "worker.py"
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


ALL = ["embedders", "blocks", "router", "methods", "scaffold"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT that was trained for two steps."""
    folder = tmp_path_factory.mktemp("base") / "dit"
    model = {"kind": "dit", "name": "tiny/4", "hidden_size": 32, "depth": 2, "num_heads": 2}
    settings = {**SMALL, "model": model, "training": {**SMALL["training"], "steps": 2}, "out": str(folder)}
    assert train(resolve(settings)).finished
    return folder


def recipe(base: Path, out: Path, **changes: Any) -> Recipe:
    training = {**SMALL["training"], "steps": 8, **changes.pop("training", {})}
    upcycle = {"base": str(base), "phases": PHASES, **changes.pop("upcycle", {})}
    chunking = changes.pop("chunking", {"budget_warmup_steps": 4, "draw": "sample"})
    model = {"kind": "dcdit", "name": "base", **changes.pop("model", {})}
    whole = {**SMALL, "model": model, "training": training, "upcycle": upcycle, "chunking": chunking}
    return resolve({**whole, "out": str(out), **changes})


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upcycled") / "run"
    assert train(recipe(base, folder)).finished
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_phase_has_its_losses_and_its_learning_rate(whole: Path) -> None:
    rows = rows_of(whole)
    assert [set(row) & {"teacher", "output"} for row in rows] == [{"teacher"}] * 2 + [{"teacher", "output"}] * 3 + [
        set()
    ] * 3
    assert [row["lr"] for row in rows] == [1e-3] * 5 + [5e-4] * 3
    assert [row["kept"] for row in rows[:2]] == [0.25, 0.25]  # one cell of each patch
    assert all(row["tail_drop"] == 0 for row in rows[:4])


@pytest.mark.parametrize("step", [3, 6])
def test_resuming_equals_never_stopping(
    base: Path, whole: Path, tmp_path: Path, step: int, assert_same_run: Callable[..., None]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "model")
    for later in (folder / "checkpoints").glob("step_*"):
        if int(later.name.removeprefix("step_")) > step:
            shutil.rmtree(later)
    moved = tmp_path / "elsewhere"
    shutil.copytree(base, moved)  # the base may lie in another place, but not be another
    assert train(recipe(moved, folder), resume=True).finished
    assert_same_run(whole, folder, 8)


def test_another_base_is_refused(base: Path, whole: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(whole, folder)
    shutil.copytree(base, other)
    model = read(other)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.add_(1.0)
    model.save_pretrained(other / "model")
    shutil.rmtree(folder / "checkpoints" / "step_0000008")
    with pytest.raises(CheckpointError, match="began with other weights than"):
        train(recipe(other / "model", folder), resume=True)


def test_what_a_phase_leaves_alone_does_not_move(base: Path, tmp_path: Path) -> None:
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    keep = {"checkpoint_every": 1, "keep_checkpoints": 9}
    train(recipe(base, ended, training=keep))
    states = [read(ended / "checkpoints" / f"step_{step:07d}" / "model").state_dict() for step in range(1, 9)]
    first = read(base).state_dict()

    def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
        names = [name for name in after if name in before and before[name].shape == after[name].shape]
        return {part_of(name) for name in names if not torch.equal(before[name], after[name])}

    assert "embedders" not in moved(first, states[4])  # frozen in both phases
    assert moved(states[0], states[1]) == {"blocks", "scaffold", "router"}
    assert moved(states[1], states[4]) == {"scaffold", "router"}
    assert moved(states[5], states[7]) == {"embedders", "blocks", "scaffold", "router"}
    decoder = [name for name in states[0] if name.startswith(("decoder.", "final_layer."))]
    assert all(
        torch.equal(states[0][name], states[1][name]) for name in decoder
    )  # no loss reaches it in the first phase
    assert not begun.exists()


def test_the_report_and_the_base_stand_beside_the_weights(base: Path, whole: Path) -> None:
    said = json.loads((whole / "upcycle.json").read_text())
    assert said["base"] == str(base)
    assert said["frozen"]["names"] == []  # the last phase trains everything
    facts = json.loads((whole / "model" / "tokdyn.json").read_text())
    assert facts["upcycled"] == {"base": str(base), "sha256": said["sha256"]}
    model, objective, _ = load_model(whole)
    assert objective.kind == "noise"
    assert model.config.position_scale == 0.5


def test_two_processes_equal_one(
    base: Path, tmp_path: Path, contents: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    """Parts without gradients differ from phase to phase; only the order of additions differs (fp32)."""
    one, two = tmp_path / "one", tmp_path / "two"
    made = recipe(base, one, training={"accumulation": 2}, upcycle={"phases": PHASES})
    train(made)
    (tmp_path / "recipe.yaml").write_text(dump(made))
    processes.launch(WORKER, str(two), f"recipe={tmp_path / 'recipe.yaml'}", "training.accumulation=1")
    expected, found = contents(one / "model"), contents(two / "model")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind", ["dit", "dcdit"])
def test_methods_train_with_the_model_and_are_saved_beside_it(
    base: Path, tmp_path: Path, kind: str, assert_same_run: Callable[..., None]
) -> None:
    """DyDiT's losses on a DiT, and inside a DC-DiT; a resumed run is the same, and what was saved samples alike."""
    phases = [
        {"name": "beside the base", "steps": 2, "plan": "fixed", "teacher": 1.0, "complete": 1.0},
        {"name": "gates", "frozen": ["blocks", "embedders", "scaffold", "router"], "lr": 100.0},
    ]
    methods = [{"method": "DynamicWidth", "target": 0.5, "warmup": 2}]
    changes = {"model": {"kind": kind}, "upcycle": {"phases": phases, "methods": methods}}
    changes |= {"chunking": None} if kind == "dit" else {}
    made = recipe(base, tmp_path / "run", **changes)
    train(made)
    rows = rows_of(tmp_path / "run")
    extra = [{"teacher", "complete", "DynamicWidth"} & set(row) for row in rows]
    assert extra == [{"teacher", "complete", "DynamicWidth"}] * 2 + [{"DynamicWidth"}] * 6
    assert [row["lr"] for row in rows] == [1e-3] * 2 + [pytest.approx(0.1)] * 6
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    shutil.rmtree(again / "model")
    for step in (6, 8):
        shutil.rmtree(again / "checkpoints" / f"step_{step:07d}")
    assert train(made.model_copy(update={"out": str(again)}), resume=True).finished
    assert_same_run(tmp_path / "run", again, 8)
    model, *_ = load_model(tmp_path / "run")
    assert [type(each).__name__ for each in model.tokdyn.methods] == ["DynamicWidth"]
    bare = read(tmp_path / "run" / "model")
    assert not hasattr(bare, "tokdyn")
    assert any("methods" in str(path) for path in (tmp_path / "run" / "model").rglob("*.safetensors"))
    from tokdyn.sample import SampleConfig, sample

    budget = sample(SampleConfig(model=str(again), out=tmp_path / "out", count=2, steps=2, device="cpu")).budgets[0]
    assert budget.tflops_per_image > 0


def test_phases_are_functions_of_the_step() -> None:
    settings = UpcycleSettings(base="x", phases=PHASES)
    assert [settings.phase(step)[0].name for step in (0, 1, 2, 4, 5, 500)] == [
        "blocks only", "blocks only", "handover", "handover", "finetune", "finetune",
    ]  # fmt: skip
    assert settings.phase(3)[1] == pytest.approx(1 / 3)
    share = [Guidance.at(settings, 0, step, 0, 600).planned.float().mean().item() for step in range(6)]
    assert share == pytest.approx([1, 1, 1, 2 / 3, 1 / 3, 0], abs=0.06)  # 3 sigma of 600 draws
    once, again = (Guidance.at(settings, 0, 3, 4, 8).planned for _ in range(2))
    assert torch.equal(once, again)
    assert torch.equal(Guidance.at(settings, 0, 3, 0, 12).planned[4:], once)  # wherever the batch is cut
    assert sum(phase.steps or 0 for phase in DISTILLED) == 5500


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"name": "tiny"}}, "model.name=base takes the sizes of the model that upcycle.base names"),
        ({"model": {"kind": "dit"}, "chunking": None}, "a 'dit' from a base is that base"),
        ({"upcycle": {"methods": [{"method": "DynamicWidth", "target": 2}]}}, "DynamicWidth: target"),
        ({"upcycle": {"methods": [{"method": "FeatureCache"}]}}, "method"),
        ({"upcycle": {"after": [{"method": "cache"}, {"method": "cache"}]}}, "listed twice"),
        ({"upcycle": {"phases": [{"name": "a", "complete": 1}]}}, "complete compares the model without its methods"),
        ({"upcycle": {"phases": [{"name": "a"}, {"name": "b"}]}}, "'a' has no steps"),
        ({"upcycle": {"phases": [{"name": "a", "steps": 3}]}}, "'a' is the last one; leave its steps out"),
        ({"upcycle": {"phases": [{"name": "a", "diffusion": 0}]}}, "'a' has no loss"),
        ({"upcycle": {"phases": [{"name": "a", "plan": "some"}]}}, "plan"),
    ],
)
def test_recipes_that_do_not_fit(base: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(base, tmp_path, **changes)
    assert words in str(caught.value)


def test_a_flow_is_upcycled_too(tmp_path: Path) -> None:
    model = {"kind": "dit", "name": "tiny/4", "hidden_size": 32, "depth": 1, "num_heads": 2}
    training = {**SMALL["training"], "steps": 2}
    base = {**SMALL, "model": model, "training": training, "objective": {"kind": "flow"}, "out": str(tmp_path / "flow")}
    train(resolve(base))
    words = ["training.steps=7", "training.batch_size=4", "training.precision=fp32", f"out={tmp_path / 'run'}"]
    made = upcycling(str(tmp_path / "flow"), "shapes/upcycle", [*words, f"upcycle.phases={json.dumps(PHASES)}"])
    assert made.objective.kind == "flow"
    assert train(made).finished
    assert load_model(tmp_path / "run")[1].kind == "flow"


def test_bases_that_do_not_fit(base: Path, whole: Path, tmp_path: Path) -> None:
    for settings, words in (
        (recipe(base, tmp_path / "a", data={**SMALL["data"], "size": 32}), "has sample_size=16, and the recipe 32"),
        (recipe(base, tmp_path / "a", objective={"kind": "flow"}), "objective.kind=noise, and the recipe has flow"),
        (recipe(base, tmp_path / "a", model={"depth": 3}), "depth follows from the base"),
        (recipe(whole, tmp_path / "a"), "is no DiT but a DCDiT"),
        (recipe(tmp_path / "nowhere", tmp_path / "a"), "nowhere"),
        (recipe(base, tmp_path / "a", training={"steps": 5}), "'finetune' take 5 steps and the run has 5"),
        (recipe(base, tmp_path / "a", model={"position_scale": 0.3}), "position_scale follows from"),
        (recipe(base, tmp_path / "a", upcycle={"phases": [{"name": "a", "frozen": ALL}]}), "nothing learns"),
    ):
        with pytest.raises((RecipeError, CheckpointError, ValueError), match=words):
            train(settings)
        assert not (tmp_path / "a").exists()


def test_a_dry_run_says_what_is_copied(base: Path, tmp_path: Path) -> None:
    plan = dry_run(recipe(base, tmp_path / "run"))
    assert plan.upcycled is not None
    assert plan.upcycled.flops_before > 0
    assert plan.trainable < plan.parameters
    assert plan.seconds_per_step
    assert "copied" in dict(plan.lines())
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_the_base_and_the_complete_pass(base: Path, tmp_path: Path) -> None:
    """The base computes in 5 of 8 steps, the whole model once more in the other 3."""
    width = {"methods": [{"method": "DynamicWidth", "target": 0.6}]}
    alone = dry_run(recipe(base, tmp_path / "run", upcycle={"phases": [{"name": "finetune"}]}), time_steps=False)
    phases = [*PHASES[:2], {**PHASES[2], "complete": 1.0}]
    plan = dry_run(recipe(base, tmp_path / "run", upcycle={"phases": phases, **width}), time_steps=False)
    assert plan.upcycled is not None
    added = 5 / 8 * plan.upcycled.flops_before + 3 / 8 * 3 * plan.flops_forward
    assert plan.flops_training == pytest.approx(alone.flops_training + added)
    assert plan.upcycled.width == 0.6
    assert "trained to 60% of its blocks'" in str(plan.upcycled)
    assert alone.upcycled is not None
    assert alone.upcycled.width is None


def test_the_warm_up_of_a_method_counts_steps(base: Path, tmp_path: Path) -> None:
    """Two calls to a step: after four of eight steps the target is half way down."""
    width = {"methods": [{"method": "DynamicWidth", "target": 0.6, "warmup": 8}], "phases": [{"name": "finetune"}]}
    whole = recipe(base, tmp_path / "run", upcycle=width, training={"steps": 4, "accumulation": 2})
    assert train(whole).finished
    model, *_ = load_model(tmp_path / "run")
    (method,), module = model.tokdyn.methods, model.tokdyn.parts["0"]
    assert module.calls == 8
    assert float(module.target(method)) == pytest.approx(0.8)


def test_a_share_that_skipping_cannot_reach_is_said_before_training(base: Path, tmp_path: Path) -> None:
    asked = {"after": [{"method": "skip", "flops": 0.05}], "phases": [{"name": "finetune"}]}
    with pytest.raises(RecipeError, match=r"skip cannot come down to 0.05 .* outside of the blocks"):
        train(recipe(base, tmp_path / "run", upcycle=asked))
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_length_has_phases_in_proportion(base: Path, tmp_path: Path) -> None:
    made = upcycling(str(base), None, ["training.steps=2000"], ["dc", "dydit"])
    assert made.upcycle is not None
    assert made.chunking is not None
    assert [phase.steps for phase in made.upcycle.phases] == [200, 20, None]  # of 5,000 and 500 in 50,000
    assert made.chunking.budget_warmup_steps == 220
    assert made.upcycle.methods[0].build().warmup == 420
    assert upcycling(str(base), None, ["training.images=25600"]).upcycle.phases[0].steps == 10  # 100 steps of 256
    listed = upcycling(str(base), None, ["training.steps=2000", "upcycle.phases=[{name: a, steps: 7}, {name: b}]"])
    assert listed.upcycle.phases[0].steps == 7
    own = tmp_path / "mine.yaml"
    own.write_text(
        f"model: {{name: base}}\nupcycle: {{base: {base}}}\ndata: {{kind: shapes, size: 16, length: 999}}\n"
        "training: {steps: 9000}\n"
    )
    assert upcycling(None, str(own)).data.length == 999  # a user's file says what it means
    with pytest.raises(RecipeError, match="both say what is attached"):
        upcycling(str(base), None, ["upcycle.after=[]"], ["cache"])


def test_the_recipe_takes_data_and_objective_from_the_base(base: Path) -> None:
    made = upcycling(str(base), "shapes/upcycle", ["training.steps=5"])
    assert (made.data.size, made.data.length) == (16, 64)
    assert made.objective.kind == "noise"
    assert made.training.steps == 5
    assert upcycling(str(base), settings=["data.size=8", "data.kind=shapes"]).data.size == 8
    assert facts_of("nowhere") == {}
    with pytest.raises(RecipeError, match="'demo' has no section upcycle"):
        upcycling(None, "demo")


def test_gradients_are_dropped_and_rates_multiplied(base: Path, tmp_path: Path) -> None:
    made = recipe(base, tmp_path)
    assert made.upcycle is not None
    assert schedule.run_learning_rate(made, 6, 8) == 0.5 * schedule.run_learning_rate(made, 0, 8)
    model = torch.nn.ModuleDict({"blocks": torch.nn.Linear(1, 1), "decoder": torch.nn.Linear(1, 1)})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    hold(model, made.upcycle.phases[1])
    assert [parameter.grad is None for parameter in model.parameters()] == [True, True, False, False]
