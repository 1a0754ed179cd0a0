"""Call a pipeline with settings by name, and with prompts from a file."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from tokdyn.errors import InputError
from tokdyn.section import Section
from tokdyn.seeds import noise_generator

_OWN = ("generator", "output_type", "return_dict")  # arguments that `draw` gives
_SEVERAL = ("num_images_per_prompt", "num_videos_per_prompt")
_IMAGES = ("image", "mask_image", "control_image", "last_image", "image_reference")


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
        return [value]
    if not path.is_file():
        raise ValueError(f"the file of prompts {value} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
        content = _READERS[path.suffix](text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"the file of prompts {value} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, list) or not all(isinstance(each, (str, dict)) for each in content):
        raise ValueError(f"the file of prompts {value} holds no list of texts and dictionaries")
    if not content:
        raise ValueError(f"the file of prompts {value} is empty")
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

    return {name: at(value) if name in _IMAGES else value for name, value in entry.items()}


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


def call_arguments(pipe: Any, drawing: Drawing) -> list[dict[str, Any]]:
    """Return the arguments of a call of the pipeline for each prompt, images of edits included.

    Raises:
        InputError: the pipeline has no such setting, a prompt asks for several pictures, or an image cannot be read.
    """
    accepted = inspect.signature(type(pipe).__call__).parameters
    wanted = {
        "num_inference_steps": drawing.steps,
        "guidance_scale": drawing.guidance,
        "height": drawing.height,
        "width": drawing.width,
        "num_frames": drawing.frames,
    }
    shared: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    if drawing.height is not None and "use_resolution_binning" in accepted:
        shared["use_resolution_binning"] = False  # draw exactly this size
    result = []
    for prompt in drawing.prompts:
        entry: Mapping[str, Any] = prompt if isinstance(prompt, dict) else {"prompt": prompt}
        given = {**shared, **{name: _opened(value) if name in _IMAGES else value for name, value in entry.items()}}
        own = [name for name in given if name in _OWN]
        if own:
            raise InputError(f"a prompt sets {own[0]}, which is set for all of them; leave it out.")
        several = [name for name in _SEVERAL if given.get(name, 1) != 1]
        if several or isinstance(given.get("prompt"), list):
            what = several[0] if several else "a list of texts"
            raise InputError(f"a prompt has {what}; write an entry for each picture, which has noise of its own.")
        unknown = [name for name in given if name not in accepted]
        if unknown:
            raise InputError(f"{type(pipe).__name__} has no setting {unknown[0]}; leave it out.")
        result.append(given)
    return result


def _opened(value: Any) -> Any:
    """Open an image upright, or a list of them, given by path."""
    from PIL import Image, ImageOps

    if isinstance(value, list):
        return [_opened(each) for each in value]
    if not isinstance(value, str):
        return value
    try:
        with Image.open(value) as image:
            return ImageOps.exif_transpose(image).convert("RGB")  # upright, as diffusers loads it
    except OSError as error:
        raise InputError(f"{value} cannot be read as an image: {error}.") from error


def images_of(prompt: str | Mapping[str, Any]) -> list[Path]:
    """Return the paths of the images that a prompt names."""
    named = [prompt[name] for name in _IMAGES if name in prompt] if isinstance(prompt, Mapping) else []
    every = [path for each in named for path in (each if isinstance(each, list) else [each])]
    return [Path(path) for path in every if isinstance(path, str)]


def draw(pipe: Any, arguments: Mapping[str, Any], seed: int) -> NDArray[np.uint8]:
    """Call a pipeline.

    Args:
        pipe: the pipeline.
        arguments: of the call, as `call_arguments` returns them.
        seed: of the noise.

    Returns:
        (F, H, W, 3), the pictures of the call, or the frames of a video.

    Raises:
        InputError: the pipeline refuses the arguments, or makes something else, such as sound.
    """
    generator = noise_generator(seed)
    try:
        made = pipe(**arguments, generator=generator, output_type="np", return_dict=False)[0]
    except (TypeError, ValueError) as error:
        raise InputError(f"{type(pipe).__name__} cannot draw with these settings: {error}") from error
    pixels = np.asarray(made)
    if pixels.ndim not in (4, 5) or pixels.shape[-1] != 3:
        raise InputError(
            f"{type(pipe).__name__} made an array of shape {pixels.shape}, not pictures (B, H, W, 3) or "
            "videos (B, F, H, W, 3)."
        )
    return (255.0 * pixels.reshape(-1, *pixels.shape[-3:])).round().clip(0, 255).astype(np.uint8)


def title_of(prompt: str | Mapping[str, Any], length: int = 40) -> str:
    """Return the beginning of a prompt, for tables and pictures."""
    text = prompt if isinstance(prompt, str) else str(prompt.get("prompt", "image"))
    return text if len(text) <= length else f"{text[: length - 3]}..."
