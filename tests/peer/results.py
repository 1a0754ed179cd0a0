"""Write the page of results: what each file of tests loses in every setting, and the reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from examining import Findings
from listing import COLUMNS, WRAPPED, Expected, as_table, losses, reason, row
from wrapping import ACTING, SETTINGS, versions

from tokdyn.methods import Method

HEAD = """# diffusers' own tests on wrapped models

This page was printed by `make peer`; [CONTRIBUTING](../../CONTRIBUTING.md#diffusers-own-tests) says how it works. Every
file of tests is run as it is, and with every model wrapped by an empty list of methods, by methods that never act, and
by methods that act. A test is lost if it passes on plain models and fails on wrapped ones. It is refused if a method
that acts says in words why it cannot use the input of the test. Numbers in the last column are those of the reasons
below the table, with how many tests each explains."""
UNKNOWN = "not known"


def page(findings: Sequence[Findings], entries: Sequence[Expected], unknown: Sequence[str] = ()) -> str:
    """Return the page, in markdown; `unknown` are files that were not run in all settings."""
    made_with = ", ".join(f"{name} {version}" for name, version in versions().items()) + "."
    methods = [f"- {setting}: {', '.join(map(_as_call, SETTINGS[setting])) or 'no method'}" for setting in WRAPPED]
    whys = {each.file: _whys(each, entries) for each in findings}
    every = dict.fromkeys(why for each in whys.values() for why in each)
    numbers = {why: number for number, why in enumerate(every, 1)}
    rows = [
        (*row(each), ", ".join(f"{numbers[why]} ({count})" for why, count in whys[each.file].items()))
        for each in findings
    ]
    parts = [HEAD, made_with, "\n".join(methods), as_table(rows, (*COLUMNS, "reasons"))]
    broken = [f"- `{each.file}`: {each.uncollected}" for each in findings if each.uncollected is not None]
    quiet = {test: error for setting in WRAPPED if setting != ACTING for test, error in losses(findings, setting)}
    for title, lines in (
        ("Lost to methods that do not act", [f"- `{test}`: {error}" for test, error in quiet.items()]),
        ("Reasons", [f"{number}. {why}" for why, number in numbers.items()]),
        ("Not collected", broken),
        ("Not run in all settings", [f"- `{file}`" for file in unknown]),
    ):
        if lines:
            parts.append("\n".join([f"## {title}", "", *lines]))
    return "\n\n".join(parts) + "\n"


def _as_call(method: Method) -> str:
    """Write the call that makes a method, with the settings that were given."""
    given = ", ".join(f"{name}={value!r}" for name, value in method if name in method.model_fields_set)
    return f"`{type(method).__name__}({given})`"


def _whys(findings: Findings, entries: Sequence[Expected]) -> Counter[str]:
    """Count the tests of a file that are lost or refused when methods act, by reason."""
    return Counter(reason(test, error, entries) or UNKNOWN for test, error in losses([findings], ACTING))


def write_page(path: Path, findings: Sequence[Findings], entries: Sequence[Expected], unknown: Sequence[str]) -> None:
    """Write the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(findings, entries, unknown))
