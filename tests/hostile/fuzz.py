"""Spoil files for minutes or hours, until a reader runs one, hangs on it or ends in a traceback (`make fuzz`).

A file that a reader does not stand is shrunk and written to runs/fuzz/READER; put it into tests/hostile/making.py once
the reader is mended. With hypothesis, what was found is tried again first (runs/fuzz/examples). atheris is guided by
the branches that a file reaches, and begins where it ended (runs/fuzz/corpus).
"""

from __future__ import annotations

import hashlib
import random
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from tests.hostile import guided
from tests.hostile.mutations import spoiled
from tests.hostile.readers import attempt
from tests.hostile.sound import seeds

FOUND = Path("runs/fuzz")
_ROUND = 25  # files of one ending before it is the turn of the next
_MEMORY = 3 * 2**30  # bytes beyond those of the libraries, after which a reader is said to fill the memory


def suffixes(reader: str) -> list[str]:
    """List the endings of a reader's files."""
    return sorted(seeds(reader))


def once(reader: str, suffix: str, content: bytes, patience: int = 1) -> None:
    """Let a reader read a file in a folder of its own; keep the file if it fails."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            name = f"moments{suffix}" if b"mu.npy" in content else f"file{suffix}"
            attempt(reader, name, content, Path(folder).resolve(), patience)
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            place = FOUND / reader / f"{hashlib.sha256(content).hexdigest()[:12]}{suffix}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        raise


def with_hypothesis(reader: str, suffix: str, count: int, seed: int) -> None:
    """Spoil `count` files of one ending."""

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        deadline=None,
        derandomize=False,
        database=DirectoryBasedExampleDatabase(FOUND / "examples"),
        phases=(Phase.reuse, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(spoiled(seeds(reader)[suffix]))
    def run(content: bytes) -> None:
        once(reader, suffix, content)

    run()


def run(readers: Sequence[str], seconds: int, engine: str, seed: int) -> None:
    """Spoil files of some readers for some seconds. Equal seeds spoil the same files, as far as the time goes."""
    print(f"seed {seed}", file=sys.stderr)
    if engine == "atheris":
        targets = [(reader, suffix) for reader in readers for suffix in suffixes(reader)]
        guided.fuzz(targets, seconds, seed, FOUND, lambda reader, suffix: seeds(reader)[suffix], once)
        return
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + _MEMORY, resource.RLIM_INFINITY))
    began, counts, draws = time.monotonic(), dict.fromkeys(readers, 0), random.Random(seed)
    while time.monotonic() - began < seconds:
        for reader in readers:
            for suffix in suffixes(reader):
                with_hypothesis(reader, suffix, _ROUND, draws.getrandbits(32))
                counts[reader] += _ROUND
                if time.monotonic() - began >= seconds:
                    break
            else:
                continue
            break
        print(f"{time.monotonic() - began:.0f} s: {sum(counts.values()):,} files", file=sys.stderr)
    print(", ".join(f"{count:,} {reader}" for reader, count in counts.items()))
