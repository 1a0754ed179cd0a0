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
        tolerance: largest difference between predictions that rounding explains.
    """

    build: Callable[[], nn.Module]
    call: Mapping[str, Any]
    methods: tuple[Method, ...]
    shared: Collection[str] = ()
    tolerance: float = 1e-4

    @property
    def name(self) -> str:
        """Methods and model class, for messages."""
        return f"{' and '.join(type(method).__name__ for method in self.methods)} on {type(self.build()).__name__}"

    def wrapped(self) -> nn.Module:
        """Build the model, in evaluation mode, and wrap it; trainable parts have the same weights each time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return wrap(self.build().eval(), self.methods)

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
def unwrapping_restores_the_original(case: Case) -> None:
    """`tokdyn.unwrap` restores class, state dict and predictions of the model exactly."""
    original = case.build().eval()
    model = case.wrapped()
    model(**case.call)
    unwrap(model)
    assert type(model) is type(original), f"{case.name}: unwrapping leaves the class {type(model)}"
    assert model.state_dict().keys() == original.state_dict().keys(), f"{case.name}: unwrapping changes the state dict"
    plain = prediction(original(**case.call))
    _equal(case, plain, prediction(model(**case.call)), "after unwrapping, it differs from the original")


@torch.no_grad()
def samples_do_not_depend_on_each_other(case: Case) -> None:
    """The prediction of a sample depends neither on the other samples of the batch nor on its position among them."""
    together = prediction(case.wrapped()(**case.call))
    for place in range(case.batch):
        alone = prediction(case.wrapped()(**case.one(place)))
        _close(case, together[place], alone[0], f"the prediction of sample {place} differs when it is called alone")


@torch.no_grad()
def copies_compute_with_their_own_weights(case: Case) -> None:
    """A deep copy keeps its predictions when the weights of the original change."""
    model = case.wrapped()
    twin = copy.deepcopy(model)
    before = prediction(twin(**case.call))
    for parameter in model.parameters():
        parameter.zero_()
    after = prediction(copy.deepcopy(twin)(**case.call))
    _equal(case, before, after, "the predictions of a copy change with the weights of the original")


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
    """The FLOPs that are computed from the trace of a call equal the counted ones; a multiply-add is 2."""
    cost = flops(case.wrapped(), **case.call)
    assert cost.counted == cost.total, f"{case.name}: {cost.total} FLOPs are computed, {cost.counted} are counted"


def gradients_are_the_same_with_checkpointing(case: Case) -> None:
    """Gradient checkpointing changes no gradient, also for two calls before one backward pass.

    Holds for a model without `enable_gradient_checkpointing`, because there is nothing to compare.
    """
    gradients = []
    for checkpointing in (False, True):
        model: Any = case.wrapped().train()
        if not hasattr(model, "enable_gradient_checkpointing"):
            return
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(0)
        loss = sum(prediction(model(**case.call)).float().square().mean() for _ in range(2))
        loss.backward()  # type: ignore[union-attr]
        gradients.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys(), f"{case.name}: with checkpointing, other parameters have a gradient"
    for name, gradient in plain.items():
        _close(case, gradient, recomputed[name], f"checkpointing changes the gradient of {name}")


LAWS: tuple[Callable[[Case], None], ...] = (
    disabled_is_the_original,
    unwrapping_restores_the_original,
    samples_do_not_depend_on_each_other,
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
