"""List presets as rows of a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokdyn.errors import InputError
from tokdyn.methods import FeatureCache, Method
from tokdyn.presets.files import entries, read
from tokdyn.presets.named import flat, is_file, near
from tokdyn.presets.schema import Entry, Family, Setting, given


@dataclass(frozen=True)
class PresetRow:
    """One setting of a model, or a model without settings.

    Attributes:
        family: of the model.
        model: its name.
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


def listed(model: str | Path | None = None) -> list[PresetRow]:
    """List the presets of all models, or of those whose name, family or class contains a text, or of a file.

    Raises:
        InputError: there are none.
    """
    if model is not None and is_file(model):
        family = read(model)
        known = [(family, entry) for entry in family.models]
    else:
        wanted = "" if model is None else str(model).casefold()
        known = [
            (family, entry)
            for family, entry in entries()
            if any(wanted in name.casefold() for name in (family.family, entry.kind, *entry.names))
        ]
    if not known:
        names = [each for family, entry in entries() for each in (family.family, *entry.names)]
        raise InputError(f"there is no preset for {str(model)!r}{near(str(model), names)}; see tokdyn presets.")
    return [row for family, entry in known for row in _rows(family, entry)]


def _rows(family: Family, entry: Entry) -> list[PresetRow]:
    if not entry.settings:
        blank = (None,) * 8
        return [PresetRow(family.family, entry.name, "-", entry.kind, "-", "-", "-", *blank, entry.instead)]
    return [_row(family, entry, name, setting) for name, setting in entry.settings.items()]


def _row(family: Family, entry: Entry, name: str, setting: Setting) -> PresetRow:
    methods, source, published = flat(setting), setting.source, setting.published
    return PresetRow(
        family=family.family,
        model=entry.name,
        setting=name,
        kind=entry.kind,
        method=", ".join(dict.fromkeys(map(_called, methods))),
        settings="; ".join(dict.fromkeys(map(_values, methods))),
        indicator=", ".join(dict.fromkeys(map(_indicator, methods))),
        steps=setting.steps,
        speedup=published.speedup,
        hardware=published.hardware,
        quality=published.quality,
        source=None if source is None else str(source),
        licence=None if source is None else source.licence,
        measured=None if setting.measured is None else setting.measured.model_dump(),
        note=setting.note,
        instead=entry.instead,
    )


def _called(method: Method) -> str:
    name = type(method).__name__
    return f"{name}, {method.rule}" if isinstance(method, FeatureCache) and method.steps is None else name


def _indicator(method: Method) -> str:
    if not isinstance(method, FeatureCache):
        return "-"
    if method.steps is not None:
        return "steps"
    return {"teacache": method.indicator, "magcache": "ratios"}.get(method.rule, "input and output")


def _values(method: Method) -> str:
    """Write the settings that differ from their defaults; long lists by their length."""
    left_out = ("rule", "indicator", "fingerprint")
    return ", ".join(f"{name} {_short(name, value)}" for name, value in given(method).items() if name not in left_out)


def _short(name: str, value: Any) -> str:
    if name == "coefficients":
        return f"of degree {len(value) - 1}"
    if isinstance(value, list) and len(value) > 3:
        return f"({len(value)})"
    return str(value)
