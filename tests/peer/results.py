"""Write the page of results: what each file of tests loses in every setting, and the reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from examining import Findings
from listing import WRAPPED, Expected, losses, reason
from wrapping import ACTING, SETTINGS, versions

HEAD = """# diffusers' own tests on wrapped models

This page was printed by `make peer`; [CONTRIBUTING](../../CONTRIBUTING.md#diffusers-own-tests) says how it works. Every
file of tests is run as it is, and with every model wrapped by an empty list of methods, by methods that never act, and
by methods that act. A test is lost if it passes on plain models and fails on wrapped ones. It is refused if a method
that acts says in words why it cannot use the input of the test. Numbers in the last column are those of the reasons
below the table, with how many tests each explains."""
UNKNOWN = "not known"


def page(findings: Sequence[Findings], entries: Sequence[Expected]) -> str:
    """Return the page, in markdown."""
    made_with = ", ".join(f"{name} {version}" for name, version in versions().items()) + "."
    methods = [f"- {setting}: {', '.join(map(repr, SETTINGS[setting])) or 'no method'}" for setting in WRAPPED]
    whys = {each.file: _whys(each, entries) for each in findings}
    numbers = {
        why: number for number, why in enumerate(dict.fromkeys(why for each in whys.values() for why in each), 1)
    }
    columns = ("file", "tests", *(f"lost, {setting}" for setting in WRAPPED), "refused", "not wrapped", "reasons")
    rows = [
        (*_row(each), ", ".join(f"{numbers[why]} ({count})" for why, count in whys[each.file].items()))
        for each in findings
    ]
    sums = [str(sum(int(row[i]) for row in rows)) for i in range(1, len(columns) - 2)]
    lines = [columns, tuple("---" for _ in columns), *rows, ("all", *sums, "", "")]
    parts = [HEAD, made_with, "\n".join(methods), "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    if numbers:
        parts.append("\n".join(["## Reasons", "", *(f"{number}. {why}" for why, number in numbers.items())]))
    if broken := [f"- `{each.file}`: {each.uncollected}" for each in findings if each.uncollected is not None]:
        parts.append("\n".join(["## Not collected", "", *broken]))
    return "\n\n".join(parts) + "\n"


def _whys(findings: Findings, entries: Sequence[Expected]) -> Counter[str]:
    """Count the tests of a file that are lost or refused when methods act, by reason."""
    return Counter(reason(test, error, entries) or UNKNOWN for test, error in losses([findings], ACTING))


def _row(findings: Findings) -> tuple[str, ...]:
    counts = [len(findings.passed), *(len(findings.losses[setting].lost) for setting in WRAPPED)]
    unwrapped = sorted({name for loss in findings.losses.values() for name in loss.unwrapped})
    row = map(str, (*counts, len(findings.losses[ACTING].refused)))
    return (findings.file.removeprefix("tests/"), *row, ", ".join(unwrapped))


def write_page(path: Path, findings: Sequence[Findings], entries: Sequence[Expected]) -> None:
    """Write the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(findings, entries))
