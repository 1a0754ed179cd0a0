"""Choose the preset of a model or pipeline by its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tokdyn.errors import InputError, UnsupportedModelError
from tokdyn.methods import Method
from tokdyn.presets.files import entries
from tokdyn.presets.named import find, flat, stack_of, with_setting
from tokdyn.presets.rows import is_file
from tokdyn.presets.schema import Entry


@dataclass(frozen=True)
class Chosen:
    """The preset of a model.

    Attributes:
        methods: a list for each denoiser that gets one, by its name.
        why: what was chosen and why, a sentence.
    """

    methods: dict[str, list[Method]]
    why: str


def choose(target: Any, models: Mapping[str, nn.Module], wanted: str | Path) -> Chosen:
    """Choose the preset of a model or pipeline.

    Args:
        target: the pipeline, or the model.
        models: its denoisers by the names of their components; a model alone has the name "".
        wanted: a setting such as "fast", whose model is found by the classes and the configuration of the denoisers,
            the class of the pipeline and the name that it was loaded by; or a model and a setting ("FLUX.1-dev/fast"),
            or a preset file.

    Raises:
        InputError: no preset fits, or several do and cannot be told apart.
        UnsupportedModelError: the preset that is named is for models of another class.
    """
    what = type(target).__name__
    if is_file(wanted) or "/" in str(wanted):
        entry, setting = find(wanted)
        if not any(_kind(model) == entry.kind for model in models.values()):
            kinds = ", ".join(dict.fromkeys(map(_kind, models.values())))
            raise UnsupportedModelError(
                f"the preset {entry.name}/{setting} is for a {entry.kind}, and this {what} has a {kinds}; see tokdyn "
                "presets for those of other models, or calibrate this one."
            )
        reason = f"as {wanted} asks"
    else:
        entry, reason = _recognised(target, models, str(wanted))
        entry, setting = with_setting(entry, str(wanted))
    why = f"{entry.name}/{setting} for this {what}, {reason}: {_described(entry, setting)}"
    return Chosen(_placed(entry, setting, models, what), why)


def _recognised(target: Any, models: Mapping[str, nn.Module], setting: str) -> tuple[Entry, str]:
    """Return the model that fits, and why it does, a clause."""
    what, alone = type(target).__name__, "" in models
    of_class = [entry for _, entry in entries() if entry.kind in map(_kind, models.values())]
    fitting = [entry for entry in of_class if _fits(entry, models)]
    if not alone:
        fitting = [each for each in fitting if not each.pipelines or what in each.pipelines]
    names = _loaded_by(target, models)
    called = [each for each in fitting if names & {name.casefold() for name in each.names}]
    found = called or [each for each in fitting if not each.named]
    if len(found) > 1:
        named = [setting if setting in each.settings else next(iter(each.settings), setting) for each in found]
        choices = " or ".join(repr(f"{each.name}/{one}") for each, one in zip(found, named, strict=True))
        raise InputError(
            f"the configuration of this {what} does not tell {len(found)} models with presets apart; name the one that "
            f"it is, as in {choices}."
        )
    if not found:
        kinds = ", ".join(dict.fromkeys(map(_kind, models.values())))
        known = ", ".join(each.name for each in of_class)
        others = f", whose configuration is none of those of {known}" if known else ""
        raise InputError(
            f"no preset fits this {what} with a {kinds}{others}; give one by name (tokdyn presets lists them), give "
            "methods, or make one with tokdyn calibrate."
        )
    entry = found[0]
    values = [f"{name}={value}" for name, value in entry.config.items()]
    facts = f"a {entry.kind}" + (f" with {', '.join(values)}" if values else "")
    name = next((each for each in entry.names if each.casefold() in names), None)
    return entry, f"which has {facts}" + (f" and was loaded as {name}" if name and called else "")


def _fits(entry: Entry, models: Mapping[str, nn.Module]) -> bool:
    """Return whether the denoisers have the names, the class and the configuration of a model."""
    if "" not in models and set(models) != set(entry.denoisers):
        return False
    return all(_kind(model) == entry.kind and _agrees(entry, model) for model in models.values())


def _agrees(entry: Entry, model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    if not isinstance(config, Mapping):
        return not entry.config
    return all(name in config and config[name] == value for name, value in entry.config.items())


def _loaded_by(target: Any, models: Mapping[str, nn.Module]) -> set[str]:
    """Return the names that a pipeline and its denoisers were loaded by, whole and their last parts, in lower case."""
    names = set()
    for each in (target, *models.values()):
        config = getattr(each, "config", None)
        path = config.get("_name_or_path") if isinstance(config, Mapping) else None
        path = path or getattr(each, "name_or_path", None)
        if isinstance(path, str) and path:
            plain = path.rstrip("/").casefold()
            names |= {plain, plain.rpartition("/")[2]}
            if plain.partition("models--")[2]:  # a snapshot in the cache of the hub
                names.add(plain.partition("models--")[2].partition("/")[0].rpartition("--")[2])
    return names


def _placed(entry: Entry, setting: str, models: Mapping[str, nn.Module], what: str) -> dict[str, list[Method]]:
    """Return the methods for each denoiser that they are for."""
    stack = stack_of(entry, setting)
    if not isinstance(stack, dict):
        return {name: stack for name, model in models.items() if _kind(model) == entry.kind}
    missing = [name for name in stack if name not in models]
    if missing:
        raise InputError(
            f"the preset {entry.name}/{setting} has methods for {', '.join(map(repr, stack))}, and this {what} has no "
            f"{missing[0]!r}; give the pipeline with all of them."
        )
    return stack


def _described(entry: Entry, setting: str) -> str:
    """Say in a clause what a setting is and what was published about it."""
    one = entry.settings[setting]
    rules = dict.fromkeys(getattr(each, "rule", type(each).__name__) for each in flat(one))
    parts = ["steps listed" if any(getattr(each, "steps", None) for each in flat(one)) else f"rule {', '.join(rules)}"]
    if one.published.speedup is not None:
        parts.append(f"published at {one.published.speedup:g}x")
    if one.source is not None:
        parts.append(f"from {one.source}")
    parts.append("not measured by tokdyn" if one.measured is None else "measured")
    return ", ".join(parts)


def _kind(model: nn.Module) -> str:
    return type(model).__name__
