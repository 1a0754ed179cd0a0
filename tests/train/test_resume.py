"""A resumed run equals one that never stopped, bit for bit; a run with other settings is not resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from tokdyn.errors import CheckpointError, DataError
from tokdyn.recipe import Recipe, load
from tokdyn.train import EXIT_INTERRUPTED, checkpoints, train

Tiny = Callable[..., Recipe]
Same = Callable[[Path, Path, int], None]

# Everything that could be lost: accumulation, budgets per sample, a curriculum, flips, a schedule, a partial window.
FULL = (
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
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(tiny(folder, *FULL)).finished
    return folder


@pytest.fixture
def half(whole: Path, tmp_path: Path) -> Path:
    """The run as if it had been killed after step 3 and before step 6 was saved."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "step_0000006")
    shutil.rmtree(folder / "model")
    return folder


def test_a_resumed_run_equals_one_that_never_stopped(
    whole: Path, half: Path, tiny: Tiny, assert_same_run: Same
) -> None:
    result = train(tiny(half, *FULL), resume=True)
    assert result.finished
    assert result.exit_code == 0
    assert_same_run(whole, half, 6)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    whole: Path, tmp_path: Path, tiny: Tiny, assert_same_run: Same, console: Console
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "model")
    damaged = folder / "checkpoints" / "step_0000006" / "state.safetensors"
    os.truncate(damaged, damaged.stat().st_size // 2)
    train(tiny(folder, *FULL), resume=True, console=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "state.safetensors" in shown
    assert "step 3" in shown
    assert_same_run(whole, folder, 6)


def test_a_finished_run_can_be_resumed_and_lengthened(
    whole: Path, tmp_path: Path, tiny: Tiny, assert_same_run: Same
) -> None:
    constant = (*FULL, "optimizer.decay=none")
    once, twice = tmp_path / "once", tmp_path / "twice"
    train(tiny(twice, *constant, "training.steps=3"))
    assert train(tiny(twice, *constant, "training.steps=3"), resume=True).row == {}
    assert train(tiny(twice, *constant), resume=True).finished
    train(tiny(once, *constant))
    for folder in (once, twice):  # the run that ended at step 3 has a row for it
        (folder / "metrics.jsonl").unlink()
    assert_same_run(once, twice, 6)


def spawn(folder: Path, *settings: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).parent / "worker.py"), str(folder), *settings]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < until
        time.sleep(0.01)


ENDLESS = ("training.steps=100000", "training.checkpoint_every=2", "chunking.budget_warmup_steps=1")


@pytest.mark.fault(
    "kill -9 or Ctrl-C of the training process",
    injected="the signal after the second checkpoint",
    happened="the resumed run equals one that was never stopped, bit for bit",
)
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=["kill", "ctrl-c"]
)
def test_a_stopped_process_resumes_exactly(
    number: signal.Signals, tmp_path: Path, tiny: Tiny, assert_same_run: Same
) -> None:
    folder, reference = tmp_path / "run", tmp_path / "reference"
    with spawn(folder, *ENDLESS) as process:
        wait_for(folder / "checkpoints" / "step_0000004", process)
        process.send_signal(number)
        shown = process.communicate(timeout=60)[0]
    if number == signal.SIGINT:
        assert process.returncode == EXIT_INTERRUPTED
        assert f"tokdyn train {folder} --resume" in shown
    else:
        assert process.returncode == -signal.SIGKILL
    newest = max(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*"))
    settings = (*ENDLESS, f"training.steps={newest + 2}")
    train(tiny(folder, *settings), resume=True)
    train(tiny(reference, *settings))
    assert_same_run(reference, folder, newest + 2)


def test_changed_settings_are_rejected_by_name(half: Path, tiny: Tiny) -> None:
    with pytest.raises(CheckpointError, match=r"optimizer\.lr .*0\.001.* seed .*0"):
        train(tiny(half, *FULL, "optimizer.lr=2e-3", "seed=1", "training.log_every=2"), resume=True)
    with pytest.raises(CheckpointError, match=r"training\.steps"):  # a cosine schedule depends on the length
        train(tiny(half, *FULL, "training.steps=8"), resume=True)


def test_other_data_are_rejected(half: Path, tiny: Tiny) -> None:
    state = half / "checkpoints" / "step_0000003" / "state.json"
    contents = json.loads(state.read_text())
    contents["data"] = {**contents["data"], "length": 65}
    state.write_text(json.dumps(checkpoints.sealed(contents)))
    with pytest.raises(CheckpointError, match=r"data\.path"):
        train(tiny(half, *FULL), resume=True)


def test_replaced_images_are_rejected(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """With equal names, sizes and times. A checkpoint of an earlier version, which knows names alone, is continued."""
    monkeypatch.setenv("TOKDYN_CACHE", str(tmp_path / "cache"))
    images = tmp_path / "images"
    images.mkdir()
    for number in range(5):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(images / f"{number}.bmp")
    settings = ("data.kind=images", f"data.path={images}")
    folder = tmp_path / "run"
    train(tiny(folder, *settings))
    assert train(tiny(folder, *settings, "training.steps=3"), resume=True).finished
    before = (images / "3.bmp").stat()
    Image.new("RGB", (16, 16), (99, 0, 0)).save(images / "3.bmp")
    os.utime(images / "3.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointError, match=str(images)):
        train(tiny(folder, *settings, "training.steps=4"), resume=True)
    state = folder / "checkpoints" / "step_0000003" / "state.json"
    contents = json.loads(state.read_text())
    del contents["data"]["content"]
    state.write_text(json.dumps(checkpoints.sealed(contents)))
    assert train(tiny(folder, *settings, "training.steps=4"), resume=True).finished


def test_settings_that_only_change_the_rounding_are_noted(half: Path, tiny: Tiny, console: Console) -> None:
    train(tiny(half, *FULL, "training.gradient_checkpointing=true"), resume=True, console=console)
    assert "training.gradient_checkpointing" in console.file.getvalue()  # type: ignore[attr-defined]


def test_folders_that_cannot_be_used_are_rejected(tmp_path: Path, tiny: Tiny, console: Console) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path / "none")):
        train(tiny(tmp_path / "none"), resume=True)
    assert not (tmp_path / "none").exists()
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"--resume .* out="):
        train(tiny(used))
    (used / "recipe.yaml").touch()  # as if killed before the first checkpoint
    assert train(tiny(used), resume=True, console=console).finished
    assert "step 0" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_wrong_recipe_writes_no_folder(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(DataError):
        train(tiny(tmp_path / "run", "data.kind=images", f"data.path={tmp_path / 'missing'}"))
    assert not (tmp_path / "run").exists()


def test_metrics_have_one_row_per_log_step(whole: Path, rows: Callable[[Path], list[dict[str, Any]]]) -> None:
    found = rows(whole)
    assert [row["step"] for row in found] == [4, 6]
    assert [row["target"] for row in found] == pytest.approx([2 + 2 * 3 / 5, 4])
    assert {"loss", "ratio", "kept", "natural_kept", "probability", "tail_drop", "grad_norm", "lr", "epoch"} <= set(
        found[0]
    )


def test_a_moved_run_is_resumed_in_its_new_folder(whole: Path, half: Path, assert_same_run: Same) -> None:
    recipe = load(half)  # although its recipe.yaml names the folder that it was copied from
    assert recipe.out == str(half)
    train(recipe, resume=True)
    assert_same_run(whole, half, 6)
