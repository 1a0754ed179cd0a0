"""Checkpoints are complete or absent; damage is detected, and the error names the damaged file."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tokdyn.errors import CheckpointError
from tokdyn.recipe import Recipe
from tokdyn.train import checkpoints, train

Limit = Callable[[int], AbstractContextManager[None]]


def fill(folder: Path) -> None:
    (folder / "model").mkdir()
    save_file({"x": torch.arange(1000.0)}, folder / "model" / "weights.safetensors")
    save_file({"y": torch.arange(10.0)}, folder / "state.safetensors")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "checkpoints"
    for step in (10, 20):
        checkpoints.save(root, step, fill, {"note": "n"}, keep=3)
    return root


def names(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir())


def test_the_newest_checkpoint_is_found(root: Path) -> None:
    newest = checkpoints.newest(root)
    assert newest is not None
    assert (newest.step, newest.state["note"], newest.skipped) == (20, "n", ())
    assert (root / "latest").read_text() == "step_0000020\n"
    assert names(root) == ["latest", "step_0000010", "step_0000020"]


def test_old_checkpoints_are_removed_and_a_step_can_be_saved_again(root: Path) -> None:
    checkpoints.save(root, 30, fill, {}, keep=2)
    checkpoints.save(root, 30, fill, {"note": "again"}, keep=2)
    assert names(root) == ["latest", "step_0000020", "step_0000030"]
    newest = checkpoints.newest(root)
    assert newest is not None
    assert newest.state["note"] == "again"


def truncate(folder: Path) -> None:
    os.truncate(folder / "model" / "weights.safetensors", 100)


def flip_a_bit(folder: Path) -> None:
    path = folder / "model" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def remove(folder: Path) -> None:
    (folder / "state.safetensors").unlink()


def truncate_the_index(folder: Path) -> None:
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text[: len(text) // 2])


def empty_the_index(folder: Path) -> None:
    (folder / "state.json").write_text("[]")


def resealed(folder: Path, **changes: object) -> None:
    """Change what state.json says, and renew its hash; None removes a value."""
    state = json.loads((folder / "state.json").read_text()) | changes
    state = {key: value for key, value in state.items() if value is not None}
    (folder / "state.json").write_text(json.dumps(checkpoints.sealed(state)))


def edited(folder: Path, edit: Callable[[str], str]) -> None:
    path = folder / "state.json"
    path.write_text(edit(path.read_text()))


def without_files(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text()) | {"files": {}}
    (folder / "state.json").write_text(json.dumps(state))
    flip_a_bit(folder)


def without_files_but_sealed(folder: Path) -> None:
    resealed(folder, files={})
    flip_a_bit(folder)


def an_older_format_without_files(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text()) | {"format": 1, "files": {}}
    (folder / "state.json").write_text(json.dumps({key: value for key, value in state.items() if key != "digest"}))
    flip_a_bit(folder)


def another_step(folder: Path) -> None:
    resealed(folder, step=30)


def an_infinite_step(folder: Path) -> None:
    edited(folder, lambda text: re.sub('"step": ..', '"step": Infinity', text))


def a_step_of_many_digits(folder: Path) -> None:
    edited(folder, lambda text: re.sub('"step": ..', '"step": ' + "9" * 5000, text))


def brackets(folder: Path) -> None:
    (folder / "state.json").write_text("[" * 100_000)


def a_file_more(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "model" / "other.safetensors")


def no_digest(folder: Path) -> None:
    edited(folder, lambda text: text.replace('"digest"', '"digesu"'))


DAMAGES = [
    (truncate, r"model/weights\.safetensors .*100 bytes"),
    (flip_a_bit, r"model/weights\.safetensors"),
    (remove, r"state\.safetensors"),
    (truncate_the_index, r"state\.json"),
    (empty_the_index, r"state\.json"),
    (without_files, r"state\.json"),
    (without_files_but_sealed, r"model/weights\.safetensors"),
    (an_older_format_without_files, r"model/weights\.safetensors"),
    (another_step, r"step 30"),
    (an_infinite_step, r"state\.json"),
    (a_step_of_many_digits, r"state\.json"),
    (brackets, r"state\.json"),
    (a_file_more, r"model/other\.safetensors"),
    (no_digest, r"state\.json"),
]


@pytest.mark.fault(
    "a file of a checkpoint is damaged",
    injected="truncated, changed, missing or added files; a state.json that is cut, empty, without files or hash, of "
    "another step, of an infinite one, of 5,000 digits or 100,000 brackets",
    happened="it is named, and the checkpoint before it is used",
    lost="nothing: the steps since that checkpoint are computed again",
)
@pytest.mark.parametrize(("damage", "named"), DAMAGES, ids=lambda each: getattr(each, "__name__", ""))
def test_a_damaged_checkpoint_is_named_and_skipped(damage: Callable[[Path], None], named: str, root: Path) -> None:
    damage(root / "step_0000020")
    newest = checkpoints.newest(root)
    assert newest is not None
    assert newest.step == 10
    assert len(newest.skipped) == 1
    assert "step_0000020" in newest.skipped[0]
    assert re.search(named, newest.skipped[0])
    damage(root / "step_0000010")
    with pytest.raises(CheckpointError, match=named):
        checkpoints.newest(root)


@pytest.mark.fault(
    "one bit of state.json flips",
    injected="each bit of 40 bytes, spread over the file",
    happened="nothing but a blank has changed, or the checkpoint before it is used and that is said",
    lost="nothing: the steps since that checkpoint are computed again",
    times=320,
)
def test_no_flipped_bit_of_the_state_passes(root: Path) -> None:
    path = root / "step_0000020" / "state.json"
    whole = path.read_bytes()
    state = json.loads(whole)
    flips = [(place, bit) for place in range(0, len(whole), len(whole) // 40) for bit in range(8)]
    assert len(flips) >= 320
    for place, bit in flips:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        newest = checkpoints.newest(root)
        assert newest is not None
        if newest.step == 10:
            assert re.search(r"step_0000020 is .*state\.json", newest.skipped[0])
        else:
            assert newest.state == state


def test_an_unknown_format_is_rejected(root: Path) -> None:
    resealed(root / "step_0000020", format=999)
    with pytest.raises(CheckpointError, match=rf"format 999\b.* {checkpoints.FORMAT}\b"):
        checkpoints.verify(root / "step_0000020")


def test_damaged_checkpoints_of_later_steps_take_no_place(root: Path) -> None:
    for step in (30, 40):
        checkpoints.save(root, step, fill, {}, keep=9)
        flip_a_bit(root / f"step_{step:07d}")
    checkpoints.save(root, 25, fill, {}, keep=2)
    assert names(root) == ["latest", *(f"step_00000{step}" for step in (20, 25, 30, 40))]


def test_a_partly_written_folder_is_ignored_and_replaced(root: Path) -> None:
    half = root / ".half_step_0000030"
    half.mkdir()
    (half / "state.json").write_text("{")
    newest = checkpoints.newest(root)
    assert newest is not None
    assert newest.step == 20
    checkpoints.save(root, 30, fill, {}, keep=3)
    assert not half.exists()


def test_a_disk_that_fails_in_between_leaves_the_old_checkpoint(root: Path, largest_file: Limit) -> None:
    with largest_file(2000), pytest.raises(CheckpointError, match="step_0000030"):
        checkpoints.save(root, 30, fill, {}, keep=1)
    assert names(root) == ["latest", "step_0000010", "step_0000020"]
    with largest_file(2000), pytest.raises(CheckpointError, match="step_0000020"):
        checkpoints.save(root, 20, fill, {}, keep=1)
    newest = checkpoints.newest(root)
    assert newest is not None
    assert (newest.step, newest.skipped) == (20, ())


def test_the_reason_of_the_system_is_in_the_error(root: Path) -> None:
    def full(folder: Path) -> None:
        fill(folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoints.save(root, 30, full, {}, keep=1)


def test_a_run_on_a_full_disk_stops_and_can_be_resumed(
    tmp_path: Path, tiny: Callable[..., Recipe], largest_file: Limit
) -> None:
    folder = tmp_path / "run"
    settings = ("training.checkpoint_every=1", "training.keep_checkpoints=3")
    train(tiny(folder, *settings, "training.steps=1"))
    with largest_file(20_000), pytest.raises(CheckpointError, match="step_0000002"):
        train(tiny(folder, *settings, "training.steps=3"), resume=True)
    newest = checkpoints.newest(folder / "checkpoints")
    assert newest is not None
    assert newest.step == 1
    assert train(tiny(folder, *settings, "training.steps=3"), resume=True).finished
