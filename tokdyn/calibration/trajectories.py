"""Draw a few images with a model on disk, and record its calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokdyn.bases.names import names_pipeline
from tokdyn.bases.table import INDEX
from tokdyn.calibration.config import CalibrateConfig
from tokdyn.data.vae import quiet_diffusers
from tokdyn.diffusion.objective import Objective
from tokdyn.diffusion.records import StepState
from tokdyn.diffusion.sampling import generate
from tokdyn.diffusion.schedulers import default_scheduler, open_scheduler
from tokdyn.diffusion.settings import Sampler
from tokdyn.errors import CheckpointError, RecipeError
from tokdyn.files import json_object, user_path
from tokdyn.host import product_type
from tokdyn.pipelines import denoisers
from tokdyn.pipelines.drawing import call_arguments, draw
from tokdyn.pipelines.opening import open_pipeline
from tokdyn.progress import progress
from tokdyn.prompts import Drawing
from tokdyn.recorder import Call, recording
from tokdyn.sample.labels import class_numbers
from tokdyn.sample.loading import ModelInfo, load_model
from tokdyn.seeds import noise_generator


@dataclass(frozen=True)
class Subject:
    """One or several models, and how to draw images with them.

    Attributes:
        models: on their device, by their names in the pipeline; "" is the only one.
        name: name of the run, folder or file.
        scheduler: name of the scheduler.
        classes: labels that the images cycle through.
        draw: draws one image per label and seed, and calls a function after every step.
        steps: how often that is in one call of `draw`.
    """

    models: dict[str, nn.Module]
    name: str
    scheduler: str
    classes: tuple[int, ...]
    draw: Callable[[list[int], list[int], Callable[[], None]], None]
    steps: int


def open_subject(config: CalibrateConfig, device: torch.device) -> Subject:
    """Load the model to calibrate.

    Raises:
        TokdynError: the model does not exist, or the settings do not fit it.
    """
    path = user_path(config.model)
    if names_pipeline(config.model, wanted=config.prompts is not None):
        return _prompted(config, device)
    for name in ("height", "width", "frames"):
        if getattr(config, name) is not None:
            raise RecipeError(f"{name} is for pipelines that draw prompts, which {config.model} is not: leave it out.")
    return _pipeline(config, path, device) if (path / INDEX).is_file() else _own(config, device)


def trajectories(config: CalibrateConfig, subject: Subject) -> dict[str, list[Call]]:
    """Record the calls of each model while the images are drawn."""
    recorded: dict[str, list[Call]] = {name: [] for name in subject.models}
    batches = -(-config.count // config.batch_size)
    with progress("sampling", batches * subject.steps) as advance:
        for start in range(0, config.count, config.batch_size):
            images = range(start, min(start + config.batch_size, config.count))
            labels = [subject.classes[image % len(subject.classes)] for image in images]
            with ExitStack() as stack:
                calls = {
                    name: stack.enter_context(recording(model, host=True)) for name, model in subject.models.items()
                }
                subject.draw(labels, [config.seed + image for image in images], lambda: advance(1))
            for name, own in calls.items():
                recorded[name] += own
    return recorded


def _own(config: CalibrateConfig, device: torch.device) -> Subject:
    """Open a model of tokdyn, sampled like `tokdyn sample` does."""
    model, objective, info = load_model(config.model, config.ema)
    model.to(device)
    sampler = Sampler(
        scheduler=config.scheduler, steps=config.steps, guidance=config.guidance, clip=_of_pixels(model, info)
    )

    def draw(labels: list[int], seeds: list[int], step: Callable[[], None]) -> None:
        def after_step(_: StepState) -> None:
            step()

        generate(model, sampler, objective, labels, seeds, callback=after_step)

    classes = class_numbers(config.classes, info, model)
    return Subject({"": model}, info.name, _scheduler(config, objective), classes, draw, config.steps)


def _scheduler(config: CalibrateConfig, objective: Objective) -> str:
    """Return the name of the scheduler, after checking before any drawing that it fits."""
    name = config.scheduler or default_scheduler(objective)
    open_scheduler(name, config.steps, objective)
    return name


def _of_pixels(model: Any, info: ModelInfo) -> bool:
    """Whether the model predicts pixels, so that a predicted image can be clamped to [-1, 1]."""
    if info.data is not None:
        return info.data.kind != "latents"
    return info.latents is None and model.config.in_channels in (1, 3)


def _prompted(config: CalibrateConfig, device: torch.device) -> Subject:
    """Open a pipeline that draws prompts, with its own scheduler."""
    given = config.model_fields_set
    for name in ("classes", "scheduler", "ema"):
        if name in given:
            raise RecipeError(f"{name} has no effect on a pipeline that draws prompts: leave it out.")
    drawing = Drawing(
        prompts=config.prompts or ("a photo",),
        steps=config.steps if "steps" in given else None,
        guidance=config.guidance if "guidance" in given else None,
        height=config.height,
        width=config.width,
        frames=config.frames,
    )
    bf16 = product_type(config.precision, device) is not None
    pipe = open_pipeline(config.model, device, "bf16" if bf16 else "fp32")
    calls = call_arguments(pipe, drawing)

    def draw_prompts(labels: list[int], seeds: list[int], step: Callable[[], None]) -> None:
        for label, seed in zip(labels, seeds, strict=True):
            draw(pipe, calls[label], seed)
        step()

    name, scheduler = Path(config.model).name, type(pipe.scheduler).__name__
    found = {name: model.eval() for name, model in denoisers(pipe).items()}
    models = found if len(found) > 1 else {"": next(iter(found.values()))}
    return Subject(models, name, scheduler, tuple(range(len(calls))), draw_prompts, 1)


def _pipeline(config: CalibrateConfig, path: Path, device: torch.device) -> Subject:
    """Open a DiTPipeline of diffusers with its own scheduler."""
    import diffusers

    kind = str(json_object(path / INDEX).get("_class_name"))
    if kind != "DiTPipeline":
        raise CheckpointError(
            f"{path} is a {kind}, which has no transformer that this command knows; see tokdyn models."
        )
    if config.scheduler is not None:
        raise RecipeError(
            f"scheduler={config.scheduler} has no effect, since a pipeline samples with its own: leave it out."
        )
    try:
        with quiet_diffusers():
            pipeline: Any = diffusers.DiTPipeline.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be loaded as a DiTPipeline: {error}") from error
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    model = pipeline.transformer.eval()
    total = int(model.config.num_embeds_ada_norm)

    def draw(labels: list[int], seeds: list[int], step: Callable[[], None]) -> None:
        generators = [noise_generator(seed) for seed in seeds]
        with _after_each(model, step):
            pipeline(
                class_labels=labels,
                guidance_scale=config.guidance,
                num_inference_steps=config.steps,
                generator=generators,
                output_type="pt",
            )

    name, scheduler = path.resolve().name, type(pipeline.scheduler).__name__
    return Subject({"": model}, name, scheduler, _numbers(config, total), draw, config.steps)


def _numbers(config: CalibrateConfig, total: int) -> tuple[int, ...]:
    """Return the classes of a pipeline by number, or all of them."""
    if config.classes is None:
        return tuple(range(total))
    wrong = [label for label in config.classes if not (isinstance(label, int) or label.isdecimal())]
    numbers = [int(label) for label in config.classes if label not in wrong]
    wrong += [str(number) for number in numbers if not 0 <= number < total]
    if wrong or not numbers:
        raise RecipeError(
            f"class {wrong[0] if wrong else 'list'} does not exist; the classes of a pipeline are the numbers 0 to "
            f"{total - 1}."
        )
    return tuple(numbers)


@contextmanager
def _after_each(model: nn.Module, step: Callable[[], None]) -> Iterator[None]:
    """Call a function after every call of a model within this context."""

    def hook(*_: Any) -> None:
        step()

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
