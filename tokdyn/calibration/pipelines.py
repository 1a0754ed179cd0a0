"""Upcycling the transformer of a text-to-image pipeline on images that the pipeline draws itself."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

import tokdyn
from tokdyn.attach.entry import attached
from tokdyn.calibration.recording import recording
from tokdyn.calibration.replay import evaluating
from tokdyn.cost import flops
from tokdyn.errors import CheckpointError, InputError
from tokdyn.files import UserPath, json_object, replacing, require_folder
from tokdyn.host import describe, open_device, settle_memory
from tokdyn.report.grids import image_grid
from tokdyn.report.pixels import write_png
from tokdyn.seeds import Stream, seed_everything
from tokdyn.upcycling.conversion import check_method, upcycle
from tokdyn.upcycling.pipelines import DistilSettings, distil, require_unused

INDEX, REPORT, PICTURE, BEGUN = "model_index.json", "upcycle.json", "images.png", "settings.json"
_OWN = ("DiTTransformer2DModel", "DiT", "DCDiT")  # of class-conditional pipelines, which recipes train


def _listed(value: Any) -> Any:
    """One prompt as a list; a file as its lines."""
    if isinstance(value, str):
        path = Path(value).expanduser()
        if path.suffix == ".txt":
            if not path.is_file():
                raise ValueError(f"there is no file {value}")
            return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [value]
    return value


class PipelineConfig(BaseModel):
    """Settings of `tokdyn upcycle` for a pipeline of diffusers.

    Attributes:
        base: Folder of the pipeline.
        out: Folder to write to; None means upcycled/NAME, after the pipeline.
        prompts: What to draw, or a .txt file with a prompt in every line.
        target: N of the chunking, cells per kept token.
        sampling_steps: Model calls per image; None takes the pipeline's own.
        guidance: Scale of guidance; None takes the pipeline's own.
        height: Of the images in pixels; None takes the pipeline's own.
        width: The same.
        steps: Optimizer steps.
        calls: Recorded calls per step.
        lr: Learning rate.
        warmup_steps: The rate rises linearly over this many steps.
        trained: `methods` trains their parts alone; `all` trains the transformer too, beside a copy of it.
        seed: Of images and training.
        checkpoint_every: Steps between checkpoints.
        precision: Of the pipeline's weights.
        device: `auto` (a GPU if there is one), or a torch device such as `cpu` or `cuda:1`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str
    out: UserPath | None = None
    prompts: Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)] = ("a photo",)
    target: Annotated[float, Field(gt=1.0)] = 4.0
    sampling_steps: PositiveInt | None = None
    guidance: Annotated[float, Field(ge=0.0)] | None = None
    height: PositiveInt | None = None
    width: PositiveInt | None = None
    steps: PositiveInt = 1000
    calls: PositiveInt = 1
    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    trained: Literal["methods", "all"] = "methods"
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    checkpoint_every: PositiveInt = 100
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"

    @model_validator(mode="after")
    def _both_sides(self) -> Self:
        if (self.height is None) != (self.width is None):
            raise ValueError("give both height and width, or neither")
        if self.trained == "all" and self.precision == "bf16":
            raise ValueError("trained=all needs precision=fp32: small steps are lost in bf16 weights")
        return self

    @property
    def distillation(self) -> DistilSettings:
        """The settings of the training."""
        names = set(DistilSettings.model_fields) & set(type(self).model_fields)
        return DistilSettings(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class PipelineResult:
    """What `upcycle_pipeline` made.

    Attributes:
        folder: with `methods`, metrics, a report (errors are means over the first and last tenth of the steps) and a
            picture of images before and after.
        report: what upcycle.json holds.
    """

    folder: Path
    report: dict[str, Any]


def is_pipeline(base: str | None) -> bool:
    """Whether a base is the folder of a pipeline whose transformer no recipe trains."""
    path = Path(base or "").expanduser() / INDEX
    if base is None or not path.is_file():
        return False
    entry = json_object(path).get("transformer")
    return isinstance(entry, list) and len(entry) == 2 and entry[1] not in _OWN


def upcycle_pipeline(
    config: PipelineConfig, methods: list[str], resume: bool = False, tell: Callable[[str], None] = lambda text: None
) -> PipelineResult:
    """Draw images, record what the transformer was called with, and distil it against itself with all tokens.

    Args:
        config: the settings.
        methods: "dc", "dydit" or both.
        resume: continue from the last checkpoint in the folder; the images are drawn again from the same seeds.
        tell: is given a report before the first step: what learns, what is frozen, tokens and FLOPs of a call.

    Raises:
        TokdynError: the pipeline cannot be read, or its transformer does not take the methods.
    """
    settle_memory()
    for name in methods:
        check_method(name)
    device = open_device(config.device)
    out = config.out or Path("upcycled") / Path(config.base).name
    require_folder(out)
    own = {**config.model_dump(mode="json", exclude={"steps", "checkpoint_every", "out", "device"}), "methods": methods}
    if not resume:
        require_unused(out)  # before images are drawn in vain
    elif (out / BEGUN).is_file():
        changed = [name for name, value in json_object(out / BEGUN).items() if own.get(name) != value]
        if changed:
            raise CheckpointError(
                f"{out} was begun with other settings: {', '.join(changed)}; set them back to resume it."
            )
    pipe = _open(config, device)
    with recording(pipe.transformer) as calls:
        before = _draw(pipe, config, device)
    arguments = {"target": config.target} if "dc" in methods else {}
    seed_everything(config.seed, Stream.WEIGHTS)
    student = upcycle(pipe.transformer, methods, **arguments)
    teacher = pipe.transformer if config.trained == "all" else None
    if teacher is None:
        pipe.transformer = None  # one copy is enough
    told = _told(student, calls[0], config)
    tell("\n".join(f"{what:<12} {text}" for what, text in told.items()))
    result = distil(student, calls, out, config.distillation, teacher=teacher, resume=resume, facts=own)
    pipe.transformer = student.eval()
    after = _draw(pipe, config, device)
    titles = ["all tokens", "upcycled"]
    both = np.stack([before, after], axis=1).reshape(-1, *before.shape[1:])
    shown = [prompt[:40] for prompt in config.prompts]
    write_png(image_grid(both, columns=2, row_titles=shown, column_titles=titles), out / PICTURE)
    run, tenth = tokdyn.stats(student), max(1, len(result.rows) // 10)
    report = {
        "tokdyn": tokdyn.__version__,
        "settings": config.model_dump(mode="json"),
        "methods": methods,
        "model": type(student).__name__,
        "before_the_first_step": told,
        "calls": len(calls),
        "error": {"first": _mean(result.rows[:tenth]), "last": _mean(result.rows[-tenth:])},
        "share_of_block_flops": run.share,
        "machine": describe(device),
    }
    with replacing(out / REPORT) as half:
        half.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return PipelineResult(out, report)


def _told(student: Any, call: Mapping[str, Any], config: PipelineConfig) -> dict[str, str]:
    """What learns, what is frozen, and what a recorded call costs with all tokens and with those that are kept."""
    parts = attached(student).parts
    own = {id(parameter) for parameter in parts.parameters()}
    whole = sum(parameter.numel() for parameter in student.parameters() if id(parameter) not in own)
    new = sum(parameter.numel() for parameter in parts.parameters())
    with evaluating(student):
        found = flops(student, **call)
    lines = {
        "kept as is": f"{whole:,} parameters of the {type(student).__name__}",
        "new": f"{new:,} parameters ({', '.join(type(each).__name__ for each in attached(student).methods)})",
        "frozen": "all but what is new" if config.trained == "methods" else "nothing; a copy of the original teaches",
    }
    if found.dense:
        lines["call"] = (
            f"{found.dense / found.batch / 1e9:,.3f} GFLOP per image before, {found.per_image / 1e9:,.3f} after "
            f"({found.total / found.dense:.2f}x, multiply-add = 2)"
        )
    return lines


def _mean(rows: Sequence[dict[str, float]]) -> float:
    """The error of the output, mean over some steps."""
    return sum(row["output"] for row in rows) / len(rows)


def _open(config: PipelineConfig, device: torch.device) -> Any:
    import diffusers

    reader: Any = diffusers.DiffusionPipeline
    try:
        pipe = reader.from_pretrained(config.base)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{config.base} cannot be read as a pipeline of diffusers: {error}") from error
    if not isinstance(getattr(pipe, "transformer", None), torch.nn.Module):
        raise InputError(f"the {type(pipe).__name__} in {config.base} has no transformer to upcycle.")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, torch.bfloat16) if config.precision == "bf16" else pipe.to(device)


def _draw(pipe: Any, config: PipelineConfig, device: torch.device) -> Any:
    """One image for every prompt, (P, H, W, 3) uint8."""
    known = inspect.signature(pipe.__call__).parameters
    wanted = {
        "num_inference_steps": config.sampling_steps,
        "guidance_scale": config.guidance,
        "height": config.height,
        "width": config.width,
    }
    given: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InputError(f"{type(pipe).__name__} has no {unknown[0]}; leave it out.")
    if config.height is not None and "use_resolution_binning" in known:
        given["use_resolution_binning"] = False  # that size and no other
    images = []
    for number, prompt in enumerate(config.prompts):
        generator = torch.Generator(device.type).manual_seed(config.seed + number)
        try:
            made = pipe(prompt, generator=generator, output_type="np", **given).images
        except (TypeError, ValueError) as error:
            raise InputError(f"{type(pipe).__name__} does not draw with these settings: {error}") from error
        images.append((255.0 * np.asarray(made)[0]).round().clip(0, 255).astype(np.uint8))
    return np.stack(images)
