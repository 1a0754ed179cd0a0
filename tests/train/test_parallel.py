"""Several devices, or several micro-batches, train the same model as one device with one batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import processes
from tokdyn.errors import RecipeError
from tokdyn.recipe import Recipe
from tokdyn.recipe.build import build_model
from tokdyn.seeds import Stream, seed_everything
from tokdyn.train import train
from tokdyn.train.step import RatioTerm, draw, micro_step

Tiny = Callable[..., Recipe]
WORKER = Path(__file__).parent / "worker.py"


def launch(folder: Path, *settings: str) -> None:
    """Train in two processes."""
    processes.launch(WORKER, str(folder), *settings)


def test_two_processes_equal_one(
    tmp_path: Path,
    tiny: Tiny,
    contents: Callable[[Path], dict[str, Tensor]],
    rows: Callable[[Path], list[dict[str, Any]]],
) -> None:
    """Micro-batch i of one process equals that of process i, so only the order of additions differs (fp32, 1e-5)."""
    settings = ("training.steps=4", "chunking.budget_warmup_steps=1", "chunking.draw=sample", "data.flip=true")
    launch(tmp_path / "two", *settings)
    train(tiny(tmp_path / "one", *settings, "training.accumulation=2"))
    one, two = contents(tmp_path / "one" / "model"), contents(tmp_path / "two" / "model")
    assert one.keys() == two.keys()
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, atol=1e-5, rtol=1e-4, msg=name)
    for left, right in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert left.keys() == right.keys()
        assert list(left.values()) == pytest.approx(list(right.values()), rel=1e-4)


def gradients(model: Any, recipe: Recipe, parts: int, kind: str) -> dict[str, Tensor]:
    seed_everything(3, Stream.MICRO_STEP)
    x, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    tail = torch.linspace(0.0, 0.7, 8) if kind == "dcdit" else 0.0
    draws = draw(recipe.objective, x, labels, null_class=10, label_dropout=0.3, tail_drop=tail)
    # Groups of 2 divide every part, so the pooled loss does not depend on the division.
    chunking = RatioTerm(target=4.0, ratio_weight=0.03, ratio_group=2) if kind == "dcdit" else None
    model.zero_grad(set_to_none=True)
    size = 8 // parts
    for part in range(parts):
        piece = draws.slice(slice(part * size, (part + 1) * size))
        out = micro_step(model, recipe.objective, piece, "fp32", chunking)
        torch.autograd.backward(out.loss / parts)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["dit", "dcdit"])
def test_accumulated_gradients_equal_those_of_the_whole_batch(kind: str, tmp_path: Path, tiny: Tiny) -> None:
    """Up to the order of additions in fp32. Zero weights become random, because the gradients of a new DiT are zero."""
    other = ("model={kind: dit, name: tiny/4, patch_size: 4}",) if kind == "dit" else ()
    recipe = tiny(tmp_path, *other)
    seed_everything(0, Stream.WEIGHTS)
    model = build_model(recipe)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    whole, pieces = gradients(model, recipe, 1, kind), gradients(model, recipe, 4, kind)
    assert whole.keys() == pieces.keys()
    assert len(whole) == sum(p.requires_grad for p in model.parameters())
    for name, expected in whole.items():
        torch.testing.assert_close(pieces[name], expected, atol=2e-6, rtol=1e-4, msg=name)


def test_a_batch_that_does_not_divide_is_rejected(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(RecipeError, match=r"training\.batch_size is 4.*training\.accumulation=3"):
        train(tiny(tmp_path / "run", "training.accumulation=3"))
