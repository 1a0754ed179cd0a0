"""Propose the recipe and the settings to train on images that a user has (`tokdyn train photos/`)."""

from __future__ import annotations

import json
import shlex
import statistics
import warnings
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokdyn.data.classes import class_folders
from tokdyn.data.opening import open_source
from tokdyn.data.sources import EXTENSIONS, Labelled, Source
from tokdyn.errors import DataError, RecipeError
from tokdyn.files import unused, user_path
from tokdyn.recipe import yaml_text

RECIPE = "demo"
"""The recipe that proposals override: a small DC-DiT on pixels."""
_LOOKED_AT = 200  # images whose sizes are read
_LARGEST, _SMALLEST, _MULTIPLE = 64, 16, 4  # pixels of a side that the recipe trains on
_FINE = 32  # pixels of a side up to which a cell is 2x2 pixels, and 4x4 above
_STEPS = 3000
_FEW = 100  # images that a model can learn by heart


@dataclass(frozen=True)
class Proposal:
    """A recipe for a set of images.

    Attributes:
        path: folder or zip of the images.
        images: number of images.
        height: median height in pixels.
        width: median width in pixels.
        classes: number of images of each class by its name.
        recipe: name of a shipped recipe.
        settings: settings that override it, such as "data.size=64".
        notes: sentences about what the user may want to change.
    """

    path: str
    images: int
    height: int
    width: int
    classes: dict[str, int]
    recipe: str
    settings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def command(self) -> str:
        """The shell command that trains with the proposal."""
        return shlex.join(["tokdyn", "train", self.recipe, *self.settings])


def holds_images(name: str) -> bool:
    """Return whether a name is that of a folder or a zip, or a folder in a zip, and not that of a run or a recipe."""
    path = user_path(name)
    if path.is_dir():
        return not any((path / part).exists() for part in ("recipe.yaml", "metrics.jsonl", "checkpoints"))
    archive = next((place for place in (path, *path.parents) if place.is_file()), None)
    return archive is not None and zipfile.is_zipfile(archive)


def propose(name: str, overrides: Sequence[str] = ()) -> Proposal:
    """Look at a folder or zip of images, and propose how to train on it.

    Args:
        name: the folder or zip. If the first folder of every path is the one class folder, the folders in it are the
            classes.
        overrides: settings of the user, which take the place of proposed ones.

    Raises:
        DataError: it holds no images, or none that can be read.
    """
    source, place = open_source(name), name.rstrip("/")
    names = source.names()
    if not names:
        raise DataError(
            f"{name} holds no images: give a folder or zip of files ending in one of {' '.join(sorted(EXTENSIONS))}, "
            "or a recipe; `tokdyn recipes ls` lists those that ship with tokdyn."
        )
    sizes, grey, broken = _look(source, names)
    if not sizes:
        raise DataError(f"None of the images in {name} that were tried can be read, such as {broken[0]}.")
    below = {file.split("/", 1)[0] for file in names}
    if not isinstance(source, Labelled) and len(below) == 1 and all(file.count("/") >= 2 for file in names):
        top = below.pop()
        place, names = f"{place}/{top}", [file.removeprefix(f"{top}/") for file in names]
    height, width = (round(statistics.median(side)) for side in zip(*sizes, strict=True))
    side = min(_LARGEST, max(_SMALLEST, min(height, width) // _MULTIPLE * _MULTIPLE))
    notes: list[str] = []
    classes, extra = _classes(source, names, notes)
    if broken:
        extra.append("data.on_error=skip")
        notes.append(f"{broken[0]} cannot be read; unreadable images are left out.")
    if grey:
        extra.append("data.channels=1")
    if len(names) < _FEW:
        notes.append(f"{len(names)} images are few: the model will learn them by heart.")
    if min(height, width) > 2 * side:
        notes.append(
            f"Images are scaled down to {side}x{side} pixels. For large ones, encode them with tokdyn features, and "
            "train imagenet/dc-dit-s-256 on the latents."
        )
    stem = user_path(place).absolute().stem or "images"
    settings = (
        "data.kind=images",
        f"data.path={_as_yaml(place)}",
        f"data.size={side}",
        *extra,
        f"model.patch_size={2 if side <= _FINE else 4}",
        f"training.steps={_STEPS}",
        f"out={_as_yaml(str(unused(Path('runs') / stem)))}",
    )
    given = {setting.partition("=")[0] for setting in overrides}
    kept = [setting for setting in settings if setting.partition("=")[0] not in given]
    return Proposal(name, len(names), height, width, classes, RECIPE, (*kept, *overrides), tuple(notes))


def _look(source: Source, names: Sequence[str]) -> tuple[list[tuple[int, int]], bool, list[str]]:
    """Read the headers of some images.

    Returns:
        (rows, columns) of those that can be read, whether all of them are grey, and the names of the others.
    """
    from tokdyn.image_files import open_image

    sizes, grey, broken = [], True, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large images, whose pixels are not decoded here
        for name in names[:: -(-len(names) // _LOOKED_AT)]:
            try:
                with open_image(source.read(name)) as image:
                    sizes.append((image.height, image.width))
                    grey = grey and image.mode in ("1", "L", "LA")
            except Exception:  # of Pillow, which raises anything on damaged files
                broken.append(name)
    return sizes, grey, broken


def _classes(source: Source, names: Sequence[str], notes: list[str]) -> tuple[dict[str, int], list[str]]:
    """Return the number of images of each class, and the settings for them; add a note if folders are ignored."""
    at_root = [name for name in names if "/" not in name]
    if not at_root or isinstance(source, Labelled):
        found = source.classes(None) if isinstance(source, Labelled) else class_folders(names)
        counts = Counter(found.labels.tolist())
        return {name: counts[label] for label, name in enumerate(found.names)}, []
    if len(at_root) == len(names):
        return {"all": len(names)}, []
    notes.append(
        f"{len(at_root)} images lie beside the folders, such as {at_root[0]}, so that all images form one class; move "
        "them into folders to train with classes."
    )
    return {"all": len(names)}, ["data.num_classes=1"]


def _as_yaml(text: str) -> str:
    """Return a text as a value of key=value, quoted if YAML would read something else."""
    try:
        plain = yaml_text.parse_value(text, "The path") == text
    except RecipeError:
        plain = False
    return text if plain else json.dumps(text, ensure_ascii=False)
