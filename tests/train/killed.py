"""Train in forks of this process, and kill each with SIGKILL at a random moment: killed.py FOLDER TIMES key=value...

The forks take the imports from this process, so that a kill costs a fraction of a second. The last one ends by itself.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from tokdyn.recipe import files, resolve, yaml_text
from tokdyn.train import train


def main() -> None:
    """Start, kill and resume."""
    folder, draws = Path(sys.argv[1]), random.Random(0)
    base = yaml_text.parse((Path(__file__).parent / "tiny.yaml").read_text(), "tiny.yaml")
    recipe = resolve(files.deep_merge({**base, "out": str(folder)}, files.parse_overrides(sys.argv[3:])))
    for number in range(int(sys.argv[2]) + 1):
        child = os.fork()
        if child == 0:
            train(recipe, resume=(folder / "recipe.yaml").is_file())
            os._exit(0)
        if number < int(sys.argv[2]):
            time.sleep(draws.uniform(0.1, 1.0))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
