"""The recipe: one strict, frozen model of everything a training run depends on."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from tokdyn.data import DataConfig
from tokdyn.diffusion.objective import Objective
from tokdyn.diffusion.sampling import Sampler
from tokdyn.recipe.model_settings import BASE, ModelSettings
from tokdyn.section import Count, Fraction, Positive, Section
from tokdyn.upcycling.settings import UpcycleSettings


class OptimizerSettings(Section):
    """AdamW and its learning rate.

    Attributes:
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay, applied to tensors of two or more dimensions.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        warmup_steps: The rate rises linearly over this many steps.
        decay: What the rate does after the warm-up: stays, or falls to `final_lr` at the last step.
        final_lr: Where a decay ends, as a fraction of `lr`.
        clip: Largest norm of the whole gradient; null leaves it alone.
        implementation: Which of torch's AdamW kernels runs: fused (the fastest where it exists), foreach or loop.
    """

    lr: Annotated[float, Field(gt=0.0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    warmup_steps: Count = 0
    decay: Literal["none", "linear", "cosine"] = "none"
    final_lr: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    clip: Annotated[float, Field(gt=0.0)] | None = 1.0
    implementation: Literal["fused", "foreach", "loop"] = "fused"


class ChunkingSettings(Section):
    """What training adds for a chunking model (arXiv 2603.06351).

    Attributes:
        ratio_weight: Weight of the ratio loss that holds the kept fraction near 1/N.
        ratio_group: The loss pools this many samples; null pools the whole micro-batch.
        tail_drops: After the warm-up each step draws one of these tail-drop fractions (multi-budget training).
        draw: One fraction for the whole step, or one for each sample.
        budget_warmup_steps: Steps trained without tail drop first.
        curriculum: Points (step, N) of the target; empty keeps the model's own N throughout.
        interpolation: Between two points N is held, or moves in a straight line.
        calibrate: Start with the router's bias set so that 1/N of a first batch is kept (not with the model's
            `official_init`).
    """

    ratio_weight: Annotated[float, Field(ge=0.0)] = 0.03
    ratio_group: Positive | None = 16
    tail_drops: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    draw: Literal["step", "sample"] = "step"
    budget_warmup_steps: Count = 5000
    curriculum: tuple[tuple[Count, Annotated[float, Field(gt=1.0)]], ...] = ()
    interpolation: Literal["hold", "linear"] = "linear"
    calibrate: bool = True

    @model_validator(mode="after")
    def _steps_rise(self) -> Self:
        if any(later[0] <= earlier[0] for earlier, later in pairwise(self.curriculum)):
            raise ValueError("the steps of the curriculum should rise from point to point")
        return self


class TrainingSettings(Section):
    """The length and the mechanics of a run.

    Attributes:
        batch_size: Images per optimizer step, over all devices and accumulated micro-batches together.
        images: Length of the run in images; the last step is the first that reaches it.
        steps: Length of the run in optimizer steps, instead of `images`.
        accumulation: Micro-batches per step on each device.
        precision: bf16 computes matrix products in bfloat16 (in fp32 on a CPU that has no instructions for it) and
            keeps fp32 weights; fp32 computes in fp32.
        ema: Decay of the averaged weights.
        ema_warmup: Use min(ema, (1 + t) / (10 + t)) at step t, so that short runs forget their start.
        label_dropout: Fraction of labels replaced by the null class, for guidance.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        compile: Run torch.compile on nothing, on the convolutional scaffold (or, in a DiT, nothing), on the
            transformer blocks, or on both.
        workers: Processes that load data.
        log_every: Steps per line of metrics.
        checkpoint_every: Steps per checkpoint.
        checkpoint_minutes: Also write a checkpoint when this long has passed since the last one.
        keep_checkpoints: How many to keep; older ones are removed.
        sample_every: Steps per preview; null writes none.
        trackers: Names of accelerate trackers that also get the metrics, such as "tensorboard" or "wandb".
    """

    batch_size: Positive = 256
    images: Positive | None = None
    steps: Positive | None = None
    accumulation: Positive = 1
    precision: Literal["bf16", "fp32"] = "bf16"
    ema: Fraction = 0.9999
    ema_warmup: bool = True
    label_dropout: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    gradient_checkpointing: bool = False
    compile: Literal[False, "scaffold", "blocks", "all"] = False
    workers: Count = 0
    log_every: Positive = 50
    checkpoint_every: Positive = 5000
    checkpoint_minutes: Annotated[float, Field(gt=0.0)] | None = None
    keep_checkpoints: Positive = 2
    sample_every: Positive | None = None
    trackers: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.images is not None and self.steps is not None:
            raise ValueError("set either images or steps, not both; write images=null or steps=null for the other")
        return self


class PreviewSettings(Section):
    """The sample grid and boundary map written every `training.sample_every` steps.

    Attributes:
        sampler: How to sample; null takes 25 steps of ddim, or of euler for a flow, without guidance.
        images: How many images; classes are dealt out in turn.
        seed: Image i always starts from noise seed + i, so previews can be compared over time.
        tail_drops: One grid per fraction (a chunking model only).
        maps: Draw the boundary maps too (a chunking model only).
    """

    sampler: Sampler | None = None
    images: Positive = 16
    seed: Count = 0
    tail_drops: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (0.0,)
    maps: bool = True


class ComputeMatch(Section):
    """Train for as long as a baseline's FLOPs last (arXiv 2603.06351, settings).

    Attributes:
        baseline: Name of the DiT that is matched, such as "S/2", on the same data.
        steps: Optimizer steps of the baseline at the same batch size.
        kept: Fraction of tokens that the model keeps before tail drop; null assumes 1/N.
    """

    baseline: str
    steps: Positive
    kept: Annotated[float, Field(gt=0.0, le=1.0)] | None = None


class Recipe(Section):
    """Everything a training run depends on. Equal recipes on equal machines train equal models.

    Attributes:
        name: Names the run; also the default folder, runs/NAME.
        description: What the recipe is for, in a sentence.
        seed: Of the weights, the data order, the noise and every other draw.
        out: Folder to write to; null means runs/NAME.
        model: The network.
        data: What it learns from.
        objective: What it learns.
        optimizer: How.
        chunking: Only for a chunking model, where it defaults to the paper's settings.
        training: Length, precision, logging and checkpoints.
        preview: What to draw during the run.
        compute_match: Derive the number of steps from a baseline's compute, instead of `training.steps`.
        upcycle: Begin with the blocks of a pretrained DiT; `model.name` is "base" then.
    """

    name: Annotated[str, Field(pattern=r"^\w[\w.+-]*(/\w[\w.+-]*)*$")] = "run"
    description: str = ""
    seed: Count = 0
    out: str | None = Field(default=None, coerce_numbers_to_str=True)
    model: ModelSettings
    data: DataConfig
    objective: Objective = Field(default_factory=Objective)
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    chunking: ChunkingSettings | None = None
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    preview: PreviewSettings = Field(default_factory=PreviewSettings)
    compute_match: ComputeMatch | None = None
    upcycle: UpcycleSettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _default_chunking(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("chunking") is None:
            model = data.get("model")
            kind = model.get("kind", "dcdit") if isinstance(model, dict) else getattr(model, "kind", None)
            if kind == "dcdit":
                return {**data, "chunking": {}}
        return data

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.model.kind == "dit" and self.chunking is not None:
            raise ValueError("a 'dit' has no router, so the section 'chunking' has no effect; write chunking=null")
        if self.chunking and self.chunking.curriculum and self.chunking.curriculum[-1][1] != self.model.target:
            raise ValueError(
                f"the curriculum ends at N = {self.chunking.curriculum[-1][1]:g} but model.target is "
                f"{self.model.target:g}; make them equal"
            )
        if self.chunking and self.chunking.curriculum and getattr(self.model, "router", None) == "random":
            raise ValueError(
                "a random router learns nothing, so the curriculum has no effect; write chunking.curriculum=[]"
            )
        if (self.model.name == BASE) != (self.upcycle is not None):
            raise ValueError(
                "model.name=base takes the sizes of the model that upcycle.base names; set both, or neither"
            )
        if self.upcycle is not None:
            self._upcycles(self.upcycle)
        lengths = (self.training.images, self.training.steps, self.compute_match)
        if sum(length is not None for length in lengths) != 1:
            raise ValueError("set exactly one of training.images, training.steps and compute_match")
        if self.compute_match and self.model.kind == "dit":
            raise ValueError("compute_match is for a chunking model; give a 'dit' its training.steps")
        return self

    def _upcycles(self, settings: UpcycleSettings) -> None:
        if self.compute_match is not None:
            raise ValueError("give an upcycled model its training.steps, compute_match is for one from scratch")
        if self.model.kind == "dit" and not settings.methods:
            raise ValueError("a 'dit' from a base is that base; attach upcycle.methods, or make it a 'dcdit'")
        if self.model.kind == "dit" and self.model.overrides:
            raise ValueError(f"{next(iter(self.model.overrides))!r} follows from the base of a 'dit'; leave it out")

    @property
    def folder(self) -> str:
        """The folder that the run writes to."""
        return str(Path(self.out).expanduser()) if self.out else f"runs/{self.name}"
