"""Recipes of runs small enough for tests, and readers of what a run wrote."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tokdyn.recipe import Recipe, files, resolve, yaml_text
from tokdyn.train.metrics import read

TINY = yaml_text.parse((Path(__file__).parent / "tiny.yaml").read_text(), "tiny.yaml")
TIMING = {"images_per_second", "seconds"}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Recipe]:
    """A function `tiny(folder, "key=value", ...)` that returns a recipe."""

    def make(folder: Path, *settings: str) -> Recipe:
        return resolve(files.deep_merge({**TINY, "out": str(folder)}, files.parse_overrides(settings)))

    return make


@pytest.fixture
def console() -> Console:
    """A console whose text is console.file.getvalue()."""
    return Console(file=io.StringIO(), width=1000)


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, torch.Tensor]]:
    """A function that returns every tensor in every file below a folder, by file and name."""

    def read_all(folder: Path) -> dict[str, torch.Tensor]:
        found = {
            f"{file.relative_to(folder)}:{name}": tensor
            for file in sorted(folder.rglob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        assert found, f"no tensors in {folder}"
        return found

    return read_all


@pytest.fixture(scope="session")
def rows() -> Callable[[Path], list[dict[str, Any]]]:
    """A function that returns the metrics of a run without its timings."""

    def read_rows(folder: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k not in TIMING} for row in read(folder / "metrics.jsonl")]

    return read_rows


@pytest.fixture(scope="session")
def assert_same_run(
    contents: Callable[[Path], dict[str, torch.Tensor]], rows: Callable[[Path], list[dict[str, Any]]]
) -> Callable[[Path, Path, int], None]:
    """A function that asserts that two runs wrote the same bits: weights, average, optimizer, means, metrics."""

    def check(left: Path, right: Path, step: int) -> None:
        for part in (f"checkpoints/step_{step:07d}", "model"):
            expected, found = contents(left / part), contents(right / part)
            assert expected.keys() == found.keys()
            assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
        assert rows(left) == rows(right)

    return check
