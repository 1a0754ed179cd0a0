"""Read recipe files into nested dicts: find the file, merge it over what it extends, and parse key=value settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokdyn.errors import RecipeError
from tokdyn.files import user_path
from tokdyn.limits import EXTENDS, YAML_BYTES, YAML_DEPTH
from tokdyn.reading import one_line, read_text, shown
from tokdyn.recipe import shipped, yaml_text
from tokdyn.recipe.explain import nearest

Settings = dict[str, Any]


def deep_merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> Settings:
    """Return `base` overridden by `top`: dicts are merged key by key; all other values, lists too, are replaced."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = deep_merge(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def locate(name: str, folder: Path | None = None) -> Path:
    """Find the file of a recipe.

    Args:
        name: A YAML file, a training folder, or the name of a shipped recipe such as "cifar10/dit-flops".
        folder: Folder that relative paths start from; None is the current folder.

    Raises:
        RecipeError: There is neither such a file nor such a shipped recipe.
    """
    path = user_path(name) if folder is None else folder / name
    try:
        if path.is_file():
            return path.resolve()
        if path.is_dir() and (path / "recipe.yaml").is_file():
            return (path / "recipe.yaml").resolve()
    except OSError as error:  # the system refuses names that are too long
        raise RecipeError(f"There is no recipe '{one_line(name, 80)}': {error.strerror}.") from error
    names = shipped.names()
    plain = name.removesuffix(".yaml")
    if plain in names:
        return shipped.path(plain)
    close = nearest(plain, names)
    hint = close if "did you mean" in close else "; `tokdyn recipes ls` lists those"
    what = one_line(name, 80)
    raise RecipeError(f"There is no recipe '{what}': neither a file or folder of this name nor a shipped recipe{hint}.")


def read(name: str, folder: Path | None = None, _chain: tuple[Path, ...] = ()) -> Settings:
    """Read a recipe and everything that it extends into one dict.

    Args:
        name: The recipe, as for `locate`.
        folder: Folder that relative paths start from; None is the current folder.
        _chain: The files that extend this one, to detect circles.

    Raises:
        RecipeError: A recipe is not found, is not YAML or not a mapping, or recipes extend each other in a circle.
    """
    path = locate(name, folder)
    if path in _chain:
        circle = " -> ".join(link.name for link in (*_chain[_chain.index(path) :], path))
        raise RecipeError(f"These recipes extend each other in a circle: {circle}. Remove one of the `extends:` lines.")
    if excess := EXTENDS.excess(len(_chain) + 1):
        raise RecipeError(f"{_chain[0]} extends a recipe that extends another, and so on: {excess}.")
    try:
        data = yaml_text.parse(read_text(path, YAML_BYTES), str(path))
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is no recipe, because it is not text: give a YAML file, or a folder or .zip of images to train on."
        ) from error
    except OSError as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error}.") from error
    if data is None:
        data = {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RecipeError(f"{path} should hold `key: value` settings at the top, got {type(data).__name__}.")
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise RecipeError(f"{path}: 'extends' should be one path or recipe name, got {shown(parent)}.")
    return deep_merge(read(parent, path.parent, (*_chain, path)), data)


def parse_overrides(settings: Iterable[str]) -> Settings:
    """Parse settings such as "optimizer.lr=4e-4" or "chunking.tail_drops=[0, 0.3]" into one nested dict.

    Values are YAML. If a key is repeated, the last value counts.

    Raises:
        RecipeError: A setting has no '=' or an empty key, or its value is not YAML.
    """
    result: Settings = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts) or YAML_DEPTH.excess(len(parts)):
            raise RecipeError(
                f"'{one_line(setting, 80)}' is not a setting; write key=value, for example optimizer.lr=1e-4."
            )
        value = yaml_text.parse_value(text, f"The value of '{one_line(key, 80)}'")
        nested: Any = value
        for part in reversed(parts):
            nested = {part: nested}
        result = deep_merge(result, nested)
    return result
