"""The laws as public functions: they hold for tokdyn's own methods, and each of them catches what breaks it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from torch import nn

import tokdyn
from tests.contract.models import TINY
from tokdyn.adapters import adapter_for
from tokdyn.attach import Plan, Sublayer, handles
from tokdyn.methods import METHODS, Method, Stage, Traits, register_method
from tokdyn.testing import LAWS, Case, check_adapter, check_method
from tokdyn.testing.laws import other_models_stay_as_they_are

DIT = TINY["DiT"]


class Faulty(Method):
    """Something around the MLP that breaks a law."""

    fault: Literal[
        "none", "batch", "place", "saved", "cost", "checkpointing", "copies", "others", "attribute", "weights"
    ] = "none"

    def traits(self, depth: int) -> Traits:
        return Traits(Stage.SUBLAYER, around=("mlp",))

    def model_dump(self, **kwargs: Any) -> dict[str, Any]:
        found = super().model_dump(**kwargs)
        return {**found, "fault": "none"} if self.fault == "saved" else found


@dataclass(eq=False)
class FaultyMlp(Sublayer):
    fault: str
    calls: int = 0
    first: Any = None

    def around(self, frame, view, site, call, named):  # type: ignore[no-untyped-def]
        out = call(**named)
        self.calls += 1
        if site.kind != "mlp":
            return out
        if self.fault == "batch":
            out = out + out.mean(dim=0, keepdim=True)
        if self.fault == "place":
            out = out * torch.arange(1, len(out) + 1).view(-1, 1, 1)
        if self.fault == "cost":
            frame.block.mlp.append((view.batch, 1))
        model = frame.context.model
        if self.fault == "copies":  # of a model that was wrapped by somebody else
            self.first = self.first or weakref.ref(model)
            out = out * next(self.first().parameters()).norm()
        if self.fault == "others":
            nn.SiLU.forward = lambda _, x: 2 * x
        if self.fault == "attribute":
            model.left_behind = True
        if self.fault == "weights":
            model.register_buffer("left_behind", torch.ones(1))
        if self.fault == "checkpointing" and frame.context.training:
            out = out * (1 + 0.1 * (self.calls % 7))
        return out


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Faulty]]:
    methods = dict(METHODS)
    monkeypatch.setattr(nn.SiLU, "forward", nn.SiLU.forward)  # put back behind the fault that replaces it
    register_method(Faulty)

    @handles(Faulty)
    def build(plan: Plan) -> list[object]:
        return [FaultyMlp(plan.method.fault)]

    yield Faulty
    METHODS.clear()
    METHODS.update(methods)


def test_a_method_that_does_nothing_obeys_the_laws(faulty: type[Faulty]) -> None:
    check_method(faulty(), DIT.build(), DIT.inputs(2))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("batch", "called alone"),
        ("place", "called alone"),
        ("saved", "read back"),
        ("cost", "counted"),
        ("checkpointing", "checkpointing"),
        ("copies", "copy"),
        ("attribute", "left_behind"),
        ("weights", "weights"),
    ],
)
def test_a_broken_law_is_named(faulty: type[Faulty], fault: str, words: str) -> None:
    name = "DiTTransformer2DModel" if fault == "checkpointing" else "DiT"
    with pytest.raises(AssertionError, match=f"Faulty on {name}: .*{words}"):
        check_method(faulty(fault=fault), TINY[name].build(), TINY[name].inputs(2))  # type: ignore[arg-type]


def test_a_change_of_other_models_is_named(faulty: type[Faulty]) -> None:
    """By its own law: `check_method` meets it earlier, as an unwrapped model that differs from the original."""
    name = "DiTTransformer2DModel"
    case = Case(TINY[name].build, TINY[name].inputs(2), (faulty(fault="others"),))
    with pytest.raises(AssertionError, match=f"Faulty on {name}: .*not wrapped"):
        other_models_stay_as_they_are(case)


def test_wrapped_models_are_prepared_for_every_law() -> None:
    depths: list[int] = []

    def prepare(model: nn.Module) -> None:
        tokdyn.stats(model)  # raises if it is not wrapped
        depths.append(len(model.blocks))

    check_method(tokdyn.DepthSkip(blocks=(1,)), DIT.build(), DIT.inputs(2), prepare=prepare)
    assert len(depths) >= len(LAWS)


def test_a_single_sample_is_refused() -> None:
    with pytest.raises(tokdyn.InputError, match="two"):
        check_method(tokdyn.TokenMerge(), DIT.build(), DIT.inputs(1))


@pytest.mark.parametrize("name", ["DiT", pytest.param("FluxTransformer2DModel", marks=pytest.mark.slow)])
def test_adapters_obey_the_laws(name: str) -> None:
    shared = {"img_ids", "txt_ids", "image_rotary_emb"}
    checked = check_adapter(TINY[name].build(), TINY[name].inputs(2), shared=shared, tolerance=1e-3)
    assert len(checked) > len(METHODS)


def test_an_adapter_that_reads_the_wrong_grid_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DIT.build()
    wrong = replace(adapter_for(model), name="wrong", grid=lambda *_: (3, 3))
    monkeypatch.setattr("tokdyn.adapters.registry.REGISTERED", [wrong])
    with pytest.raises(AssertionError, match=r"'wrong' .* 9 cells.* 24 tokens"):
        check_adapter(model, DIT.inputs(2))


def test_every_law_says_what_it_holds() -> None:
    assert all(law.__doc__ for law in LAWS)
