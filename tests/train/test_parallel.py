"""The division of a batch over processes and micro-batches changes a run by rounding only, also if it is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import processes
from tokdyn.data import BatchStream, ShapesDataset
from tokdyn.division import computing
from tokdyn.errors import RecipeError
from tokdyn.methods import WidthGates
from tokdyn.recipe import Recipe, resolve
from tokdyn.train import schedule, train
from tokdyn.train.batches import Division
from tokdyn.train.setup import open_accelerator, set_up
from tokdyn.train.step import RatioTerm, micro_step

Tiny = Callable[..., Recipe]
WORKER = Path(__file__).parent / "division_worker.py"

# A large eps keeps AdamW from turning the rounding of gradients near zero into steps of full length.
COMMON = {
    "data": {"kind": "shapes", "size": 16, "length": 20, "flip": True},
    "optimizer": {"lr": 1e-2, "eps": 1e-2},
    "training": {"batch_size": 8, "precision": "fp32", "log_every": 1, "ema": 0.5, "keep_checkpoints": 9},
}
DIT = {"kind": "dit", "name": "tiny/4", "hidden_size": 32, "depth": 2, "num_heads": 2}
DC = {"kind": "dcdit", "name": "tiny", "patch_size": 2, "hidden_size": 32, "depth": 1, "num_heads": 2}
FLOW = {"kind": "flow", "timestep_sampling": "logit_normal"}
PHASES = [
    {"name": "blocks", "steps": 1, "plan": "fixed", "teacher": 1.0},
    {"name": "handover", "steps": 2, "plan": "handover", "teacher": 0.5, "output": 0.5, "frozen": ["embedders"]},
    {"name": "finetune", "output": 0.5, "frozen": []},
]
WIDTH = {
    "methods": [{"method": "DynamicWidth", "target": 0.5, "warmup": 5}],
    "phases": [{**phase, "complete": 1.0} for phase in PHASES],
}
BUDGETS = {"budget_warmup_steps": 1, "draw": "sample", "ratio_weight": 0.5}
FAMILIES: dict[str, dict[str, Any]] = {
    "DiT": {"model": DIT},
    "DiT, flow": {"model": DIT, "objective": FLOW},
    "DC-DiT": {"model": DC, "chunking": {**BUDGETS, "ratio_group": 6}},  # the groups end where no part ends
    "DC-DiT, flow, one group": {"model": DC, "chunking": {**BUDGETS, "ratio_group": None}, "objective": FLOW},
    "random router": {"model": {**DC, "router": "random"}, "chunking": {"budget_warmup_steps": 0, "ratio_group": 2}},
    "upcycled": {"model": {"kind": "dcdit", "name": "base"}, "chunking": BUDGETS, "upcycle": {"phases": PHASES}},
    "upcycled, width": {"model": {"kind": "dcdit", "name": "base"}, "chunking": BUDGETS, "upcycle": WIDTH},
    "width": {"model": {"kind": "dit", "name": "base"}, "upcycle": WIDTH},
}
Family = Callable[..., Recipe]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A function that returns the recipe of a family, with a folder and settings of its training."""
    base = tmp_path_factory.mktemp("base") / "dit"
    train(resolve({**COMMON, "model": DIT, "out": str(base), "training": {**COMMON["training"], "steps": 1}}))

    def make(name: str, out: Path, **training: Any) -> Recipe:
        sections = {**COMMON, **FAMILIES[name], "training": {**COMMON["training"], **training}, "out": str(out)}
        if "upcycle" in sections:
            sections["upcycle"] = {"base": str(base), **sections["upcycle"]}
        return resolve(sections)

    return make


def randomize(model: nn.Module) -> None:
    """Change all weights, so that nothing is zero and every gate is drawn open and shut."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for gates in (module for module in model.modules() if isinstance(module, WidthGates)):
            layers = [gates.heads, gates.channels, *(each[-1] for each in gates.tokens or [])]  # type: ignore[index]
            for layer in layers:
                if layer is not None:
                    layer.bias.fill_(1.0)


def one_step(recipe: Recipe, step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the gradients and the metrics of a step, as the training loop computes them."""
    run = set_up(recipe, open_accelerator(recipe))
    randomize(run.trainee.model)
    parts = recipe.training.accumulation
    chunking = None
    if recipe.chunking is not None:
        target = schedule.target(recipe.chunking, recipe.model.target, step)
        chunking = RatioTerm(target, recipe.chunking.ratio_weight, recipe.chunking.ratio_group)
    batches = iter(run.stream.loader(step * parts, (step + 1) * parts))
    metrics: dict[str, float] = {}
    for batch in Division(run).micro_batches(step, batches, chunking):
        with computing(batch.part):
            out = micro_step(run.wrapped, recipe.objective, batch.draws, "fp32", chunking, batch.phase_batch)
            torch.autograd.backward(out.loss / parts)
        for name, value in out.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value.item() / parts
    return {name: p.grad for name, p in run.trainee.model.named_parameters() if p.grad is not None}, metrics


@pytest.mark.parametrize("name", FAMILIES)
def test_accumulated_gradients_and_losses_are_those_of_the_whole_batch(
    name: str, family: Family, tmp_path: Path
) -> None:
    """To 1e-6 in fp32, in a step of the handover of upcycled models."""
    gradients, metrics = one_step(family(name, tmp_path, steps=9), 2)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert all(gradient.any() for gradient in gradients.values()) or "upcycled" in name
    for parts in (2, 4):
        pieces, found = one_step(family(name, tmp_path, steps=9, accumulation=parts), 2)
        assert found == pytest.approx(metrics, rel=1e-6, abs=1e-9)
        assert pieces.keys() == gradients.keys()
        difference = torch.stack([(pieces[key] - gradient).norm() for key, gradient in gradients.items()]).norm()
        assert difference <= 1e-6 * norm


@pytest.mark.parametrize(
    "names", [("DC-DiT", "upcycled, width"), pytest.param(tuple(FAMILIES), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_two_processes_equal_one_before_and_after_resumes_that_change_the_division(
    names: tuple[str, ...],
    family: Family,
    tmp_path: Path,
    contents: Callable[[Path], dict[str, Tensor]],
    rows: Callable[[Path], list[dict[str, Any]]],
) -> None:
    """Two processes, then two with two micro-batches each, then one with four, against one that is never divided."""
    runs = []
    for name in names:
        for steps, accumulation in ((4, 1), (5, 2)):
            recipe = family(name, tmp_path / "parts" / name, steps=steps, accumulation=accumulation)
            runs.append((recipe.model_dump(mode="json"), steps == 5))
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    processes.launch(WORKER, str(tmp_path / "runs.json"), timeout=300)
    for name in names:
        whole, parts = tmp_path / "whole" / name, tmp_path / "parts" / name
        train(family(name, parts, steps=6, accumulation=4), resume=True)
        train(family(name, whole, steps=6))
        expected, found = rows(whole), rows(parts)
        assert [row["step"] for row in found] == list(range(1, 7))
        for left, right in zip(expected, found, strict=True):
            assert right == pytest.approx(left, rel=2e-6, abs=1e-7), name
        weights = contents(parts / "model")
        for key, value in contents(whole / "model").items():
            torch.testing.assert_close(weights[key], value, atol=1e-6, rtol=1e-5, msg=f"{name}: {key}")


@given(
    st.integers(1, 30), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 40), st.integers(0, 9)
)
def test_parts_of_a_batch_are_disjoint_and_complete(
    samples: int, world: int, accumulation: int, count: int, step: int, seed: int
) -> None:
    """Every image of a step's batch is at one place of one micro-batch, the same one for any division."""
    data, batch = ShapesDataset((16, 16), length=samples), world * accumulation * count
    whole = BatchStream(data, batch, seed, flip=True)
    found = {}
    for rank in range(world):
        stream = BatchStream(data, count, seed, rank, world, flip=True)
        for micro in range(accumulation):
            first = (micro * world + rank) * count
            index, flips = stream.indices(step * accumulation + micro), stream.flips(step * accumulation + micro)
            assert flips is not None
            found |= {first + place: (int(index[place]), bool(flips[place])) for place in range(count)}
    flips = whole.flips(step)
    assert flips is not None
    assert [found[place] for place in range(batch)] == list(
        zip(whole.indices(step).tolist(), flips.tolist(), strict=True)
    )


def test_a_batch_that_does_not_divide_is_rejected(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(RecipeError, match=r"training\.batch_size is 4.*training\.accumulation=3"):
        train(tiny(tmp_path / "run", "training.accumulation=3"))
