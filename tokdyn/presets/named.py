"""Find presets by the name of a model: `tokdyn.preset`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokdyn.errors import InputError
from tokdyn.methods import FeatureCache, Method
from tokdyn.presets.files import entries, read
from tokdyn.presets.rows import is_file, near, plain, unknown
from tokdyn.presets.schema import Entry, Setting


def preset(model: str | Path, setting: str | None = None) -> list[Method] | dict[str, list[Method]]:
    """Return the methods of a preset; `tokdyn.wrap` takes them.

        tokdyn.wrap(pipe, tokdyn.preset("FLUX.1-dev", "fast"))

    The methods carry the class of the model that they are for, and values of its configuration that tell it apart;
    attaching them to another model raises a warning. `tokdyn presets` lists what there is.

    Args:
        model: name of a model or its id on the hub, in any case; the name of a family if only one of its models has the
            setting; or a preset file, such as `tokdyn calibrate` writes.
        setting: such as "fast"; it may also be part of the name, as in "FLUX.1-dev/fast" or "preset.yaml/fast". None
            takes the only one.

    Returns:
        A list of methods; for a model with several denoisers a list for each, by the name of its component.

    Raises:
        InputError: there is no such model or setting, or there are several; the message names them.
    """
    return stack_of(*find(model, setting))


def find(model: str | Path, setting: str | None = None) -> tuple[Entry, str]:
    """Return the model of a preset and the name of the setting; arguments and errors are those of `preset`."""
    given: tuple[tuple[Any, Any], ...] = (model, (str, Path)), (setting, (str, type(None)))
    for value, kinds in given:
        if not isinstance(value, kinds):
            raise InputError(f"{value!r} names no preset; give texts, as in tokdyn.preset('FLUX.1-dev', 'fast').")
    if is_file(model):
        fitting = read(model).models
    else:
        name = str(model)
        fitting = _named(name)
        if not fitting and setting is None and "/" in name:
            name, _, setting = name.rpartition("/")
            fitting = read(name).models if is_file(name) else _named(name)
        if not fitting:
            names = [each for family, entry in entries() for each in (family.family, *entry.names)]
            raise unknown(name, names)
    able = [entry for entry in fitting if setting is None or setting.casefold() in entry.settings]
    if len(able) > 1:
        choices = ", ".join(repr(each.name) for each in able)
        raise InputError(f"{str(model)!r} has presets for several models; give one of {choices}.")
    return with_setting(able[0] if able else fitting[0], setting)


def stack_of(entry: Entry, setting: str) -> list[Method] | dict[str, list[Method]]:
    """Return the methods of a setting, each with a fingerprint of what it is for."""
    methods = entry.settings[setting].methods
    if isinstance(methods, dict):
        return {name: [_marked(each, entry) for each in own] for name, own in methods.items()}
    return [_marked(each, entry) for each in methods]


def published_for(method: Method) -> frozenset[str]:
    """Return the classes of the models that the numbers of a method were published for; empty if they are none such.

    These numbers are the coefficients of a FeatureCache or its ratios.
    """
    if not isinstance(method, FeatureCache):
        return frozenset()
    numbers = method.ratios or method.coefficients
    if numbers == type(method).model_fields["coefficients"].default:
        return frozenset()
    return frozenset(
        entry.kind
        for _, entry in entries()
        for setting in entry.settings.values()
        for each in flat(setting)
        if isinstance(each, FeatureCache) and numbers in (each.ratios, each.coefficients)
    )


def flat(setting: Setting) -> list[Method]:
    """Return the methods of all denoisers."""
    methods = setting.methods
    return [each for own in methods.values() for each in own] if isinstance(methods, dict) else list(methods)


def _marked(method: Method, entry: Entry) -> Method:
    fields = type(method).model_fields
    if "fingerprint" not in fields or getattr(method, "fingerprint", None):
        return method
    listed, count = getattr(method, "steps", None) is not None, getattr(method, "num_steps", None)
    steps = f"::{count}" if listed and count is not None else ""  # for this number of steps only
    return method.model_copy(update={"fingerprint": entry.fingerprint + steps})


def _named(name: str) -> list[Entry]:
    """Return the models of this name; those of a family of this name if there are none."""
    key, known = plain(name), entries()
    own = [entry for _, entry in known if key in map(plain, entry.names)]
    return own or [entry for family, entry in known if plain(family.family) == key]


def with_setting(entry: Entry, setting: str | None) -> tuple[Entry, str]:
    """Return a model and the name of its setting, or of its only one.

    Raises:
        InputError: it has no settings, not this one, or several.
    """
    if setting is None and len(entry.settings) == 1:
        return entry, next(iter(entry.settings))
    if not entry.settings:
        raise InputError(f"{entry.name} has no settings: {entry.instead}.")
    known = ", ".join(entry.settings)
    if setting is None:
        raise InputError(f"{entry.name} has several settings; give one of {known}.")
    if setting.casefold() not in entry.settings:
        raise InputError(f"{entry.name} has no setting {setting!r}{near(setting, entry.settings)}; it has {known}.")
    return entry, setting.casefold()
