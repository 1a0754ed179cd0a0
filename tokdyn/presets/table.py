"""List presets as rows of a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokdyn.methods import FeatureCache, Method
from tokdyn.presets.files import entries, read
from tokdyn.presets.named import flat
from tokdyn.presets.rows import PresetRow, about, is_file
from tokdyn.presets.schema import Entry, Family, Setting, given


def listed(model: str | Path | None = None) -> list[PresetRow]:
    """List the presets of all models, or of those whose name, family or class contains a text, or of a file.

    Raises:
        InputError: there are none.
    """
    if model is not None and is_file(model):
        family = read(model)
        return [row for entry in family.models for row in _rows(family, entry)]
    rows = [row for family, entry in entries() for row in _rows(family, entry)]
    return rows if model is None else about(rows, str(model))


def _rows(family: Family, entry: Entry) -> list[PresetRow]:
    if not entry.settings:
        blank = (None,) * 8
        facts = (family.family, entry.name, tuple(entry.names), "-", entry.kind, "-", "-", "-")
        return [PresetRow(*facts, *blank, entry.instead)]
    return [_row(family, entry, name, setting) for name, setting in entry.settings.items()]


def _row(family: Family, entry: Entry, name: str, setting: Setting) -> PresetRow:
    methods, source, published = flat(setting), setting.source, setting.published
    return PresetRow(
        family=family.family,
        model=entry.name,
        names=tuple(entry.names),
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
