"""The parts of a step: what is drawn, the average of the weights, AdamW's state, metrics."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from tokdyn.diffusion.objective import Objective
from tokdyn.errors import RecipeError, TokdynError
from tokdyn.recipe import OptimizerSettings, Recipe
from tokdyn.train import metrics, state, train
from tokdyn.train.ema import Ema
from tokdyn.train.setup import open_optimizer
from tokdyn.train.step import draw

Tiny = Callable[..., Recipe]


def test_labels_are_dropped_as_often_as_asked() -> None:
    torch.manual_seed(0)
    x, labels = torch.zeros(4000, 1, 1, 1), torch.arange(4000) % 10
    drawn = draw(Objective(), x, labels, null_class=10, label_dropout=0.1)
    share = (drawn.labels == 10).float().mean().item()
    assert share == pytest.approx(0.1, abs=5 * math.sqrt(0.09 / 4000))  # five standard deviations
    kept = drawn.labels != 10
    assert torch.equal(drawn.labels[kept], labels[kept])
    assert torch.equal(draw(Objective(), x, labels, 10, 0.0).labels, labels)


def test_ema_is_the_weighted_sum() -> None:
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


@pytest.mark.parametrize("implementation", ["fused", "foreach", "loop"])
def test_optimizers_are_adamw_without_decay_of_vectors(implementation: str) -> None:
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


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path: Path, tiny: Tiny) -> None:
    folder = tmp_path / "run"
    settings = ("training.steps=40", "training.checkpoint_every=1", "training.log_every=40", "optimizer.clip=null")
    with pytest.raises(TokdynError, match=r"not finite since step \d+ .*the checkpoint of step \d+ is kept.*Lower"):
        train(tiny(folder, *settings, "optimizer.lr=1e30", "training.keep_checkpoints=50"))
    found = state.newest(folder / "checkpoints")
    assert found is not None
    from safetensors.torch import load_file

    weights = load_file(found.folder / "model" / "diffusion_pytorch_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_metrics_survive_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        metrics.append(path, {"step": step, "loss": 0.5})
    path.write_text(path.read_text()[:-5])
    assert [row["step"] for row in metrics.read(path)] == [1, 2]
    metrics.truncate(path, 1)
    metrics.append(path, {"step": 2})
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2}\n'


def test_a_preview_is_drawn_from_the_average_and_changes_nothing(
    tmp_path: Path, tiny: Tiny, assert_same_run: Callable[[Path, Path, int], None]
) -> None:
    seen = []

    def preview(model: nn.Module, recipe: Recipe, folder: Path, step: int) -> None:
        seen.append((step, folder.name, model.training, recipe.training.sample_every))
        torch.rand(7)

    train(tiny(tmp_path / "a", "training.steps=5", "training.sample_every=2"), preview=preview)
    assert seen == [(2, "a", False, 2), (4, "a", False, 2), (5, "a", False, 2)]
    train(tiny(tmp_path / "b", "training.steps=5"))
    assert_same_run(tmp_path / "a", tmp_path / "b", 5)


def test_a_preview_that_nobody_draws_is_told(tmp_path: Path, tiny: Tiny, console: Console) -> None:
    train(tiny(tmp_path / "run", "training.sample_every=1"), console=console)
    assert "No previews will be drawn" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_live_line_on_a_terminal(tmp_path: Path, tiny: Tiny) -> None:
    import io

    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
    train(tiny(tmp_path / "run", "training.steps=3"), console=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "step 3/3" in shown
    assert "images/s" in shown
    assert "ETA" in shown


@pytest.mark.parametrize("what", ["data.kind=shapes", "objective={kind: flow, timestep_sampling: logit_normal}"])
def test_what_is_saved_says_how_to_sample(what: str, tmp_path: Path, tiny: Tiny) -> None:
    import json

    from tokdyn.models import DCDiT
    from tokdyn.recipe import load

    recipe = tiny(tmp_path / "run", what)
    train(recipe)
    for folder in ("model", "checkpoints/step_0000002/model", "checkpoints/step_0000002/ema"):
        info = json.loads((tmp_path / "run" / folder / "tokdyn.json").read_text())
        assert Objective(**info["objective"]) == recipe.objective
        assert len(info["class_names"]) == 10
        assert "path" not in info["data"]
        assert DCDiT.from_pretrained(tmp_path / "run" / folder).config.learn_sigma == recipe.objective.learn_sigma
    assert load(tmp_path / "run") == load(tmp_path / "run" / "model" / "recipe.yaml") == recipe


def test_a_tracker_that_is_missing_is_named(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(RecipeError, match="names no-such-tracker, which is not installed here"):
        train(tiny(tmp_path / "run", "training.trackers=[no-such-tracker]"))
    assert not (tmp_path / "run").exists()


def test_training_starts_at_the_target_unless_the_official_start_is_asked_for(tmp_path: Path, tiny: Tiny) -> None:
    """1/4 of 4096 cells of fresh noise: a standard deviation of 0.007, and the router sees other images than it was
    calibrated on. The official bias of -1.1 keeps almost nothing."""
    large = ("training.batch_size=64", "training.steps=1")
    train(tiny(tmp_path / "run", *large))
    (row,) = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert row["natural_kept"] == pytest.approx(0.25, abs=0.05)
    train(tiny(tmp_path / "official", *large, "model.official_init=true"))
    (row,) = metrics.read(tmp_path / "official" / "metrics.jsonl")
    assert row["natural_kept"] < 0.1


def test_a_curriculum_starts_calibrated_to_its_first_target(tmp_path: Path, tiny: Tiny) -> None:
    """Half of 4096 cells: a standard deviation of 0.008."""
    large = ("training.batch_size=64", "training.steps=1", "chunking.curriculum=[[0,2.0],[100,4.0]]")
    for router in ("spatial_predictability", "cosine"):
        train(tiny(tmp_path / router, *large, f"model.router={router}"))
        (row,) = metrics.read(tmp_path / router / "metrics.jsonl")
        assert row["natural_kept"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["scaffold", "blocks"])
def test_compiled_parts_train_and_resume(
    what: str, tmp_path: Path, tiny: Tiny, assert_same_run: Callable[[Path, Path, int], None]
) -> None:
    settings = (f"training.compile={what}", "training.precision=bf16", "chunking.budget_warmup_steps=0")
    train(tiny(tmp_path / "whole", *settings, "training.steps=4"))
    train(tiny(tmp_path / "parts", *settings, "training.steps=2"))
    train(tiny(tmp_path / "parts", *settings, "training.steps=4"), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 4)
