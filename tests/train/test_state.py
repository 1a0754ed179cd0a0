"""A checkpoint is there or not there; what is damaged is recognised and named."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tokdyn.errors import CheckpointError
from tokdyn.recipe import Recipe
from tokdyn.train import state, train

Limit = Callable[[int], AbstractContextManager[None]]


def fill(folder: Path) -> None:
    (folder / "model").mkdir()
    save_file({"x": torch.arange(1000.0)}, folder / "model" / "weights.safetensors")
    save_file({"y": torch.arange(10.0)}, folder / "state.safetensors")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "checkpoints"
    for step in (10, 20):
        state.save(root, step, fill, {"note": "n"}, keep=3)
    return root


def names(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir())


def test_saved_and_found(root: Path) -> None:
    found = state.newest(root)
    assert found is not None
    assert (found.step, found.state["note"], found.skipped) == (20, "n", ())
    assert (root / "latest").read_text() == "step_0000020\n"
    assert names(root) == ["latest", "step_0000010", "step_0000020"]


def test_old_ones_are_removed_and_one_step_can_be_saved_again(root: Path) -> None:
    state.save(root, 30, fill, {}, keep=2)
    state.save(root, 30, fill, {"note": "again"}, keep=2)
    assert names(root) == ["latest", "step_0000020", "step_0000030"]
    found = state.newest(root)
    assert found is not None
    assert found.state["note"] == "again"


def truncate(folder: Path) -> None:
    os.truncate(folder / "model" / "weights.safetensors", 100)


def flip_a_bit(folder: Path) -> None:
    path = folder / "model" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def remove(folder: Path) -> None:
    (folder / "state.safetensors").unlink()


def cut_the_list(folder: Path) -> None:
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text[: len(text) // 2])


def empty_the_list(folder: Path) -> None:
    (folder / "state.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate, "model/weights.safetensors has 100 bytes of"),
        (flip_a_bit, "model/weights.safetensors is not what was written"),
        (remove, "state.safetensors is missing"),
        (cut_the_list, "state.json cannot be read"),
        (empty_the_list, "state.json cannot be read"),
    ],
)
def test_damage_is_named_and_the_one_before_is_used(damage: Callable[[Path], None], named: str, root: Path) -> None:
    damage(root / "step_0000020")
    found = state.newest(root)
    assert found is not None
    assert found.step == 10
    assert len(found.skipped) == 1
    assert "step_0000020" in found.skipped[0]
    assert named in found.skipped[0]
    damage(root / "step_0000010")
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* can be used"):
        state.newest(root)


def test_a_format_from_the_future_is_refused(root: Path) -> None:
    path = root / "step_0000020" / "state.json"
    path.write_text(path.read_text().replace(f'"format": {state.FORMAT}', '"format": 999'))
    with pytest.raises(CheckpointError, match="format 999, this version reads"):
        state.verify(root / "step_0000020")


def test_a_half_written_folder_is_no_checkpoint_and_is_replaced(root: Path) -> None:
    half = root / ".half_step_0000030"
    half.mkdir()
    (half / "state.json").write_text("{")
    found = state.newest(root)
    assert found is not None
    assert found.step == 20
    state.save(root, 30, fill, {}, keep=3)
    assert not half.exists()


def test_a_disk_that_fails_midway_leaves_the_old_checkpoint(root: Path, largest_file: Limit) -> None:
    with largest_file(2000), pytest.raises(CheckpointError, match="written before are untouched"):
        state.save(root, 30, fill, {}, keep=1)
    assert names(root) == ["latest", "step_0000010", "step_0000020"]
    with largest_file(2000), pytest.raises(CheckpointError, match="could not be written"):
        state.save(root, 20, fill, {}, keep=1)
    found = state.newest(root)
    assert found is not None
    assert (found.step, found.skipped) == (20, ())


def test_an_error_of_the_system_is_told(root: Path) -> None:
    def full(folder: Path) -> None:
        fill(folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CheckpointError, match="No space left on device"):
        state.save(root, 30, full, {}, keep=1)


def test_training_on_a_full_disk_stops_with_the_last_checkpoint(
    tmp_path: Path, tiny: Callable[..., Recipe], largest_file: Limit
) -> None:
    folder = tmp_path / "run"
    settings = ("training.checkpoint_every=1", "training.keep_checkpoints=3")
    train(tiny(folder, *settings, "training.steps=1"))
    with largest_file(20_000), pytest.raises(CheckpointError, match="could not be written"):
        train(tiny(folder, *settings, "training.steps=3"), resume=True)
    found = state.newest(folder / "checkpoints")
    assert found is not None
    assert found.step == 1
    assert train(tiny(folder, *settings, "training.steps=3"), resume=True).finished
