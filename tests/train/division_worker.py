"""Train several runs one after the other: division_worker.py FILE, a JSON list of [recipe, whether to resume]."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from rich.console import Console

from tokdyn.recipe import resolve
from tokdyn.train import train

if __name__ == "__main__":
    for settings, resume in json.loads(Path(sys.argv[1]).read_text()):
        assert train(resolve(settings), resume=resume, console=Console(file=io.StringIO())).finished
