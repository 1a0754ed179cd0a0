"""Read the prompts that a pipeline is to draw, and define the settings that all such commands share."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tokdyn.errors import InputError
from tokdyn.files import user_path
from tokdyn.reading import one_line, parse_json, read_text, shown
from tokdyn.section import Section
from tokdyn.yaml_loading import load_yaml

IMAGES = ("image", "mask_image", "control_image", "last_image", "image_reference")
"""Arguments of pipelines that hold images, or lists of images."""
MOST = 100_000
"""The most steps, frames, and pixels along a side."""
_COUNTS = ("num_inference_steps", "height", "width", "num_frames", "frames")
_SCALES = ("guidance_scale", "guidance_scale_2", "true_cfg_scale")


def read_prompts(value: Any) -> Any:
    """Turn one prompt into a list, and a file into its prompts.

    Args:
        value: a prompt; or a path that ends in .txt, with one prompt in a line, or in .json, .yaml or .yml, with a list
            of prompts and of dictionaries of arguments. In these, paths of images are relative to the file. A list is
            returned unchanged.

    Raises:
        ValueError: the file does not exist or holds something else.
    """
    if not isinstance(value, str):
        return value
    path = user_path(value)
    if path.suffix not in _READERS:
        if path.suffix and os.path.isfile(path):
            raise ValueError(f"the file of prompts {value} has an unknown ending: write a .txt, .json or .yaml file")
        return [value]
    if not path.is_file():
        raise ValueError(f"the file of prompts {value} does not exist")
    try:
        text = read_text(path)
        content = _READERS[path.suffix](text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"the file of prompts {value} cannot be read: {one_line(error)}") from error
    if not isinstance(content, list) or not all(isinstance(each, (str, dict)) for each in content):
        raise ValueError(f"the file of prompts {value} holds no list of texts and dictionaries")
    if not content:
        raise ValueError(f"the file of prompts {value} is empty")
    for each in content:
        try:
            json.dumps(each)
        except TypeError as error:  # YAML reads dates, too
            raise ValueError(f"the file of prompts {value} holds {shown(each)}: write texts in quotes") from error
    return [_located(each, path.parent) if isinstance(each, dict) else each for each in content]


def _lines(text: str) -> list[str]:
    """Return the lines that are not blank."""
    return [line.strip() for line in text.splitlines() if line.strip()]


_READERS: dict[str, Callable[[str], Any]] = {
    ".txt": _lines,
    ".json": parse_json,
    ".yaml": load_yaml,
    ".yml": load_yaml,
}


def _located(entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make the paths of images absolute."""

    def at(value: Any) -> Any:
        if isinstance(value, list):
            return [at(each) for each in value]
        return str((folder / user_path(value)).resolve()) if isinstance(value, str) else value

    return {name: at(value) if name in IMAGES else value for name, value in entry.items()}


def check_numbers(arguments: Mapping[str, Any]) -> None:
    """Check the numbers among the arguments of a pipeline: not every pipeline refuses -1 steps, and none refuses NaN.

    Raises:
        InputError: a number of steps, frames or pixels is no whole number from 1 to 100,000, a guidance scale is
            negative, a strength is outside of 0 to 1, or a number is not finite.
    """
    for name, value in arguments.items():
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name in _COUNTS and not (number and isinstance(value, int) and 1 <= value <= MOST):
            raise InputError(f"{name} is {value!r}; give a whole number from 1 to {MOST:,}.")
        if not _finite(value):
            raise InputError(f"{name} is {value!r}; give finite numbers.")
        if name in _SCALES and not (number and value >= 0):
            raise InputError(f"{name} is {value!r}; give a number of at least 0.")
        if name == "strength" and number and not 0 <= value <= 1:
            raise InputError(f"strength is {value!r}; give a number from 0 to 1.")


def _finite(value: Any) -> bool:
    """Return whether there is no NaN and no infinity in a value, a list or a dictionary."""
    if isinstance(value, (list, tuple, dict)):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _sound(prompts: tuple[str | dict[str, Any], ...]) -> tuple[str | dict[str, Any], ...]:
    """Check the numbers of every prompt."""
    for place, each in enumerate(prompts, 1):
        if isinstance(each, dict):
            try:
                check_numbers(each)
            except InputError as error:
                raise ValueError(f"in prompt {place}, {error}") from error
    return prompts


Prompts = Annotated[
    tuple[str | dict[str, Any], ...], BeforeValidator(read_prompts), Field(min_length=1), AfterValidator(_sound)
]
"""Texts, or dictionaries of arguments, such as {prompt: make it night, image: street.png}."""
Number = Annotated[int, Field(ge=1, le=MOST)]


class Drawing(Section):
    """What a pipeline is to draw. Null means the default of the pipeline.

    Attributes:
        prompts: A prompt, a .txt file with one prompt per line, or a .yaml or .json file with a list of texts and of
            arguments, such as {prompt: make it night, image: street.png}.
        steps: Steps of the sampler per image.
        guidance: Guidance scale.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        frames: Frames of a video.
        seed: The noise of prompt i has the seed `seed` + i.
    """

    prompts: Prompts = ("a photo",)
    steps: Number | None = None
    guidance: Annotated[float, Field(ge=0.0)] | None = None
    height: Number | None = None
    width: Number | None = None
    frames: Number | None = None
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0

    @model_validator(mode="after")
    def _size_is_whole(self) -> Self:
        if (self.height is None) != (self.width is None):
            raise ValueError("give both height and width, or neither")
        return self


def images_of(prompt: str | Mapping[str, Any]) -> list[Path]:
    """Return the paths of the images that a prompt names."""
    named = [prompt[name] for name in IMAGES if name in prompt] if isinstance(prompt, Mapping) else []
    every = [path for each in named for path in (each if isinstance(each, list) else [each])]
    return [Path(path) for path in every if isinstance(path, str)]


def title_of(prompt: str | Mapping[str, Any], length: int = 40) -> str:
    """Return the beginning of a prompt, for tables and pictures."""
    text = prompt if isinstance(prompt, str) else str(prompt.get("prompt", "image"))
    return text if len(text) <= length else f"{text[: length - 3]}..."
