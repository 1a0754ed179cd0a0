"""A stack: a model, the methods on it, and how many tokens its branches may keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tokdyn.attach.entry import attachment_of, unwrap
from tokdyn.attach.sidecar import load
from tokdyn.calibration.afterwards import rewrap
from tokdyn.diffusion.guidance import tail_drop_error, takes_tail_drop
from tokdyn.diffusion.objective import Objective
from tokdyn.diffusion.sampling import Drop, Sampler
from tokdyn.diffusion.schedulers import SchedulerName
from tokdyn.errors import RecipeError
from tokdyn.methods.written import from_written
from tokdyn.recipe import yaml_text
from tokdyn.recipe.explain import explain
from tokdyn.sample.loading import ModelInfo, load_model


class Stack(BaseModel):
    """What is compared.

    Attributes:
        name: in tables and pictures.
        model: what `tokdyn sample` takes; null means the model of the command.
        folder: of methods, from `tokdyn calibrate`, `tokdyn upcycle` or `tokdyn.save`, in place of those that the model
            was trained with.
        methods: put around those that the model was trained with, outermost first: a list of
            {method: NAME, setting: value, ...}.
        tail_drop: share of the kept tokens that a chunking model drops, or points [[noise level, share], ...].
        uncond_tail_drop: the same in the unconditional branch (Lite-CFG, arXiv 2603.06351); null means as the other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1)]
    model: str | None = None
    folder: Path | None = None
    methods: tuple[dict[str, Any], ...] = ()
    tail_drop: Drop = 0.0
    uncond_tail_drop: Drop | None = None

    @field_validator("methods")
    @classmethod
    def _builds(cls, methods: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        for each in methods:
            from_written(each)  # an InputError is a ValueError
        return methods


@dataclass(frozen=True)
class Opened:
    """A stack that is ready to run.

    Attributes:
        stack: as it was asked for.
        model: in evaluation mode on the CPU, with its methods.
        objective: what it was trained to predict.
        info: where it came from.
    """

    stack: Stack
    model: Any
    objective: Objective
    info: ModelInfo

    def sampler(self, scheduler: SchedulerName | None, steps: int, guidance: float) -> Sampler:
        """Draws as `tokdyn sample` does by default, with the budgets of the stack."""
        return Sampler(
            scheduler=scheduler, steps=steps, guidance=guidance, tail_drop=self.stack.tail_drop,
            uncond_tail_drop=self.stack.uncond_tail_drop, clip=self.info.latents is None,
        )  # fmt: skip

    def labels(self, count: int) -> list[int]:
        """The classes in turn."""
        return [number % self.model.config.num_classes for number in range(count)]


def read_stacks(words: Sequence[str]) -> tuple[Stack, ...]:
    """Stacks as a command line gives them.

    Args:
        words: each a YAML file with a list of stacks (or with one under `stacks`), or one stack as YAML:
            "{name: merged, methods: [{method: TokenMerge, ratio: 0.3}]}".

    Raises:
        RecipeError: a word is neither, a stack is not valid, or two share a name.
    """
    stacks: list[Stack] = []
    for word in words:
        inline = word.lstrip().startswith("{")
        source = "the stack" if inline else word
        try:
            found = yaml_text.parse(word if inline else Path(word).expanduser().read_text(encoding="utf-8"), source)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"{word} cannot be read ({error}): give a YAML file with a list of stacks, or one stack as "
                '"{name: merged, methods: [{method: TokenMerge, ratio: 0.3}]}".'
            ) from error
        listed = [found] if inline else found.get("stacks") if isinstance(found, dict) else found
        if not isinstance(listed, list) or not listed or not all(isinstance(each, dict) for each in listed):
            raise RecipeError(f"{source} holds no stacks: expected a list of {{name: ..., methods: [...]}}.")
        for each in listed:
            try:
                stacks.append(Stack.model_validate(each))
            except ValidationError as error:
                raise explain(Stack, error, source) from error
    names = [stack.name for stack in stacks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"two stacks are called {twice[0]}; give each its own name.")
    return tuple(stacks)


def open_stack(stack: Stack, model: str | None = None, ema: bool = True) -> Opened:
    """Load the model of a stack and attach its methods.

    Args:
        stack: what to open.
        model: for stacks that name none.
        ema: take the averaged weights where there are both.

    Raises:
        TokdynError: there is no model, or a method or a tail drop does not fit it.
    """
    place = stack.model or model
    if place is None:
        raise RecipeError(f"the stack {stack.name} names no model; give it one, or one for all stacks.")
    loaded, objective, info = load_model(place, ema)
    return Opened(stack, attach(loaded, stack), objective, info)


def attach(model: Any, stack: Stack) -> Any:
    """Put the methods of a stack on a loaded model, in place; returns it in evaluation mode.

    Raises:
        TokdynError: a method or a tail drop does not fit it.
    """
    if stack.folder is not None:
        if attachment_of(model) is not None:
            unwrap(model)
        load(model, stack.folder)
    if stack.methods:
        rewrap(model, [from_written(each) for each in stack.methods])
    if (stack.tail_drop or stack.uncond_tail_drop) and not takes_tail_drop(model):
        raise tail_drop_error(model)
    return model.eval()
