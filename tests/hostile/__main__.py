"""Spoil files until a reader fails (`make fuzz`), or write the corpus of hostile files.

python tests/hostile --seconds 180
python tests/hostile --seconds 600 --readers checkpoints zips
python tests/hostile --engine atheris --seconds 600         (pip install '.[fuzz]')
python tests/hostile --write
"""

from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path
from types import ModuleType


def main() -> None:
    """Parse the arguments and run."""
    package = ModuleType("tests")  # a package in site-packages may have this name, too
    package.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["tests"] = package
    from tests.hostile import fuzz, making
    from tests.hostile.readers import READERS, warm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the corpus, and do nothing else")
    parser.add_argument("--seconds", type=int, default=180)
    parser.add_argument("--readers", nargs="+", choices=sorted(READERS), default=sorted(READERS))
    parser.add_argument("--engine", choices=("hypothesis", "atheris"), default="hypothesis")
    parser.add_argument("--seed", type=int, help="equal seeds spoil the same files; by default another one every time")
    words = parser.parse_args()
    if words.write:
        making.main()
    else:
        warm()
        seed = secrets.randbits(31) if words.seed is None else words.seed
        fuzz.run(words.readers, words.seconds, words.engine, seed)


if __name__ == "__main__":
    main()
