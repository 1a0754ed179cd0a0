"""Processes that load data or train along and die: the others end in one sentence, and the run resumes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.processes import running
from tests.train.test_signals import TINY, wait_for_rows
from tokdyn.errors import DataError
from tokdyn.recipe import Recipe
from tokdyn.train import checkpoints, train

Tiny = Callable[..., Recipe]
Same = Callable[[Path, Path, int], None]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight images of 16x16 pixels, one of which is no image."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(8):
        Image.fromarray(np.full((16, 16, 3), 30 * number, dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "5.png").write_bytes(b"no image")
    return folder


@pytest.mark.fault(
    "an unreadable image",
    injected="a file of eight that is no image, read by the trainer and by a worker process",
    happened="one sentence that names the file, without a traceback in it",
)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(workers: int, photos: Path, tmp_path: Path, tiny: Tiny) -> None:
    data = f"data={{kind: images, path: {photos}, size: 16, in_memory: false}}"
    with pytest.raises(DataError, match=r"^5\.png in .* on_error=skip\.$") as refused:
        train(tiny(tmp_path / "run", data, f"training.workers={workers}"))
    assert "Traceback" not in str(refused.value)


@pytest.mark.fault(
    "kill -9 of a process that loads data",
    injected="SIGKILL to the one worker, at the third step",
    happened="one sentence that names it; the run resumes to the same weights and logs",
)
def test_a_dead_worker_ends_the_run_in_a_sentence(tmp_path: Path, tiny: Tiny, assert_same_run: Same) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    settings = ("training.steps=4", "training.checkpoint_every=2", "training.workers=1", "training.sample_every=1")
    killed = []

    def kill(model: Any, recipe: Recipe, folder: Path, step: int) -> None:
        if step == 3:
            (worker,) = multiprocessing.active_children()
            killed.append(worker.pid)
            os.kill(worker.pid or 0, signal.SIGKILL)
            time.sleep(0.2)  # for the signal of its end to come

    with pytest.raises(DataError, match=r"process \d+ .*--resume") as refused:
        train(tiny(folder, *settings, "training.steps=400"), preview=kill)
    assert str(killed[0]) in str(refused.value)
    train(tiny(folder, *settings), resume=True)
    train(tiny(whole, *settings))
    assert_same_run(whole, folder, 4)


def command(folder: Path, *words: str) -> list[str]:
    first = str(folder) if "--resume" in words else str(TINY)
    return [sys.executable, "-m", "tokdyn.cli.main", "train", first, f"out={folder}", *words]


@contextmanager
def two(folder: Path, *words: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Train in two processes that talk through gloo, and write what they say into files."""
    with ExitStack() as files:
        texts = [files.enter_context(said(folder, rank).open("w")) for rank in range(2)]
        with running([command(folder, *words)] * 2, lambda rank: {"stderr": texts[rank]}) as found:
            yield found


def said(folder: Path, rank: int) -> Path:
    """Return the file of what a process writes to stderr."""
    return folder.with_name(f"rank_{rank}.txt")


@pytest.mark.slow
@pytest.mark.fault(
    "one of two processes that train together dies",
    injected="SIGKILL to the main or to the other of two gloo processes",
    happened="the other ends within seconds, in one sentence and with exit code 2; both together resume",
    lost="nothing: the steps since the last checkpoint are computed again",
)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_rank_ends_the_other_in_a_sentence(victim: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with two(folder, "training.steps=100000", "training.checkpoint_every=5") as processes:
        wait_for_rows(folder, processes[0])
        while not checkpoints.steps_of(folder / "checkpoints"):
            time.sleep(0.05)
        processes[victim].kill()
        other = processes[1 - victim]
        other.wait(timeout=60)
        shown = said(folder, 1 - victim).read_text()
        assert other.returncode == 2, shown
    assert "Traceback" not in shown
    assert "Another process" in shown
    last = checkpoints.steps_of(folder / "checkpoints")[-1]
    with two(folder, "--resume", f"training.steps={last + 3}") as processes:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert checkpoints.steps_of(folder / "checkpoints")[-1] == last + 3


@pytest.mark.slow
@pytest.mark.fault(
    "SIGTERM or Ctrl-C to one of two processes that train together",
    injected="the signal to the process that is not the main one",
    happened="both save at the same step and exit 0 (130 after Ctrl-C)",
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_stop_together(number: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with two(folder, "training.steps=100000", "training.checkpoint_every=100000") as processes:
        wait_for_rows(folder, processes[0])
        processes[1].send_signal(number)
        for process in processes:
            process.wait(timeout=60)
    shown = [said(folder, rank).read_text() for rank in range(2)]
    code = 130 if number == signal.SIGINT else 0
    assert [process.returncode for process in processes] == [code, code], shown
    assert len(checkpoints.steps_of(folder / "checkpoints")) == 1
    assert "--resume" in shown[0]
