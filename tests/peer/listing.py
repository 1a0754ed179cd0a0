"""Write what is lost when models are wrapped, and hold it against the losses that are expected."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from examining import WRAPPED, Findings
from wrapping import ACTING, SETTINGS, versions

COLUMNS = ("file", "passed", *(f"lost, {setting}" for setting in WRAPPED), "refused", "wrapped", "not wrapped")


@dataclass(frozen=True)
class Expected:
    """Tests that are lost for a good reason when methods act.

    Attributes:
        test: a pattern of the test's name, `file::Class::function`, without parameters.
        reason: why it is lost.
        error: a pattern of the first line of its error.
    """

    test: str
    reason: str
    error: str = "*"

    def names(self, test: str, error: str = "") -> bool:
        """Return whether the patterns are those of a lost test; without an error, whether the first one is."""
        return fnmatchcase(test.partition("[")[0], self.test) and (not error or fnmatchcase(error, self.error))


def expected(path: Path) -> list[Expected]:
    """Read the losses that are expected."""
    return [Expected(**entry) for entry in tomllib.loads(path.read_text()).get("lost", [])]


def losses(findings: Sequence[Findings], setting: str) -> Iterator[tuple[str, str]]:
    """Yield every test that is lost or refused in a setting, with the first line of its error."""
    for each in findings:
        yield from (each.losses[setting].lost | each.losses[setting].refused).items()


def reason(test: str, error: str, entries: Sequence[Expected]) -> str | None:
    """Return the reason for which the loss of a test is expected; None if it is not."""
    return next((entry.reason for entry in entries if entry.names(test, error)), None)


def unexpected(findings: Sequence[Findings], entries: Sequence[Expected]) -> list[str]:
    """Return the tests that must not be lost: all where no method acts, and those without a reason where some do."""
    bad = [test for setting in WRAPPED if setting != ACTING for test, _ in losses(findings, setting)]
    return bad + [test for test, error in losses(findings, ACTING) if reason(test, error, entries) is None]


def idle(findings: Sequence[Findings], entries: Sequence[Expected]) -> list[str]:
    """Return the patterns of expected losses that name tests which passed, and none that was lost."""
    lost = list(losses(findings, ACTING))
    passed = [test for each in findings for test in each.passed]
    return [
        entry.test
        for entry in entries
        if any(entry.names(test) for test in passed) and not any(entry.names(*each) for each in lost)
    ]


def row(findings: Findings) -> tuple[str, ...]:
    """Return the row of a file in a table with `COLUMNS`."""
    acting = findings.losses[ACTING]
    unwrapped = sorted({name for loss in findings.losses.values() for name in loss.unwrapped})
    wrapped = "; ".join(f"{name}: {', '.join(methods) or 'no method'}" for name, methods in acting.wrapped.items())
    counts = [len(findings.passed), *(len(findings.losses[setting].lost) for setting in WRAPPED), len(acting.refused)]
    return (findings.file.removeprefix("tests/"), *map(str, counts), wrapped, ", ".join(unwrapped))


def table(findings: Sequence[Findings]) -> str:
    """Return a table by file, with a row of sums, in markdown."""
    return as_table([row(each) for each in findings], COLUMNS)


def as_table(rows: Sequence[tuple[str, ...]], columns: tuple[str, ...]) -> str:
    """Return rows with a row of sums of the numbers among `COLUMNS`, in markdown."""
    numbers = range(1, len(COLUMNS) - 2)
    sums = ("all", *(str(sum(int(each[i]) for each in rows)) for i in numbers))
    lines = [columns, tuple("---" for _ in columns), *rows, (*sums, *("" for _ in columns[len(sums) :]))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(findings: Sequence[Findings], entries: Sequence[Expected]) -> str:
    """Return the whole report: the table, and every lost test with the first line of its error and the reason."""
    parts = [", ".join(f"{name} {version}" for name, version in versions().items()) + ".", table(findings)]
    for setting in WRAPPED:
        lines = []
        for test, error in losses(findings, setting):
            why = reason(test, error, entries) if setting == ACTING else None
            lines.append(f"- `{test}`: {error}" + (f" (expected: {why})" if why else ""))
        methods = ", ".join(map(repr, SETTINGS[setting])) or "an empty list of methods"
        parts.append("\n".join([f"## Lost, {setting}", "", f"Models are wrapped by {methods}.", "", *lines]).rstrip())
    if unsteady := sorted({test for each in findings for loss in each.losses.values() for test in loss.unsteady}):
        parts.append("\n".join(["## Unsteady", "", *(f"- `{test}`" for test in unsteady)]))
    if broken := [f"- `{each.file}`: {each.uncollected}" for each in findings if each.uncollected is not None]:
        parts.append("\n".join(["## Not collected", "", *broken]))
    return "\n\n".join(parts) + "\n"


def data(findings: Sequence[Findings], entries: Sequence[Expected]) -> dict[str, Any]:
    """Return the report as plain data."""
    return {
        "versions": versions(),
        "settings": {setting: [repr(method) for method in SETTINGS[setting]] for setting in WRAPPED},
        "files": [
            {
                "file": each.file,
                "passed": len(each.passed),
                "failed": each.failed,
                "unfinished": each.unfinished,
                "uncollected": each.uncollected,
                "lost": {setting: each.losses[setting].lost for setting in WRAPPED},
                "refused": each.losses[ACTING].refused,
                "unsteady": {setting: each.losses[setting].unsteady for setting in WRAPPED},
                "wrapped": {setting: each.losses[setting].wrapped for setting in WRAPPED},
                "unwrapped": {setting: each.losses[setting].unwrapped for setting in WRAPPED},
            }
            for each in findings
        ],
        "unexpected": unexpected(findings, entries),
    }


def write(path: Path, findings: Sequence[Findings], entries: Sequence[Expected]) -> None:
    """Write the report to `path`.md and `path`.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(markdown(findings, entries))
    path.with_suffix(".json").write_text(json.dumps(data(findings, entries), indent=1) + "\n")
