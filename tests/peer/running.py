"""Run tests of a checkout of diffusers in a fork of this process, and record what became of each."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
CACHES = ("cache", "pyramid", "taylorseer")  # in names of tests that enable a cache of diffusers

OVER = "ran over the time limit"


@dataclass(frozen=True)
class Job:
    """Tests to run in one process.

    Attributes:
        checkout: folder of diffusers.
        file: of tests, relative to the checkout.
        setting: how models are wrapped, a key of `wrapping.SETTINGS`.
        tests: the tests to run; None for all.
        unwrapped: names of classes that stay as they are.
        whole: whether methods that leave out or merge tokens are left out.
        limit: seconds.
        log: the file for what the process prints; its records lie beside it.
    """

    checkout: Path
    file: str
    setting: str
    tests: tuple[str, ...] | None
    unwrapped: tuple[str, ...]
    whole: bool
    limit: float
    log: Path

    @property
    def records(self) -> Path:
        """The file for records, one line of JSON each."""
        return self.log.with_suffix(".jsonl")


@dataclass
class Results:
    """What became of tests.

    Attributes:
        collected: the tests that were to run, in order.
        uncollected: why the file could not be collected; None if it could.
        outcomes: "passed", "failed" or "skipped" by test.
        errors: the first line of the error of each test that failed.
        wrapped: the classes that were wrapped, with the methods that fit them.
        touched: the tests in which a model was wrapped.
        inferred: classes without an adapter whose structure could not be inferred, which a call has said.
        refused: classes that could not be wrapped at all.
        begun: the test that was running when the process ended; None if it ended by itself.
    """

    collected: list[str] = field(default_factory=list)
    uncollected: str | None = None
    outcomes: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    wrapped: dict[str, list[str]] = field(default_factory=dict)
    touched: set[str] = field(default_factory=set)
    inferred: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    begun: str | None = None


@functools.cache
def preload() -> None:
    """Import what nearly every test needs, so that forks need not."""
    import diffusers.models.modeling_utils
    import diffusers.pipelines.pipeline_utils  # noqa: F401
    import pytest  # noqa: F401
    import transformers  # noqa: F401
    import wrapping  # noqa: F401


def start(job: Job) -> int:
    """Start a job; return its process id."""
    preload()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    job.records.write_text("")
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()  # so that processes which tests start end with it
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        out = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = _run(job)
    finally:
        os._exit(code)


def _run(job: Job) -> int:
    import pytest
    from wrapping import Wrapper

    os.chdir(job.checkout)
    wrapper = Wrapper(job.setting, job.unwrapped, job.whole)
    if job.setting != "plain":
        wrapper.install()
    with job.records.open("a", buffering=1) as records:
        plugin = Plugin(wrapper, job.tests, lambda record: records.write(json.dumps(record) + "\n"))
        arguments = [job.file, "-q", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={job.checkout}"]
        code = int(pytest.main(arguments, plugins=[plugin]))
    sys.stdout.flush()
    return code


class Plugin:
    """Selects tests, tells the wrapper what they are about, and records what becomes of them."""

    def __init__(self, wrapper: Any, tests: Iterable[str] | None, record: Callable[[dict[str, Any]], Any]) -> None:
        self._wrapper = wrapper
        self._tests = None if tests is None else frozenset(tests)
        self._record = record
        self._error: str | None = None
        self._outcome = "passed"

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        if self._tests is not None:
            left_out = [item for item in items if item.nodeid not in self._tests]
            items[:] = [item for item in items if item.nodeid in self._tests]
            config.hook.pytest_deselected(items=left_out)
        self._record({"collected": [item.nodeid for item in items]})

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            lines = [line.removeprefix("E ").strip() for line in str(report.longrepr).splitlines() if line.strip()]
            self._record({"uncollected": lines[-1] if lines else "no message"})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._error, self._outcome = None, "passed"
        self._record({"begun": nodeid})

    def pytest_runtest_setup(self, item: Any) -> None:
        marked = item.get_closest_marker("cache") is not None
        self._wrapper.beside_cache = marked or any(word in item.name for word in CACHES)
        self._wrapper.wrapped, self._wrapper.inferred, self._wrapper.refused = {}, set(), set()

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        from tokdyn.errors import UnsupportedModelError

        if call.excinfo is not None and call.excinfo.errisinstance(UnsupportedModelError):
            self._record({"inferred": sorted(self._wrapper.inferred)})

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._outcome, self._error = "failed", self._error or _first_line(report)
        elif report.skipped and self._outcome == "passed":
            self._outcome = "skipped"
        if report.when == "teardown":
            record = {"ended": report.nodeid, "outcome": self._outcome, "error": self._error}
            self._record(record | {"wrapped": self._wrapper.wrapped, "refused": sorted(self._wrapper.refused)})


def _first_line(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr) if crash is None else crash.message
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")


def read(job: Job) -> Results:
    """Read the records of a job that has ended."""
    found = Results()
    for line in job.records.read_text().splitlines():
        record = json.loads(line)
        if "collected" in record:
            found.collected = record["collected"]
        elif "uncollected" in record:
            found.uncollected = record["uncollected"]
        elif "begun" in record:
            found.begun = record["begun"]
        elif "inferred" in record:
            found.inferred.update(record["inferred"])
        else:
            found.begun = None
            found.outcomes[record["ended"]] = record["outcome"]
            found.refused.update(record["refused"])
            if record["wrapped"]:
                found.touched.add(record["ended"])
            for name, methods in record["wrapped"].items():
                found.wrapped[name] = sorted({*found.wrapped.get(name, []), *methods})
            if record["error"] is not None:
                found.errors[record["ended"]] = record["error"]
    return found


Task = Generator[Job, tuple["Results", str], Result]
"""A task asks for one job after the other, gets what became of its tests and how it ended, and returns a result."""


def in_parallel(tasks: Iterable[Task[Result]], jobs: int) -> Iterator[Result]:
    """Run the jobs of several tasks at a time, each in a process of its own; yield the results of tasks as they end."""
    waiting, running = iter(tasks), dict[int, tuple[Task[Result], Job, float]]()
    ready: list[tuple[Task[Result], tuple[Results, str] | None]] = []
    try:
        while True:
            while len(running) + len(ready) < jobs and (task := next(waiting, None)) is not None:
                ready.append((task, None))
            for task, became in ready:
                try:
                    job = task.send(became) if became else next(task)
                except StopIteration as end:
                    yield end.value
                else:
                    running[start(job)] = task, job, time.monotonic() + job.limit
            if not running and not ready:
                return
            ready = [(task, became) for task, job, became in _ended(running)]
    finally:
        for pid in running:
            _end(pid)


def _ended(running: dict[int, tuple[Task[Any], Job, float]]) -> Iterator[tuple[Task[Any], Job, tuple[Results, str]]]:
    """Wait a moment, end jobs that run over their limit, and take out those that have ended."""
    time.sleep(0.1)
    for pid, (task, job, until) in list(running.items()):
        late = time.monotonic() >= until
        if late:
            _end(pid)
        ended, status = os.waitpid(pid, 0 if late else os.WNOHANG)
        if ended:
            _end(pid)  # what its tests have started
            del running[pid]
            yield task, job, (read(job), _ending(status, late))


def _end(pid: int) -> None:
    """End a process that was started here, and those that it started."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _ending(status: int, late: bool) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return "" if code in (0, 1) else f"pytest ended with code {code}"
    return OVER if late else f"the process ended by signal {-code}"
