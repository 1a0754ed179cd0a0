"""Train runs one after the other in forks that talk through gloo: forked_worker.py FILE.

The file is a JSON list of [number of processes, list of [recipe, whether to resume]]. The forks take the imports from
their parent, which are most of what starting costs.
"""

from __future__ import annotations

import io
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from tokdyn.recipe import resolve
from tokdyn.train import train


def train_in(count: int, runs: list[tuple[dict[str, Any], bool]]) -> None:
    """Start the forks, and end with another exit code than 0 if one of them does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true"}
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            for settings, resume in runs:
                assert train(resolve(settings), resume=resume, console=Console(file=io.StringIO())).finished
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        sys.exit(f"{count} processes ended with {codes}")


if __name__ == "__main__":
    for number, trained in json.loads(Path(sys.argv[1]).read_text()):
        train_in(number, trained)
