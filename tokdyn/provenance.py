"""Compute and compare fingerprints: short texts that identify the model and sampler of a calibration.

A fingerprint such as `DiTTransformer2DModel:1f0c2a9b:3c1dbd04...:50@0.999-0.488-0.020` holds the class, a hash of the
configuration, eight weights in bf16 and, if the calibration depends on the sampler, its number of steps with the first,
middle and last noise level. Weights are compared with the tolerance of a cast to bf16, so a model that was cast still
matches, and so does one that was trained so little that these eight weights are equal to that precision.

That of a published preset, such as `WanTransformer3DModel:num_layers=30,in_channels=16`, holds the class and those
values of the configuration that tell the model apart from others of the class, and ends with `::28` if it is for 28
steps only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_WEIGHTS = 8
_UNKNOWN = "----"  # a weight that cannot be read at little cost
_TOLERANCE = 2**-6  # relative; bf16 rounds by up to 2^-8, once here and once in a cast
_LEVEL = 0.0025  # tolerance of noise levels, whose timesteps may have been half precision


def fingerprint(model: nn.Module, levels: Sequence[float] = ()) -> str:
    """Compute the fingerprint of a model, with or without that of a sampler.

    Args:
        model: wrapped or not; trainable parts of methods are left out.
        levels: noise level of every step of the sampler; () leaves the sampler out.
    """
    parts = [_class(model), _configuration(model), "".join(_weights(model))]
    return ":".join([*parts, _sampler(levels)] if levels else parts)


def different(expected: str, model: nn.Module) -> str | None:
    """Compare a model with the one in a fingerprint.

    Returns:
        A clause for a message that names the first difference; None if there is none.
    """
    kind, configuration, weights = (expected + "::").split(":")[:3]
    if kind != _class(model):
        return f"the model is a {_class(model)}, not a {kind}"
    if "=" in configuration or not configuration:
        return _other_values(configuration, model)
    if configuration != _configuration(model):
        return "the model has another configuration"
    before = [weights[start : start + 4] for start in range(0, len(weights), 4)]
    now = _weights(model)
    if len(before) != len(now) or not all(map(_close, before, now)):
        return "the model has other weights"
    return None


def other_sampler(expected: str, levels: Sequence[float]) -> str | None:
    """Compare the sampler of a trajectory with the one in a fingerprint.

    Args:
        expected: the fingerprint.
        levels: noise level of every step of the trajectory.

    Returns:
        A clause for a message that names the difference; None if there is none, or the fingerprint has no sampler.
    """
    before, now = ":".join(expected.split(":")[3:]), _sampler(levels)
    if not before or before == now:
        return None
    (steps, _, marks), (taken, _, passed) = before.partition("@"), now.partition("@")
    if steps != taken:
        return f"the sampler takes {taken} steps, not {steps}"
    if marks and any(
        abs(float(a) - float(b)) > _LEVEL for a, b in zip(marks.split("-"), passed.split("-"), strict=False)
    ):
        return f"the first, middle and last noise level of the sampler are {passed}, not {marks}"
    return None


def _class(model: nn.Module) -> str:
    return type(model).__name__


def _other_values(expected: str, model: nn.Module) -> str | None:
    """Name the first value, of those in a fingerprint, that the configuration of a model has otherwise."""
    config: Any = getattr(model, "config", None)
    for name, _, value in (each.partition("=") for each in expected.split(",") if each):
        if not isinstance(config, Mapping) or name not in config:
            return f"the configuration of the model has no {name}, which is {value} in the other"
        if str(config[name]) != value:
            return f"{name} is {config[name]} in the configuration of the model, not {value}"
    return None


def _configuration(model: nn.Module) -> str:
    """Hash the configuration, or the shapes of the weights if the model has no configuration."""
    config: Any = getattr(model, "config", None)
    if isinstance(config, Mapping):
        content: Any = {name: value for name, value in config.items() if not name.startswith("_")}
    else:
        content = {name: tuple(value.shape) for name, value in _parameters(model)}
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _weights(model: nn.Module) -> list[str]:
    """Read one element of each of eight matrices spread over the model, as four hexadecimal digits of bf16."""
    matrices = [value for _, value in _parameters(model) if value.dim() > 1]
    count = min(_WEIGHTS, len(matrices))
    chosen = [matrices[(2 * place + 1) * len(matrices) // (2 * count)] for place in range(count)]
    digits = [_UNKNOWN] * count
    by_device: dict[torch.device, list[int]] = {}
    for place, value in enumerate(chosen):
        plain = type(value.data) is Tensor and not value.is_meta  # neither quantised nor sharded
        if plain and value.is_floating_point() and value.element_size() > 1:
            by_device.setdefault(value.device, []).append(place)
    for places in by_device.values():  # one transfer from each device
        picked = torch.stack([_one(chosen[place]).bfloat16() for place in places])
        for place, bits in zip(places, picked.view(torch.int16).tolist(), strict=True):
            digits[place] = f"{bits & 0xFFFF:04x}"
    return digits


def _one(value: Tensor) -> Tensor:
    """Take one element of a matrix, away from its edges."""
    return value.detach()[tuple(size * 2 // 5 for size in value.shape)]


def _close(one: str, other: str) -> bool:
    """Return whether two weights agree within the tolerance; one that could not be read agrees with any."""
    if _UNKNOWN in (one, other):
        return True
    a, b = (_number(each) for each in (one, other))
    return abs(a - b) <= _TOLERANCE * max(abs(a), abs(b)) + 1e-7  # about the smallest value of fp16


def _number(digits: str) -> float:
    """Read a bf16 value from its four hexadecimal digits."""
    bits = int(digits, 16) << 16
    return float(torch.tensor([bits - (1 << 32) if bits >> 31 else bits], dtype=torch.int32).view(torch.float32))


def _sampler(levels: Sequence[float]) -> str:
    marks = (levels[0], levels[len(levels) // 2], levels[-1])
    return f"{len(levels)}@{'-'.join(f'{max(mark, 0.0):.3f}' for mark in marks)}"


def _parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the model's own parameters with their names, sorted by name; those of methods are left out."""
    own = [(name, value) for name, value in model.named_parameters() if not name.startswith("tokdyn.")]
    return sorted(own, key=lambda pair: pair[0])
