"""Public names, signatures, defaults, commands and keys of recipes change on purpose only."""

from __future__ import annotations

import difflib
from typing import Literal

import pytest

from tests.public_names import LIST, commands, described, lines, nested
from tokdyn.methods import METHODS, Method


def test_what_is_public_is_what_is_written_down() -> None:
    before, now = LIST.read_text(encoding="utf-8").splitlines(), lines()
    changes = "\n".join(difflib.unified_diff(before, now, "tests/public_names.txt", "the code", lineterm="", n=0))
    assert before == now, (
        f"{changes}\nWhere this is meant to be, say it in CHANGELOG.md and write the list with "
        "`python tests/public_names.py`."
    )


def first(method: str = "a", *, count: int = 1) -> None: ...


def other_default(method: str = "b", *, count: int = 1) -> None: ...


def other_kind(method: str = "a", count: int = 1) -> None: ...


def other_type(method: str = "a", *, count: int | None = 1) -> None: ...


def other_name(method: str = "a", *, number: int = 1) -> None: ...


@pytest.mark.parametrize("other", [other_default, other_kind, other_type, other_name])
def test_a_change_of_a_function_is_seen(other: object) -> None:
    assert list(described("f", first)) != list(described("f", other))


class Settings(Method):
    share: float = 0.5
    where: Literal["attention", "mlp"] = "mlp"


class OtherDefault(Method):
    share: float = 0.6
    where: Literal["attention", "mlp"] = "mlp"


class OtherChoice(Method):
    share: float = 0.5
    where: Literal["attention", "mlp", "both"] = "mlp"


class Required(Method):
    share: float
    where: Literal["attention", "mlp"] = "mlp"


@pytest.mark.parametrize("other", [OtherDefault, OtherChoice, Required])
def test_a_change_of_a_setting_is_seen(other: type[Method]) -> None:
    assert list(nested(Settings)) != list(nested(other))


def test_methods_commands_and_keys_are_in_the_list() -> None:
    written = LIST.read_text(encoding="utf-8").splitlines()
    for name, method in METHODS.items():
        for field in method.model_fields:
            assert any(line.startswith(f"tokdyn.{name}.{field}: ") for line in written), (name, field)
    assert [line for line in written if line.split()[0] == "tokdyn"] == list(commands())
    assert any(line.startswith("recipe training.batch_size: ") for line in written)
