"""Commands that processes share, and what happens to them: one report, one sentence, and a resumed folder."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.processes import running
from tests.sampling import FACTS, tiny
from tokdyn.ownership import owning
from tokdyn.sample import SampleConfig, sample
from tokdyn.train.snapshot import save_model

pytestmark = pytest.mark.slow


LEAVING = """
import os
from tokdyn.team import joining
with joining() as team:
    import torch.distributed.nn  # as libraries do that a job needs
    assert team.exchange(team.rank) == [0, 1]
names = {open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task")}
assert not any("gloo" in name for name in names), names
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "dc"
    save_model(tiny(0), folder, FACTS)
    return folder


@contextmanager
def started(count: int, *words: str, own: tuple[str, ...] = ()) -> Iterator[list[subprocess.Popen[str]]]:
    """Start `tokdyn sample` in processes that share the work; the last one gets further words of its own."""
    command = [sys.executable, "-m", "tokdyn.cli.main", "sample", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with running([command] * (count - 1) + [[*command, *own]], lambda rank: pipes) as found:
        yield found


def ended(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str], list[str]]:
    """Return the exit codes, what was printed, and what was printed on stderr."""
    texts = [process.communicate(timeout=300) for process in processes]
    return [process.returncode for process in processes], *map(list, zip(*texts, strict=True))


def words_of(saved: Path, out: Path, **settings: object) -> list[str]:
    given = {"steps": 3, "scheduler": "ddim", "device": "cpu", "format": "folder", "batch_size": 2, **settings}
    return [str(saved), f"out={out}", *(f"{name}={value}" for name, value in given.items())]


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "images").glob("*.png")}


@pytest.mark.fault(
    "one of several processes that share a job fails",
    injected="a device that only the second of two processes is given, and that no machine has",
    happened="both end with exit code 2 and one sentence, and nothing is written",
)
def test_a_setting_that_one_process_cannot_use_ends_both(saved: Path, tmp_path: Path) -> None:
    with started(2, *words_of(saved, tmp_path / "out"), own=("device=abacus",)) as processes:
        codes, printed, told = ended(processes)
    assert codes == [2, 2]
    assert printed == ["", ""]
    assert told[0].count("abacus") == 1
    assert "Traceback" not in told[0]
    assert told[1] == ""
    assert not (tmp_path / "out").exists()


def test_processes_with_other_settings_and_a_second_job_are_refused(saved: Path, tmp_path: Path) -> None:
    with started(2, *words_of(saved, tmp_path / "out"), own=("steps=4",)) as processes:
        codes, _, told = ended(processes)
    assert (codes, told[1]) == ([2, 2], "")
    assert "Process 1" in told[0]
    with owning(tmp_path / "out"), started(2, *words_of(saved, tmp_path / "out")) as processes:
        codes, _, told = ended(processes)
    assert (codes, told[1]) == ([2, 2], "")
    assert "in use" in told[0]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux to see threads")
def test_nothing_of_the_connection_is_left_after_a_job() -> None:
    """A thread of gloo that lives as the interpreter ends aborts it now and then."""
    with running([[sys.executable, "-c", LEAVING]] * 2) as processes:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]


@pytest.mark.fault(
    "one of several processes that share a job is killed",
    injected="SIGKILL to the first or to the second of two processes that sample; one or three go on",
    happened="the other ends with exit code 2 and one sentence; the images are those of one process",
    lost="nothing: images that were finished are kept",
)
@pytest.mark.parametrize(("victim", "after"), [(0, 1), (1, 3)])
def test_a_killed_job_is_resumed_by_another_number_of_processes(
    victim: int, after: int, saved: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with started(2, *words_of(saved, out, count=400)) as processes:
        while len(images(out)) < 8:
            assert processes[0].poll() is None, processes[0].communicate()
            time.sleep(0.05)
        processes[victim].send_signal(signal.SIGKILL)
        codes, _, told = ended(processes)
    assert codes[1 - victim] == 2, told
    assert "Another process" in told[1 - victim]
    assert "Traceback" not in told[1 - victim]
    before = len(images(out))
    assert before < 400
    count = 2 * (before // 2) + 6
    with started(after, *words_of(saved, out, count=count)) as processes:
        codes, printed, told = ended(processes)
    assert codes == [0] * after, told
    assert [bool(text) for text in printed] == [True] + [False] * (after - 1)
    settings = {"steps": 3, "scheduler": "ddim", "device": "cpu", "format": "folder", "batch_size": 2}
    sample(SampleConfig(model=str(saved), out=tmp_path / "whole", count=count, **settings))
    whole, found = images(tmp_path / "whole"), images(out)
    pairs = [{f"{2 * number:06d}.png", f"{2 * number + 1:06d}.png"} for number in range(count // 2)]
    different = {name for name in whole if whole[name] != found[name]}
    assert sum(bool(pair & different) for pair in pairs) <= 2  # batches that each process had written in part
