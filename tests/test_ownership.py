"""A folder has one owner at a time, and a killed owner leaves it free."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tokdyn.errors import OutputError
from tokdyn.ownership import LOCK, holds_nothing, owning

OWNER = """
    import os, sys, time
    from pathlib import Path
    from tokdyn.ownership import owning

    with owning(Path(sys.argv[1])):
        if "fork" in sys.argv and os.fork() == 0:  # as a process that loads data, which outlives a killed trainer
            print(os.getpid(), flush=True)
        else:
            print("owned", flush=True)
        time.sleep(60)
"""


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(OWNER), str(folder), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def lines(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().strip() for _ in range(count)]


@pytest.mark.fault(
    "a process is killed that owns a folder",
    injected="kill -9 of the owner, with and without a living child",
    happened="a second owner is refused while the first lives, and by name; afterwards the folder is free",
)
@pytest.mark.parametrize("words", [[], ["fork"]])
def test_a_folder_is_refused_while_its_owner_lives(words: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with start(folder, *words) as process:
        said = lines(process, 1 + len(words))
        try:
            with pytest.raises(OutputError, match=rf"{folder} .* process {process.pid} .* out="), owning(folder):
                pass
            process.kill()
            process.wait()
            assert (folder / LOCK).is_file()
            with owning(folder):
                (folder / "kept").touch()
        finally:
            process.kill()
            for child in (int(word) for word in said if word.isdecimal()):
                os.kill(child, signal.SIGKILL)
    assert [entry.name for entry in folder.iterdir()] == ["kept"]


def test_an_owner_is_refused_a_folder_twice(tmp_path: Path) -> None:
    with owning(tmp_path / "run"):
        with pytest.raises(OutputError, match="in use"), owning(tmp_path / "run"):
            pass
        assert holds_nothing(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_many_that_ask_at_once_own_one_after_the_other(tmp_path: Path) -> None:
    """Each owner removes the lock in the end, also while others open it."""
    script = """
        import sys
        from pathlib import Path
        from tokdyn.errors import OutputError
        from tokdyn.ownership import owning

        folder, owned = Path(sys.argv[1]), 0
        while owned < 50:
            try:
                with owning(folder):
                    (folder / "one").touch(exist_ok=False)
                    (folder / "one").unlink()
                    owned += 1
            except OutputError:
                pass
    """
    folder = tmp_path / "run"
    folder.mkdir()
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder)]
    asking = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(timeout=60) for process in asking] == [0, 0, 0]


@pytest.mark.parametrize("loss", ["moved", "replaced"])
def test_a_folder_that_is_not_the_same_any_more_is_noticed(loss: str, tmp_path: Path) -> None:
    with owning(tmp_path / "run") as check:
        check()
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        if loss == "replaced":
            (tmp_path / "run").mkdir()
        with pytest.raises(OutputError, match=str(tmp_path / "run")):
            check()
