"""Train in two processes with a fault, and write what each says into a file beside the recipe.

shard_fault_worker.py RECIPE disk: the second cannot write files of more than 4 KB.
shard_fault_worker.py RECIPE folder: each has a folder of its own.
"""

from __future__ import annotations

import io
import json
import os
import resource
import sys
from pathlib import Path

from rich.console import Console

from tokdyn.errors import TokdynError
from tokdyn.recipe import resolve
from tokdyn.train import train

if __name__ == "__main__":
    path, rank = Path(sys.argv[1]), os.environ["RANK"]
    if sys.argv[2] == "folder":
        os.chdir(path.with_name(rank))
    elif rank == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        train(resolve(json.loads(path.read_text())), console=Console(file=io.StringIO()))
    except TokdynError as error:
        path.with_name(f"said_{rank}.txt").write_text(str(error))
