"""Define how a wrapped transformer is trained on calls, in settings that are read before torch is loaded."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from tokdyn.section import Count, Fraction, Positive, Section, listed

TailDrops = Annotated[tuple[Fraction, ...], BeforeValidator(listed), Field(min_length=1)]


class DistilSettings(Section):
    """How a wrapped transformer is trained on calls.

    Attributes:
        steps: Optimizer steps.
        calls: Calls per optimizer step, drawn anew in every step, of all processes together.
        lr: Learning rate of AdamW, which has no weight decay here.
        warmup_steps: Steps over which the learning rate rises linearly to `lr`.
        clip: Largest norm of the gradient.
        trained: `methods` trains only the parts of the methods; `lora` trains them and LoRA on the linear layers of the
            blocks (arXiv 2106.09685); both need no second model. `all` trains the transformer too.
        rank: Rank of the LoRA; null means 16.
        tail_drops: Tail drops (shares of the kept tokens to drop) of which every call draws one, so that one model
            works at all these budgets; null leaves the tail drop as the methods say.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        seed: Seed of the draws.
        checkpoint_every: Steps between checkpoints.
    """

    steps: Positive = 1000
    calls: Positive = 1
    lr: PositiveFloat = 1e-3
    warmup_steps: Count = 0
    clip: PositiveFloat = 1.0
    trained: Literal["methods", "lora", "all"] = "methods"
    rank: Positive | None = None
    tail_drops: TailDrops | None = None
    gradient_checkpointing: bool = False
    seed: Count = 0
    checkpoint_every: Positive = 100

    @model_validator(mode="after")
    def _rank_has_an_effect(self) -> Self:
        if self.rank is not None and self.trained != "lora":
            raise ValueError(f"rank has no effect with trained={self.trained}; remove it, or set trained=lora")
        return self
