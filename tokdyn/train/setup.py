"""Build the parts of a training run from its recipe: data, model, optimizer and averaged weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import nn

from tokdyn.data import BatchStream, Dataset, LatentDataset, open_data
from tokdyn.data.vae import weights_digest
from tokdyn.errors import RecipeError
from tokdyn.recipe import OptimizerSettings, Recipe
from tokdyn.recipe.build import build_model, open_base, total_steps
from tokdyn.recipe.explain import nearest
from tokdyn.seeds import Stream, seed_everything
from tokdyn.train import schedule
from tokdyn.train.ema import Ema
from tokdyn.train.sharding import asked_sharding, sharding_of, skeleton_of
from tokdyn.train.snapshot import Trainee
from tokdyn.train.step import autocast
from tokdyn.train.window import Window
from tokdyn.upcycling.comparison import UpcycleReport, report
from tokdyn.upcycling.distillation import Distillation
from tokdyn.upcycling.phases import always_frozen, freeze

_CALIBRATION_IMAGES = 64
_DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


@dataclass(frozen=True)
class Run:
    """A run that is ready to take its next step.

    Attributes:
        recipe: The recipe.
        accelerator: Holds the device and the connection to the other processes.
        dataset: The images and labels to train on.
        stream: The micro-batches of this process; micro-batch m of a step has the index `step * accumulation + m`.
        trainee: Model, averaged weights, optimizer and sums of metrics.
        wrapped: The module that a training step calls: the model, or the `Distillation` of an upcycled model, with its
            data-parallel wrapper if there are several processes with replicas.
        stepper: The optimizer, wrapped by accelerate unless weights are sharded.
        steps: Optimizer steps of the whole run.
        base: Name ("base") and SHA-256 ("sha256") of the base of an upcycled model; None for other models.
        upcycled: What an upcycled model copied from its base; None for other models.
    """

    recipe: Recipe
    accelerator: Accelerator
    dataset: Dataset
    stream: BatchStream
    trainee: Trainee
    wrapped: Any
    stepper: Any
    steps: int
    base: dict[str, str] | None = None
    upcycled: UpcycleReport | None = None

    @property
    def sharded(self) -> bool:
        """Whether the processes share the weights; if not, each has all of them."""
        return self.trainee.skeleton is not None

    @property
    def micro_batch(self) -> int:
        """Images per micro-batch on one device."""
        return self.stream.batch_size

    def slot(self, micro: int) -> int:
        """Return the index of this process's micro-batch `micro` among those of all processes in a step."""
        return micro * self.stream.world + self.stream.rank


def open_accelerator(recipe: Recipe) -> Accelerator:
    """Choose the device, and connect to the other processes if there are any.

    Raises:
        RecipeError: A tracker is not installed, or the launcher asks for a kind of parallelism other than replicas and
            FSDP2, or for what training does not do.
    """
    sharding = asked_sharding(recipe)
    known = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    missing = [name for name in recipe.training.trackers if name not in known]
    if missing:
        raise RecipeError(
            f"training.trackers names {missing[0]}, which is not installed here{nearest(missing[0], known)}; install "
            "it, or remove it from training.trackers."
        )
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",  # autocast is part of the step, so that sampling and training use the same one
        log_with=list(recipe.training.trackers) or None,
        project_dir=recipe.folder,
        # the parts of an upcycled model that have gradients differ from phase to phase
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)] if recipe.upcycle else None,
    )
    sharded = sharding is not None and accelerator.distributed_type == DistributedType.FSDP
    if accelerator.distributed_type not in _DISTRIBUTED and not sharded:
        raise RecipeError(
            "Training runs on one device, as data-parallel replicas or sharded by FSDP2, not as "
            f"{accelerator.distributed_type.value}; launch it with `torchrun --nproc_per_node N -m tokdyn.cli.main "
            "train RECIPE`."
        )
    return accelerator


def micro_batch_size(recipe: Recipe, processes: int) -> int:
    """Return the number of images in a micro-batch.

    Args:
        recipe: The recipe.
        processes: Number of processes that train together.

    Raises:
        RecipeError: The batch size is not a multiple of processes times accumulated micro-batches.
    """
    training = recipe.training
    parts = training.accumulation * processes
    if training.batch_size % parts:
        raise RecipeError(
            f"training.batch_size is {training.batch_size}, which does not divide over {processes} processes times "
            f"training.accumulation={training.accumulation}; choose a multiple of {parts}."
        )
    return training.batch_size // parts


def open_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Build AdamW for the trainable parameters. Vectors and scalars, such as biases, get no weight decay."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=settings.implementation == "fused",
        foreach=settings.implementation == "foreach",
    )


def calibrate(model: Any, recipe: Recipe, dataset: Dataset, device: torch.device) -> None:
    """Set the router's bias so that it keeps 1/N of the tokens of one batch, N being that of the first step.

    The batch and its noise depend on the seed alone, so that all processes get the same bias.

    Args:
        model: A DCDiT on `device`; changed in place.
        recipe: The recipe, with a section `chunking`.
        dataset: The data to take the batch from.
        device: The device of the model.
    """
    count = min(_CALIBRATION_IMAGES, len(dataset))
    x, labels = BatchStream(dataset, count, recipe.seed)[0]
    seed_everything(recipe.seed, Stream.CALIBRATION)
    noised = recipe.objective.add_noise(x)
    assert recipe.chunking is not None  # every recipe of a chunking model has the section
    target = schedule.target(recipe.chunking, model.config.target, 0)
    with torch.no_grad(), autocast(device, recipe.training.precision):
        model.calibrate_router(noised.x_t.to(device), noised.timestep.to(device), labels.to(device), target)


def compile_parts(model: Any, parts: str | bool) -> None:
    """Compile parts of a model with torch.compile, in place. Parameter names, and so checkpoints, stay the same.

    Args:
        model: A DiT or DCDiT.
        parts: The setting `training.compile`: False (nothing), "blocks", "scaffold" (the encoder and decoder of a
            DCDiT; nothing for a DiT) or "all".
    """
    if parts in ("blocks", "all"):
        for block in model.blocks:
            block.compile(dynamic=hasattr(model, "encoder"))  # the number of kept tokens differs from step to step
    if parts in ("scaffold", "all") and hasattr(model, "encoder"):
        model.encoder.compile(dynamic=False)
        model.decoder.compile(dynamic=False)


def model_info(recipe: Recipe, dataset: Dataset, base: dict[str, str] | None = None) -> dict[str, Any]:
    """Return the contents of the tokdyn.json that is saved beside the weights: objective, data, class names, base."""
    return {
        "name": recipe.name,
        "objective": recipe.objective.model_dump(mode="json"),
        "data": recipe.data.model_dump(mode="json", exclude={"path"}),
        "latents": dataset.index.origin.model_dump(mode="json") if isinstance(dataset, LatentDataset) else None,
        "class_names": list(dataset.class_names),
        **({} if base is None else {"upcycled": base}),
    }


def set_up(recipe: Recipe, accelerator: Accelerator, fresh: bool = True) -> Run:
    """Build the parts of a run, in the same order and from the same seed on every process.

    Args:
        recipe: The recipe.
        accelerator: The result of `open_accelerator`.
        fresh: Whether the run starts at step 0. Only then is the router calibrated; a checkpoint holds its bias.

    Raises:
        TokdynError: The recipe, the data or the base are wrong.
    """
    dataset = open_data(recipe.data)
    micro_batch = micro_batch_size(recipe, accelerator.num_processes)
    stream = BatchStream(
        dataset, micro_batch, recipe.seed, accelerator.process_index, accelerator.num_processes, recipe.data.flip
    )
    steps = total_steps(recipe, dataset.shape, dataset.num_classes)
    base = None if recipe.upcycle is None else open_base(recipe, dataset.shape, dataset.num_classes)
    seed_everything(recipe.seed, Stream.WEIGHTS)
    model = build_model(recipe, dataset.shape, dataset.num_classes, base=base).to(accelerator.device)
    if fresh and recipe.chunking is not None and recipe.chunking.calibrate and not model.config.official_init:
        calibrate(model, recipe, dataset, accelerator.device)
    model.train()
    called, identity, upcycled = model, None, None
    if recipe.upcycle is not None and base is not None:
        identity = {"base": recipe.upcycle.base, "sha256": weights_digest(base)}
        freeze(model, always_frozen(recipe.upcycle))
        upcycled = report(base, model)
        called = Distillation(model, base.to(accelerator.device) if recipe.upcycle.needs_teacher else None)
    ema = Ema(model, recipe.training.ema, recipe.training.ema_warmup)
    if recipe.training.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    sharding, skeleton = sharding_of(recipe, accelerator), None
    if sharding is not None:
        skeleton = skeleton_of(ema.model)
        for each in (model, ema.model):
            sharding.shard(each, accelerator)
        ema.follow(model)
    optimizer = open_optimizer(model, recipe.optimizer)
    window = Window(accelerator.device, recipe.training.loss_limit)
    trainee = Trainee(model, ema, optimizer, window, model_info(recipe, dataset, identity), skeleton)
    compile_parts(model, recipe.training.compile)
    wrapped, stepper = (called, optimizer) if sharding else accelerator.prepare(called, optimizer)
    return Run(recipe, accelerator, dataset, stream, trainee, wrapped, stepper, steps, identity, upcycled)
