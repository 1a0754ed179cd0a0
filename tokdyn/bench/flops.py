"""Compute and count the FLOPs of named models, checkpoints and stacks: by part, per call and per image.

A named model is an architecture such as DiT-XL/2, without trained weights. A multiply-add is 2 FLOPs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokdyn.attach import attachment_of
from tokdyn.bench.settings import FlopsConfig
from tokdyn.bench.stacks import Opened, Stack, open_stack
from tokdyn.cost import Flops, compute_matched_steps, flops, flops_per_image, model_parts
from tokdyn.cost.analytic import grid_of
from tokdyn.cost.blocks import PARTS
from tokdyn.cost.statistics import stats
from tokdyn.diffusion.records import Generation, StepRecord
from tokdyn.diffusion.sampling import generate
from tokdyn.errors import RecipeError, TokdynError
from tokdyn.files import require_folder
from tokdyn.models import DCDiT, DiT
from tokdyn.models.sizes import SHAPES, is_named
from tokdyn.ops.schedules import at
from tokdyn.progress import progress
from tokdyn.sample.costs import CHUNKING, step_costs
from tokdyn.seeds import noise_generator

TOLERANCE = 1e-3
"""Largest relative difference allowed between computed and counted FLOPs."""
BASELINE_STEPS, WARMUP_STEPS = 400_000, 5_000  # of compute-matched training, arXiv 2603.06351
TRAINING_DROPS = tuple(drop / 10 for drop in range(7))  # tail drops that the paper's training draws from
NAMED = tuple(f"DiT-{size}/2" for size in SHAPES if size != "tiny") + tuple(
    f"DC-DiT-{size}" for size in SHAPES if size != "tiny"
)
_COUNTED_TIMES = (0.9, 0.5, 0.1)  # positions in the range of timesteps at which calls of a checkpoint are counted


@dataclass(frozen=True)
class FlopsRow:
    """The cost of one model or stack, per image. A multiply-add is 2 FLOPs.

    Attributes:
        model: name of the model or stack.
        params: number of parameters.
        tokens: tokens per image.
        kept: share of the tokens that the blocks compute, mean over branches, steps and images; None if they compute
            all.
        tokens_from: where `kept` comes from: "all" (all tokens are computed), "given" (by the setting `kept`), "target"
            (1/N), or "measured" (on images that the model drew).
        gflops_per_forward: 1e9 FLOPs of one step, both guidance branches included, mean over steps.
        tflops_per_image: 1e12 FLOPs of all steps.
        parts: `gflops_per_forward` by part of the model.
        counted_gflops: 1e9 FLOPs that torch's counter counted in some calls; None if nothing was counted.
        computed_gflops: 1e9 FLOPs computed for the same calls.
        matched_steps: training steps that cost as much as 400,000 steps of the DiT of the same size with patch size 2;
            None for other models than named DC-DiTs.
    """

    model: str
    params: int
    tokens: int
    kept: float | None
    tokens_from: str
    gflops_per_forward: float
    tflops_per_image: float
    parts: dict[str, float]
    counted_gflops: float | None = None
    computed_gflops: float | None = None
    matched_steps: int | None = None


def bench_flops(config: FlopsConfig, stacks: Sequence[Stack] = ()) -> list[FlopsRow]:
    """Compute the cost of models and stacks.

    Args:
        config: the settings. If it names no models, all named models are computed, or none if there are stacks.
        stacks: stacks to compute as well, each with its own tail drops.

    Returns:
        One row per model and stack, in this order.

    Raises:
        TokdynError: a model cannot be opened, a file of the settings cannot be written, or computed and counted FLOPs
            differ.
    """
    for setting, path in (("csv", config.csv), ("plot", config.plot)):
        if path is not None:
            require_folder(path.parent, setting)
    names = config.models if config.models is not None else () if stacks else NAMED
    rows = []
    with progress("FLOPs", len(names) + len(stacks)) as advance:
        for name in names:
            rows.append(_cost_of_named(config, name) if is_named(name) else _cost_of_stack(config, _bare(config, name)))
            advance(1)
        for stack in stacks:
            rows.append(_cost_of_stack(config, stack))
            advance(1)
    return [_checked(row) for row in rows]


def _bare(config: FlopsConfig, name: str) -> Stack:
    """Return the stack of a model without further methods, with the tail drops of the settings."""
    return Stack(name=name, model=name, tail_drop=config.tail_drop, uncond_tail_drop=config.uncond_tail_drop)


def named_model(config: FlopsConfig, name: str) -> DiT | DCDiT:
    """Build a named model on the meta device."""
    shared: dict[str, Any] = {
        "sample_size": config.sample_size, "in_channels": config.in_channels, "num_classes": config.num_classes
    }  # fmt: skip
    with torch.device("meta"):
        if name.startswith("DC-"):
            chunking_model: DCDiT = DCDiT.named(name, **shared, target=config.target)
            return chunking_model
        model: DiT = DiT.named(name.removeprefix("DiT-"), **shared)
        return model


def _cost_of_named(config: FlopsConfig, name: str) -> FlopsRow:
    """Compute the cost of a named model. A DC-DiT keeps the share `kept` of the settings, or 1/N."""
    model = named_model(config, name)
    rows, columns = grid_of(model.config)
    drops = _drops(config, _bare(config, name))
    shares: list[float | None] = [None] * len(drops)
    if isinstance(model, DCDiT):
        natural = config.kept or 1.0 / config.target
        shares = [max(natural * (1.0 - drop), 1.0 / (rows * columns)) for drop in drops]
    parts: dict[str, float] = {}
    for share in shares:
        for part, spent in model_parts(model, share).items():
            parts[part] = parts.get(part, 0.0) + spent / 1e9
    total = sum(parts.values())
    kept = [share for share in shares if share is not None]
    counted, computed = _count_named(model, kept[0] if kept else None) if config.count else (None, None)
    return FlopsRow(
        model=name,
        params=sum(parameter.numel() for parameter in model.parameters()),
        tokens=rows * columns,
        kept=sum(kept) / len(kept) if kept else None,
        tokens_from="all" if not kept else "target" if config.kept is None else "given",
        gflops_per_forward=total,
        tflops_per_image=total * config.steps / 1e3,
        parts=parts,
        counted_gflops=counted,
        computed_gflops=computed,
        matched_steps=_matched_steps(config, model, name) if isinstance(model, DCDiT) else None,
    )


def _count_named(model: DiT | DCDiT, kept: float | None) -> tuple[float, float]:
    """Count the FLOPs of a named model's call on one image.

    A DC-DiT has to run for this, so it gets weights of zero, and a plan: a mask of the tokens to keep.

    Args:
        model: the model, on the meta device.
        kept: kept share of a DC-DiT; None for a DiT.

    Returns:
        Counted and computed 1e9 FLOPs.
    """
    size, channels = model.config.sample_size, model.config.in_channels
    x, time, label = torch.zeros(1, channels, size, size), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    if kept is None:
        counted = flops(model, x, time, label)
    else:
        real = model.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*real.parameters(), *real.buffers()):
                tensor.zero_()
        cells = (size // model.config.patch_size) ** 2
        plan = torch.arange(cells) < max(1, round(kept * cells))
        counted = flops(real.eval(), x, time, label, plan=plan[None])
    assert counted.counted is not None
    return counted.counted / 1e9, counted.total / 1e9


def _matched_steps(config: FlopsConfig, model: DCDiT, name: str) -> int | None:
    """Compute `FlopsRow.matched_steps`. Training draws from all tail drops of the paper after its warm-up.

    Returns:
        The number of steps, or None if the input size is not a multiple of the baseline's patch size.
    """
    if config.sample_size % 2:
        return None
    natural = config.kept or 1.0 / config.target
    budgets = [flops_per_image(model, natural * (1.0 - drop)) for drop in TRAINING_DROPS]
    baseline = flops_per_image(named_model(config, f"{name.removeprefix('DC-')}/2"))
    return compute_matched_steps(BASELINE_STEPS, WARMUP_STEPS, baseline, budgets[0], budgets)


def _cost_of_stack(config: FlopsConfig, stack: Stack) -> FlopsRow:
    """Compute the cost of a checkpoint or a stack. If `kept` is not set, the kept share is measured on drawn images."""
    opened = open_stack(stack)
    model, (rows, columns) = opened.model, grid_of(opened.model.config)
    attachment = attachment_of(model)
    wrapped = attachment is not None and bool(attachment.methods)
    chunked = isinstance(model, DCDiT)
    counted = computed = None
    if config.count:
        calls = _count_calls(config, opened)
        counted = sum(call.counted or 0 for call in calls) / 1e9 / config.images
        computed = sum(call.total for call in calls) / 1e9 / config.images
    if config.kept is not None and chunked and not wrapped:
        shares = [config.kept * (1.0 - drop) for drop in _drops(config, stack)]
        parts = dict.fromkeys(model_parts(model), 0.0)
        for share in shares:
            for name, spent in model_parts(model, share).items():
                parts[name] += spent / 1e9
        total, source = sum(parts.values()), "given"
        kept: float | None = sum(shares) / len(shares)
    else:
        generation = _draw(config, opened)
        costs = step_costs(model, generation.steps, config.images)
        if any(cost.gflops is None for cost in costs):
            raise RecipeError(
                f"steps={config.steps} makes more calls than statistics of {stack.name} hold: choose fewer steps."
            )
        parts = measured_parts(model, generation.steps, config.images, wrapped)
        total = sum(parts.values())
        measured = [share for cost in costs for share in (cost.kept, cost.uncond_kept) if share is not None]
        kept = sum(measured) / len(measured) if measured else None
        source = "measured" if measured or wrapped else "all"
    return FlopsRow(
        model=stack.name,
        params=sum(parameter.numel() for parameter in model.parameters()),
        tokens=rows * columns,
        kept=kept,
        tokens_from=source,
        gflops_per_forward=total,
        tflops_per_image=total * config.steps / 1e3,
        parts=parts,
        counted_gflops=counted,
        computed_gflops=computed,
    )


def _drops(config: FlopsConfig, stack: Stack) -> tuple[float, ...]:
    """Return the tail drop of each guidance branch that is computed; raise a RecipeError if one is not constant."""
    unconditional = stack.tail_drop if stack.uncond_tail_drop is None else stack.uncond_tail_drop
    both = (stack.tail_drop, unconditional) if config.guidance != 1.0 else (stack.tail_drop,)
    if not all(isinstance(drop, float) for drop in both):
        raise RecipeError(
            f"kept cannot be set for the stack {stack.name}, whose tail drop depends on the noise level: remove kept, "
            "and the kept share is measured."
        )
    return tuple(at(drop, 0.5) for drop in both)


def _draw(config: FlopsConfig, opened: Opened) -> Generation:
    """Draw images with a stack, as `tokdyn sample` does."""
    sampler = opened.sampler(config.scheduler, config.steps, config.guidance)
    seeds = range(config.seed, config.seed + config.images)
    return generate(opened.model, sampler, opened.objective, opened.labels(config.images), list(seeds))


def measured_parts(model: Any, steps: Sequence[StepRecord], images: int, wrapped: bool) -> dict[str, float]:
    """Return the 1e9 FLOPs of a step by part, both guidance branches included, as means over steps and images.

    Args:
        model: the model that drew the images; if it is wrapped, its statistics must be those of these images.
        steps: the records of the steps.
        images: number of images.
        wrapped: whether methods are attached to the model.
    """
    total: Counter[str] = Counter()
    if wrapped:
        outside = {name: spent for name, spent in model_parts(model).items() if name not in PARTS}
        for call in stats(model).calls:
            for name, spent in outside.items():
                total[name] += spent * (call.samples - (call.reused if name in CHUNKING else 0))
            total.update(call.parts or {})
            total.update(call.methods or {})
    else:
        for record in steps:
            counts = record.counts
            branches = [None] if counts is None else [counts.cond, *([] if counts.uncond is None else [counts.uncond])]
            for branch in branches * (2 if counts is None and record.guided else 1):
                total.update(model_parts(model, None if branch is None else branch.tolist(), images))
    return {name: spent / 1e9 / images / len(steps) for name, spent in total.items()}


def _count_calls(config: FlopsConfig, opened: Opened) -> list[Flops]:
    """Count the FLOPs of calls at several timesteps. The inputs are noise, because only the two counts are compared."""
    model, objective = opened.model, opened.objective
    size = model.config.sample_size
    shape = (size, size) if isinstance(size, int) else size
    noise = torch.randn(config.images, model.config.in_channels, *shape, generator=noise_generator(config.seed))
    labels = torch.tensor(opened.labels(config.images))
    options: dict[str, Any] = {"tail_drop": at(opened.stack.tail_drop, 0.5)} if opened.stack.tail_drop else {}
    calls = []
    for share in _COUNTED_TIMES:
        time = torch.full((config.images,), share * objective.num_train_timesteps)
        timestep: Tensor = time if objective.kind == "flow" else time.long()
        calls.append(flops(model, noise, timestep, labels, **options))
    return calls


def _checked(row: FlopsRow) -> FlopsRow:
    """Return the row; raise a TokdynError if its computed and counted FLOPs differ."""
    if row.counted_gflops is not None and row.computed_gflops is not None:
        difference = abs(row.computed_gflops / row.counted_gflops - 1.0)
        if difference > TOLERANCE:
            raise TokdynError(
                f"The computed {row.computed_gflops:.4f} GFLOPs of {row.model} differ by {difference:.2%} from the "
                f"counted {row.counted_gflops:.4f}, and {TOLERANCE:.1%} is allowed: please report this, or set "
                "count=false."
            )
    return row
