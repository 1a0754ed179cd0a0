"""Time calls and training steps of stacks in turn in one process, and compare the speed-up with that of the FLOPs."""

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

from tokdyn.attach import attachment_of
from tokdyn.bench import timing
from tokdyn.bench.flops import is_named
from tokdyn.bench.stacks import Stack, open_stack
from tokdyn.calibration.after_training import rewrap
from tokdyn.cost import flops
from tokdyn.errors import RecipeError
from tokdyn.files import UserPath
from tokdyn.host import open_device, settle_memory
from tokdyn.methods.registry import from_settings
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
        model: A named model such as DC-DiT-S (random weights) or anything `tokdyn sample` accepts, for stacks that
            name no model of their own.
        batch: Images per call; give several to measure each.
        size: Rows and columns of the input, one or several; null means the model's own, or 32 for a named model.
        kept: Share of the tokens that DC-DiTs keep in every image, one or several; null leaves it to the router.
        precision: `fp32`, `bf16` (autocast for matrix products), or both.
        mode: `sample` (a call without gradients), `train` (forward and backward), or both.
        compile: `none`, or the parts of the model to compile: `scaffold`, `blocks` or `all`. Compilation happens in the
            warm-up and is not timed.
        rounds: Timed rounds; in each, every stack runs once in turn, and the median counts.
        warmup: Rounds before that, which are not timed.
        memory: Also measure the peak memory that a call adds.
        plot: Draw times to this PNG, if several sizes or batches are measured.
        out: Write all results to this JSON file.
        threads: Processor threads; null means all.
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
    """One combination of settings that every stack is measured with.

    Attributes:
        batch: B.
        size: rows and columns of the input; None means the model's own.
        kept: share of the tokens that a DC-DiT keeps; None leaves it to the router.
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
        case: what was measured.
        tokens: N, cells of the token grid.
        milliseconds: median time of a call, or of a training step.
        spread: range of the rounds over their median.
        images_per_second: B over the median.
        gflops: 1e9 FLOPs of the call, or three times as many for a training step; a multiply-add is 2 FLOPs.
        gflops_per_second: `gflops` over the median.
        speedup: time of the first stack in this case over the time of this stack.
        realised: `speedup` over the ratio of the FLOPs; 1 means that all saved FLOPs turn into saved time.
        peak_mib: MiB that a call adds at its peak; None if it was not asked for.
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
        """What the rows of one curve share: the stack and its settings, without size and batch."""
        words = [self.stack, self.case.mode, self.case.precision]
        words += [] if self.case.compile == "none" else [f"compile={self.case.compile}"]
        words += [] if self.case.kept is None else [f"kept={self.case.kept:g}"]
        return " ".join(words)


def cases(config: SpeedConfig) -> Iterator[Case]:
    """Yield every combination of the settings."""
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
        stacks: one or more; the others are compared with the first.

    Raises:
        TokdynError: a stack cannot be opened, or cannot be timed call by call.
    """
    settle_memory()
    timing.prepare(config.threads)
    if not stacks:
        raise RecipeError("there are no stacks to time; give at least one.")
    device, wanted = open_device(config.device), list(cases(config))
    rows = []
    with progress("timing", len(wanted)) as advance:
        for case in wanted:
            rows += _measure(config, case, stacks, device)
            advance(1)
    return rows


def growth(rows: Sequence[SpeedRow], along: Literal["tokens", "batch"]) -> dict[str, float]:
    """Fit the exponent b of time = a * x**b along tokens or batch by least squares on logarithms.

    Returns:
        The exponent for every stack and setting with at least three points.
    """
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        other = f"batch={row.case.batch}" if along == "tokens" else f"tokens={row.tokens}"
        x = row.tokens if along == "tokens" else row.case.batch
        lines.setdefault(f"{row.line} {other}", {})[x] = row.milliseconds
    return {name: timing.growth(points) for name, points in lines.items() if len(points) >= 3}


def _measure(config: SpeedConfig, case: Case, stacks: Sequence[Stack], device: torch.device) -> list[SpeedRow]:
    """Time all stacks in one case."""
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
    """Add the speed-up over the first stack."""
    speedup = first.milliseconds / row.milliseconds
    return replace(row, speedup=speedup, realised=speedup * row.gflops / first.gflops)


def _prepare(
    config: SpeedConfig, stack: Stack, case: Case, device: torch.device
) -> tuple[Any, tuple[Tensor, ...], dict[str, Any]]:
    """Build the model of a stack on its device, with the inputs and options of its calls."""
    model = model_of(config, stack, case).to(device)
    inputs, options = _inputs(model, stack, case, device)
    return model, inputs, options


def model_of(config: SpeedConfig, stack: Stack, case: Case) -> Any:
    """Open the checkpoint of a stack, or build its named model with random weights."""
    place = stack.model or config.model
    if place is None:
        raise RecipeError(f"the stack {stack.name} names no model; set its model, or one for all stacks.")
    if not is_named(place):
        model = open_stack(stack, place).model
    else:
        torch.manual_seed(0)
        shared: dict[str, Any] = {"sample_size": case.size or 32}
        model = DCDiT.named(place, **shared) if place.startswith("DC-") else DiT.named(place, **shared)
        if stack.folder is not None:
            raise RecipeError(
                f"the stack {stack.name} has folder={stack.folder}, but the named model {place} has no trained weights "
                "that those methods could fit; name a checkpoint."
            )
        rewrap(model, [from_settings(each) for each in stack.methods])
    attachment = attachment_of(model)
    if attachment is not None and attachment.remembers:
        raise RecipeError(
            f"the stack {stack.name} has a FeatureCache, which acts across steps and cannot be timed by single calls; "
            "use tokdyn bench quality."
        )
    return model


def _inputs(model: Any, stack: Stack, case: Case, device: torch.device) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Build noise, timesteps and labels, and for a DC-DiT the plan of tokens to keep or the tail drop."""
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
    """Call the model without gradients, or run forward and backward of the mean square of its output."""
    device, training = inputs[0].device, case.mode == "train"
    with nullcontext() if training else torch.inference_mode(), autocast(device, case.precision):
        out = model(*inputs, **options)
    if training:
        out.sample.float().square().mean().backward()
        model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_mib(config: SpeedConfig, stack: Stack, case: Case) -> float:
    """Measure the MiB that a call adds at its peak, in a new process, since a process keeps memory it once took."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_mib_in_this_process, config, stack, case).result()


def _peak_mib_in_this_process(config: SpeedConfig, stack: Stack, case: Case) -> float:
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
