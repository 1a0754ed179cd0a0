"""How fast stacks are: calls and training steps in turn in one process, beside what their FLOPs promise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt
from torch import Tensor

from tokdyn.attach.entry import attachment_of
from tokdyn.bench import timing
from tokdyn.bench.flops import is_named
from tokdyn.bench.stacks import Stack, open_stack
from tokdyn.calibration.after_training import rewrap
from tokdyn.cost import flops
from tokdyn.errors import RecipeError
from tokdyn.files import UserPath
from tokdyn.host import open_device, settle_memory
from tokdyn.methods import FeatureCache
from tokdyn.methods.written import from_written
from tokdyn.models import DCDiT, DiT
from tokdyn.ops.schedules import at
from tokdyn.progress import progress
from tokdyn.sample.config import listed
from tokdyn.train.setup import compile_parts
from tokdyn.train.step import autocast

Precision = Literal["fp32", "bf16"]
Mode = Literal["sample", "train"]


class SpeedConfig(BaseModel):
    """Settings of `tokdyn bench speed`.

    Attributes:
        model: A named model such as DC-DiT-S (random weights) or what `tokdyn sample` takes, for stacks that name none.
        batch: Images per call; several are measured one after the other.
        size: Rows and columns of the input, likewise; null takes the model's own, 32 for a named model.
        kept: Share of the tokens that DC-DiTs keep, likewise, the same for every image; null leaves it to the router.
        precision: `fp32`, `bf16` (autocast for matrix products), or both.
        mode: `sample` (a call without gradients), `train` (forward and backward), or both.
        compile: `none`, `scaffold`, `blocks` or `all` of a model; the first calls then compile and are not timed.
        rounds: Each stack runs this often, in turn; medians count.
        warmup: Rounds before that are not timed.
        memory: Also measure the peak memory that a call adds.
        plot: PNG to draw times to, where several sizes or batches were measured.
        out: JSON file to write everything to.
        threads: Processor threads; null takes all.
        device: `auto` (a GPU if there is one), or a torch device such as `cpu` or `cuda:1`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = None
    batch: Annotated[tuple[PositiveInt, ...], BeforeValidator(listed), Field(min_length=1)] = (8,)
    size: Annotated[tuple[PositiveInt, ...] | None, BeforeValidator(listed)] = None
    kept: Annotated[tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] | None, BeforeValidator(listed)] = None
    precision: Annotated[tuple[Precision, ...], BeforeValidator(listed), Field(min_length=1)] = ("fp32",)
    mode: Annotated[tuple[Mode, ...], BeforeValidator(listed), Field(min_length=1)] = ("sample",)
    compile: Annotated[
        tuple[Literal["none", "scaffold", "blocks", "all"], ...], BeforeValidator(listed), Field(min_length=1)
    ] = ("none",)
    rounds: Annotated[int, Field(ge=3)] = 7
    warmup: Annotated[int, Field(ge=1)] = 2
    memory: bool = False
    plot: UserPath | None = None
    out: UserPath | None = None
    threads: PositiveInt | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Case:
    """What is measured of every stack.

    Attributes:
        batch: B.
        size: rows and columns of the input; None is the model's own.
        kept: share of the tokens that a DC-DiT keeps; None leaves it to the router.
        precision: of matrix products.
        mode: without gradients, or forward and backward.
        compile: which parts of the model.
    """

    batch: int
    size: int | None
    kept: float | None
    precision: Precision
    mode: Mode
    compile: str


@dataclass(frozen=True)
class SpeedRow:
    """One stack in one case.

    Attributes:
        stack: its name.
        case: what was measured.
        tokens: N, cells of the token grid.
        milliseconds: of a call (or a step), median.
        spread: range of the rounds over the median.
        images_per_second: B over the median.
        gflops: 1e9 FLOPs of the call, or three times that for a step; a multiply-add is 2 FLOPs.
        gflops_per_second: of them, over the median.
        speedup: time of the first stack in this case over that of this one.
        realised: `speedup` over the ratio of their FLOPs: 1 is all that the FLOPs promise.
        peak_mib: memory that a call adds at its peak; None if it was not asked for.
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
        """Stack and settings, without size and batch: what makes a curve."""
        words = [self.stack, self.case.mode, self.case.precision]
        words += [] if self.case.compile == "none" else [f"compile={self.case.compile}"]
        words += [] if self.case.kept is None else [f"kept={self.case.kept:g}"]
        return " ".join(words)


def cases(config: SpeedConfig) -> Iterator[Case]:
    """Every combination of what was asked for."""
    sizes: Sequence[int | None] = config.size or (None,)
    kept: Sequence[float | None] = config.kept or (None,)
    for mode, precision, compiled, share, size, batch in product(
        config.mode, config.precision, config.compile, kept, sizes, config.batch
    ):
        yield Case(batch, size, share, precision, mode, compiled)


def bench_speed(config: SpeedConfig, stacks: Sequence[Stack]) -> list[SpeedRow]:
    """Time stacks in turn.

    Args:
        config: what to measure.
        stacks: at least one; the first is what the others are compared with.

    Raises:
        TokdynError: a stack does not open, or cannot be timed call by call.
    """
    settle_memory()
    timing.prepare(config.threads)
    if not stacks:
        raise RecipeError("there is no stack to time: give at least one.")
    device, found = open_device(config.device), list(cases(config))
    rows = []
    with progress("timing", len(found)) as advance:
        for case in found:
            rows += _case(config, case, stacks, device)
            advance(1)
    return rows


def growth(rows: Sequence[SpeedRow], along: Literal["tokens", "batch"]) -> dict[str, float]:
    """The exponent b of time ~ a x^b along tokens or batch, by least squares on logarithms.

    Returns:
        For every stack and setting with three points or more, the exponent.
    """
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        other = f"batch={row.case.batch}" if along == "tokens" else f"tokens={row.tokens}"
        x = row.tokens if along == "tokens" else row.case.batch
        lines.setdefault(f"{row.line} {other}", {})[x] = row.milliseconds
    return {name: timing.growth(points) for name, points in lines.items() if len(points) >= 3}


def _case(config: SpeedConfig, case: Case, stacks: Sequence[Stack], device: torch.device) -> list[SpeedRow]:
    sides: dict[str, Callable[[], None]] = {}
    costs: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for stack in stacks:
        model, inputs, more = _ready(config, stack, case, device)
        sides[stack.name] = partial(_run, model, inputs, more, case)
        with autocast(device, case.precision):
            costs[stack.name] = flops(model.eval(), *inputs, **more).total * (3 if case.mode == "train" else 1) / 1e9
        tokens[stack.name] = math.prod(side // model.config.patch_size for side in inputs[0].shape[-2:])
        model.train(case.mode == "train")
        if case.compile != "none":
            compile_parts(model, case.compile)
    times = timing.in_turn(sides, rounds=config.rounds, warmup=config.warmup)
    rows = []
    for name in sides:
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
        rows = [replace(row, peak_mib=_peak(config, stack, case)) for row, stack in zip(rows, stacks, strict=True)]
    first = rows[0]
    return [_beside(row, first) for row in rows]


def _beside(row: SpeedRow, first: SpeedRow) -> SpeedRow:
    speedup = first.milliseconds / row.milliseconds
    return replace(row, speedup=speedup, realised=speedup * row.gflops / first.gflops)


def _ready(
    config: SpeedConfig, stack: Stack, case: Case, device: torch.device
) -> tuple[Any, tuple[Tensor, ...], dict[str, Any]]:
    """A model with what it is called with."""
    model = model_of(config, stack, case).to(device)
    inputs, more = _inputs(model, stack, case, device)
    return model, inputs, more


def model_of(config: SpeedConfig, stack: Stack, case: Case) -> Any:
    """The model of a stack: of a checkpoint, or of a name with random weights that keep 1/N of white noise."""
    place = stack.model or config.model
    if place is None:
        raise RecipeError(f"the stack {stack.name} names no model; give it one, or one for all stacks.")
    if not is_named(place):
        model = open_stack(stack, place).model
    else:
        torch.manual_seed(0)
        shared: dict[str, Any] = {"sample_size": case.size or 32}
        model = DCDiT.named(place, **shared) if place.startswith("DC-") else DiT.named(place, **shared)
        if stack.folder is not None:
            raise RecipeError(f"the stack {stack.name} has trained methods for a model without trained weights.")
        rewrap(model, [from_written(each) for each in stack.methods])
    carried = attachment_of(model)
    if carried is not None and carried.has(FeatureCache):
        raise RecipeError(
            f"the stack {stack.name} has a FeatureCache, which acts from step to step: time it with "
            "tokdyn bench quality."
        )
    return model


def _inputs(model: Any, stack: Stack, case: Case, device: torch.device) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Noise, times, classes, and for a DC-DiT the tokens to keep or the tail drop."""
    own = model.config.sample_size
    size = (case.size, case.size) if case.size else (own, own) if isinstance(own, int) else tuple(own)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, model.config.in_channels, *size, generator=generator).to(device)
    time = torch.linspace(0, 999, case.batch).round().to(device)
    labels = (torch.arange(case.batch) % model.config.num_classes).to(device)
    more: dict[str, Any] = {}
    if isinstance(model, DCDiT):
        patch = model.config.patch_size
        cells = (size[0] // patch) * (size[1] // patch)
        if case.kept is not None:
            order = torch.rand(case.batch, cells, generator=generator).argsort(dim=1)
            more["plan"] = (order < max(1, round(case.kept * cells))).to(device)
        if stack.tail_drop:
            more["tail_drop"] = at(stack.tail_drop, 0.5)
    return (x, time, labels), more


def _run(model: Any, inputs: tuple[Tensor, ...], more: dict[str, Any], case: Case) -> None:
    """A call without gradients; or forward and backward of the mean square of what the model says."""
    device, training = inputs[0].device, case.mode == "train"
    with nullcontext() if training else torch.inference_mode(), autocast(device, case.precision):
        out = model(*inputs, **more)
    if training:
        out.sample.float().square().mean().backward()
        model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(config: SpeedConfig, stack: Stack, case: Case) -> float:
    """MiB that the first call adds at its peak, in a process of its own: a process keeps what it once took."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_here, config, stack, case).result()


def _peak_here(config: SpeedConfig, stack: Stack, case: Case) -> float:
    device = open_device(config.device)
    timing.prepare(config.threads)
    model, inputs, more = _ready(config, stack, case, device)
    model.train(case.mode == "train")
    if device.type != "cuda":
        return timing.peak_growth_mib(partial(_run, model, inputs, more, case))
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _run(model, inputs, more, case)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20
