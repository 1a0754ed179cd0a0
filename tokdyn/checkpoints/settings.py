"""Read the settings stored with a checkpoint, and combine them with inferred settings and those of the caller."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from tokdyn.checkpoints.files import NOTES, Raw
from tokdyn.checkpoints.pickles import lookup
from tokdyn.errors import CheckpointError
from tokdyn.models import DCDiT, DiT
from tokdyn.models.arguments import ARGUMENTS, checked
from tokdyn.models.sizes import renamed_settings
from tokdyn.reading import shown

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Number of attention heads for each published width (S, B, L, XL), which shapes do not determine."""

FREE = frozenset({"sigma", "target", "force_ends", "official_init", "timestep_shift", "mlp_norm_eps"})
"""Settings that no tensor's shape depends on, of which the caller may override the stored value."""


def settle(
    model: type[DiT] | type[DCDiT],
    inferred: Mapping[str, Any],
    stored: Mapping[str, Any],
    given: Mapping[str, Any],
    origin: str,
) -> dict[str, Any]:
    """Combine inferred settings, stored settings and those of the caller, which must not contradict each other.

    Args:
        model: the class to build.
        inferred: settings inferred from shapes.
        stored: settings from a config.json or a training file.
        given: settings of the caller.
        origin: name of the checkpoint, for error messages.

    Returns:
        Keyword arguments of the model. `sample_size` and `sigma` are missing if they are neither stored nor given.

    Raises:
        CheckpointError: a setting is unknown, two sources contradict each other, or the number of heads is unknown or
            does not divide the width.
    """
    known = set(inspect.signature(model.__init__).parameters) - {"self"}
    stored, given = renamed_settings(stored), renamed_settings(given)
    for name in given:
        if name not in known:
            raise CheckpointError(
                f"{model.__name__} has no setting {name!r}; its settings are {', '.join(sorted(known))}."
            )
    settings = dict(inferred)
    for whose, layer in (("stored with", stored), ("given for", given)):
        for name, value in layer.items():
            if value is None and name != "sigma":  # None means "not set", but sigma=None turns smoothing off
                continue
            value = tuple(value) if isinstance(value, list) else value
            if name in ARGUMENTS["dcdit"] and not (layer is given and name == "sample_size"):
                value = _checked(name, value, f"{whose} {origin}")
            free = name in FREE and name not in inferred
            if name in settings and not free and not _same(settings[name], value):
                raise CheckpointError(
                    f"{name}={shown(value)}, {whose} {origin}, contradicts its "
                    f"{'weights' if name in inferred else 'settings'}, where it is {settings[name]!r}."
                )
            settings[name] = settings[name] if name in inferred else value
    width = settings["hidden_size"]
    heads = settings.setdefault("num_heads", HEADS.get(width))
    if heads is None:
        raise CheckpointError(
            f"the number of heads of {origin} cannot be inferred from shapes and is not known for width {width}; set "
            "num_heads."
        )
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise CheckpointError(f"num_heads={heads!r} does not divide the width {width} of {origin}.")
    return settings


def _checked(name: str, value: Any, whose: str) -> Any:
    """Return a setting in the type that the constructor takes; raise a CheckpointError if it is of another."""
    try:
        return checked("dcdit", name, value)  # the arguments of a DiT are among those of a DC-DiT
    except ValueError as error:
        raise CheckpointError(f"{name}={shown(value)}, {whose}, cannot be used: {error}.") from error


def own_settings(raw: Raw) -> dict[str, Any]:
    """Return the settings in the config.json of a folder that tokdyn wrote.

    Raises:
        CheckpointError: this version of tokdyn does not know one of the settings.
    """
    model = {"DiT": DiT, "DCDiT": DCDiT}[raw.config["_class_name"]]
    known = set(inspect.signature(model.__init__).parameters)
    settings = renamed_settings({name: value for name, value in raw.config.items() if not name.startswith("_")})
    settings.pop("out_channels", None)  # derived, kept in config.json for diffusers' pipelines
    unknown = sorted(set(settings) - known)
    if unknown:
        raise CheckpointError(
            f"config.json of {raw.origin} has {unknown[0]!r}, which {model.__name__} of this version of tokdyn does "
            "not know; use the version that wrote it."
        )
    return settings


def diffusers_settings(raw: Raw) -> dict[str, Any]:
    """Return the settings in diffusers' config.json, with those that make a `DiT` compute like diffusers' DiT.

    In diffusers, the timestep frequencies end one step further than in facebook's DiT, and the norm before the MLP has
    its own epsilon. A config.json that tokdyn wrote also holds the settings of the original model; they are ignored
    once diffusers has loaded the model and saved it again.

    Raises:
        CheckpointError: the config.json describes a variant that a `DiT` cannot compute.
    """
    config = raw.config if str(raw.config.get("_class_name", "")).endswith("Transformer2DModel") else {}
    for name, expected in (
        ("norm_type", "ada_norm_zero"),
        ("activation_fn", "gelu-approximate"),
        ("norm_elementwise_affine", False),
        ("attention_bias", True),
    ):
        if config.get(name, expected) != expected:
            raise CheckpointError(f"{raw.origin} has {name}={config[name]!r}, but a DiT only computes {expected!r}.")
    return {
        "num_heads": config.get("num_attention_heads"),
        "sample_size": config.get("sample_size"),
        "timestep_shift": 1,
        "mlp_norm_eps": config.get("norm_eps", 1e-5),
        **noted_settings(DiT, {} if "_name_or_path" in config else config.get(NOTES, {}), raw.origin),
    }


def noted_settings(model: type[DiT] | type[DCDiT], notes: Any, origin: str) -> dict[str, Any]:
    """Return the settings that `tokdyn convert` stored under the key `NOTES`.

    Args:
        model: the class to build.
        notes: the stored value.
        origin: name of the checkpoint, for error messages.

    Raises:
        CheckpointError: the notes are malformed, or this version of tokdyn does not know one of the settings.
    """
    known = set(inspect.signature(model.__init__).parameters)
    notes = renamed_settings(notes) if isinstance(notes, Mapping) else notes
    unknown = [notes] if not isinstance(notes, Mapping) else sorted(set(notes) - known)
    if unknown:
        raise CheckpointError(
            f"{origin} has {unknown[0]!r} under {NOTES}, which {model.__name__} of this version of tokdyn does not "
            "know; use the version that wrote it."
        )
    return dict(notes)


def official_settings(raw: Raw) -> dict[str, Any]:
    """Return the settings of official DC-DiT weights: force_ends=True, and those in their training file."""
    heads = lookup(raw.training, "model", "hnet", "num_heads")
    target = lookup(raw.training, "training", "downsample_factor")
    settings = {
        "force_ends": True,
        "num_heads": heads[0] if isinstance(heads, list) and heads else None,
        "sigma": lookup(raw.training, "model", "hnet", "dechunk_kernel_sigma"),
        "target": target[0] if isinstance(target, list) and target else target,
    }
    return {name: value for name, value in settings.items() if value is not None}


def _same(one: Any, other: Any) -> bool:
    """Return whether two settings are equal: floats up to rounding, and a number equals a pair of that number."""
    if isinstance(one, tuple) or isinstance(other, tuple):
        pair, second = (value if isinstance(value, tuple) else (value, value) for value in (one, other))
        return pair == second
    if isinstance(one, float) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-3)
    return bool(one == other)
