"""A resumed run equals one that never stopped, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tokdyn.recipe import Recipe
from tokdyn.train import train
from tokdyn.train.metrics import read

from .conftest import quiet, tiny

TIMING = {"images_per_second", "seconds"}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.relative_to(folder)}:{name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def rows(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read(folder / "metrics.jsonl")]


def assert_same_run(left: Path, right: Path, step: int) -> None:
    for part in (f"checkpoints/step_{step:07d}", "model"):
        expected, found = tensors(left / part), tensors(right / part)
        assert expected.keys() == found.keys()
        assert expected
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert rows(left) == rows(right)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without a stop, with everything on: accumulation, budgets, curriculum, workers, uneven log lines."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(full(folder), console=quiet()).finished
    return folder


def full(folder: Path, *settings: str) -> Recipe:
    return tiny(
        folder,
        "training.steps=6",
        "training.accumulation=2",
        "training.log_every=4",
        "training.checkpoint_every=3",
        "training.precision=bf16",
        "data.flip=true",
        "chunking.budget_warmup_steps=1",
        "chunking.draw=sample",
        "chunking.curriculum=[[0, 2], [5, 4]]",
        "optimizer.warmup_steps=4",
        "optimizer.decay=cosine",
        *settings,
    )


def test_resuming_equals_never_stopping(whole: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "step_0000006")
    shutil.rmtree(folder / "model")
    result = train(full(folder), resume=True, console=quiet())
    assert result.finished
    assert_same_run(whole, folder, 6)
