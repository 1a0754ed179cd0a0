"""The laws as public functions: they hold for tokdyn's own methods, and each of them catches what breaks it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch

import tokdyn
from tests.contract.models import TINY
from tokdyn.adapters import adapter_for
from tokdyn.attach import Plan, Sublayer, handles
from tokdyn.methods import METHODS, Method, Stage, Traits, register_method
from tokdyn.testing import LAWS, check_adapter, check_method

DIT = TINY["DiT"]


class Faulty(Method):
    """Something around the MLP that breaks a law."""

    fault: Literal["none", "batch", "place", "saved", "cost", "checkpointing"] = "none"

    def traits(self, depth: int) -> Traits:
        return Traits(Stage.SUBLAYER, around=("mlp",))

    def model_dump(self, **kwargs: Any) -> dict[str, Any]:
        found = super().model_dump(**kwargs)
        return {**found, "fault": "none"} if self.fault == "saved" else found


@dataclass(eq=False)
class FaultyMlp(Sublayer):
    fault: str
    calls: int = 0

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
        if self.fault == "checkpointing" and frame.context.training:
            out = out * (1 + 0.1 * (self.calls % 7))
        return out


@pytest.fixture
def faulty() -> Iterator[type[Faulty]]:
    methods = dict(METHODS)
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
    ],
)
def test_a_broken_law_is_named(faulty: type[Faulty], fault: str, words: str) -> None:
    name = "DiTTransformer2DModel" if fault == "checkpointing" else "DiT"
    with pytest.raises(AssertionError, match=f"Faulty on {name}: .*{words}"):
        check_method(faulty(fault=fault), TINY[name].build(), TINY[name].inputs(2))  # type: ignore[arg-type]


def test_a_single_sample_is_refused() -> None:
    with pytest.raises(tokdyn.InputError, match="two"):
        check_method(tokdyn.TokenMerge(), DIT.build(), DIT.inputs(1))


@pytest.mark.parametrize("name", ["DiT", "FluxTransformer2DModel"])
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
