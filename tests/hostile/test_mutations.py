"""Recipes with a setting that cannot be meant are refused, and spoiled files of every format end in a sentence."""

from __future__ import annotations

import contextlib
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.hostile.mutations import leaves, nonsense, parsed, replaced, spoiled, values, written
from tests.hostile.readers import READERS, attempt, warm
from tests.hostile.sound import seeds
from tokdyn import recipe
from tokdyn.errors import TokdynError
from tokdyn.recipe import Recipe, yaml_text
from tokdyn.recipe.build import total_steps

RECIPES = [
    parsed(recipe.dump(recipe.load(name)))
    for name in ("demo", "cifar10/dit-flops", "imagenet/dc-dit-b-256", "upcycle/dc", "upcycle/dydit")
]
TEXTS = [recipe.dump(recipe.load(name)).encode() for name in ("demo", "cifar10/dit-flops")]


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    warm()


def some(count: int) -> Any:
    return settings(max_examples=count, suppress_health_check=list(HealthCheck))


def refused(content: bytes) -> str | None:
    """The sentence with which a recipe is refused; None if it is accepted."""
    with tempfile.TemporaryDirectory() as folder:
        error = attempt("recipes", "x.yaml", content, Path(folder).resolve())
    return None if error is None else str(error)


def accepted(content: bytes) -> Recipe | None:
    """The recipe, if it is one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder).resolve() / "x.yaml"
        path.write_bytes(content)
        try:
            return recipe.load(path)
        except recipe.RecipeError:
            return None


def no_nonsense(changed: tuple[str, dict[str, Any]]) -> None:
    what, content = changed
    assert refused(written(content)) is not None, f"{what} was accepted"


def no_traceback(content: bytes) -> None:
    """A spoiled recipe is refused, or is one: it can be written, is finite, and says how long it trains."""
    refused(content)
    found = accepted(content)
    if found is None:
        return
    text = recipe.dump(found)
    assert recipe.resolve(yaml_text.parse(text, "x")) == found
    numbers = [value for _, value in leaves(found.model_dump()) if isinstance(value, float)]
    assert all(map(math.isfinite, numbers))
    with contextlib.suppress(TokdynError):
        assert total_steps(found) >= 1


def every_setting() -> list[tuple[dict[str, Any], tuple[Any, ...], Any]]:
    """Each setting of the recipes once: a recipe, the keys that lead to it, and what it is there."""
    found = {}
    for each in RECIPES:
        for path, value in leaves(each):
            found.setdefault((*(key for key in path if isinstance(key, str)), type(value)), (each, path, value))
    return list(found.values())


def test_every_setting_refuses_what_cannot_be_meant() -> None:
    for number, (each, path, value) in enumerate(every_setting()):
        bad = values(path, value)
        no_nonsense((f"{path}={bad[number % len(bad)]!r}", replaced(each, path, bad[number % len(bad)])))


@pytest.mark.slow
def test_every_setting_refuses_all_that_cannot_be_meant() -> None:
    for each, path, value in every_setting():
        for bad in values(path, value):
            no_nonsense((f"{path}={bad!r}", replaced(each, path, bad)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("demo", "model.target=1e4"),
        ("demo", "chunking.curriculum=[[0, 5000], [10, 4]]"),
        ("imagenet/dc-dit-b-256", "compute_match.baseline=B"),
        ("imagenet/dc-dit-b-256", "compute_match.baseline=x"),
        ("demo", "model.hidden_size=-192"),
        ("demo", "model.sigma=1e-300"),
        ("demo", "optimizer.eps=1e-300"),
        ("demo", "optimizer.lr=1e300"),
    ],
)
def test_values_of_the_right_type_that_cannot_be_meant_are_refused(name: str, change: str) -> None:
    key, _, value = change.partition("=")
    with pytest.raises(TokdynError) as refused:
        recipe.check(name, [change, "model.target=4"] if "curriculum" in change else [change])
    assert key.rpartition(".")[2] in str(refused.value)
    if value[-1].isdigit() and "-" not in value:
        assert f"{float(value):,.10g}" in str(refused.value) or value.replace("e", "e+") in str(refused.value)


@some(40)
@given(nonsense(RECIPES))
def test_no_nonsense_is_accepted(changed: tuple[str, dict[str, Any]]) -> None:
    no_nonsense(changed)


@some(40)
@given(spoiled(TEXTS))
def test_spoiled_recipes_end_in_a_sentence(content: bytes) -> None:
    no_traceback(content)


@pytest.mark.slow
@some(2500)
@given(nonsense(RECIPES))
def test_no_nonsense_is_accepted_often(changed: tuple[str, dict[str, Any]]) -> None:
    no_nonsense(changed)


@pytest.mark.slow
@some(2500)
@given(spoiled(TEXTS))
def test_spoiled_recipes_end_in_a_sentence_often(content: bytes) -> None:
    no_traceback(content)


def test_sound_files_are_read(tmp_path: Path) -> None:
    """Otherwise nothing deep in a reader is ever spoiled."""
    from tests.hostile.sound import MAKERS

    for reader, make in MAKERS.items():
        for number, (name, content) in enumerate(make()):
            folder = tmp_path / f"{reader}{number}"
            folder.mkdir()
            assert reader == "latents" or attempt(reader, name, content, folder) is None, f"{reader}: {name}"


@pytest.mark.parametrize("reader", [name for name in READERS if name != "recipes"])
def test_spoiled_files_end_in_a_sentence(reader: str) -> None:
    spoil_files(reader, 6)


@pytest.mark.slow
@pytest.mark.parametrize("reader", [name for name in READERS if name != "recipes"])
def test_spoiled_files_end_in_a_sentence_often(reader: str) -> None:
    spoil_files(reader, 400)


def spoil_files(reader: str, count: int) -> None:
    for suffix, files in sorted(seeds(reader).items()):
        spoil(reader, suffix, files, count)


def spoil(reader: str, suffix: str, files: list[bytes], count: int) -> None:
    @some(count)
    @given(spoiled(files))
    def run(content: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            attempt(reader, f"file{suffix}", content, Path(folder).resolve())

    run()
