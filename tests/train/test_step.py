"""The parts of a step: random draws, averaged weights, AdamW, metrics, previews."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

import tokdyn
from tests.upcycling.models import inputs, small_base
from tokdyn.diffusion.objective import Objective
from tokdyn.errors import RecipeError, TokdynError
from tokdyn.models import DCDiT
from tokdyn.recipe import OptimizerSettings, Recipe, load
from tokdyn.seeds import image_keys
from tokdyn.train import checkpoints, metrics, train
from tokdyn.train.ema import Ema
from tokdyn.train.setup import open_optimizer
from tokdyn.train.step import RatioTerm, draw, micro_step
from tokdyn.upcycling import Distillation
from tokdyn.upcycling.phases import PhaseBatch
from tokdyn.upcycling.settings import PhaseSettings

Tiny = Callable[..., Recipe]


def test_labels_are_dropped_with_the_given_probability() -> None:
    x, labels = torch.zeros(4000, 1, 1, 1), torch.arange(4000) % 10
    keys = image_keys(0, 5, 0, 4000)
    drawn = draw(Objective(), x, labels, null_class=10, label_dropout=0.1, keys=keys)
    share = (drawn.labels == 10).float().mean().item()
    assert share == pytest.approx(0.1, abs=5 * math.sqrt(0.09 / 4000))  # five standard deviations
    kept = drawn.labels != 10
    assert torch.equal(drawn.labels[kept], labels[kept])
    assert torch.equal(draw(Objective(), x, labels, 10, 0.0, keys).labels, labels)


def test_the_average_is_the_weighted_sum() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    ema = Ema(model, decay=0.5, warmup=True)
    expected = model[0].weight.detach().clone()
    for step in range(6):
        with torch.no_grad():
            model[0].weight.copy_(torch.full((2, 2), float(step)))
            model[1].running_mean.fill_(step)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(ema.model[0].weight, expected)
    assert ema.model[1].running_mean.tolist() == [5.0, 5.0]  # buffers are copied
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert model[0].weight.requires_grad


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    """Of a student with a weight of its own for every term; fp32."""
    base = small_base()
    student = tokdyn.upcycle(base, ["dc", "dydit"], width_target=0.5)
    phase = PhaseSettings(name="a", diffusion=0.5, teacher=0.25, output=2.0, complete=3.0)
    weights = {"loss": 0.5, "teacher": 0.25, "output": 2.0, "complete": 3.0, "ratio": 0.125, "DynamicWidth": 1.0}
    x, _, labels = inputs()
    draws = draw(Objective(), x, labels, null_class=5, label_dropout=0.0, keys=image_keys(0, 0, 0, 3))
    result = micro_step(
        Distillation(student, base), Objective(), draws, "fp32", RatioTerm(4.0, 0.125, None),
        PhaseBatch(phase, torch.ones(3, dtype=torch.bool)),
    )  # fmt: skip
    expected = sum(weight * result.metrics[name].item() for name, weight in weights.items())
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)
    assert all(result.metrics[name] > 0 for name in weights if name != "DynamicWidth")


@pytest.mark.parametrize("implementation", ["fused", "foreach", "loop"])
def test_optimizers_are_adamw_without_weight_decay_of_vectors(implementation: str) -> None:
    """Against one step of the formula in fp64; fp32 rounds a step of 0.1 by less than 1e-6."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    settings = OptimizerSettings(lr=0.1, weight_decay=0.5, implementation=implementation)  # type: ignore[arg-type]
    optimizer = open_optimizer(model, settings)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(4, 3)).square().sum().backward()
    gradients = {name: parameter.grad.double() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    optimizer.step()
    for name, parameter in model.named_parameters():
        decayed = before[name].double() * (1 - 0.1 * 0.5) if name == "weight" else before[name].double()
        gradient = gradients[name]
        expected = decayed - 0.1 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach().double(), expected, atol=1e-6, rtol=0)


def test_the_learning_rate_of_a_step_is_the_one_logged(tmp_path: Path, tiny: Tiny) -> None:
    train(tiny(tmp_path / "run", "training.steps=3", "optimizer.warmup_steps=2"))
    rates = [row["lr"] for row in metrics.read(tmp_path / "run" / "metrics.jsonl")]
    assert rates == [5e-4, 1e-3, 1e-3]


def test_rows_of_metrics_count_images_epochs_and_seconds(tmp_path: Path, tiny: Tiny) -> None:
    """Of 64 images in batches of 4; the seconds of a resumed run include those before it was stopped."""
    folder = tmp_path / "run"
    train(tiny(folder, "training.steps=2"))
    train(tiny(folder, "training.steps=4"), resume=True)
    found = metrics.read(folder / "metrics.jsonl")
    assert [row["images"] for row in found] == [4, 8, 12, 16]
    assert [row["epoch"] for row in found] == [1 / 16, 2 / 16, 3 / 16, 4 / 16]
    seconds = [row["seconds"] for row in found]
    assert seconds == sorted(seconds)
    assert all(row["images_per_second"] > 0 for row in found)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path, tiny: Tiny) -> None:
    folder = tmp_path / "run"
    settings = ("training.steps=40", "training.checkpoint_every=1", "training.log_every=40", "optimizer.clip=null")
    with pytest.raises(TokdynError, match=r"step \d+ .*step \d+ .*optimizer\.lr"):
        train(tiny(folder, *settings, "optimizer.lr=1e12", "training.keep_checkpoints=50"))
    newest = checkpoints.newest(folder / "checkpoints")
    assert newest is not None
    weights = load_file(newest.folder / "model" / "diffusion_pytorch_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_a_truncated_line_of_metrics_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        metrics.append(path, {"step": step, "loss": 0.5})
    path.write_text(path.read_text()[:-5])
    assert [row["step"] for row in metrics.read(path)] == [1, 2]
    assert metrics.restore(path, None, 1) is not None
    metrics.append(path, {"step": 2})
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2}\n'


def test_a_preview_gets_the_average_and_does_not_change_the_run(
    tmp_path: Path, tiny: Tiny, assert_same_run: Callable[[Path, Path, int], None]
) -> None:
    calls = []

    def preview(model: nn.Module, recipe: Recipe, folder: Path, step: int) -> None:
        calls.append((step, folder.name, model.training, recipe.training.sample_every))
        torch.rand(7)

    train(tiny(tmp_path / "a", "training.steps=5", "training.sample_every=2"), preview=preview)
    assert calls == [(2, "a", False, 2), (4, "a", False, 2), (5, "a", False, 2)]
    train(tiny(tmp_path / "b", "training.steps=5"))
    assert_same_run(tmp_path / "a", tmp_path / "b", 5)


def test_previews_without_a_function_to_draw_them_are_noted(tmp_path: Path, tiny: Tiny, console: Console) -> None:
    train(tiny(tmp_path / "run", "training.sample_every=1"), console=console)
    assert "training.sample_every" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_terminal_shows_a_live_line(tmp_path: Path, tiny: Tiny) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
    train(tiny(tmp_path / "run", "training.steps=3"), console=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "step 3/3" in shown
    assert "images/s" in shown
    assert "ETA" in shown


@pytest.mark.parametrize("setting", ["data.kind=shapes", "objective={kind: flow, timestep_sampling: logit_normal}"])
def test_saved_models_say_what_they_were_trained_to_predict(setting: str, tmp_path: Path, tiny: Tiny) -> None:
    recipe = tiny(tmp_path / "run", setting)
    train(recipe)
    for folder in ("model", "checkpoints/step_0000002/model", "checkpoints/step_0000002/ema"):
        info = json.loads((tmp_path / "run" / folder / "tokdyn.json").read_text())
        assert Objective(**info["objective"]) == recipe.objective
        assert len(info["class_names"]) == 10
        assert "path" not in info["data"]
        assert DCDiT.from_pretrained(tmp_path / "run" / folder).config.learn_sigma == recipe.objective.learn_sigma
    assert load(tmp_path / "run") == load(tmp_path / "run" / "model" / "recipe.yaml") == recipe


def test_a_tracker_that_is_not_installed_is_rejected(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(RecipeError, match=r"training\.trackers .*no-such-tracker"):
        train(tiny(tmp_path / "run", "training.trackers=[no-such-tracker]"))
    assert not (tmp_path / "run").exists()


def test_a_run_starts_at_its_target_unless_the_official_start_is_asked_for(tmp_path: Path, tiny: Tiny) -> None:
    """1/4 of 4096 cells has a standard deviation of 0.007, and the images are others than those of the calibration. The
    official bias of -1.1 keeps almost nothing."""
    large = ("training.batch_size=64", "training.steps=1")
    train(tiny(tmp_path / "run", *large))
    (row,) = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert row["natural_kept"] == pytest.approx(0.25, abs=0.05)
    train(tiny(tmp_path / "official", *large, "model.official_init=true"))
    (row,) = metrics.read(tmp_path / "official" / "metrics.jsonl")
    assert row["natural_kept"] < 0.1


def test_the_router_is_calibrated_to_the_first_target_of_a_curriculum(tmp_path: Path, tiny: Tiny) -> None:
    """Half of 4096 cells has a standard deviation of 0.008."""
    large = ("training.batch_size=64", "training.steps=1", "chunking.curriculum=[[0,2.0],[100,4.0]]")
    for router in ("spatial_predictability", "cosine"):
        train(tiny(tmp_path / router, *large, f"model.router={router}"))
        (row,) = metrics.read(tmp_path / router / "metrics.jsonl")
        assert row["natural_kept"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch.compile asks for it
@pytest.mark.parametrize("what", ["scaffold", "blocks"])
def test_compiled_parts_train_and_resume(
    what: str, tmp_path: Path, tiny: Tiny, assert_same_run: Callable[[Path, Path, int], None]
) -> None:
    settings = (f"training.compile={what}", "training.precision=bf16", "chunking.budget_warmup_steps=0")
    train(tiny(tmp_path / "whole", *settings, "training.steps=4"))
    train(tiny(tmp_path / "parts", *settings, "training.steps=2"))
    train(tiny(tmp_path / "parts", *settings, "training.steps=4"), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 4)
