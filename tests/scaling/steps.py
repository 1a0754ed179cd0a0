"""Small recipes, and real steps of them, beside which what is worked out is held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tokdyn.ops.dispatch import plain
from tokdyn.recipe import Recipe, resolve
from tokdyn.recipe.build import build_model, stated_shape, total_steps
from tokdyn.scaling import Work
from tokdyn.seeds import image_keys
from tokdyn.train.step import RatioTerm, draw, micro_step
from tokdyn.train.work import work_of

KEPT = 0.25


def recipe(kind: str, **training: Any) -> Recipe:
    """A recipe of a DiT or DC-DiT of a few blocks, on 256 tokens."""
    model = {
        "kind": kind,
        "name": {"dit": "tiny/1", "dcdit": "tiny"}[kind],
        "hidden_size": 96,
        "depth": 4,
        "num_heads": 4,
    }
    chunked: dict[str, Any] = {"chunking": {"tail_drops": [0.0]}} if kind == "dcdit" else {}
    return resolve(
        {
            "model": model,
            "data": {"kind": "shapes", "size": 16, "length": 64},
            "training": {"batch_size": 4, "steps": 2, "precision": "fp32", **training},
            "out": "unused",
            **chunked,
        }
    )


def work(of: Recipe, gpus: int = 1) -> Work:
    """What a step of a recipe takes."""
    return work_of(of, gpus, stated_shape(of.data), None, total_steps(of))


def step(of: Recipe) -> tuple[Any, Callable[[], None]]:
    """The model of a recipe, whose router keeps a quarter, and a function that runs forward and backward passes."""
    torch.manual_seed(0)
    shape, count = stated_shape(of.data), of.training.batch_size
    model = build_model(of).train()
    x, labels = torch.randn(count, *shape), torch.zeros(count, dtype=torch.int64)
    draws = draw(of.objective, x, labels, model.config.num_classes, 0.1, image_keys(0, 0, 0, count))
    chunking = None
    if of.chunking is not None:
        chunking = RatioTerm(of.model.target, of.chunking.ratio_weight, of.chunking.ratio_group)
        model.calibrate_router(draws.noised.x_t, draws.noised.timestep, draws.labels, 1 / KEPT)
    if of.training.gradient_checkpointing:
        model.enable_gradient_checkpointing()

    def run() -> None:
        with plain():  # what runs on a GPU
            torch.autograd.backward(micro_step(model, of.objective, draws, of.training.precision, chunking).loss)

    return model, run
