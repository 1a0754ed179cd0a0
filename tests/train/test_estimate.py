"""The dry run says what training does, and writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tokdyn.cost import flops_per_image
from tokdyn.errors import DataError, RecipeError
from tokdyn.recipe import Recipe, load
from tokdyn.recipe.build import build_model, planned_steps
from tokdyn.train import dry_run

Tiny = Callable[..., Recipe]


def test_a_plan_counts_what_is_built(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tiny(tmp_path / "run", "training.steps=null", "training.images=9", "chunking.tail_drops=[0, 0.5]")
    plan = dry_run(recipe)
    model = build_model(recipe)
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert plan.trainable == plan.parameters - model.pos_embed.numel()
    assert (plan.tokens, plan.kept) == (64, 12)
    assert plan.flops_forward == flops_per_image(model)
    assert plan.flops_training == pytest.approx(1.5 * (flops_per_image(model) + flops_per_image(model, 0.125)))
    assert (plan.steps, plan.images, plan.samples) == (3, 12, 64)
    assert plan.seconds is not None
    assert plan.seconds > 0
    assert plan.memory_activations is not None
    assert plan.memory_activations > 0
    assert {"parameters", "forward", "time"} <= {name for name, _ in plan.lines()}
    assert list(tmp_path.iterdir()) == []


def test_a_plan_without_data_uses_the_stated_shape() -> None:
    plan = dry_run(load("imagenet/dc-dit-s-256"), time_steps=False)
    assert plan.parameters == 34_760_000 + plan.parameters % 10_000  # 34.76 M, as published
    assert plan.samples is None
    assert plan.seconds is None
    assert "data.path is not set" in plan.note
    assert "memory, activations" not in dict(plan.lines())


def test_a_plan_checks_the_data(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        dry_run(load("cifar10/dit-flops", [f"data.path={tmp_path / 'missing.zip'}"]))
    with pytest.raises(RecipeError, match=r"data\.size"):
        dry_run(load("cifar10/dit-flops", ["data.size=null"]))


@pytest.mark.parametrize(("name", "published"), [("s", 421_230), ("b", 408_071), ("l", 486_372), ("xl", 494_943)])
def test_compute_matched_lengths_are_the_published_ones(name: str, published: int) -> None:
    """arXiv 2603.06351 v2 matched FLOPs that it measured; ours assume that exactly 1/4 is kept: within 2.5%."""
    assert planned_steps(load(f"imagenet/dc-dit-{name}-256")) == pytest.approx(published, rel=0.025)


def test_a_warm_up_beyond_the_baseline_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"compute_match: .* warm-up"):
        planned_steps(load("imagenet/dc-dit-s-256", ["chunking.budget_warmup_steps=400000"]))
