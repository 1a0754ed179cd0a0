"""What a calibration was made on: a short text that can be compared with a model and a sampler later.

`DiTTransformer2DModel:1f0c2a9b:3c1dbd04...:50@0.999-0.488-0.020` names the class, a hash of the configuration, eight
weights in bf16, and, where it matters, the steps of the sampler with its first, middle and last noise level. Weights
are compared within what rounding to bf16 changes, so that a cast model is the same model; so is, then, a model whose
training went on for so short a time that its weights look alike to that precision.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.methods import Method
from tokdyn.trace.trajectory import Position

_WEIGHTS = 8
_UNKNOWN = "----"  # a weight that cannot be read at little cost
_TOLERANCE = 2**-6  # relative; bf16 rounds by up to 2^-8, once here and once in a cast
_LEVEL = 0.0025  # half-precision timesteps


def fingerprint(model: nn.Module, levels: Sequence[float] = ()) -> str:
    """Identify a model, and the steps of a sampler.

    Args:
        model: wrapped or not; the parts of methods do not count.
        levels: the noise level of every step; none where the sampler does not matter.
    """
    parts = [_class(model), _configuration(model), "".join(_weights(model))]
    return ":".join([*parts, _sampler(levels)] if levels else parts)


def different(expected: str, model: nn.Module) -> str | None:
    """Say in words what of a model is not as a fingerprint says; None if everything is."""
    kind, configuration, weights = (expected + "::").split(":")[:3]
    if kind != _class(model):
        return f"the model is a {_class(model)}, not a {kind}"
    if configuration != _configuration(model):
        return "its configuration is another"
    there = [weights[start : start + 4] for start in range(0, len(weights), 4)]
    now = _weights(model)
    if len(there) != len(now) or not all(map(_close, there, now)):
        return "its weights are others"
    return None


def other_sampler(expected: str, levels: Sequence[float]) -> str | None:
    """Say in words what of a trajectory is not as a fingerprint says; None if it all is, or it does not tell."""
    there, now = ":".join(expected.split(":")[3:]), _sampler(levels)
    if not there or there == now:
        return None
    (steps, _, marks), (taken, _, passed) = there.partition("@"), now.partition("@")
    if steps != taken:
        return f"the sampler takes {taken} steps, not {steps}"
    if any(abs(float(a) - float(b)) > _LEVEL for a, b in zip(marks.split("-"), passed.split("-"), strict=False)):
        return f"the sampler goes through noise levels {passed}, not {marks}"
    return None


def _class(model: nn.Module) -> str:
    return type(model).__name__


def _configuration(model: nn.Module) -> str:
    """Hash the configuration, or the shapes of the weights where there is none."""
    config: Any = getattr(model, "config", None)
    if isinstance(config, Mapping):
        content: Any = {name: value for name, value in config.items() if not name.startswith("_")}
    else:
        content = {name: tuple(value.shape) for name, value in _parameters(model)}
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _weights(model: nn.Module) -> list[str]:
    """Take eight weights from matrices in all parts of the model, four hexadecimal digits of bf16 each."""
    matrices = [value for _, value in _parameters(model) if value.dim() > 1]
    count = min(_WEIGHTS, len(matrices))
    chosen = [matrices[(2 * place + 1) * len(matrices) // (2 * count)] for place in range(count)]
    found = [_UNKNOWN] * count
    by_device: dict[torch.device, list[int]] = {}
    for place, value in enumerate(chosen):
        plain = type(value.data) is Tensor and not value.is_meta  # neither quantised nor cut over devices
        if plain and value.is_floating_point() and value.element_size() > 1:
            by_device.setdefault(value.device, []).append(place)
    for places in by_device.values():  # one transfer from each device
        picked = torch.stack([_one(chosen[place]).bfloat16() for place in places])
        for place, bits in zip(places, picked.view(torch.int16).tolist(), strict=True):
            found[place] = f"{bits & 0xFFFF:04x}"
    return found


def _one(value: Tensor) -> Tensor:
    """Take one element of a matrix, away from its edges."""
    return value.detach()[tuple(size * 2 // 5 for size in value.shape)]


def _close(one: str, other: str) -> bool:
    if _UNKNOWN in (one, other):
        return True
    a, b = (_number(each) for each in (one, other))
    return abs(a - b) <= _TOLERANCE * max(abs(a), abs(b)) + 1e-7  # fp16 ends there


def _number(digits: str) -> float:
    """Read a bf16 value from its bits."""
    bits = int(digits, 16) << 16
    return float(torch.tensor([bits - (1 << 32) if bits >> 31 else bits], dtype=torch.int32).view(torch.float32))


def _sampler(levels: Sequence[float]) -> str:
    marks = (levels[0], levels[len(levels) // 2], levels[-1])
    return f"{len(levels)}@{'-'.join(f'{max(mark, 0.0):.3f}' for mark in marks)}"


def _parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """List parameters by name, in the order of names, without those of methods."""
    found = [(name, value) for name, value in model.named_parameters() if not name.startswith("tokdyn.")]
    return sorted(found, key=lambda pair: pair[0])


_CURE = "calibrate again on calls of this one: tokdyn.calibrate(model, calls, {name}())"


def warn_of_another_model(model: nn.Module, methods: Sequence[Method]) -> None:
    """Warn once when a calibrated method is used on another model."""
    for method in methods:
        expected = getattr(method, "fingerprint", None)
        reason = different(expected, model) if expected else None
        if reason is not None:
            name = type(method).__name__
            text = f"{name} was calibrated on another model: {reason}. What it decides may be wrong here; "
            warnings.warn(text + _CURE.format(name=name) + ".", UserWarning, stacklevel=3)
            return


@dataclass
class SamplerCheck:
    """Compare the steps of the first whole trajectory with those that a method was calibrated on.

    Attributes:
        method: with a fingerprint that names a sampler.
        levels: noise levels of the steps of the trajectory so far.
    """

    method: Method
    levels: list[float] = field(default_factory=list)
    _run: int = -1
    _done: bool = False

    @staticmethod
    def of(methods: Sequence[Method]) -> SamplerCheck | None:
        """Make a check for the first method that depends on the sampler; None if none does."""
        named = (each for each in methods if (getattr(each, "fingerprint", None) or "").count(":") > 2)
        return next((SamplerCheck(each) for each in named), None)

    def see(self, position: Position, level: float) -> None:
        """Note a call of the model in sampling."""
        if position.run != self._run:
            self.end()
            self._run, self.levels = position.run, []
        if position.place == 0:
            self.levels.append(level)

    def end(self) -> None:
        """Warn once when the trajectory that ends here is of another sampler. A single call is no trajectory."""
        levels, self.levels = self.levels, []
        if self._done or len(levels) < 2:
            return
        self._done = True
        expected: str = self.method.fingerprint  # type: ignore[attr-defined]
        reason = other_sampler(expected, levels)
        if reason is not None:
            name = type(self.method).__name__
            text = f"{name} was calibrated with another sampler: {reason}. What it decides may be wrong here; "
            warnings.warn(text + _CURE.format(name=name) + ".", UserWarning, stacklevel=2)
