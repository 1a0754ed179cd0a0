"""Full disks, protected and vanished folders, clocks that jump, and files that a killed process has left."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.train.faults import SignalAt, read_only
from tokdyn.errors import CheckpointError, OutputError
from tokdyn.ownership import LOCK, owning
from tokdyn.recipe import Recipe
from tokdyn.train import checkpoints, train

Tiny = Callable[..., Recipe]
Limit = Callable[[int], AbstractContextManager[None]]
Same = Callable[[Path, Path, int], None]
SETTINGS = ("training.steps=4", "training.checkpoint_every=2", "training.sample_every=1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(tiny(folder, *SETTINGS))
    return folder


def go_on(folder: Path, tiny: Tiny) -> None:
    """Resume the run in a folder, or start one if there is none."""
    train(tiny(folder, *SETTINGS), resume=(folder / "recipe.yaml").is_file())


@pytest.mark.fault(
    "the disk is full at any moment",
    injected="the system refuses files above a size: of the lock, the recipe, the log, the state, the weights",
    happened="one sentence; with space again the run goes on to the same weights and logs",
)
@pytest.mark.parametrize(
    "size",
    [0, 20_000, *(pytest.param(size, marks=pytest.mark.slow) for size in (100, 300, 600, 1500, 3000, 8000, 50_000))],
)
def test_a_full_disk_ends_in_a_sentence(
    size: int, whole: Path, tmp_path: Path, tiny: Tiny, largest_file: Limit, assert_same_run: Same
) -> None:
    folder = tmp_path / "run"
    with largest_file(size), pytest.raises((CheckpointError, OutputError), match="File too large"):
        train(tiny(folder, *SETTINGS))
    assert not list(tmp_path.rglob(".half_*"))
    go_on(folder, tiny)
    assert_same_run(whole, folder, 4)


@pytest.mark.fault(
    "the folder becomes read-only",
    injected="its permissions, before a run, before it is resumed and at its second step; root loses its override",
    happened="one sentence; with permission the run goes on to the same weights and logs",
)
@pytest.mark.parametrize(
    "moment", ["running", *(pytest.param(when, marks=pytest.mark.slow) for when in ("before", "resumed"))]
)
def test_a_protected_folder_ends_in_a_sentence(
    moment: str, whole: Path, tmp_path: Path, tiny: Tiny, assert_same_run: Same
) -> None:
    folder = tmp_path / "run"
    with ExitStack() as stack:
        if moment == "running":

            def protect(model: Any, recipe: Recipe, folder: Path, step: int) -> None:
                if step == 1:
                    stack.enter_context(read_only(folder))

            with pytest.raises(CheckpointError, match=r"step_0000002 .*Permission denied"):
                train(tiny(folder, *SETTINGS), preview=protect)
        else:
            folder.mkdir()
            if moment == "resumed":
                train(tiny(folder, *SETTINGS), preview=SignalAt(2, signal.SIGTERM))
            stack.enter_context(read_only(folder))
            with pytest.raises(OutputError, match=str(folder)):
                train(tiny(folder, *SETTINGS), resume=moment == "resumed")
    go_on(folder, tiny)
    assert_same_run(whole, folder, 4)


@pytest.mark.fault(
    "the folder vanishes while the run writes into it",
    injected="moved, removed, or replaced by an empty one at the third step",
    happened="one sentence, and nothing in its place; put back, the run goes on to the same weights and logs",
    lost="what was removed",
)
@pytest.mark.parametrize(
    "how", ["moved", *(pytest.param(how, marks=pytest.mark.slow) for how in ("removed", "replaced"))]
)
def test_a_folder_that_vanishes_ends_in_a_sentence(
    how: str, whole: Path, tmp_path: Path, tiny: Tiny, assert_same_run: Same
) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"

    def vanish(model: Any, recipe: Recipe, place: Path, step: int) -> None:
        if step == 3:
            folder.rename(elsewhere)
            if how == "replaced":
                folder.mkdir()

    with pytest.raises(OutputError, match=rf"{folder} .*--resume"):
        train(tiny(folder, *SETTINGS), preview=vanish)
    assert not folder.exists() or not any(folder.iterdir())
    if how == "removed":
        shutil.rmtree(elsewhere)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        elsewhere.rename(folder)
    go_on(folder, tiny)
    assert_same_run(whole, folder, 4)


@pytest.mark.fault(
    "the clock jumps, or stands still",
    injected="a wall clock that jumps by up to a year in both directions, and a monotonic clock that stands still or "
    "leaps by days, as after a suspension",
    happened="the same weights and logs, except for their times",
)
@pytest.mark.parametrize("clock", ["leaping", pytest.param("still", marks=pytest.mark.slow)])
def test_jumps_of_the_clock_change_nothing(
    clock: str, whole: Path, tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, assert_same_run: Same
) -> None:
    draws, ticks = random.Random(0), itertools.count(1)
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + draws.uniform(-3e7, 3e7))
    monkeypatch.setattr("time.monotonic", lambda: 1e5 if clock == "still" else 3e5 * next(ticks))
    train(tiny(tmp_path / "run", *SETTINGS, "training.checkpoint_minutes=1"))
    monkeypatch.undo()
    assert_same_run(whole, tmp_path / "run", 4)


@pytest.mark.fault(
    "kill -9 while a checkpoint, a log or an old checkpoint is written or removed",
    injected="what such a process leaves: `.half_` files and folders in 25 places, and a lock that nobody holds",
    happened="they are ignored, and removed at the next start",
    times=25,
)
def test_what_a_killed_process_left_is_removed(whole: Path, tmp_path: Path, tiny: Tiny, assert_same_run: Same) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for step in range(22):
        old = folder / "checkpoints" / f".half_old_step_{step:07d}" / "model"
        old.mkdir(parents=True)
        (old / "weights.safetensors").write_bytes(b"half")
    (folder / "checkpoints" / ".half_step_0000099").mkdir()
    (folder / ".half_model").mkdir()
    (folder / ".half_recipe.yaml").touch()
    (folder / LOCK).write_text("process 1 on elsewhere\n")
    go_on(folder, tiny)
    assert not [path for path in folder.rglob("*") if path.name.startswith((".half_", LOCK))]
    assert_same_run(whole, folder, 4)


@pytest.mark.fault(
    "two processes train into one folder",
    injected="a second `train`, another with `seed=1`, and `--resume` beside a living run",
    happened="the second is refused at once and names the first; the first is not disturbed",
)
@pytest.mark.parametrize(
    ("words", "resume"), [([], False), pytest.param(["seed=1"], False, marks=pytest.mark.slow), ([], True)]
)
def test_the_second_run_in_a_folder_is_refused(
    words: list[str], resume: bool, whole: Path, tmp_path: Path, tiny: Tiny, assert_same_run: Same
) -> None:
    folder, refused = tmp_path / "run", []

    def second(model: Any, recipe: Recipe, folder: Path, step: int) -> None:
        if step == 3:
            with pytest.raises(OutputError, match=rf"{folder} is in use by process \d+"):
                train(tiny(folder, *SETTINGS, *words), resume=resume)
            refused.append(step)

    assert train(tiny(folder, *SETTINGS), preview=second).finished
    assert refused == [3]
    assert_same_run(whole, folder, 4)


def test_a_run_waits_for_no_lock_of_a_start_that_failed(tmp_path: Path, tiny: Tiny, console: Console) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / LOCK).touch()  # as a kill -9 before the first file leaves it
    assert train(tiny(folder, *SETTINGS), console=console).finished
    with owning(folder):
        assert checkpoints.steps_of(folder / "checkpoints") == [2, 4]


@pytest.mark.slow
@pytest.mark.fault(
    "kill -9 at random moments",
    injected="SIGKILL after 0.1 to 1 s to a run that writes a checkpoint and a log line in every step",
    happened="each start resumes, nothing half-written stays, and weights and logs equal those of an undisturbed run",
    times=25,
)
def test_a_run_that_is_killed_again_and_again_loses_nothing(tmp_path: Path, tiny: Tiny, assert_same_run: Same) -> None:
    settings = ("training.steps=60", "training.checkpoint_every=1")
    words = [str(tmp_path / "killed"), "25", *settings]
    done = subprocess.run([sys.executable, str(Path(__file__).parent / "killed.py"), *words], timeout=300, check=False)
    assert done.returncode == 0
    assert not list((tmp_path / "killed").rglob(".half_*"))
    train(tiny(tmp_path / "whole", *settings))
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 60)
