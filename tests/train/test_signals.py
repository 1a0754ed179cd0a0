"""Signals: the first one saves, the second interrupts, an ignored one is ignored, and none shows a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from tests.train.faults import SignalAt
from tokdyn.recipe import Recipe
from tokdyn.train import checkpoints, train

Tiny = Callable[..., Recipe]
Same = Callable[[Path, Path, int], None]
TINY = Path(__file__).parent / "tiny.yaml"
SETTINGS = (
    "training.steps=6",
    "training.sample_every=1",
    "training.checkpoint_every=100",
    "training.keep_checkpoints=9",
)
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.mark.fault(
    "SIGTERM, SIGHUP or Ctrl-C",
    injected="a signal to the process in the middle of a run, and two in quick succession, as launchers send",
    happened="finishes the step, saves, prints the line that resumes, exits 0 (130 after Ctrl-C)",
)
@pytest.mark.parametrize(
    ("numbers", "code"),
    [([TERM], 0), ([HUP], 0), ([INT], 130), ([INT, INT], 130), ([TERM, TERM], 0), ([INT, TERM], 130)],
)
def test_the_first_signal_saves(
    numbers: Sequence[signal.Signals], code: int, tmp_path: Path, tiny: Tiny, console: Console
) -> None:
    folder = tmp_path / "run"
    result = train(tiny(folder, *SETTINGS), preview=SignalAt(3, *numbers), console=console)
    assert (result.step, result.finished, result.exit_code, result.signal) == (3, False, code, numbers[0])
    assert checkpoints.steps_of(folder / "checkpoints") == [3]
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{numbers[0].name} asked" in shown
    assert f"tokdyn train {folder} --resume" in shown


@pytest.mark.fault(
    "Ctrl-C twice",
    injected="two SIGINT, 0.6 s apart, within a step",
    happened="the second one interrupts at once; the run resumes from its last checkpoint, to the same weights",
)
def test_the_second_signal_interrupts(tmp_path: Path, tiny: Tiny, assert_same_run: Same) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    settings = (*SETTINGS, "training.checkpoint_every=2")
    with pytest.raises(KeyboardInterrupt):
        train(tiny(folder, *settings), preview=SignalAt(3, INT, INT, pause=0.6))
    assert checkpoints.steps_of(folder / "checkpoints") == [2]
    handlers = [signal.getsignal(number) for number in (INT, TERM, HUP)]
    assert handlers == [signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL]
    train(tiny(folder, *settings), resume=True)
    train(tiny(whole, *settings))
    assert_same_run(folder, whole, 6)


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path, tiny: Tiny) -> None:
    """As SIGHUP under nohup."""
    before = signal.signal(HUP, signal.SIG_IGN)
    try:
        assert train(tiny(tmp_path / "run", *SETTINGS), preview=SignalAt(3, HUP)).finished
    finally:
        signal.signal(HUP, before)


STARTING = """
    import os, signal, sys

    class Interrupt:
        def find_spec(self, name, path=None, target=None):
            if name == wanted:
                sys.meta_path.remove(self)
                os.kill(os.getpid(), signal.SIGINT)

    wanted = sys.argv.pop(1)
    sys.meta_path.insert(0, Interrupt())
    from tokdyn.cli.main import main
    main()
"""


@pytest.mark.fault(
    "Ctrl-C at start-up",
    injected="SIGINT at the import of typer, of the recipes, of torch, of accelerate and of the training loop",
    happened="one word, exit code 130, no folder is left",
)
@pytest.mark.parametrize(
    "module",
    [
        "typer",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("tokdyn.recipe.schema", "torch", "accelerate", "tokdyn.train.loop")
        ),
    ],
)
def test_a_signal_during_start_up_shows_no_traceback(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(STARTING), module, "train", str(TINY), f"out={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "Interrupted.\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.fault(
    "SIGTERM, SIGHUP or Ctrl-C to the command, also while worker processes load data",
    injected="`tokdyn train` in a process group that is sent the signal, with 0 and 2 workers",
    happened="saves and exits 0 (130 after Ctrl-C) without a traceback, and `--resume` goes on",
)
@pytest.mark.parametrize("number", [TERM, HUP, INT])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_command_saves_and_exits(number: signal.Signals, workers: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "tokdyn.cli.main", "train"]
    words = [str(TINY), f"out={folder}", "training.steps=100000", f"training.workers={workers}"]
    with subprocess.Popen(command + words, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_for_rows(folder, process)
        os.killpg(process.pid, number)
        shown = process.communicate(timeout=60)[1]
    assert process.returncode == (130 if number == INT else 0), shown
    assert "Traceback" not in shown
    assert f"tokdyn train {folder} --resume" in shown
    assert "tokdyn sample" not in shown
    (step,) = checkpoints.steps_of(folder / "checkpoints")
    again = subprocess.run([*command, str(folder), "--resume", f"training.steps={step + 1}"], check=False)
    assert again.returncode == 0


def wait_for_rows(folder: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < until
        time.sleep(0.05)
