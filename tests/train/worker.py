"""Train in a process of its own, which a test kills or runs several of: worker.py FOLDER [--resume] key=value...

The recipe is tiny.yaml, or the one of the word recipe=FILE.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from tokdyn.recipe import files, resolve, yaml_text
from tokdyn.train import train

if __name__ == "__main__":
    files_named = [word.removeprefix("recipe=") for word in sys.argv[2:] if word.startswith("recipe=")]
    named = Path(*files_named) if files_named else Path(__file__).parent / "tiny.yaml"
    base = yaml_text.parse(named.read_text(), named.name)
    words = [word for word in sys.argv[2:] if word != "--resume" and not word.startswith("recipe=")]
    settings = files.deep_merge({**base, "out": sys.argv[1]}, files.parse_overrides(words))
    sys.exit(train(resolve(settings), resume="--resume" in sys.argv, console=Console(file=sys.stdout)).exit_code)
