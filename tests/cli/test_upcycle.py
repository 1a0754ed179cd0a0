"""`tokdyn upcycle` as a user types it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tokdyn.cli.main import app
from typer.testing import CliRunner

import tokdyn
from tokdyn.errors import CompositionError, RecipeError
from tokdyn.recipe.from_base import upcycling_recipe
from tokdyn.sample import load_model

TINY = ["data.size=16", "data.length=64", "training.batch_size=4", "training.log_every=1", "training.sample_every=null"]
PHASES = "upcycle.phases=[{name: a, steps: 2, plan: fixed, teacher: 1}, {name: b}]"
STEPS = ["training.steps=4", "training.precision=fp32", "chunking.budget_warmup_steps=2"]


def run(*words: str | Path, code: int = 0) -> tuple[str, str]:
    """Run a command in this process and return its stdout and stderr."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT that was trained for two steps."""
    folder = tmp_path_factory.mktemp("cli") / "dit"
    small = ["model.hidden_size=32", "model.depth=3", "model.num_heads=2", "training.steps=2"]
    recipe = folder.parent / "dit.yaml"
    recipe.write_text("model: {kind: dit, name: tiny/4}\ndata: {kind: shapes}\n")
    run("train", recipe, *small, *TINY, "training.precision=fp32", f"out={folder}")
    return folder


def test_one_command_trains_and_attaches_a_stack(base: Path, tmp_path: Path) -> None:
    """A DC-DiT with dynamic width is trained, merging and a calibrated cache are attached, and all of it is sampled."""
    out = tmp_path / "run"
    stack = ["--method", "dc", "--method", "dydit", "--method", "cache", "--method", "merge=0.2"]
    shown, notes = run("upcycle", "--base", base, *stack, *STEPS, *TINY[2:], PHASES, f"out={out}", "--json")
    summary = json.loads(shown)
    resumed, _ = run("upcycle", f"out={out}", "training.steps=5", "--resume", "--json")  # with the recipe of the run
    assert json.loads(resumed)["step"] == 5
    assert summary["step"] == 4
    assert summary["methods"] == str(out / "methods")
    assert "copied" in notes
    assert str(out / "report.html") in notes
    assert "<canvas" in (out / "report.html").read_text()
    for name in ("tokdyn_config.json", "tokdyn.safetensors", "cache/calibration.json", "cache/calibration.png"):
        assert (out / "methods" / name).is_file()
    methods = json.loads((out / "methods" / "tokdyn_config.json").read_text())["methods"]
    assert [method["method"] for method in methods] == ["FeatureCache", "TokenMerge", "DynamicWidth"]
    model, *_ = load_model(out)
    ((_, gates),) = tokdyn.parts(model)
    trained = {name: value.clone() for name, value in gates.state_dict().items()}
    tokdyn.unwrap(model)
    tokdyn.load(model, out / "methods")
    _, _, (_, loaded) = tokdyn.parts(model)
    assert all(bool((loaded.state_dict()[name] == value).all()) for name, value in trained.items())
    sampled = ["steps=50", "count=2", "device=cpu", f"methods={out / 'methods'}", f"out={tmp_path / 'images'}"]
    run("sample", out, *sampled)
    assert json.loads((tmp_path / "images" / "sample.json").read_text())["budgets"][0]["tflops_per_image"] > 0


def test_a_dry_run_trains_nothing(base: Path, tmp_path: Path) -> None:
    shown, _ = run("upcycle", "--base", base, *STEPS, PHASES, f"out={tmp_path / 'run'}", "--dry-run", "--json")
    assert json.loads(shown)["upcycled"]["copied"]["parameters"] > 0
    assert not (tmp_path / "run").exists()


def test_a_missing_base_is_reported_before_missing_data() -> None:
    _, error = run("upcycle", "--base", "runs/no/where", "--method", "dc", code=2)
    assert "runs/no/where" in error
    assert "data.path" not in error


def test_methods_choose_the_recipe() -> None:
    path = ["data.path=x"]
    assert upcycling_recipe("b", None, path, ["dydit"]).model.kind == "dit"
    both = upcycling_recipe("b", None, path, ["dydit", "dc", "cache"])
    assert both.model.kind == "dcdit"
    assert [each.method for each in both.upcycle.methods] == ["DynamicWidth"]
    assert [each.method for each in both.upcycle.after] == ["cache"]
    assert upcycling_recipe("b", None, path).name == "upcycle/dc"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--method", "dcc"], r"--method dcc .*dc or dydit"),
        (["--method", "dc", "--method", "dc"], "--method dc, dc"),
        (["--method", "skip=much"], "skip=much.*skip=0.7"),
        (["--method", "skip"], "skip .*flops=0.7"),
        (["--recipe", "demo"], "'demo' .*upcycle"),
        (["--recipe", "shapes/upcycle", "--method", "dc"], "'shapes/upcycle' .*--method dc"),
        (["--base", "nowhere", "data.kind=shapes", "data.num_classes=10"], "nowhere"),
        (["word"], "'word'"),
    ],
)
def test_mistakes_end_in_one_sentence(words: list[str], named: str) -> None:
    _, error = run("upcycle", *words, code=2)
    assert re.search(named, error)
    assert error.count("\n") == 1


def test_methods_that_cannot_be_combined_leave_the_trained_ones_attached(base: Path) -> None:
    from tokdyn.calibration.after_training import rewrap

    model, *_ = load_model(base)
    tokdyn.wrap(model, [tokdyn.DynamicWidth(target=0.5)])
    before = {name: value.clone() for name, value in model.tokdyn.state_dict().items()}
    with pytest.raises((CompositionError, RecipeError)):
        rewrap(model, [tokdyn.DynamicWidth(target=0.7)])
    assert [type(method).__name__ for method, _ in tokdyn.parts(model)] == ["DynamicWidth"]
    assert all(bool((value == before[name]).all()) for name, value in model.tokdyn.state_dict().items())
