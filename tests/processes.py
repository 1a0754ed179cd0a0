"""Starting processes that talk through gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def group(count: int) -> dict[str, str]:
    """The variables that a launcher gives to all of `count` processes on this machine, at a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "ACCELERATE_USE_CPU": "true",
    }


def ranked(rank: int) -> dict[str, str]:
    """The variables that it gives to one of them."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


@contextmanager
def running(
    commands: Sequence[Sequence[str]], streams: Callable[[int], dict[str, Any]] = lambda rank: {}
) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that run a command each, by rank, and are killed at the end of the block if they still do.

    Args:
        commands: the words of each.
        streams: returns further arguments of `subprocess.Popen` for a rank.
    """
    together = {**os.environ, **group(len(commands))}
    processes: list[subprocess.Popen[str]] = []
    try:
        for rank, words in enumerate(commands):
            environment = {**together, **ranked(rank)}
            processes.append(subprocess.Popen(words, env=environment, text=True, **streams(rank)))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def launch(script: Path, *words: str, timeout: float = 120, count: int = 2) -> None:
    """Run a script in `count` processes on this machine; all have to end well in time (seconds)."""
    with running([[sys.executable, str(script), *words]] * count) as processes:
        assert [process.wait(timeout=timeout) for process in processes] == [0] * count
