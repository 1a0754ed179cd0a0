"""The command line that benchmarks share: options, threads, and the exit code for missed targets."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tokdyn.bench import timing


def parser(
    description: str | None, out: str | None = None, rounds: int | None = None, figures: str | None = None
) -> argparse.ArgumentParser:
    """Build the parser of a benchmark.

    Args:
        description: docstring of its module, shown by --help as it is.
        out: default of --out; without one, results are only saved on request.
        rounds: default of --rounds; None leaves the option out.
        figures: default of --figures; None leaves the option out.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=out and Path(out), help="save the result as JSON")
    made.add_argument("--threads", type=int, help="processor threads; all by default")
    if rounds is not None:
        made.add_argument("--rounds", type=int, default=rounds, help="rounds of timing, whose median counts")
    if figures is not None:
        made.add_argument("--figures", type=Path, default=Path(figures), help="folder for pictures")
    return made


def start(given: argparse.Namespace) -> argparse.Namespace:
    """Set allocator and threads before the first tensor is made, and return the parsed options."""
    timing.prepare(given.threads)
    return given


def finish(missed: Sequence[str]) -> int:
    """Print which targets are missed, and return the exit code."""
    print(f"missed: {'; '.join(missed)}" if missed else "every target is met")
    return 1 if missed else 0
