"""The laws: each takes a case and raises an `AssertionError` where it does not hold."""

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
    """A method, or several, on a model.

    Attributes:
        build: makes a fresh model, the same each time, not wrapped.
        call: keyword arguments of a call of the model, for a batch of at least two samples.
        methods: that the model is wrapped with.
        shared: names of arguments that have no batch.
        tolerance: largest difference that rounding explains, of predictions and, relative to their largest entry, of
            gradients.
        prepare: changes the wrapped model in place before it is used; calibrates a router or opens gates, for instance.
    """

    build: Callable[[], nn.Module]
    call: Mapping[str, Any]
    methods: tuple[Method, ...]
    shared: Collection[str] = ()
    tolerance: float = 1e-4
    prepare: Callable[[nn.Module], object] | None = None

    @property
    def name(self) -> str:
        """What failures call it."""
        return f"{' and '.join(type(method).__name__ for method in self.methods)} on {type(self.build()).__name__}"

    def wrapped(self) -> nn.Module:
        """Build the model, wrap it and prepare it; trained parts start the same each time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = wrap(self.build().eval(), self.methods)
            if self.prepare is not None:
                self.prepare(model)
            return model

    def one(self, place: int) -> dict[str, Any]:
        """Select the arguments of one sample."""
        return {
            name: value if name in self.shared else _entry(value, place, self.batch)
            for name, value in self.call.items()
        }

    @property
    def batch(self) -> int:
        """Samples of the call."""
        return next(len(value) for name, value in self.call.items() if name not in self.shared and _has_entries(value))


def prediction(output: Any) -> Tensor:
    """(B, ...) what a model predicts, of whatever it returns."""
    found = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    return torch.stack(list(found)) if isinstance(found, Sequence) else found


@torch.no_grad()
def disabled_is_the_original(case: Case) -> None:
    """Within `tokdyn.disabled` the model predicts bit for bit what it did before it was wrapped."""
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
    """`tokdyn.unwrap` leaves classes, attributes, state dict and predictions as they were."""
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
    """The prediction of a sample depends neither on its batch mates nor on its place in the batch."""
    together = prediction(case.wrapped()(**case.call))
    for place in range(case.batch):
        alone = prediction(case.wrapped()(**case.one(place)))
        _close(case, together[place], alone[0], f"sample {place} is predicted otherwise when it is called alone")


@torch.no_grad()
def other_models_stay_as_they_are(case: Case) -> None:
    """Wrapping and calling one model changes nothing in another of its class."""
    other = case.build().eval()
    plain = prediction(other(**case.call))
    case.wrapped()(**case.call)
    _equal(case, plain, prediction(other(**case.call)), "a model of its class that is not wrapped changes")


@torch.no_grad()
def copies_compute_with_their_own_weights(case: Case) -> None:
    """A deep copy predicts the same when the weights of the original change, and something else when its own do."""
    model = case.wrapped()
    model(**case.call)
    twin, second = copy.deepcopy(model), copy.deepcopy(model)
    before = prediction(twin(**case.call))
    for parameter in model.parameters():
        parameter.zero_()
    after = prediction(second(**case.call))
    _equal(case, before, after, "a copy changes with the weights of the original")
    scaled = case.build().eval()
    for changed in (twin, scaled):
        for name, parameter in changed.named_parameters():
            parameter.mul_(1.0 if name.startswith("tokdyn.") else 1.1)
    with disabled(twin):
        after = prediction(twin(**case.call))
    _equal(case, prediction(scaled(**case.call)), after, "a copy does not compute with the weights it was given")


@torch.no_grad()
def saved_methods_load(case: Case) -> None:
    """`tokdyn.save` and `tokdyn.load` bring back the same methods, trained parts and predictions."""
    for method in case.methods:
        again = from_settings(to_settings(method))
        assert again == method, f"{case.name}: {method} is read back as {again}"
    model = case.wrapped()
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        other = load(case.build().eval(), folder)
    assert attached(other).methods == attached(model).methods, f"{case.name}: other methods are loaded than were saved"
    one, two = prediction(model(**case.call)), prediction(other(**case.call))
    _equal(case, one, two, "methods that were saved and loaded predict something else")


@torch.no_grad()
def computed_flops_are_the_counted_ones(case: Case) -> None:
    """The FLOPs that are computed from what the methods did equal those that are counted (multiply-add = 2).

    So do those of the dense model, which statistics compare with, and those with the methods disabled.
    """
    model, plain = case.wrapped(), flops(case.build().eval(), **case.call).counted
    for training in (False, True):
        cost = flops(model.train(training), **case.call)
        assert cost.counted == cost.total, f"{case.name}: {cost.total} FLOPs are computed, {cost.counted} are counted"
        if cost.dense is not None and not adapter_for(model).chunked:
            assert cost.dense == plain, f"{case.name}: {cost.dense} FLOPs are said to be dense, and {plain} are"
    with disabled(model.eval()):
        cost = flops(model, **case.call)
    assert cost.counted == cost.total == plain, f"{case.name}: disabled, it costs {cost.counted} FLOPs, and not {plain}"


def gradients_are_the_same_with_checkpointing(case: Case) -> None:
    """Gradient checkpointing changes no gradient, for two calls before one backward pass too."""
    found = []
    for checkpointing in (False, True):
        model: Any = case.wrapped().train()
        enable = getattr(model, "enable_gradient_checkpointing", getattr(model, "set_grad_checkpointing", None))
        if enable is None:
            return
        if checkpointing:
            enable()
        torch.manual_seed(0)
        loss = sum(weight * prediction(model(**case.call)).float().square().mean() for weight in (1, 2))
        loss.backward()  # type: ignore[union-attr]
        found.append({name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None})
    plain, recomputed = found
    assert plain.keys() == recomputed.keys(), f"{case.name}: checkpointing gives other parameters a gradient"
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
    return value[place : place + 1] if _has_entries(value) and len(value) == batch else value


def _equal(case: Case, expected: Tensor, found: Tensor, what: str) -> None:
    assert torch.equal(expected, found), f"{case.name}: {what}, by {_distance(expected, found):.3g}"


def _close(case: Case, expected: Tensor, found: Tensor, what: str) -> None:
    distance = _distance(expected, found)
    assert distance <= case.tolerance, f"{case.name}: {what}, by {distance:.3g} where {case.tolerance:.3g} is rounding"


def _distance(expected: Tensor, found: Tensor) -> float:
    """Largest difference, of which a value that is not finite is one."""
    if expected.shape != found.shape:
        return float("inf")
    difference = (expected - found).abs().max() if expected.numel() else torch.zeros(())
    return float(difference.nan_to_num(float("inf")))
