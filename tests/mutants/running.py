"""Run tests in forks of one process that has imported every library but ours.

A fork imports tokdyn with one mistake in it and runs the tests that reach the changed line, fastest first, until one
fails. Nothing is written to the source tree, and a mistake may sit where a module is imported.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
from coverage import Coverage

MEMORY = 8 << 30
"""Bytes that a mistake may ask for beyond what the libraries hold."""
PATIENCE = 900
"""Seconds of real time after which a fork that waits for nothing is ended."""
FAILED = 70
"""Exit code of a fork in which something went wrong outside of the tests."""
LIBRARIES = (
    "torch",
    "numpy",
    "einops",
    "pydantic",
    "yaml",
    "PIL",
    "hypothesis",
    "diffusers",
    "timm",
    "safetensors.torch",
)


@dataclass
class Net:
    """Tests, and which lines each of them reaches.

    Attributes:
        seconds: of processor time of each test, without a mistake.
        reached: for each file and line, the tests that run it; "" are the lines that run at import.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    reached: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def tests(self, path: str, lines: Iterable[int], limit: float) -> list[str]:
        """Return the tests that reach any of some lines, fastest first, up to `limit` seconds of them.

        A line that runs at import concerns every test; those that reach its file come first.
        """
        reached = self.reached.get(path, {})
        found = {test for line in lines for test in reached.get(str(line), ())}
        order = sorted(found - {""}, key=self._cost)
        if "" in found:
            file = {test for tests in reached.values() for test in tests} - {""} - set(order)
            order += sorted(file, key=self._cost) + sorted(self.seconds.keys() - file - set(order), key=self._cost)
        chosen: list[str] = []
        spent = 0.0
        for test in order:
            spent += self.seconds[test]
            if chosen and spent > limit:
                break
            chosen.append(test)
        return chosen

    def _cost(self, test: str) -> tuple[float, str]:
        return self.seconds[test], test


class _Select:
    """Keep the chosen tests, in the chosen order."""

    def __init__(self, chosen: Sequence[str]) -> None:
        self._place = {test: place for place, test in enumerate(chosen)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self._place), key=lambda i: self._place[i.nodeid])


class _Watch:
    """Note how much processor time each test takes, as other work may slow it down, and what it reaches."""

    def __init__(self, coverage: Coverage) -> None:
        self._coverage, self._began = coverage, 0.0
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._coverage.switch_context(nodeid)
        self._began = _processor_time()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._coverage.switch_context("")
        self.seconds[nodeid] = _processor_time() - self._began


def _processor_time() -> float:
    """Seconds that this process and its children have computed."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def preload() -> None:
    """Import the libraries, so that forks need not, and let no collection of garbage look at them again."""
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


def _fork(action: Callable[[], int], log: Path = Path(os.devnull)) -> int:
    """Run an action in a fork that writes to a file; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = FAILED
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(out, stream)
        code = action()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _pytest(root: Path, files: Iterable[str], plugins: list[Any], *options: str) -> int:
    os.chdir(root)
    return int(pytest.main(["-q", "-p", "no:cacheprovider", *options, *files], plugins=plugins))


def digest(path: Path) -> str:
    """Hash a file, or every Python file of a folder."""
    found = hashlib.sha256()
    for file in sorted([path] if path.is_file() else path.rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def weave(root: Path, tests: Sequence[str], sources: Sequence[str], every: Sequence[str], folder: Path) -> Net:
    """Return the net of some tests over some source files.

    Args:
        root: of the repository.
        tests: files and folders of tests.
        sources: source files.
        every: the source files of all rooms, so that tests run once for all of them.
        folder: where nets are kept until the tests or the sources change.

    Raises:
        SystemExit: a test fails without any mistake.
    """
    net = Net()
    for path in tests:
        store = folder / f"net-{path.replace('/', '.').removesuffix('.py')}.json"
        kept = json.loads(store.read_text()) if store.exists() else {}
        now = {source: digest(root / source) for source in sources}
        if kept.get("tests") != digest(root / path) or not now.items() <= kept["sources"].items():
            print(f"running {path} without mistakes, to see which lines each test reaches", flush=True)
            _watch(root, path, every, store)
            kept = json.loads(store.read_text())
        net.seconds |= kept["seconds"]
        for source in sources:
            for line, found in kept["reached"][source].items():
                reached = net.reached.setdefault(source, {}).setdefault(line, [])
                reached += found
    return net


def _watch(root: Path, path: str, sources: Sequence[str], store: Path) -> None:
    def run() -> int:
        kept = {"tests": digest(root / path), "sources": {source: digest(root / source) for source in sources}}
        coverage = Coverage(data_file=None, include=[str(root / source) for source in sources], config_file=False)
        watch = _Watch(coverage)
        coverage.start()
        code = _pytest(root, [path], [watch])
        coverage.stop()
        data = coverage.get_data()
        reached = {
            source: {str(line): tests for line, tests in data.contexts_by_lineno(str(root / source)).items()}
            for source in sources
        }
        if code == 0:
            store.with_suffix(".part").write_text(json.dumps(kept | {"seconds": watch.seconds, "reached": reached}))
            store.with_suffix(".part").replace(store)
        return code

    store.parent.mkdir(parents=True, exist_ok=True)
    log = store.with_suffix(".log")
    code = os.waitstatus_to_exitcode(os.waitpid(_fork(run, log), 0)[1])
    if code:
        sys.exit(f"{path} fails without any mistake (exit code {code}); {log} holds its output.")


def start(root: Path, path: str, source: str, tests: Sequence[str], seconds: float) -> int:
    """Start a fork in which a file has other contents and tests run until one fails; return its process id."""

    def run() -> int:
        module = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        original = SourceFileLoader.get_code

        def get_code(self: SourceFileLoader, name: str) -> Any:
            if name == module:
                return compile(source, str(root / path), "exec", dont_inherit=True)
            return original(self, name)

        SourceFileLoader.get_code = get_code  # type: ignore[assignment, method-assign]
        allowed = int(20 + 10 * seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, allowed + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
        signal.alarm(PATIENCE)
        files = dict.fromkeys(test.split("::")[0] for test in tests)
        return _pytest(root, files, [_Select(tests)], "-x", "--tb=no")

    return _fork(run)


def verdict(status: int) -> str:
    """Name the way in which a fork ended."""
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return "survived"
    if code in (-signal.SIGXCPU, -signal.SIGALRM, -signal.SIGKILL):
        return "timeout"
    if code in (5, FAILED):  # 4, a mistake that no conftest.py can be imported with, is noticed
        raise RuntimeError(f"the tests could not be run (exit code {code}); delete runs/mutants and try again.")
    return "killed"
