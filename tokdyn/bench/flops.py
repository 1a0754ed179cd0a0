"""What named models, checkpoints and stacks cost: by part, per forward and per image, computed and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt
from torch import Tensor

from tokdyn.attach import attachment_of
from tokdyn.bench import published
from tokdyn.bench.stacks import Opened, Stack, open_stack
from tokdyn.cost import compute_matched_steps, flops, flops_per_image, model_parts, stats
from tokdyn.cost.analytic import grid_of
from tokdyn.cost.blocks import PARTS
from tokdyn.diffusion.records import Generation, StepRecord
from tokdyn.diffusion.sampling import GuidanceScale, Share, Steps, generate
from tokdyn.diffusion.schedulers import SchedulerName
from tokdyn.errors import RecipeError, TokdynError
from tokdyn.files import UserPath
from tokdyn.models import DCDiT, DiT
from tokdyn.models.sizes import SHAPES
from tokdyn.ops.schedules import at
from tokdyn.progress import progress
from tokdyn.sample.config import listed
from tokdyn.sample.costs import CHUNKING, step_costs

TOLERANCE = 1e-3
"""Largest share by which what is computed and what is counted may differ."""
BASELINE_STEPS, WARMUP_STEPS = 400_000, 5_000  # of compute-matched training, arXiv 2603.06351
DROPS = tuple(drop / 10 for drop in range(7))  # that its training draws from
NAMED = tuple(f"DiT-{size}/2" for size in SHAPES if size != "tiny") + tuple(
    f"DC-DiT-{size}" for size in SHAPES if size != "tiny"
)
_LEVELS = (0.9, 0.5, 0.1)  # shares of the range of times at which a checkpoint's calls are counted


class FlopsConfig(BaseModel):
    """Settings of `tokdyn bench flops`.

    Attributes:
        models: Named models such as DiT-XL/2 or DC-DiT-S, and what `tokdyn sample` takes; null means all named ones.
        steps: Model calls per image.
        guidance: Scale of classifier-free guidance; anything but 1 computes a second, unconditional branch.
        sample_size: Rows and columns of the input of named models; 32 is a 256-pixel image in an 8x latent space.
        in_channels: Channels of the input of named models.
        num_classes: Classes of named models.
        target: N of named DC-DiTs, cells per kept token.
        kept: Share of the tokens that DC-DiTs keep before tail drop; null takes 1/N of named ones, whose weights nobody
            has trained, and measures that of checkpoints on images that they draw.
        tail_drop: Share of the kept tokens that is dropped.
        uncond_tail_drop: The same in the unconditional branch (Lite-CFG); null means as tail_drop.
        images: Images that checkpoints and stacks draw, to measure their tokens over the trajectory.
        scheduler: Of these images; null takes ddpm, or euler for a flow.
        seed: Of the first of these images.
        count: Also count a pass with torch's counter, and fail where it differs by more than 0.1%.
        csv: File to write the table to.
        plot: PNG to draw the parts to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: Annotated[tuple[str, ...] | None, BeforeValidator(listed)] = None
    steps: Steps = 250
    guidance: GuidanceScale = 1.0
    sample_size: PositiveInt = 32
    in_channels: PositiveInt = 4
    num_classes: PositiveInt = 1000
    target: Annotated[float, Field(gt=1.0)] = 4.0
    kept: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    tail_drop: Share = 0.0
    uncond_tail_drop: Share | None = None
    images: PositiveInt = 4
    scheduler: SchedulerName | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    count: bool = True
    csv: UserPath | None = None
    plot: UserPath | None = None


@dataclass(frozen=True)
class FlopsRow:
    """One model. FLOPs are of one image; a multiply-add is 2.

    Attributes:
        model: its name or path.
        params: parameters.
        tokens: N, cells of its token grid.
        kept: share of them that blocks see, mean over branches, steps and images; None where all are.
        tokens_from: "all" are computed; "given" with `kept`; "target", 1/N; "measured" on images that it drew.
        gflops_per_forward: 1e9 FLOPs of one call, both branches of guidance together, mean over steps.
        tflops_per_image: 1e12 FLOPs of all steps.
        parts: 1e9 FLOPs of such a call by part.
        counted_gflops: 1e9 FLOPs of the passes that were counted; None if none was.
        computed_gflops: of the same passes.
        matched_steps: training steps that cost as much as 400,000 of the DiT of the same size with patches of 2.
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
    """Work out what models and stacks cost.

    Args:
        config: which, and how.
        stacks: beside the models; they bring their own tail drops.

    Raises:
        TokdynError: a model does not open, or what was counted is not what was computed.
    """
    names = config.models if config.models is not None else () if stacks else NAMED
    rows = []
    with progress("FLOPs", len(names) + len(stacks)) as advance:
        for name in names:
            rows.append(_named(config, name) if is_named(name) else _opened(config, _plain(config, name)))
            advance(1)
        for stack in stacks:
            rows.append(_opened(config, stack))
            advance(1)
    return [_agreeing(row) for row in rows]


def is_named(name: str) -> bool:
    """Whether this is the name of an architecture, such as DiT-XL/2 or DC-DiT-S."""
    size, _, patch = name.removeprefix("DC-").removeprefix("DiT-").partition("/")
    return size in SHAPES and (name.startswith("DC-DiT-") if not patch else not name.startswith("DC-"))


def _plain(config: FlopsConfig, name: str) -> Stack:
    return Stack(name=name, model=name, tail_drop=config.tail_drop, uncond_tail_drop=config.uncond_tail_drop)


def named_model(config: FlopsConfig, name: str) -> DiT | DCDiT:
    """The architecture of that name, on the meta device."""
    shared: dict[str, Any] = {
        "sample_size": config.sample_size, "in_channels": config.in_channels, "num_classes": config.num_classes
    }  # fmt: skip
    with torch.device("meta"):
        if name.startswith("DC-"):
            chunked: DCDiT = DCDiT.named(name, **shared, target=config.target)
            return chunked
        found: DiT = DiT.named(name.removeprefix("DiT-"), **shared)
        return found


def _named(config: FlopsConfig, name: str) -> FlopsRow:
    """A named architecture, at the tokens that are given or aimed at."""
    model = named_model(config, name)
    rows, columns = grid_of(model.config)
    drops = _drops(config, _plain(config, name))
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
        matched_steps=_matched(config, model, name) if isinstance(model, DCDiT) else None,
    )


def _count_named(model: DiT | DCDiT, kept: float | None) -> tuple[float, float]:
    """Count a pass of one image. DC-DiT decides by its data, so it runs, with weights of zero and the tokens given."""
    size, channels = model.config.sample_size, model.config.in_channels
    x, time, label = torch.zeros(1, channels, size, size), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    if kept is None:
        found = flops(model, x, time, label)
    else:
        real = model.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*real.parameters(), *real.buffers()):
                tensor.zero_()
        cells = (size // model.config.patch_size) ** 2
        plan = torch.arange(cells) < max(1, round(kept * cells))
        found = flops(real.eval(), x, time, label, plan=plan[None])
    assert found.counted is not None
    return found.counted / 1e9, found.total / 1e9


def _matched(config: FlopsConfig, model: DCDiT, name: str) -> int | None:
    """Steps of the same training compute as the DiT of its size, drawing from all tail drops after the warm-up."""
    if config.sample_size % 2:
        return None
    natural = config.kept or 1.0 / config.target
    budgets = [flops_per_image(model, natural * (1.0 - drop)) for drop in DROPS]
    baseline = flops_per_image(named_model(config, f"{name.removeprefix('DC-')}/2"))
    return compute_matched_steps(BASELINE_STEPS, WARMUP_STEPS, baseline, budgets[0], budgets)


def _opened(config: FlopsConfig, stack: Stack) -> FlopsRow:
    """A checkpoint or a stack: its tokens are those of images that it draws."""
    opened = open_stack(stack)
    model, (rows, columns) = opened.model, grid_of(opened.model.config)
    carried = attachment_of(model)
    wrapped = carried is not None and bool(carried.methods)
    chunked = hasattr(model, "chunking")
    counted = computed = None
    if config.count:
        found = _calls(config, opened)
        counted = sum(each.counted or 0 for each in found) / 1e9 / config.images
        computed = sum(each.total for each in found) / 1e9 / config.images
    if config.kept is not None and chunked and not wrapped:
        shares = [config.kept * (1.0 - drop) for drop in _drops(config, stack)]
        parts = dict.fromkeys(model_parts(model), 0.0)
        for share in shares:
            for name, spent in model_parts(model, share).items():
                parts[name] += spent / 1e9
        total, source = sum(parts.values()), "given"
        kept: float | None = sum(shares) / len(shares)
    else:
        made = _trajectory(config, opened)
        costs = step_costs(model, made.steps, config.images)
        if any(cost.gflops is None for cost in costs):
            raise RecipeError(f"{stack.name}: {config.steps} steps are more than statistics hold; choose fewer steps.")
        parts = _parts(model, made.steps, config.images, wrapped)
        total = sum(parts.values())
        shares_seen = [share for cost in costs for share in (cost.kept, cost.uncond_kept) if share is not None]
        kept = sum(shares_seen) / len(shares_seen) if shares_seen else None
        source = "measured" if shares_seen or wrapped else "all"
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
    unconditional = stack.tail_drop if stack.uncond_tail_drop is None else stack.uncond_tail_drop
    both = (stack.tail_drop, unconditional) if config.guidance != 1.0 else (stack.tail_drop,)
    if not all(isinstance(drop, float) for drop in both):
        raise RecipeError(f"the stack {stack.name} drops by noise level, so its tokens are measured: leave kept out.")
    return tuple(at(drop, 0.5) for drop in both)


def _trajectory(config: FlopsConfig, opened: Opened) -> Generation:
    """Images, drawn as `tokdyn sample` draws them."""
    sampler = opened.sampler(config.scheduler, config.steps, config.guidance)
    seeds = range(config.seed, config.seed + config.images)
    return generate(opened.model, sampler, opened.objective, opened.labels(config.images), list(seeds))


def _parts(model: Any, steps: Sequence[StepRecord], images: int, wrapped: bool) -> dict[str, float]:
    """1e9 FLOPs of a call by part, mean over steps and images, both branches together."""
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


def _calls(config: FlopsConfig, opened: Opened) -> list[Any]:
    """Single calls at several times, on noise and nothing else: what is compared is two ways to add up."""
    model, objective = opened.model, opened.objective
    size = model.config.sample_size
    shape = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(config.seed)
    noise = torch.randn(config.images, model.config.in_channels, *shape, generator=generator)
    labels = torch.tensor(opened.labels(config.images))
    more: dict[str, Any] = {"tail_drop": at(opened.stack.tail_drop, 0.5)} if opened.stack.tail_drop else {}
    found = []
    for level in _LEVELS:
        time = torch.full((config.images,), level * objective.num_train_timesteps)
        told: Tensor = time if objective.kind == "flow" else time.long()
        found.append(flops(model, noise, told, labels, **more))
    return found


def _agreeing(row: FlopsRow) -> FlopsRow:
    if row.counted_gflops is not None and row.computed_gflops is not None:
        apart = abs(row.computed_gflops / row.counted_gflops - 1.0)
        if apart > TOLERANCE:
            raise TokdynError(
                f"{row.model}: {row.computed_gflops:.4f} GFLOPs were computed and {row.counted_gflops:.4f} counted, "
                f"{apart:.2%} apart where {TOLERANCE:.1%} is allowed; please report this, or leave count out."
            )
    return row


def compared(config: FlopsConfig) -> list[dict[str, Any]]:
    """What arXiv 2603.06351 prints beside what is computed, by row of its tables.

    The paper does not print how many tokens its trained models keep: with no `kept`, DC-DiTs are taken at 1/N, and
    "implied_kept" is the share before tail drop at which the computed cost is the printed one.

    Returns:
        One mapping per row: model, tail drops, TFLOPs per image printed and computed, the difference, the kept share
        before tail drop that was taken and the one that is implied.
    """
    rows: list[dict[str, Any]] = []
    for printed in published.ROWS:
        model = named_model(config, printed.model)
        natural = (config.kept or 1.0 / config.target) if printed.tail_drop is not None else None
        computed = _published_cost(model, printed, natural)
        rows.append(
            {
                "model": printed.model,
                "tail_drop": printed.tail_drop,
                "uncond_tail_drop": printed.uncond_tail_drop,
                "guided": printed.guided,
                "printed": printed.tflops,
                "computed": round(computed, 3),
                "difference": f"{computed / printed.tflops - 1:+.2%}",
                "kept": natural,
                "implied_kept": None if natural is None else round(_implied(model, printed), 4),
            }
        )
    return rows


def _published_cost(model: DiT | DCDiT, printed: published.Published, natural: float | None) -> float:
    """TFLOPs per image of a published row."""
    kept, unconditional = None, 1.0 if printed.guided else None
    if natural is not None:
        kept = natural * (1.0 - (printed.tail_drop or 0.0))
        if printed.guided:
            unconditional = natural * (1.0 - (printed.uncond_tail_drop or 0.0))
    return flops_per_image(model, kept, unconditional) * published.STEPS / 1e12


def _implied(model: DiT | DCDiT, printed: published.Published) -> float:
    """The kept share at which the cost is the printed one; cost rises with it."""
    low, high = 0.01, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _published_cost(model, printed, middle) < printed.tflops else (low, middle)
    return (low + high) / 2
