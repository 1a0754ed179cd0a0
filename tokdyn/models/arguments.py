"""The arguments that DiT and DC-DiT take, by name, so that settings can be checked before torch is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tokdyn.limits import DEPTH, PARAMETERS
from tokdyn.reading import shown
from tokdyn.section import require_plain

Size = int | tuple[int, int]

SHARED: dict[str, Any] = {
    "sample_size": Size,
    "patch_size": int,
    "in_channels": int,
    "hidden_size": int,
    "depth": int,
    "num_heads": int,
    "mlp_ratio": float,
    "num_classes": int,
    "learn_sigma": bool,
    "timestep_shift": int,
    "timestep_map": tuple[float, float],
    "mlp_norm_eps": float,
    "out_channels": int | None,
}
"""The types of the arguments of both constructors."""
OF_CHUNKING: dict[str, Any] = {
    "encoder_depth": int,
    "decoder_depth": int,
    "scaffold_width": int | None,
    "target": float,
    "router": Literal["spatial_predictability", "cosine", "random"],
    "sigma": float | None,
    "force_ends": bool,
    "official_init": bool,
    "position_scale": float,
    "condition_adaptor": bool,
}
"""Those of the DC-DiT alone."""
TARGET = 4.0
"""N, cells per kept token of a DC-DiT, where it is not given."""
ARGUMENTS = {"dit": SHARED, "dcdit": {**SHARED, **OF_CHUNKING}}
"""By the kind of the model."""


@cache
def _adapter(kind: str, name: str) -> TypeAdapter[Any]:
    """Return the validator of an argument; it refuses NaN and infinity."""
    return TypeAdapter(ARGUMENTS[kind][name], config=ConfigDict(allow_inf_nan=False))


def checked(kind: str, name: str, value: Any) -> Any:
    """Return the value of an argument, which may come from any file, in the type that the constructor takes.

    Args:
        kind: "dit" or "dcdit".
        name: the argument.
        value: its value.

    Raises:
        ValueError: the value is of another type, NaN or infinite; the message names the argument and the value.
    """
    try:
        require_plain(value, ARGUMENTS[kind][name])
        return _adapter(kind, name).validate_python(value)
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"]
        raise ValueError(f"'{name}': {message[0].lower()}{message[1:]}, got {shown(value)}") from error
    except ValueError as error:
        raise ValueError(f"'{name}': {error}") from error


def require_size(settings: Mapping[str, Any]) -> int:
    """Raise a ValueError if a model of these settings would have more blocks or parameters than are accepted.

    Args:
        settings: checked arguments of a constructor; those that are missing are not counted.

    Returns:
        The number of its parameters, or a little less.
    """
    for name in ("depth", "encoder_depth", "decoder_depth"):
        if excess := DEPTH.excess(settings.get(name, 0)):
            raise ValueError(f"'{name}': these are {excess}")
    most = PARAMETERS.value
    width, ratio = min(settings.get("hidden_size", 0), most), min(settings.get("mlp_ratio", 4.0), float(most))
    hidden, patch = int(width * ratio), settings.get("patch_size", 1)
    block = 10 * width * width + 2 * width * hidden  # attention, modulation and MLP
    others = width * (settings.get("num_classes", 0) + patch * patch * settings.get("in_channels", 1))
    scaffold = settings.get("scaffold_width") or 0
    count: int = settings.get("depth", 1) * block + others + 9 * scaffold * (scaffold + width)
    if excess := PARAMETERS.excess(max(count, settings.get("hidden_size", 0))):
        raise ValueError(f"the model would have {excess}")
    return count
