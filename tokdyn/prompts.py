"""Read the prompts that a pipeline is to draw, and define the settings that all such commands share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from tokdyn.section import Section

IMAGES = ("image", "mask_image", "control_image", "last_image", "image_reference")


"""Arguments of pipelines that hold images, or lists of images."""


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
    path = Path(value).expanduser()
    if path.suffix not in _READERS:
        if path.suffix and os.path.isfile(path):
            raise ValueError(f"the file of prompts {value} has an unknown ending: write a .txt, .json or .yaml file")
        return [value]
    if not path.is_file():
        raise ValueError(f"the file of prompts {value} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
        content = _READERS[path.suffix](text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"the file of prompts {value} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, list) or not all(isinstance(each, (str, dict)) for each in content):
        raise ValueError(f"the file of prompts {value} holds no list of texts and dictionaries")
    if not content:
        raise ValueError(f"the file of prompts {value} is empty")
    for each in content:
        try:
            json.dumps(each)
        except TypeError as error:  # YAML reads dates, too
            raise ValueError(f"the file of prompts {value} holds {each!r}: write texts in quotes") from error
    return [_located(each, path.parent) if isinstance(each, dict) else each for each in content]


def _lines(text: str) -> list[str]:
    """Return the lines that are not blank."""
    return [line.strip() for line in text.splitlines() if line.strip()]


_READERS: dict[str, Callable[[str], Any]] = {
    ".txt": _lines,
    ".json": json.loads,
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
}


def _located(entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make the paths of images absolute."""

    def at(value: Any) -> Any:
        if isinstance(value, list):
            return [at(each) for each in value]
        return str((folder / Path(value).expanduser()).resolve()) if isinstance(value, str) else value

    return {name: at(value) if name in IMAGES else value for name, value in entry.items()}


Prompts = Annotated[tuple[str | dict[str, Any], ...], BeforeValidator(read_prompts), Field(min_length=1)]
"""Texts, or dictionaries of arguments, such as {prompt: make it night, image: street.png}."""


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
    steps: PositiveInt | None = None
    guidance: Annotated[float, Field(ge=0.0)] | None = None
    height: PositiveInt | None = None
    width: PositiveInt | None = None
    frames: PositiveInt | None = None
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
