"""The settings of `tokdyn demo`. They load no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from tokdyn.bases.table import rows
from tokdyn.files import UserPath

DIT, DCDIT = "shapes/dit", "shapes/dc-dit"
"""The models that the demo shows."""
_OF_TRAINING = ("minutes", "training_steps", "scored")


class DemoSettings(BaseModel):
    """Settings of the demo.

    Attributes:
        train: Train a model, in place of showing those that ship with tokdyn; null trains if there are none here.
        out: Page to write, report.html by default; if a model is trained, the folder for the run and its pictures,
            runs/demo by default.
        sampling_steps: Sampling steps per image; null takes what was chosen for the models that ship, and 25 for a
            trained one.
        guidance: Scale of classifier-free guidance; null takes what was chosen likewise, and 2.
        count: Number of images to sample with each budget; the classes are assigned to them in turn.
        seed: Seed of the samples, and of the training.
        minutes: Time limit of the training. The model is then sampled as it is; the same command trains it further.
        training_steps: Optimizer steps of the training; null takes those of the recipe `demo`.
        scored: Number of images outside the training set to score the router of the trained model on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: bool | None = None
    out: UserPath | None = None
    sampling_steps: PositiveInt | None = None
    guidance: float | None = Field(default=None, ge=0.0)
    count: PositiveInt = 10
    seed: int = Field(default=0, ge=0)
    minutes: float = Field(default=2.5, gt=0.0)
    training_steps: PositiveInt | None = None
    scored: PositiveInt = 256

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        for name in _OF_TRAINING:
            if not self.trains and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect without training: add --train, or leave {name} out")
        return self

    @property
    def trains(self) -> bool:
        """Whether a model is trained."""
        return not {DIT, DCDIT} <= set(rows()) if self.train is None else self.train

    @property
    def place(self) -> Path:
        """The page to write, or the folder of the run."""
        return self.out or Path("runs/demo" if self.trains else "report.html")
