"""Let libFuzzer spoil files, guided by the branches that they reach in the code of the readers (atheris).

Everything is imported first, and then only the functions that read are instrumented. atheris' own hook of imports takes
whole packages: all of tokdyn and all that it imports on the way, most of which no file reaches.
"""

from __future__ import annotations

import hashlib
import inspect
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

INSTRUMENTED = (
    "tokdyn.reading", "tokdyn.section", "tokdyn.yaml_loading", "tokdyn.image_files", "tokdyn.prompts", "tokdyn.recipe",
    "tokdyn.presets", "tokdyn.checkpoints", "tokdyn.data", "tokdyn.bench.stacks", "tokdyn.attach.sidecar",
    "tokdyn.evaluate.npz", "tokdyn.evaluate.images", "tokdyn.evaluate.statistics", "tokdyn.models.arguments",
    "yaml", "zipfile", "PIL",
)  # fmt: skip
"""Modules that read, and packages of such."""
_LEAST = 5  # seconds for an ending, however many there are
_SLOWED = 20  # times that instrumented code may take; PyYAML takes about ten times as long


def functions(module: ModuleType) -> Iterator[FunctionType]:
    """List the functions and methods that a module defines, also decorated ones."""
    scopes: list[Any] = [module, *(each for each in vars(module).values() if inspect.isclass(each))]
    for scope in scopes:
        if getattr(scope, "__module__", module.__name__) != module.__name__:
            continue
        for value in list(vars(scope).values()):
            found = inspect.unwrap(getattr(value, "__func__", None) or getattr(value, "fget", None) or value)
            if isinstance(found, FunctionType) and found.__module__ == module.__name__:
                yield found


def instrument() -> int:
    """Instrument the functions of the modules that read and are imported; return their number."""
    import atheris

    names = [name for name in sorted(sys.modules) if name.startswith(tuple(f"{each}." for each in INSTRUMENTED))]
    modules = [sys.modules[name] for name in (*names, *INSTRUMENTED) if name in sys.modules]
    found = {id(each.__code__): each for module in modules for each in functions(module)}
    for each in found.values():
        atheris.instrument_func(each)
    return len(found)


def fuzz(
    targets: Sequence[tuple[str, str]],
    seconds: int,
    seed: int,
    found: Path,
    files: Callable[[str, str], Sequence[bytes]],
    once: Callable[[str, str, bytes, int], None],
) -> None:
    """Spoil files of some readers, each ending in a process of its own.

    Args:
        targets: reader and ending.
        seconds: how long all of it takes.
        seed: seed of the first process.
        found: folder of the corpora, which later runs start from, and of the files that a reader does not stand.
        files: gives the files to begin with for a reader and an ending.
        once: lets a reader read a file with some patience, and raises an error if it does not stand it.

    Raises:
        SystemExit: a reader failed; its file lies in the folder.
    """
    began = time.monotonic()
    print(f"{instrument():,} functions are instrumented", file=sys.stderr)
    total = mmap.mmap(-1, 8)  # shared with the processes
    began, failed = time.monotonic(), []
    for number, (reader, suffix) in enumerate(targets):
        share = max(_LEAST, round((seconds - (time.monotonic() - began)) / (len(targets) - number)))
        corpus = found / "corpus" / f"{reader}{suffix}"
        corpus.mkdir(parents=True, exist_ok=True)
        for content in files(reader, suffix):
            (corpus / hashlib.sha256(content).hexdigest()[:40]).write_bytes(content)
        before, known = struct.unpack("q", total[:])[0], len(list(corpus.iterdir()))
        child = os.fork()
        if not child:
            _libfuzzer(lambda data, to=(reader, suffix): once(*to, data, _SLOWED), total, corpus, share, seed + number)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        count, more = struct.unpack("q", total[:])[0] - before, len(list(corpus.iterdir())) - known
        print(f"{reader}{suffix}: {count:,} files in {share} s, {more:,} of them reached new branches")
        if code:
            failed.append(f"{reader}{suffix}")
    if failed:
        raise SystemExit(f"{', '.join(failed)} failed; the files are in {found}")


def _libfuzzer(once: Callable[[bytes], None], total: mmap.mmap, corpus: Path, seconds: int, seed: int) -> None:
    """Run libFuzzer for some seconds, and end the process."""
    import atheris

    def run(data: bytes) -> None:
        total[:] = struct.pack("q", struct.unpack("q", total[:])[0] + 1)
        once(data)

    words = (f"-max_total_time={seconds}", "-timeout=0", "-rss_limit_mb=8000", "-verbosity=0", "-max_len=65536")
    # Readers ring SIGALRM themselves. The file that a reader does not stand is kept by `once`.
    atheris.Setup([sys.argv[0], *words, f"-seed={seed}", "-artifact_prefix=/dev/null", str(corpus)], run)
    atheris.Fuzz()
