"""Call a pipeline with settings by name, and with prompts from a file."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokdyn.errors import InputError
from tokdyn.limits import IMAGE_BYTES
from tokdyn.prompts import IMAGES, Drawing
from tokdyn.reading import one_line, read_bytes
from tokdyn.seeds import noise_generator

_OWN = ("generator", "output_type", "return_dict")  # arguments that `draw` gives
_SEVERAL = ("num_images_per_prompt", "num_videos_per_prompt")


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
        given = {**shared, **{name: _opened(value) if name in IMAGES else value for name, value in entry.items()}}
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
    from PIL import ImageOps

    from tokdyn.image_files import open_image

    if isinstance(value, list):
        return [_opened(each) for each in value]
    if not isinstance(value, str):
        return value
    try:
        with open_image(read_bytes(Path(value), IMAGE_BYTES)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")  # upright, as diffusers loads it
    except Exception as error:  # Pillow raises anything on damaged files
        raise InputError(f"{value} cannot be read as an image: {one_line(error)}.") from error


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
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{type(pipe).__name__} cannot draw with these settings: {error}") from error
    pixels = np.asarray(made)
    if pixels.ndim not in (4, 5) or pixels.shape[-1] != 3:
        raise InputError(
            f"{type(pipe).__name__} made an array of shape {pixels.shape}, not pictures (B, H, W, 3) or "
            "videos (B, F, H, W, 3)."
        )
    return (255.0 * pixels.reshape(-1, *pixels.shape[-3:])).round().clip(0, 255).astype(np.uint8)
