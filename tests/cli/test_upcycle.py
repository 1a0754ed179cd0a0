"""`tokdyn upcycle` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokdyn.cli.main import app
from typer.testing import CliRunner

import tokdyn
from tokdyn.errors import CompositionError, RecipeError
from tokdyn.recipe.from_base import split_methods, upcycling
from tokdyn.sample import load_model

TINY = ["data.size=16", "data.length=64", "training.batch_size=4", "training.log_every=1", "training.sample_every=null"]
PHASES = "upcycle.phases=[{name: a, steps: 2, plan: fixed, teacher: 1}, {name: b}]"
STEPS = ["training.steps=4", "training.precision=fp32", "chunking.budget_warmup_steps=2"]


def run(*words: str | Path, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "dit"
    model = ["model.kind=dit", "model.name=tiny/4", "model.patch_size=4", "model.target=null"][:2]
    small = ["model.hidden_size=32", "model.depth=3", "model.num_heads=2", "chunking=null", "training.steps=2"]
    recipe = folder.parent / "dit.yaml"
    recipe.write_text("model: {kind: dit, name: tiny/4}\ndata: {kind: shapes}\n")
    run("train", recipe, *model, *small, *TINY, "training.precision=fp32", f"out={folder}")
    return folder


def test_a_stack_is_one_command(base: Path, tmp_path: Path) -> None:
    """DC-DiT with dynamic width inside and a calibrated cache outside, trained, attached and sampled with."""
    out = tmp_path / "run"
    stack = ["--method", "dc", "--method", "dydit", "--method", "cache", "--method", "merge=0.2"]
    told, notes = run("upcycle", "--base", base, *stack, *STEPS, *TINY[2:], PHASES, f"out={out}", "--json")
    done = json.loads(told)
    again, _ = run("upcycle", f"out={out}", "training.steps=5", "--resume", "--json")  # as it was begun
    assert json.loads(again)["step"] == 5
    assert done["step"] == 4
    assert done["methods"] == str(out / "methods")
    assert "copied" in notes
    for name in ("tokdyn_config.json", "tokdyn.safetensors", "cache/calibration.json", "cache/calibration.png"):
        assert (out / "methods" / name).is_file()
    methods = json.loads((out / "methods" / "tokdyn_config.json").read_text())["methods"]
    assert [each["method"] for each in methods] == ["FeatureCache", "TokenMerge", "DynamicWidth"]
    model, *_ = load_model(out)
    trained = {name: value.clone() for name, value in model.tokdyn.parts["0"].state_dict().items()}
    tokdyn.unwrap(model)
    tokdyn.load(model, out / "methods")
    assert all(bool((model.tokdyn.parts["2"].state_dict()[name] == value).all()) for name, value in trained.items())
    sampled = ["steps=50", "count=2", "device=cpu", f"methods={out / 'methods'}", f"out={tmp_path / 'images'}"]
    run("sample", out, *sampled)
    assert json.loads((tmp_path / "images" / "sample.json").read_text())["budgets"][0]["tflops_per_image"] > 0


def test_a_dry_run_trains_nothing(base: Path, tmp_path: Path) -> None:
    told, _ = run("upcycle", "--base", base, *STEPS, PHASES, f"out={tmp_path / 'run'}", "--dry-run", "--json")
    plan = json.loads(told)
    assert plan["upcycled"]["copied"]["parameters"] > 0
    assert not (tmp_path / "run").exists()


def test_a_base_that_is_none_is_said_first() -> None:
    """Before the data that the recipe of latents lacks."""
    _, said = run("upcycle", "--base", "runs/no/where", "--method", "dc", code=2)
    assert "there is no base 'runs/no/where'" in said
    assert "data.path" not in said


def test_methods_choose_the_recipe() -> None:
    assert split_methods(["dc", "skip=0.7", "merge"]) == (
        ["dc"],
        [{"method": "skip", "flops": 0.7}, {"method": "merge"}],
    )
    path = ["data.path=x"]
    assert upcycling("b", None, path, ["dydit"]).model.kind == "dit"
    both = upcycling("b", None, path, ["dydit", "dc", "cache"])
    assert both.model.kind == "dcdit"
    assert [each.method for each in both.upcycle.methods] == ["DynamicWidth"]
    assert [each.method for each in both.upcycle.after] == ["cache"]
    assert upcycling("b", None, path).name == "upcycle/dc"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "dcc"], "--method dcc is unknown; known are dc and dydit"),
        (["--method", "dc", "--method", "dc"], "name each method once"),
        (["--method", "skip=much"], "'much' is no number"),
        (["--method", "skip"], "skip needs a share of the FLOPs"),
        (["--recipe", "demo"], "'demo' has no section upcycle"),
        (["--recipe", "shapes/upcycle", "--method", "dc"], "leave --method dc out"),
        (["--base", "nowhere", "data.kind=shapes", "data.num_classes=10"], "nowhere"),
        (["word"], "'word' is one word too many"),
    ],
)
def test_mistakes_end_in_one_sentence(words: list[str], message: str) -> None:
    _, told = run("upcycle", *words, code=2)
    assert message in told
    assert told.count("\n") == 1


def test_methods_that_do_not_go_together_leave_the_trained_ones(base: Path) -> None:
    from tokdyn.calibration.afterwards import rewrap

    model, *_ = load_model(base)
    tokdyn.wrap(model, [tokdyn.DynamicWidth(target=0.5)])
    before = {name: value.clone() for name, value in model.tokdyn.state_dict().items()}
    with pytest.raises((CompositionError, RecipeError)):
        rewrap(model, [tokdyn.DynamicWidth(target=0.7)])
    assert [type(each).__name__ for each in model.tokdyn.methods] == ["DynamicWidth"]
    assert all(bool((value == before[name]).all()) for name, value in model.tokdyn.state_dict().items())
