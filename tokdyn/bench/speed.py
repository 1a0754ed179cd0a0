"""Time calls and training steps of stacks in turn in one process, and compare time saved with FLOPs saved.

A stack is a list of methods that act together on a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Any, Literal

import torch
from torch import Tensor

from tokdyn.attach import accept_methods, attachment_of
from tokdyn.bench import timing
from tokdyn.bench.settings import Mode, Precision, SpeedConfig
from tokdyn.bench.stacks import Stack, open_stack
from tokdyn.calibration.after_training import rewrap
from tokdyn.cost import flops
from tokdyn.errors import InputError, RecipeError
from tokdyn.files import require_folder
from tokdyn.host import open_device, settle_memory
from tokdyn.models import DCDiT, DiT
from tokdyn.models.sizes import is_named
from tokdyn.ops.schedules import at
from tokdyn.progress import progress
from tokdyn.train.setup import compile_parts
from tokdyn.train.step import autocast


@dataclass(frozen=True)
class Case:
    """One combination of settings, with which every stack is measured.

    Attributes:
        batch: B, images per call.
        size: rows and columns of the input; None takes the model's own.
        kept: kept share of a DC-DiT; None leaves it to the router.
        precision: precision of matrix products.
        mode: "sample" (no gradients) or "train" (forward and backward).
        compile: the parts of the model to compile.
    """

    batch: int
    size: int | None
    kept: float | None
    precision: Precision
    mode: Mode
    compile: str


@dataclass(frozen=True)
class SpeedRow:
    """The measurements of one stack in one case.

    Attributes:
        stack: name of the stack.
        case: the settings.
        tokens: tokens per image.
        milliseconds: median time of a call, or of a training step.
        spread: (slowest round - fastest round) / median.
        images_per_second: B / median.
        gflops: 1e9 FLOPs of the call, or three times as many for a training step; a multiply-add is 2 FLOPs.
        gflops_per_second: `gflops` / median.
        speedup: time of the first stack / time of this stack, in this case.
        realised: `speedup` / (FLOPs of the first stack / FLOPs of this stack); 1 if time is saved in proportion to
            FLOPs.
        peak_mib: MiB that a call adds at its peak; None if memory was not measured.
    """

    stack: str
    case: Case
    tokens: int
    milliseconds: float
    spread: float
    images_per_second: float
    gflops: float
    gflops_per_second: float
    speedup: float = 1.0
    realised: float = 1.0
    peak_mib: float | None = None

    @property
    def line(self) -> str:
        """The name of the curve that the row is a point of: the stack and the settings other than size and batch."""
        words = [self.stack, self.case.mode, self.case.precision]
        words += [] if self.case.compile == "none" else [f"compile={self.case.compile}"]
        words += [] if self.case.kept is None else [f"kept={self.case.kept:g}"]
        return " ".join(words)


NO_CURVE = "A curve needs several sizes or batches, but there is one of each: give size=16,32,64."


def cases(config: SpeedConfig) -> Iterator[Case]:
    """Yield every combination of the settings."""
    sizes: Sequence[int | None] = config.size or (None,)
    kept: Sequence[float | None] = config.kept or (None,)
    for mode, precision, compiled, share, size, batch in product(
        config.mode, config.precision, config.compile, kept, sizes, config.batch
    ):
        yield Case(batch, size, share, precision, mode, compiled)


def bench_speed(config: SpeedConfig, stacks: Sequence[Stack]) -> list[SpeedRow]:
    """Time stacks in turn, with every combination of the settings.

    Sets the number of threads and the global seed of this process.

    Args:
        config: the settings.
        stacks: one stack or more; the first is the one that the others are compared with.

    Returns:
        One row for each stack in each case.

    Raises:
        TokdynError: there are no stacks, a stack cannot be opened, it has a method that acts across steps, or a file of
            the settings cannot be written or drawn.
    """
    settle_memory()
    timing.prepare(config.threads)
    if not stacks:
        raise RecipeError("There are no stacks to time: give at least one with --stack.")
    for setting, path in (("out", config.out), ("plot", config.plot)):
        if path is not None:
            require_folder(path.parent, setting)
    if config.plot is not None and len(stacks) == 1 and len(config.batch) < 2 and len(config.size or ()) < 2:
        raise InputError(NO_CURVE)
    device, wanted = open_device(config.device), list(cases(config))
    rows = []
    with progress("timing", len(wanted)) as advance:
        for case in wanted:
            rows += _measure(config, case, stacks, device)
            advance(1)
    return rows


def growth(rows: Sequence[SpeedRow], along: Literal["tokens", "batch"]) -> dict[str, float]:
    """Fit the exponent b of `time = a * x**b`, where x is the tokens of an image or the images of a batch.

    Returns:
        The exponent of each curve with at least three points, by the curve's name.
    """
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        other = f"batch={row.case.batch}" if along == "tokens" else f"tokens={row.tokens}"
        x = row.tokens if along == "tokens" else row.case.batch
        lines.setdefault(f"{row.line} {other}", {})[x] = row.milliseconds
    return {name: timing.growth(points) for name, points in lines.items() if len(points) >= 3}


def _measure(config: SpeedConfig, case: Case, stacks: Sequence[Stack], device: torch.device) -> list[SpeedRow]:
    """Measure all stacks in one case."""
    calls: dict[str, Callable[[], None]] = {}
    costs: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for stack in stacks:
        model, inputs, options = _prepare(config, stack, case, device)
        calls[stack.name] = partial(_run, model, inputs, options, case)
        with autocast(device, case.precision):
            cost = flops(model.eval(), *inputs, **options).total
        costs[stack.name] = cost * (3 if case.mode == "train" else 1) / 1e9
        tokens[stack.name] = math.prod(side // model.config.patch_size for side in inputs[0].shape[-2:])
        model.train(case.mode == "train")
        if case.compile != "none":
            compile_parts(model, case.compile)
    times = timing.in_turn(calls, rounds=config.rounds, warmup=config.warmup)
    rows = []
    for name in calls:
        median = times[name]["median_ms"]
        rows.append(
            SpeedRow(
                stack=name,
                case=case,
                tokens=tokens[name],
                milliseconds=median,
                spread=(times[name]["max_ms"] - times[name]["min_ms"]) / median,
                images_per_second=case.batch / median * 1e3,
                gflops=costs[name],
                gflops_per_second=costs[name] / median * 1e3,
            )
        )
    if config.memory:
        rows = [replace(row, peak_mib=_peak_mib(config, stack, case)) for row, stack in zip(rows, stacks, strict=True)]
    first = rows[0]
    return [_compare(row, first) for row in rows]


def _compare(row: SpeedRow, first: SpeedRow) -> SpeedRow:
    """Add the speed-up over the first stack to a row."""
    speedup = first.milliseconds / row.milliseconds
    return replace(row, speedup=speedup, realised=speedup * row.gflops / first.gflops)


def _prepare(
    config: SpeedConfig, stack: Stack, case: Case, device: torch.device
) -> tuple[Any, tuple[Tensor, ...], dict[str, Any]]:
    """Return the model of a stack on the device, with the positional and the keyword arguments of its calls."""
    model = model_of(config, stack, case).to(device)
    inputs, options = _inputs(model, stack, case, device)
    return model, inputs, options


def model_of(config: SpeedConfig, stack: Stack, case: Case) -> Any:
    """Open the checkpoint of a stack, or build its named model with random weights; attach the methods of the stack.

    Raises:
        TokdynError: there is no model, it cannot be opened, or a method cannot be timed by single calls.
    """
    place = stack.model or config.model
    if place is None:
        raise RecipeError(f"The stack {stack.name} has no model: set its model, or one for all stacks.")
    if not is_named(place):
        model = open_stack(stack, place).model
    else:
        torch.manual_seed(0)
        shared: dict[str, Any] = {"sample_size": case.size or 32}
        model = DCDiT.named(place, **shared) if place.startswith("DC-") else DiT.named(place, **shared)
        if stack.folder is not None:
            raise RecipeError(
                f"The stack {stack.name} has folder={stack.folder}, but the methods in it need trained weights, which "
                f"the named model {place} does not have: set model to a checkpoint."
            )
        rewrap(model, stack.for_model())
    attachment = attachment_of(model)
    if attachment is None:
        return model
    across = next((each.name for each in attachment.blueprint.placed if each.traits.remembers), None)
    if across is not None:
        raise RecipeError(
            f"The stack {stack.name} has a {across} that acts across steps, which single calls cannot time: use tokdyn "
            "bench quality."
        )
    return accept_methods(model)  # an untrained method costs what a trained one does


def _inputs(model: Any, stack: Stack, case: Case, device: torch.device) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Return the arguments of a call: noise, timesteps and labels; and keyword arguments for a DC-DiT.

    These are `plan`, a mask (B, N) of random tokens to keep, if the case sets `kept`, and the stack's `tail_drop`.
    """
    own = model.config.sample_size
    size = (case.size, case.size) if case.size else (own, own) if isinstance(own, int) else tuple(own)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, model.config.in_channels, *size, generator=generator).to(device)
    time = torch.linspace(0, 999, case.batch).round().to(device)
    labels = (torch.arange(case.batch) % model.config.num_classes).to(device)
    options: dict[str, Any] = {}
    if isinstance(model, DCDiT):
        patch = model.config.patch_size
        cells = (size[0] // patch) * (size[1] // patch)
        if case.kept is not None:
            order = torch.rand(case.batch, cells, generator=generator).argsort(dim=1)
            options["plan"] = (order < max(1, round(case.kept * cells))).to(device)
        if stack.tail_drop:
            options["tail_drop"] = at(stack.tail_drop, 0.5)
    return (x, time, labels), options


def _run(model: Any, inputs: tuple[Tensor, ...], options: dict[str, Any], case: Case) -> None:
    """Run one call without gradients, or forward and backward with the mean square of the output as loss."""
    device, training = inputs[0].device, case.mode == "train"
    with nullcontext() if training else torch.inference_mode(), autocast(device, case.precision):
        out = model(*inputs, **options)
    if training:
        out.sample.float().square().mean().backward()
        model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_mib(config: SpeedConfig, stack: Stack, case: Case) -> float:
    """Measure the MiB that a call adds at its peak, in a new process, because a process keeps memory it has used."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_mib_in_this_process, config, stack, case).result()


def _peak_mib_in_this_process(config: SpeedConfig, stack: Stack, case: Case) -> float:
    """Measure the MiB that a first call adds at its peak to the memory of this process or of the CUDA device."""
    device = open_device(config.device)
    timing.prepare(config.threads)
    model, inputs, options = _prepare(config, stack, case, device)
    model.train(case.mode == "train")
    if device.type != "cuda":
        return timing.peak_growth_mib(partial(_run, model, inputs, options, case))
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _run(model, inputs, options, case)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20
