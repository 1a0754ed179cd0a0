"""What is known of models and methods before torch is loaded is true."""

from __future__ import annotations

import inspect

import pytest

from tokdyn.method_names import ALIASES, full_name, short_name
from tokdyn.methods import METHODS
from tokdyn.methods import registry as registered
from tokdyn.models import DCDiT, DiT
from tokdyn.models.arguments import ARGUMENTS, TARGET


@pytest.mark.parametrize(("kind", "model"), [("dit", DiT), ("dcdit", DCDiT)])
def test_arguments_are_those_of_the_constructor(kind: str, model: type) -> None:
    signature = inspect.signature(model.__init__, eval_str=True)
    written = {name: each.annotation for name, each in signature.parameters.items() if name != "self"}
    assert written == ARGUMENTS[kind]


def test_default_target() -> None:
    assert inspect.signature(DCDiT.__init__).parameters["target"].default == TARGET


def test_names_of_methods_are_those_of_the_classes() -> None:
    own = {name: kind.aliases for name, kind in METHODS.items() if kind.__module__.startswith("tokdyn.")}
    assert own == ALIASES


@pytest.mark.parametrize("name", ["TokenMerge", "token-merge", "tome", "dydit", "skip", "Merge", "no", 3, None])
def test_names_are_looked_up_as_in_the_registry(name: object) -> None:
    assert full_name(name) == registered.full_name(name)
    assert short_name(name) == registered.short_name(name)
