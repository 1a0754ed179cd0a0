"""Read stacks, lists of methods that act together on a model, from YAML, and attach them to their models.

What needs torch is imported where it is used, so that misspelt words are refused before it is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tokdyn.bases.names import check_name, is_size
from tokdyn.diffusion.settings import Drop, Sampler, SchedulerName
from tokdyn.errors import RecipeError
from tokdyn.files import user_path
from tokdyn.method_names import ALIASES, EARLIER_SETTINGS, full_name
from tokdyn.reading import read_text
from tokdyn.recipe import yaml_text
from tokdyn.recipe.explain import explain, nearest

if TYPE_CHECKING:
    from tokdyn.diffusion.objective import Objective
    from tokdyn.methods import Method
    from tokdyn.sample.loading import ModelInfo


class Stack(BaseModel):
    """A stack to measure: a list of methods, with the model that they act on and its tail drop.

    Attributes:
        name: name in tables and plots.
        model: the model, in any form that `tokdyn sample` accepts; null takes the model of the command.
        folder: folder of methods that `tokdyn calibrate`, `tokdyn upcycle` or `tokdyn.save` wrote. They are attached in
            place of the methods that the model was trained with.
        methods: methods to attach around these, outermost first: a list of {method: NAME, setting: value, ...}. For a
            pipeline also a list for each denoiser, {transformer: [...], transformer_2: [...]}, or a preset such as fast
            or FLUX.1-dev/fast.
        tail_drop: share of the kept tokens that a chunking model drops, or points [[noise level, share], ...].
        uncond_tail_drop: tail drop of the unconditional branch (Lite-CFG, arXiv 2603.06351); null takes `tail_drop`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1)]
    model: str | None = None
    folder: Path | None = None
    methods: str | tuple[dict[str, Any], ...] | dict[str, tuple[dict[str, Any], ...]] = ()
    tail_drop: Drop = 0.0
    uncond_tail_drop: Drop | None = None

    @field_validator("methods", mode="before")
    @classmethod
    def _methods_are_valid(cls, methods: Any) -> Any:
        if isinstance(methods, str):
            return methods
        lists = list(methods.values()) if isinstance(methods, dict) else [methods]
        if not all(isinstance(each, (list, tuple)) and all(isinstance(one, dict) for one in each) for each in lists):
            raise ValueError("give a list such as [{method: TokenMerge, ratio: 0.3}], or one for each denoiser by name")
        from tokdyn.methods.registry import from_settings

        for each in (one for some in lists for one in some):
            from_settings(each)  # raises an InputError, which is a ValueError
        return methods

    def for_model(self) -> list[Method]:
        """Build the methods that act on a model.

        Raises:
            RecipeError: they are listed by denoiser, which only pipelines have, or are a preset.
        """
        if isinstance(self.methods, str):
            raise RecipeError(
                f"the stack {self.name} has methods={self.methods}, a preset, which is chosen for a pipeline of "
                "diffusers; give a model a list such as [{method: TokenMerge, ratio: 0.3}]."
            )
        if isinstance(self.methods, dict):
            raise RecipeError(
                f"the stack {self.name} lists methods for the denoisers {', '.join(self.methods)} of a pipeline; give "
                "a model one list."
            )
        from tokdyn.methods.registry import from_settings

        return [from_settings(each) for each in self.methods]

    def for_pipeline(self) -> list[Method] | dict[str, list[Method]] | str:
        """Build the methods that act on all denoisers of a pipeline, or on each by name, or return a preset's name."""
        if isinstance(self.methods, str):
            return self.methods
        if not isinstance(self.methods, dict):
            return self.for_model()
        from tokdyn.methods.registry import from_settings

        return {name: [from_settings(each) for each in some] for name, some in self.methods.items()}


@dataclass(frozen=True)
class Opened:
    """A stack with its model loaded.

    Attributes:
        stack: the stack.
        model: the model with the methods attached, in evaluation mode, at first on the CPU.
        objective: objective that the model was trained with.
        info: where the model came from.
    """

    stack: Stack
    model: Any
    objective: Objective
    info: ModelInfo

    def sampler(self, scheduler: SchedulerName | None, steps: int, guidance: float) -> Sampler:
        """Return the sampler that `tokdyn sample` uses with these settings and the tail drop of the stack."""
        return Sampler(
            scheduler=scheduler, steps=steps, guidance=guidance, tail_drop=self.stack.tail_drop,
            uncond_tail_drop=self.stack.uncond_tail_drop, clip=self.info.latents is None,
        )  # fmt: skip

    def labels(self, count: int) -> list[int]:
        """Return `count` labels, which go through the classes in turn."""
        return [number % self.model.config.num_classes for number in range(count)]


def read_stacks(arguments: Sequence[str]) -> tuple[Stack, ...]:
    """Read the stacks given on a command line.

    Args:
        arguments: each is the path of a YAML file with a list of stacks (or a mapping that holds one under `stacks`),
            or one stack as inline YAML, such as "{name: merged, methods: [{method: TokenMerge, ratio: 0.3}]}".

    Raises:
        RecipeError: an argument is neither, a stack is invalid, or two stacks share a name.
    """
    stacks: list[Stack] = []
    for source, entry in _entries(arguments):
        try:
            stacks.append(Stack.model_validate(entry))
        except ValidationError as error:
            raise explain(Stack, error, source) from error
    names = [stack.name for stack in stacks]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise RecipeError(f"Two stacks are called {repeated[0]}: give each stack a name of its own.")
    return tuple(stacks)


def check_words(arguments: Sequence[str], settings: Mapping[str, Collection[str]], models: bool = True) -> None:
    """Refuse misspelt keys of stacks, and misspelt methods and settings, before torch is loaded.

    Args:
        arguments: as for `read_stacks`.
        settings: the names of the settings of each method, by the name of its class. No other methods are accepted.
        models: whether stacks may name models, which are then checked, too.

    Raises:
        RecipeError: an argument holds no stacks, or a word is not known; the message names the nearest one.
        CheckpointError: there is no such model.
    """
    for source, entry in _entries(arguments):
        wrong = [key for key in entry if key not in Stack.model_fields]
        if wrong:
            raise RecipeError(f"{source}: '{wrong[0]}' is not a setting{nearest(str(wrong[0]), Stack.model_fields)}.")
        model = entry.get("model")
        if models and isinstance(model, str) and not is_size(model):
            check_name(model)
        for method in _listed(entry.get("methods", ())):
            given = method.get("method")
            name = str(full_name(given))
            if name not in settings:
                raise RecipeError(f"{source}: 'methods': there is no method {given!r}{nearest(str(given), ALIASES)}.")
            known = {"method", *settings[name], *EARLIER_SETTINGS.get(name, ())}
            for key in (key for key in method if key not in known):
                raise RecipeError(
                    f"{source}: 'methods': {name} has no setting '{key}'{nearest(str(key), settings[name])}."
                )


def _listed(methods: Any) -> Iterator[dict[str, Any]]:
    """Yield the methods of a stack, those of all denoisers; nothing of what is not a method."""
    lists = methods.values() if isinstance(methods, dict) else [methods]
    for each in lists:
        yield from (method for method in (each if isinstance(each, list) else ()) if isinstance(method, dict))


def _entries(arguments: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the content of each stack and what to call its source; arguments and errors are those of `read_stacks`."""
    for argument in arguments:
        inline = argument.lstrip().startswith("{")
        source = "the stack" if inline else argument
        try:
            text = argument if inline else read_text(user_path(argument))
            content = yaml_text.parse(text, source)
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"{argument} cannot be read ({error}): give a YAML file with a list of stacks, or one stack as "
                '"{name: merged, methods: [{method: TokenMerge, ratio: 0.3}]}".'
            ) from error
        listed = [content] if inline else content.get("stacks") if isinstance(content, dict) else content
        if not isinstance(listed, list) or not listed or not all(isinstance(each, dict) for each in listed):
            raise RecipeError(
                f"{source} does not hold stacks: give a list of {{name: ..., methods: [...]}}, with at least one."
            )
        yield from ((source, each) for each in listed)


def open_stack(stack: Stack, model: str | None = None, ema: bool = True) -> Opened:
    """Load the model of a stack and attach its methods.

    Args:
        stack: the stack.
        model: the model, if the stack does not name one.
        ema: take the averaged weights if a checkpoint holds averaged and plain ones.

    Raises:
        TokdynError: there is no model, it cannot be loaded, or a method or a tail drop cannot be applied to it.
    """
    path = stack.model or model
    if path is None:
        raise RecipeError(f"The stack {stack.name} has no model: set its model, or one for all stacks.")
    from tokdyn.sample.loading import load_model

    loaded, objective, info = load_model(path, ema)
    return Opened(stack, attach_stack(loaded, stack), objective, info)


def attach_stack(model: Any, stack: Stack) -> Any:
    """Attach the methods of a stack to a loaded model, in place, and return the model in evaluation mode.

    Raises:
        TokdynError: a method or a tail drop cannot be applied to this model.
    """
    from tokdyn.attach import attachment_of, load, unwrap
    from tokdyn.calibration.after_training import rewrap
    from tokdyn.diffusion.guidance import tail_drop_error, takes_tail_drop

    if stack.folder is not None:
        if attachment_of(model) is not None:
            unwrap(model)
        load(model, stack.folder)
    if stack.methods:
        rewrap(model, stack.for_model())
    if (stack.tail_drop or stack.uncond_tail_drop) and not takes_tail_drop(model):
        raise tail_drop_error(model)
    return model.eval()
