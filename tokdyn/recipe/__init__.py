"""Read, validate, list and copy recipes, the YAML files with the settings of a training run.

A recipe may extend another one (`extends:`), and key=value settings override it:
`load("cifar10/dcdit-learned", ["data.path=train.zip", "optimizer.lr=3e-4"])`.
The schema loads torch, and no model code before the first recipe is validated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tokdyn.errors import RecipeError
from tokdyn.files import replacing, user_path
from tokdyn.recipe import files, shipped, yaml_text
from tokdyn.recipe.explain import explain
from tokdyn.recipe.model_settings import ModelSettings
from tokdyn.recipe.schema import (
    ChunkingSettings,
    ComputeMatch,
    OptimizerSettings,
    PreviewSettings,
    Recipe,
    TrainingSettings,
)

__all__ = [
    "ChunkingSettings",
    "ComputeMatch",
    "ModelSettings",
    "OptimizerSettings",
    "PreviewSettings",
    "Recipe",
    "TrainingSettings",
    "check",
    "copy",
    "dump",
    "load",
    "names",
    "resolve",
    "show",
    "summaries",
]

names = shipped.names
show = shipped.show


def resolve(settings: Mapping[str, Any], source: str = "The recipe") -> Recipe:
    """Validate the sections of a recipe.

    Args:
        settings: The sections, as nested dicts.
        source: Where the sections come from, for error messages.

    Raises:
        RecipeError: A setting is wrong. The message names the key, what was expected and the nearest valid key.
    """
    try:
        return Recipe.model_validate(dict(settings))
    except ValidationError as error:
        raise explain(Recipe, error, source) from error


def load(name: str | Path, settings: Iterable[str] = ()) -> Recipe:
    """Read a recipe, merge it over the recipes that it extends, and override it with settings.

    Args:
        name: A YAML file, the name of a shipped recipe, or a training folder, whose recipe.yaml is read with `out` set
            to that folder.
        settings: Settings such as "optimizer.lr=4e-4". Values are YAML. If a key is repeated, the last value counts.

    Raises:
        RecipeError: The recipe, what it extends or a setting is wrong.
    """
    sections = files.read(str(name))
    if (Path(name) / "metrics.jsonl").is_file() or (Path(name) / "checkpoints").is_dir():
        sections["out"] = str(name)
    return resolve(files.deep_merge(sections, files.parse_overrides(settings)), f"Recipe '{name}'")


def dump(recipe: Recipe) -> str:
    """Return a recipe as YAML text with every default written out; `load` reads the same recipe back."""
    return yaml_text.dump(recipe.model_dump(mode="json"))


def summaries() -> dict[str, str]:
    """Map the name of each shipped recipe to its description."""
    return {name: str(files.read(name).get("description", "")) for name in names()}


def copy(name: str, destination: str | Path) -> Path:
    """Copy a shipped recipe for editing, with everything that it extends merged in.

    Args:
        name: The name of a shipped recipe.
        destination: A file to write, or a folder to write NAME.yaml into; NAME is the last part of the recipe's name.

    Returns:
        The path of the file.

    Raises:
        RecipeError: There is no such recipe, or the destination exists already.
        OutputError: The file cannot be written.
    """
    source = shipped.path(name)
    target = user_path(destination)
    if target.is_dir() or target.suffix not in {".yaml", ".yml"}:
        target = target / f"{Path(name).name}.yaml"
    if target.exists():
        raise RecipeError(f"{target} exists already; choose another file or remove it.")
    text = source.read_text(encoding="utf-8")
    settings = files.read(name)
    if "extends:" in text:
        text = f"# Copied from the shipped recipe {name}, with what it extends.\n{yaml_text.dump(settings)}"
    with replacing(target) as half:
        half.write_text(text, encoding="utf-8")
    return target


def check(name: str | Path, settings: Iterable[str] = ()) -> Recipe:
    """Load a recipe and check that its model can be built, on torch's meta device, which takes no memory.

    Args:
        name: The recipe, as for `load`.
        settings: Settings, as for `load`.

    Raises:
        RecipeError: The recipe or a setting is wrong.
        TokdynError: The model cannot be built.
    """
    from tokdyn.recipe.build import base_without_weights, build_model

    recipe = load(name, settings)
    build_model(recipe, device="meta", base=None if recipe.upcycle is None else base_without_weights(recipe))
    return recipe
