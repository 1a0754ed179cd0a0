"""Spoil files for minutes or hours, until a reader runs one, hangs on it or ends in a traceback (`make fuzz`).

A file that a reader does not stand is shrunk and written to runs/fuzz/READER; put it into tests/hostile/making.py once
the reader is mended. With hypothesis, what was found is tried again first (runs/fuzz/examples). atheris is guided by
the lines of code that a file reaches, and takes one reader at a time.
"""

from __future__ import annotations

import hashlib
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from tests.hostile.mutations import spoiled
from tests.hostile.readers import attempt
from tests.hostile.sound import seeds

FOUND = Path("runs/fuzz")
_ROUND = 25  # files of one ending before it is the turn of the next
_MEMORY = 3 * 2**30  # bytes beyond those of the libraries, after which a reader is said to fill the memory


def suffixes(reader: str) -> list[str]:
    """List the endings of a reader's files."""
    return sorted(seeds(reader))


def once(reader: str, suffix: str, content: bytes) -> None:
    """Let a reader read a file in a folder of its own; keep the file if it fails."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            attempt(
                reader, f"moments{suffix}" if b"mu.npy" in content else f"file{suffix}", content, Path(folder).resolve()
            )
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            place = FOUND / reader / f"{hashlib.sha256(content).hexdigest()[:12]}{suffix}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        raise


def with_hypothesis(reader: str, suffix: str, count: int) -> None:
    """Spoil `count` files of one ending."""

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


def with_atheris(reader: str, seconds: int) -> None:
    """Let libFuzzer spoil files of a reader, guided by the lines that they reach."""
    import atheris

    suffix, *others = suffixes(reader)
    corpus = FOUND / "corpus" / reader
    corpus.mkdir(parents=True, exist_ok=True)
    for content in (each for some in (suffix, *others) for each in seeds(reader)[some]):
        (corpus / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)

    def run(data: bytes) -> None:
        once(reader, [suffix, *others][len(data) % (1 + len(others))], data)

    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-timeout=30", "-rss_limit_mb=6000", str(corpus)], run)
    atheris.Fuzz()


def run(readers: Sequence[str], seconds: int, engine: str) -> None:
    """Spoil files of some readers for some seconds."""
    if engine == "atheris":
        with_atheris(readers[0], seconds)
        return
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + _MEMORY, resource.RLIM_INFINITY))
    began, counts = time.monotonic(), dict.fromkeys(readers, 0)
    while time.monotonic() - began < seconds:
        for reader in readers:
            for suffix in suffixes(reader):
                with_hypothesis(reader, suffix, _ROUND)
                counts[reader] += _ROUND
                if time.monotonic() - began >= seconds:
                    break
            else:
                continue
            break
        print(f"{time.monotonic() - began:.0f} s: {sum(counts.values()):,} files", file=sys.stderr)
    print(", ".join(f"{count:,} {reader}" for reader, count in counts.items()))
