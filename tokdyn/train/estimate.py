"""Estimate the size, the cost and the duration of a training run, for `tokdyn train --dry-run`; writes no files."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokdyn.cost import flops_per_image
from tokdyn.data import open_data
from tokdyn.host import free_memory, settle_memory
from tokdyn.models import DiT
from tokdyn.progress import duration
from tokdyn.recipe import Recipe
from tokdyn.recipe.build import Shape, build_model, open_base, stated_shape, total_steps
from tokdyn.scaling.plan import Plan, worked_out
from tokdyn.scaling.settings import ScalingSettings
from tokdyn.seeds import image_keys
from tokdyn.train.setup import compile_parts, micro_batch_size, open_optimizer
from tokdyn.train.step import RatioTerm, draw, micro_step
from tokdyn.train.work import kept_shares, require_scratch, work_of
from tokdyn.upcycling.comparison import UpcycleReport, report
from tokdyn.upcycling.distillation import Distillation
from tokdyn.upcycling.phases import PhaseBatch, always_frozen, freeze

_FLOAT = 4  # bytes; weights, gradients, AdamW's moments and the average are fp32
_TIMED = 2  # number of timed steps, after one that warms up
_STEP_FLOPS = {"cpu": 1e12}  # largest number of FLOPs of a timed step, by type of device
_STEP_FLOPS_ELSEWHERE = 5e13


@dataclass(frozen=True)
class Estimate:
    """The size, the cost and the duration of a run. A multiply-add is 2 FLOPs.

    Attributes:
        parameters: Number of parameters, the frozen position table included.
        trainable: Number of parameters that are learned.
        tokens: Tokens per image.
        kept: Tokens per image that the transformer blocks compute, mean over the tail drops that training draws.
        flops_forward: FLOPs of one forward pass on one image without tail drop.
        flops_training: Mean FLOPs of training on one image: three forward passes, averaged over the tail drops; for an
            upcycled model also the passes of its teacher and of the student with its methods disabled, in the phases
            that run them.
        steps: Optimizer steps of the run.
        images: Images of all steps together.
        samples: Images in the data set; None if the data were not opened.
        memory_fixed: Bytes for weights, gradients, AdamW's moments and the averaged weights.
        memory_activations: Bytes kept for the backward pass of one micro-batch on one device; None if not timed.
        seconds_per_step: Seconds per step, scaled up from smaller batches timed on this machine; None if not timed.
        timed_images: Images in the timed batch.
        device: The device that steps were timed on.
        note: What is missing from the estimate, and why; empty if nothing is.
        upcycled: What an upcycled model copies from its base; None for other models.
        scaling: What each of many GPUs holds and sends; None if it was not asked for.
    """

    parameters: int
    trainable: int
    tokens: int
    kept: float
    flops_forward: float
    flops_training: float
    steps: int
    images: int
    samples: int | None
    memory_fixed: int
    memory_activations: int | None
    seconds_per_step: float | None
    timed_images: int
    device: str
    note: str
    upcycled: UpcycleReport | None = None
    scaling: Plan | None = None

    @property
    def seconds(self) -> float | None:
        """Estimated seconds of the whole run on this machine; None if not timed."""
        return None if self.seconds_per_step is None else self.seconds_per_step * self.steps

    @property
    def _mean_over(self) -> str:
        """What the training FLOPs are averaged over, in words."""
        return "the tail drops" if self.upcycled is None else "the tail drops and phases, the base included"

    def lines(self) -> list[tuple[str, str]]:
        """Return the estimate as pairs of a name and a text: the value with its unit."""
        epochs = f", {self.images / self.samples:.1f} epochs of {self.samples:,}" if self.samples else ""
        lines = [
            ("parameters", f"{self.parameters:,} ({self.trainable:,} trainable)"),
            ("tokens", f"{self.tokens:,} per image, {self.kept:,.0f} in the blocks on average"),
            ("forward", f"{self.flops_forward / 1e9:,.2f} GFLOP per image (multiply-add = 2)"),
            ("training", f"{self.flops_training / 1e9:,.2f} GFLOP per image, mean over {self._mean_over}"),
            *([] if self.upcycled is None else self.upcycled.lines()[:4]),
            ("length", f"{self.steps:,} steps, {self.images:,} images{epochs}"),
        ]
        if self.scaling is None:
            fixed = f"{self.memory_fixed / 2**30:,.2f} GiB: weights, gradients, moments, average"
            lines.append(("memory, fixed", fixed))
        else:
            lines += self.scaling.lines()
        if self.memory_activations is not None:
            lines.append(("memory, activations", f"{self.memory_activations / 2**30:,.2f} GiB per micro-batch"))
        if self.seconds is not None and self.seconds_per_step is not None:
            basis = f"{self.seconds_per_step:.2f} s per step, from steps of {self.timed_images} images on {self.device}"
            lines.append(("time", f"about {duration(self.seconds)} ({basis})"))
        if self.note:
            lines.append(("note", self.note))
        return lines


def dry_run(recipe: Recipe, time_steps: bool = True, cluster: ScalingSettings | None = None) -> Estimate:
    """Estimate a run: open its data, build its model, and time a few training steps on a small batch.

    No files are written. Steps are not timed if the weights and the optimizer need more memory than is free; the
    result's `note` says so.

    Args:
        recipe: The recipe. If it has no data.path, random images of the shape that it states are used.
        time_steps: Whether to time training steps.
        cluster: GPUs to work the run out for as well, which takes no memory; None for none.

    Raises:
        TokdynError: The recipe, the data or the model are wrong.
    """
    if cluster is not None:
        require_scratch(recipe)
    dataset = None if recipe.data.path is None and recipe.data.kind != "shapes" else open_data(recipe.data)
    shape = stated_shape(recipe.data) if dataset is None else dataset.shape
    classes = None if dataset is None else dataset.num_classes
    base = None if recipe.upcycle is None else open_base(recipe, shape, classes or recipe.data.num_classes or 0)
    steps = total_steps(recipe, shape, classes)
    model = build_model(recipe, shape, classes, "meta" if base is None else "cpu", base)
    if recipe.upcycle is not None:
        freeze(model, always_frozen(recipe.upcycle))
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters)
    full, mean, kept = _flops(recipe, model)
    tokens = model.pos_embed.shape[1]
    fixed = _FLOAT * (2 * total + 3 * trainable)
    notes = [] if dataset is not None else [f"data.path is not set, so random {recipe.data.kind} were used"]
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    micro_batch = micro_batch_size(recipe, 1)
    most = _STEP_FLOPS.get(device.type, _STEP_FLOPS_ELSEWHERE)
    count = max(1, min(micro_batch, int(most / (3.0 * mean))))
    seconds = activations = None
    if time_steps and fixed < free_memory(device):
        x = (
            torch.randn(count, *shape)
            if dataset is None
            else dataset.batch([i % len(dataset) for i in range(count)])[0]
        )
        per_image, saved = _measure(recipe, shape, classes, x.to(device), base)
        seconds, activations = per_image * recipe.training.batch_size, round(saved * micro_batch)
    elif time_steps:
        notes.append(f"not timed: weights and optimizer need {fixed / 2**30:.1f} GiB, more than {device} has free")
    images = steps * recipe.training.batch_size
    plan = None
    if cluster is not None:
        sharding = "full" if recipe.training.sharding == "full" else "none"
        plan = worked_out(work_of(recipe, cluster.gpus, shape, classes, steps), cluster, sharding)
    return Estimate(
        parameters=total,
        trainable=trainable,
        tokens=tokens,
        kept=kept * tokens,
        flops_forward=full,
        flops_training=3.0 * mean + _comparison_flops(recipe, steps, base, full),
        steps=steps,
        images=images,
        samples=None if dataset is None else len(dataset),
        memory_fixed=fixed,
        memory_activations=activations,
        seconds_per_step=seconds,
        timed_images=count,
        device=str(device),
        note="; ".join(notes),
        upcycled=None if base is None else report(base, model),
        scaling=plan,
    )


def _flops(recipe: Recipe, model: Any) -> tuple[float, float, float]:
    """Return the forward FLOPs per image without tail drop, their mean over the tail drops, and the mean kept share."""
    if recipe.chunking is None:
        flops = flops_per_image(model)
        return flops, flops, 1.0
    shares = kept_shares(recipe)
    costs = [flops_per_image(model, kept) for kept in shares]
    return flops_per_image(model), sum(costs) / len(costs), sum(shares) / len(shares)


def _comparison_flops(recipe: Recipe, steps: int, base: DiT | None, full: float) -> float:
    """Return the FLOPs per image that comparing with the teacher and the dense student adds, mean over the steps.

    Args:
        recipe: The recipe; only upcycling runs compare.
        steps: Optimizer steps of the run.
        base: The teacher.
        full: Forward FLOPs of the student, counted for the pass with its methods disabled.
    """
    if recipe.upcycle is None or base is None:
        return 0.0
    teacher = flops_per_image(base)
    return sum(
        share * (teacher * bool(phase.teacher or phase.output) + 3.0 * full * bool(phase.complete))
        for phase, share in recipe.upcycle.shares(steps)
    )


def _measure(
    recipe: Recipe, shape: Shape, classes: int | None, x: Tensor, base: DiT | None = None
) -> tuple[float, float]:
    """Time training steps on one batch; in an upcycling run, steps of the first phase.

    Args:
        recipe: The recipe.
        shape: (C, H, W) of an image.
        classes: Number of classes; None takes the recipe's.
        x: (B, C, H, W) images, on the device to time.
        base: The base of an upcycled model.

    Returns:
        Seconds per image (the fastest step), and bytes per image kept for the backward pass.
    """
    settle_memory()
    model = build_model(recipe, shape, classes, base=base).to(x.device).train()
    called, phase_batch = model, None
    if recipe.upcycle is not None and base is not None:
        freeze(model, always_frozen(recipe.upcycle))
        called = Distillation(model, base.to(x.device) if recipe.upcycle.needs_teacher else None)
        phase_batch = PhaseBatch.draw(recipe.upcycle, recipe.seed, 0, 0, len(x))
    compile_parts(model, recipe.training.compile)
    if recipe.training.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = open_optimizer(model, recipe.optimizer)
    parameter_storages = {parameter.data_ptr() for parameter in model.parameters()}
    labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    keys = image_keys(recipe.seed, 0, 0, len(x))
    chunking, drop = None, 0.0
    if recipe.chunking is not None:
        chunking = RatioTerm(recipe.model.target, recipe.chunking.ratio_weight, recipe.chunking.ratio_group)
        drop = sum(recipe.chunking.tail_drops) / len(recipe.chunking.tail_drops)
    saved: dict[int, int] = {}

    def count_saved(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameter_storages:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def step() -> float:
        saved.clear()
        draws = draw(recipe.objective, x, labels, model.config.num_classes, recipe.training.label_dropout, keys, drop)
        began = time.perf_counter()
        out = micro_step(called, recipe.objective, draws, recipe.training.precision, chunking, phase_batch)
        torch.autograd.backward(out.loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if x.device.type != "cpu":
            torch.accelerator.synchronize(x.device)
        return time.perf_counter() - began

    with torch.autograd.graph.saved_tensors_hooks(count_saved, lambda tensor: tensor):
        step()
    activations = sum(saved.values())
    return min(step() for _ in range(_TIMED)) / len(x), activations / len(x)
