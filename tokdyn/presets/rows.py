"""Rows of the table of presets, and their names, which are looked up before the methods, and torch, are loaded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokdyn.errors import InputError

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class PresetRow:
    """One setting of a model, or a model without settings.

    Attributes:
        family: of the model.
        model: its name.
        names: the names by which it can be asked for: its own, its ids on the hub, and those without their owner.
        setting: "-" if there are none.
        kind: the class of its denoisers.
        method: the methods, such as "FeatureCache, magcache".
        settings: the values that are set, without coefficients and ratios.
        indicator: what the rule looks at: an indicator of FeatureCache, "ratios" or "steps"; "-" for other methods.
        steps: number of steps that it was calibrated at; None if unknown.
        speedup: as published; None if it was not.
        hardware: on what.
        quality: as published.
        source: project with commit or pull request, and paper.
        licence: of the project.
        measured: what was measured with real weights by this project; None is nothing.
        note: what one should know.
        instead: why a cache gains nothing for this model, and what to use.
    """

    family: str
    model: str
    names: tuple[str, ...]
    setting: str
    kind: str
    method: str
    settings: str
    indicator: str
    steps: int | None
    speedup: float | None
    hardware: str | None
    quality: str | None
    source: str | None
    licence: str | None
    measured: dict[str, Any] | None
    note: str | None
    instead: str | None


def about(rows: Sequence[PresetRow], text: str) -> list[PresetRow]:
    """Return the rows of the models whose name, family or class contains a text, in any case.

    Raises:
        InputError: there are none.
    """
    wanted = text.casefold()
    found = [row for row in rows if any(wanted in name.casefold() for name in (row.family, row.kind, *row.names))]
    if not found:
        raise unknown(text, (name for row in rows for name in (row.family, *row.names)))
    return found


def unknown(name: str, known: Iterable[str]) -> InputError:
    """Return the error for a name that no preset has, with the most similar of the known names."""
    return InputError(f"there is no preset for {name!r}{near(name, known)}; see tokdyn presets.")


def is_file(name: str | Path) -> bool:
    """Return whether a name is that of a preset file."""
    return Path(name).suffix in SUFFIXES


def near(word: str, choices: Iterable[str]) -> str:
    """Return a hint with the choices most like a word; empty if none is."""
    by_key = {plain(each): each for each in choices}
    found = difflib.get_close_matches(plain(word), by_key, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(repr(by_key[each]) for each in found)}?)" if found else ""


def plain(name: str) -> str:
    """Return a name in the form in which names are compared."""
    return name.casefold().replace("_", "-").replace(" ", "-")
