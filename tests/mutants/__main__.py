"""Make mistakes in the code, one at a time, and count those that the tests notice (`make mutants`)."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from listing import COLUMNS, Tally, write
from making import Mutant, make
from running import Net, digest, preload, start, verdict, weave

ROOT = Path(__file__).parents[2]
STORE = ROOT / "runs" / "mutants"
LIST = Path(__file__).parent / "survivors.md"

# The first net of a room is its own tests. What passes through it meets the second, at most WIDE seconds of tests that
# reach the line.
DATA = "tests/test_tokens.py"
WRAPPED = [f"tests/contract/test_{name}.py" for name in ("merge", "weighted", "chunking", "gates")]
ROOMS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "ops": (["tokdyn/ops/*.py"], ["tests/ops"], [DATA, "tests/models", "tests/parity", "tests/methods", *WRAPPED]),
    "cpu": (["tokdyn/ops/cpu/*.py"], ["tests/ops"], ["tests/models", "tests/parity"]),
    "methods": (["tokdyn/methods/*.py"], ["tests/methods", "tests/test_compose.py"], [DATA, "tests/models", *WRAPPED]),
    "compose": (["tokdyn/compose.py"], ["tests/test_compose.py"], [DATA, "tests/methods"]),
    "tokens": (["tokdyn/tokens.py"], [DATA], ["tests/ops", "tests/models"]),
    "diffusion": (["tokdyn/diffusion/*.py"], ["tests/diffusion"], [DATA, "tests/train/test_step.py"]),
    "upcycling": (["tokdyn/upcycling/*.py"], ["tests/upcycling"], [DATA, "tests/cli/test_upcycle.py"]),
}
NEAR, WIDE, CONTROL = 60.0, 90.0, 10.0
"""Seconds of tests that a mistake meets at most."""


class Room:
    """One room: its mistakes in an order of chance that stays, and the verdicts that are known."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        _, self.near, self.wide = ROOMS[name]
        self.files = _files(name)
        mutants = [mutant for path in self.files for mutant in make(ROOT, path)]
        self.mutants = sorted(mutants, key=lambda m: hashlib.sha256(f"{seed} {m.key}".encode()).digest())
        self._log = STORE / f"{name}.jsonl"
        self._tests = " ".join(digest(ROOT / path) for path in self.near + self.wide)
        self._known: dict[str, dict[str, str]] = {}
        if self._log.exists():
            self._known = {line["key"]: line for line in map(json.loads, self._log.read_text().splitlines())}

    def verdict(self, mutant: Mutant) -> str | None:
        """What became of a mistake: killed, timeout, survived, or None if it was not tried."""
        return self._known.get(mutant.key, {}).get("verdict")

    def settled(self, mutant: Mutant) -> bool:
        """Whether trying it again would tell nothing new: tests that have changed since may notice it."""
        known = self._known.get(mutant.key)
        return known is not None and (known["verdict"] != "survived" or known["tests"] == self._tests)

    def note(self, mutant: Mutant, word: str) -> None:
        """Remember a verdict, on disk too."""
        self._known[mutant.key] = {"key": mutant.key, "verdict": word, "tests": self._tests}
        STORE.mkdir(parents=True, exist_ok=True)
        with self._log.open("a") as log:
            log.write(
                json.dumps({"key": mutant.key, "verdict": word, "tests": self._tests, "where": mutant.path}) + "\n"
            )

    def run(self, mutants: list[Mutant], jobs: int) -> None:
        """Try the mistakes that are not settled."""
        rest = [mutant for mutant in mutants if not self.settled(mutant)]
        if not rest:
            return
        every = [path for name in ROOMS for path in _files(name)]
        nets = [weave(ROOT, tests, self.files, every, STORE) for tests in (self.near, self.wide)]
        self._check(nets[0])
        began = time.monotonic()
        for done, (mutant, word) in enumerate(_tried(rest, nets, jobs), 1):
            self.note(mutant, word)
            if word == "survived" or done % 20 == 0 or done == len(rest):
                left = (time.monotonic() - began) / done * (len(rest) - done) / 60
                print(f"{self.name} {done}/{len(rest)}, {left:.0f} minutes left", flush=True)
            if word == "survived":
                print(f"unnoticed: {_shown(mutant)}", flush=True)

    def _check(self, net: Net) -> None:
        """Run tests as mistakes meet them, but without one: then they must pass."""
        for path in self.files:
            tests = net.tests(path, [1], CONTROL)
            if tests:
                source = (ROOT / path).read_text()
                pid = start(ROOT, path, source, tests, CONTROL)
                if verdict(os.waitpid(pid, 0)[1]) != "survived":
                    sys.exit(f"{path} fails tests without a mistake in it, such as {tests[-1]}.")
                return

    def tally(self, mutants: list[Mutant]) -> Tally:
        """Count the verdicts."""
        words = [self.verdict(mutant) for mutant in mutants]
        return Tally(self.name, len(self.mutants), *(words.count(word) for word in ("killed", "timeout", "survived")))


def _files(room: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in ROOMS[room][0] for path in ROOT.glob(pattern))


def _shown(mutant: Mutant) -> str:
    return f"{mutant.path}:{mutant.line} {mutant.scope}\n    - {mutant.before}\n    + {mutant.after}"


def _tried(mutants: list[Mutant], nets: list[Net], jobs: int) -> Iterator[tuple[Mutant, str]]:
    """Try mistakes in several forks at a time; yield each with its verdict."""
    waiting = [(mutant, 0) for mutant in reversed(mutants)]
    running: dict[int, tuple[Mutant, int]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant, stage = waiting.pop()
            tests = nets[stage].tests(mutant.path, mutant.lines, (NEAR, WIDE)[stage])
            if tests:
                seconds = sum(nets[stage].seconds[test] for test in tests)
                running[start(ROOT, mutant.path, mutant.source, tests, seconds)] = mutant, stage
            elif stage == 0:
                waiting.append((mutant, 1))
            else:
                yield mutant, "survived"
        if running:
            pid, status, _ = os.wait3(0)
            mutant, stage = running.pop(pid)
            word = verdict(status)
            if word == "survived" and stage == 0:
                waiting.append((mutant, 1))
            else:
                yield mutant, word


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("rooms", nargs="*", metavar="ROOM", help=f"any of {', '.join(ROOMS)}; default: all")
    parser.add_argument("--sample", type=int, default=0, help="try this many of each room; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which mistakes are tried")
    parser.add_argument("--jobs", type=int, default=1, help="forks at a time")
    parser.add_argument("--only", default="", help="files whose path contains this")
    parser.add_argument("--known", action="store_true", help="count the verdicts so far and try nothing")
    parser.add_argument("--list", action="store_true", help=f"write {LIST.relative_to(ROOT)}")
    args = parser.parse_args()
    if unknown := [room for room in args.rooms if room not in ROOMS]:
        parser.error(f"there is no room {unknown[0]!r}; known are {', '.join(ROOMS)}.")
    sys.path.remove(str(Path(__file__).parent))
    sys.path.insert(0, str(ROOT))
    os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="Agg", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    if not args.known:
        preload()
    tallies, survivors, files = [], [], []
    for name in args.rooms or ROOMS:
        room = Room(name, args.seed)
        mutants = room.mutants = [mutant for mutant in room.mutants if args.only in mutant.path]
        mutants = mutants[: args.sample or None]
        if not args.known:
            room.run(mutants, args.jobs)
        tallies.append(room.tally(mutants))
        unnoticed = [mutant for mutant in mutants if room.verdict(mutant) == "survived"]
        survivors += sorted(unnoticed, key=lambda mutant: (mutant.path, mutant.line))
        files += room.files
    widths = [max(len(row[i]) for row in (COLUMNS, *(t.row() for t in tallies))) for i in range(len(COLUMNS))]
    for row in (COLUMNS, *(tally.row() for tally in tallies)):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    if args.known:
        for mutant in survivors:
            print(_shown(mutant))
    if args.list:
        mutmut, python = importlib.metadata.version("mutmut"), platform.python_version()
        write(LIST, f"{datetime.date.today()}, mutmut {mutmut}, Python {python}", tallies, survivors, files)
    if low := [tally.room for tally in tallies if tally.share < 0.9]:
        sys.exit(f"less than 90% noticed in {', '.join(low)}.")


if __name__ == "__main__":
    main()
