"""The laws: functions of a `Case`, each of which raises an `AssertionError` if the law does not hold for it."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.adapters import adapter_for
from tokdyn.attach import attached, disabled, load, save, unwrap, wrap
from tokdyn.cost import flops
from tokdyn.methods import Method
from tokdyn.methods.registry import from_settings, to_settings


@dataclass(frozen=True)
class Case:
    """A model with methods and a call, for which the laws are checked.

    Attributes:
        build: builds the model, not wrapped and with the same weights each time.
        call: keyword arguments of a call of the model, for a batch of at least two samples.
        methods: the methods to wrap the model with.
        shared: names of arguments that have no batch axis.
        tolerance: largest difference that rounding explains, of predictions and, relative to their largest entry, of
            gradients.
        prepare: changes the wrapped model in place before it is used: calibrates its router or opens its gates, for
            instance.
    """

    build: Callable[[], nn.Module]
    call: Mapping[str, Any]
    methods: tuple[Method, ...]
    shared: Collection[str] = ()
    tolerance: float = 1e-4
    prepare: Callable[[nn.Module], object] | None = None

    @property
    def name(self) -> str:
        """Methods and model class, for messages."""
        return f"{' and '.join(type(method).__name__ for method in self.methods)} on {type(self.build()).__name__}"

    def wrapped(self) -> nn.Module:
        """Build the model, in evaluation mode, wrap and prepare it; trainable parts have the same weights each time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = wrap(self.build().eval(), self.methods)
            if self.prepare is not None:
                self.prepare(model)
            return model

    def one(self, place: int) -> dict[str, Any]:
        """Return the arguments of the call for one sample of the batch, given its position."""
        return {
            name: value if name in self.shared else _entry(value, place, self.batch)
            for name, value in self.call.items()
        }

    @property
    def batch(self) -> int:
        """Number of samples in the call."""
        return next(len(value) for name, value in self.call.items() if name not in self.shared and _has_entries(value))


def prediction(output: Any) -> Tensor:
    """Return the prediction (B, ...) from a model's result: a tensor, list or tuple, or an object with `sample`."""
    value = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    return torch.stack(list(value)) if isinstance(value, Sequence) else value


@torch.no_grad()
def disabled_is_the_original(case: Case) -> None:
    """Inside of `tokdyn.disabled` a wrapped model predicts bit for bit what the unwrapped model predicts."""
    plain, model = prediction(case.build().eval()(**case.call)), case.wrapped()
    with disabled(model):
        _equal(case, plain, prediction(model(**case.call)), "with its methods disabled, it differs from the original")


@torch.no_grad()
def wrapping_keeps_class_and_weights(case: Case) -> None:
    """A wrapped model is of its class and name, and its state dict gains only keys that begin with `tokdyn.`."""
    original, model = case.build(), case.wrapped()
    model(**case.call)
    assert isinstance(model, type(original)), f"{case.name}: wrapped, it is not a {type(original).__name__}"
    assert type(model).__name__ == type(original).__name__, f"{case.name}: wrapping renames the class"
    keys = [key for key in model.state_dict() if not key.startswith("tokdyn.")]
    assert keys == list(original.state_dict()), f"{case.name}: wrapping changes the keys of the weights"


@torch.no_grad()
def unwrapping_restores_the_original(case: Case) -> None:
    """`tokdyn.unwrap` restores classes, attributes, state dict and predictions of the model exactly."""
    original = case.build().eval()
    model, plain = case.wrapped(), prediction(original(**case.call))
    model(**case.call)
    unwrap(model)
    for (name, one), (_, two) in zip(original.named_modules(), model.named_modules(), strict=True):
        assert type(two) is type(one), f"{case.name}: unwrapping leaves the class {type(two)} of {name!r}"
        left = sorted(vars(two).keys() - vars(one).keys())
        assert not left, f"{case.name}: unwrapping leaves the attributes {', '.join(left)} on {name!r}"
    assert model.state_dict().keys() == original.state_dict().keys(), f"{case.name}: unwrapping changes the state dict"
    _equal(case, plain, prediction(model(**case.call)), "after unwrapping, it differs from the original")


@torch.no_grad()
def samples_do_not_depend_on_each_other(case: Case) -> None:
    """The prediction of a sample depends neither on the other samples of the batch nor on its position among them."""
    together = prediction(case.wrapped()(**case.call))
    for place in range(case.batch):
        alone = prediction(case.wrapped()(**case.one(place)))
        _close(case, together[place], alone[0], f"the prediction of sample {place} differs when it is called alone")


@torch.no_grad()
def other_models_stay_as_they_are(case: Case) -> None:
    """Wrapping and calling one model changes nothing in another of its class."""
    other = case.build().eval()
    plain = prediction(other(**case.call))
    case.wrapped()(**case.call)
    _equal(case, plain, prediction(other(**case.call)), "a model of its class that is not wrapped changes")


@torch.no_grad()
def copies_compute_with_their_own_weights(case: Case) -> None:
    """A deep copy keeps its predictions when the weights of the original change, and computes with its own."""
    model = case.wrapped()
    model(**case.call)
    twin, second = copy.deepcopy(model), copy.deepcopy(model)
    before = prediction(twin(**case.call))
    for parameter in model.parameters():
        parameter.zero_()
    after = prediction(second(**case.call))
    _equal(case, before, after, "the predictions of a copy change with the weights of the original")
    scaled = case.build().eval()
    for changed in (twin, scaled):
        for name, parameter in changed.named_parameters():
            parameter.mul_(1.0 if name.startswith("tokdyn.") else 1.1)
    with disabled(twin):
        after = prediction(twin(**case.call))
    _equal(case, prediction(scaled(**case.call)), after, "a copy does not compute with the weights it was given")


@torch.no_grad()
def saved_methods_load(case: Case) -> None:
    """`tokdyn.save` and `tokdyn.load` restore the methods, their trained parts and the predictions."""
    for method in case.methods:
        again = from_settings(to_settings(method))
        assert again == method, f"{case.name}: {method} was written as settings and read back as {again}"
    model = case.wrapped()
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        other = load(case.build().eval(), folder)
    assert attached(other).methods == attached(model).methods, f"{case.name}: loading restores other methods than saved"
    saved, loaded = prediction(model(**case.call)), prediction(other(**case.call))
    _equal(case, saved, loaded, "after saving and loading the methods, the predictions differ")


@torch.no_grad()
def computed_flops_are_the_counted_ones(case: Case) -> None:
    """The FLOPs that are computed from the trace of a call equal the counted ones; a multiply-add is 2.

    This holds in evaluation, in training and with the methods disabled. The FLOPs of the dense model, with which
    statistics compare, are those of the model before it was wrapped.
    """
    model, plain = case.wrapped(), flops(case.build().eval(), **case.call).counted
    for training in (False, True):
        cost = flops(model.train(training), **case.call)
        assert cost.counted == cost.total, f"{case.name}: {cost.total} FLOPs are computed, {cost.counted} are counted"
        if cost.dense is not None and not adapter_for(model).chunked:
            assert cost.dense == plain, f"{case.name}: the dense model costs {plain} FLOPs, and {cost.dense} are stated"
    with disabled(model.eval()):
        cost = flops(model, **case.call)
    assert cost.counted == cost.total == plain, f"{case.name}: disabled, it costs {cost.counted} FLOPs, not {plain}"


def gradients_are_the_same_with_checkpointing(case: Case) -> None:
    """Gradient checkpointing changes no gradient, also for two calls before one backward pass.

    Holds for a model that does not support gradient checkpointing, because there is nothing to compare.
    """
    gradients = []
    for checkpointing in (False, True):
        model: Any = case.wrapped().train()
        enable = getattr(model, "enable_gradient_checkpointing", getattr(model, "set_grad_checkpointing", None))
        if enable is None or getattr(model, "_supports_gradient_checkpointing", None) is False:
            return
        if checkpointing:
            enable()
        torch.manual_seed(0)
        loss = sum(weight * prediction(model(**case.call)).float().square().mean() for weight in (1, 2))
        loss.backward()  # type: ignore[union-attr]
        gradients.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys(), f"{case.name}: with checkpointing, other parameters have a gradient"
    for name, gradient in plain.items():
        scale = gradient.abs().max().clamp(min=1e-4)
        what = f"checkpointing changes the gradient of {name}, relative to its largest entry"
        _close(case, gradient / scale, recomputed[name] / scale, what)


LAWS: tuple[Callable[[Case], None], ...] = (
    disabled_is_the_original,
    wrapping_keeps_class_and_weights,
    unwrapping_restores_the_original,
    samples_do_not_depend_on_each_other,
    other_models_stay_as_they_are,
    copies_compute_with_their_own_weights,
    saved_methods_load,
    computed_flops_are_the_counted_ones,
    gradients_are_the_same_with_checkpointing,
)
"""All laws, in the order in which they are checked."""


def _has_entries(value: Any) -> bool:
    return (isinstance(value, Tensor) and value.dim() > 0) or isinstance(value, list)


def _entry(value: Any, place: int, batch: int) -> Any:
    if isinstance(value, Mapping):
        return {name: _entry(item, place, batch) for name, item in value.items()}
    if isinstance(value, tuple) or (isinstance(value, list) and len(value) != batch):
        return type(value)(_entry(item, place, batch) for item in value)
    return value[place : place + 1] if _has_entries(value) and len(value) == batch else value


def _equal(case: Case, expected: Tensor, actual: Tensor, failure: str) -> None:
    assert torch.equal(expected, actual), f"{case.name}: {failure}, by {_distance(expected, actual):.3g}"


def _close(case: Case, expected: Tensor, actual: Tensor, failure: str) -> None:
    distance = _distance(expected, actual)
    assert distance <= case.tolerance, f"{case.name}: {failure}, by {distance:.3g}; {case.tolerance:.3g} is allowed"


def _distance(expected: Tensor, actual: Tensor) -> float:
    """Return the largest absolute difference; infinity if the shapes differ or the difference is NaN."""
    if expected.shape != actual.shape:
        return float("inf")
    difference = (expected - actual).abs().max() if expected.numel() else torch.zeros(())
    return float(difference.nan_to_num(float("inf")))
