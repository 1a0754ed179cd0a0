"""Define the recipe: everything that a training run depends on, checked by pydantic; unknown keys are refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from tokdyn.data import DataConfig
from tokdyn.diffusion.objective import Objective
from tokdyn.diffusion.settings import Sampler
from tokdyn.files import user_path
from tokdyn.limits import BATCH, WORKERS
from tokdyn.models.sizes import dit_settings
from tokdyn.recipe.model_settings import BASE, ModelSettings
from tokdyn.section import Count, Divisor, Fraction, Positive, Section, Seed, at_most
from tokdyn.upcycling.settings import UpcycleSettings


class OptimizerSettings(Section):
    """AdamW and its learning rate.

    Attributes:
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay, applied to tensors with two or more dimensions.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        warmup_steps: Number of steps over which the learning rate rises linearly.
        decay: Learning rate after the warm-up: constant (none), or falling to the final one at the last step.
        final_lr: Final learning rate of a decay, as a fraction of `lr`.
        clip: Largest norm of the gradient of all parameters together; null does not clip.
        implementation: Implementation of AdamW in torch: fused (the fastest, if the device has it), foreach or loop.
    """

    lr: Annotated[float, Field(gt=0.0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Divisor = 1e-8
    warmup_steps: Count = 0
    decay: Literal["none", "linear", "cosine"] = "none"
    final_lr: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    clip: Annotated[float, Field(gt=0.0)] | None = 1.0
    implementation: Literal["fused", "foreach", "loop"] = "fused"


class ChunkingSettings(Section):
    """The training of a chunking model, one with a router that keeps some of its tokens (arXiv 2603.06351).

    N is the model's target: one of N tokens should be kept.

    Attributes:
        ratio_weight: Weight of the ratio loss, which holds the kept share at 1/N.
        ratio_group: Number of images, consecutive in the batch of a step, over which the ratio loss averages the kept
            share; null averages over the whole batch. If groups span accumulated micro-batches, a pass of the router
            over all of them comes before each step.
        tail_drops: Tail drops (shares of the kept tokens to drop) to draw from after the warm-up, for multi-budget
            training.
        draw: Draw one tail drop per step, or one per sample.
        budget_warmup_steps: Number of steps at the start that are trained without tail drop.
        curriculum: Points (step, N) of the target; if empty, N is the model's target throughout.
        interpolation: Between two points, hold the N of the earlier one, or interpolate linearly.
        calibrate: Before the first step, set the router's bias so that 1/N of the tokens of one batch are kept. It has
            no effect if the model has `official_init`.
        on_collapse: What to do if the router keeps, or leaves out, less than a third of what it should in two log
            lines in a row: say so once, or stop.
    """

    ratio_weight: Annotated[float, Field(ge=0.0)] = 0.03
    ratio_group: Positive | None = 16
    tail_drops: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    draw: Literal["step", "sample"] = "step"
    budget_warmup_steps: Count = 5000
    curriculum: tuple[tuple[Count, Annotated[float, Field(gt=1.0)]], ...] = ()
    interpolation: Literal["hold", "linear"] = "linear"
    calibrate: bool = True
    on_collapse: Literal["say", "stop"] = "say"

    @model_validator(mode="after")
    def _steps_rise(self) -> Self:
        if any(later[0] <= earlier[0] for earlier, later in pairwise(self.curriculum)):
            raise ValueError("the steps of the curriculum's points must ascend; sort the points, one for each step")
        return self


class TrainingSettings(Section):
    """The length of a run, and the computation, logging and saving of its steps.

    Attributes:
        batch_size: Images per optimizer step, over all devices and accumulated micro-batches together.
        images: Length of the run in images, rounded up to whole steps.
        steps: Length of the run in optimizer steps, in place of `images`.
        accumulation: Micro-batches per step on each device. They change results by rounding only, but DynamicWidth in
            upcycle.methods costs one more forward per micro-batch if there are several.
        precision: bf16 computes matrix products in bfloat16 (in fp32 on a CPU that has no instructions for it) and
            keeps fp32 weights; fp32 computes in fp32.
        ema: Decay of the averaged weights.
        ema_warmup: Use min(ema, (1 + t) / (10 + t)) at step t = 0, 1, ..., so that the average of a short run forgets
            the initial weights.
        label_dropout: Share of the labels that are replaced by the null class, as guidance needs it.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        sharding: What several processes hold of weights, gradients and moments: replicas of all (none), or their own
            shards, by FSDP2 (full). auto takes shards if accelerate's configuration asks for them, and else replicas.
            It changes results by rounding only.
        compile: Parts to compile with torch.compile: false (none), the convolutional scaffold of a DC-DiT, the
            transformer blocks, or all of these.
        workers: Number of processes that load data; 0 loads them in the main process.
        log_every: Steps between two lines of metrics.
        checkpoint_every: Steps between two checkpoints.
        checkpoint_minutes: Write a checkpoint also if so many minutes have passed since the last one.
        keep_checkpoints: Number of checkpoints to keep; older ones are removed.
        sample_every: Steps between two previews; null draws none.
        trackers: Names of accelerate trackers that receive the metrics too, such as "tensorboard" or "wandb".
        on_bad_loss: What to do if the loss or its gradient is not finite, or the loss exceeds `loss_limit`: stop, skip
            the step, or roll_back to the weights of the newest checkpoint and go on with the next batch. The last two
            wait for the device in every step.
        loss_limit: Largest loss that is not bad; null sets no limit.
        spike: Losses above so many times the median of the last 64 are logged as spikes, with the seed and the samples
            that repeat them; null logs none.
    """

    batch_size: Annotated[Positive, at_most(BATCH)] = 256
    images: Positive | None = None
    steps: Positive | None = None
    accumulation: Annotated[Positive, at_most(BATCH)] = 1
    precision: Literal["bf16", "fp32"] = "bf16"
    ema: Fraction = 0.9999
    ema_warmup: bool = True
    label_dropout: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    gradient_checkpointing: bool = False
    sharding: Literal["auto", "none", "full"] = "auto"
    compile: Literal[False, "scaffold", "blocks", "all"] = False
    workers: Annotated[Count, at_most(WORKERS)] = 0
    log_every: Positive = 50
    checkpoint_every: Positive = 5000
    checkpoint_minutes: Annotated[float, Field(gt=0.0)] | None = None
    keep_checkpoints: Positive = 2
    sample_every: Positive | None = None
    trackers: tuple[str, ...] = ()
    on_bad_loss: Literal["stop", "skip", "roll_back"] = "stop"
    loss_limit: Annotated[float, Field(gt=0.0)] | None = 1e4
    spike: Annotated[float, Field(gt=1.0)] | None = 5.0

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.images is not None and self.steps is not None:
            raise ValueError("images and steps both set the length; set one of them and write null for the other")
        return self


class PreviewSettings(Section):
    """The pictures drawn every `training.sample_every` steps: grids of samples, and maps of the kept tokens.

    Attributes:
        sampler: Settings of sampling; null takes 25 steps of ddim, or of euler for a flow, without guidance.
        images: Number of images; the classes are assigned to them in turn.
        seed: The noise of image i has the seed `seed` + i in every preview, so that previews can be compared.
        tail_drops: Tail drops to sample with, one grid for each (chunking models only).
        maps: Draw the maps too (chunking models only).
    """

    sampler: Sampler | None = None
    images: Annotated[Positive, at_most(BATCH)] = 16
    seed: Seed = 0
    tail_drops: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (0.0,)
    maps: bool = True


def _named(baseline: str) -> str:
    """Return the name of a DiT; raise an InputError, which is a ValueError, if there is none of this name."""
    dit_settings(baseline)
    return baseline


class ComputeMatch(Section):
    """The length of a run that takes as many FLOPs as the training of a baseline (arXiv 2603.06351).

    Attributes:
        baseline: Name of the DiT to match, such as "S/2", trained on the same data.
        steps: Optimizer steps of the baseline, at the same batch size.
        kept: Kept share of the model before tail drop; null assumes 1/N.
    """

    baseline: Annotated[str, AfterValidator(_named)]
    steps: Positive
    kept: Annotated[float, Field(gt=0.0, le=1.0)] | None = None


class Recipe(Section):
    """Everything that a training run depends on. Equal recipes on equal machines train equal models.

    Attributes:
        name: Name of the run, and of its default folder, runs/NAME.
        description: What the recipe is for, in a sentence.
        seed: Seed of the weights, the data order, the noise and every other draw.
        out: Folder to write to; null takes runs/NAME.
        model: The network.
        data: The data to train on.
        objective: What the model is trained to predict, and at which noise levels.
        optimizer: AdamW and the learning rate.
        chunking: The training of a chunking model's router, the paper's settings by default; null for a "dit".
        training: Length, precision, logging and checkpoints.
        preview: Pictures to draw during the run.
        compute_match: Compute the number of steps from a baseline's FLOPs, in place of `training.steps`.
        upcycle: Start from a pretrained DiT; requires model.name=base.
    """

    name: Annotated[str, Field(pattern=r"^\w[\w.+-]*(/\w[\w.+-]*)*$")] = "run"
    description: str = ""
    seed: Seed = 0
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
                f"the curriculum ends at N = {self.chunking.curriculum[-1][1]:g}, but model.target is "
                f"{self.model.target:g}; make them equal"
            )
        if self.chunking and self.chunking.curriculum and getattr(self.model, "router", None) == "random":
            raise ValueError(
                "a random router is not trained, so the curriculum has no effect; write chunking.curriculum=[]"
            )
        if (self.model.name == BASE) != (self.upcycle is not None):
            raise ValueError("model.name=base takes its sizes from upcycle.base; set both, or neither")
        if self.upcycle is not None:
            self._check_upcycling(self.upcycle)
        lengths = (self.training.images, self.training.steps, self.compute_match)
        if sum(length is not None for length in lengths) != 1:
            raise ValueError("set exactly one of training.images, training.steps and compute_match")
        if self.compute_match and self.model.kind == "dit":
            raise ValueError("compute_match is for a chunking model; set training.steps for a 'dit'")
        return self

    def _check_upcycling(self, settings: UpcycleSettings) -> None:
        """Raise a ValueError if the section `upcycle` contradicts the other sections."""
        if self.compute_match is not None:
            raise ValueError(
                "compute_match is for a model trained from scratch; set training.steps for an upcycled one"
            )
        if self.model.kind == "dit" and not settings.methods:
            raise ValueError(
                "a 'dit' with model.name=base is the base itself; list upcycle.methods, or set model.kind=dcdit"
            )
        if self.model.kind == "dit" and self.model.overrides:
            raise ValueError(
                f"{next(iter(self.model.overrides))!r} is set by upcycle.base if model.kind is 'dit'; remove it"
            )

    @property
    def folder(self) -> str:
        """The folder that the run writes to."""
        return str(user_path(self.out)) if self.out else f"runs/{self.name}"
