"""Write the page of results: what each file of tests loses in every setting, and the reasons."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from examining import WRAPPED, Findings
from listing import COLUMNS, Expected, as_table, losses, reason, row
from wrapping import ACTING, SETTINGS, versions

from tokdyn.methods import Method

HEAD = """# diffusers' own tests on wrapped models

This page was printed by `make peer`; [CONTRIBUTING](../../CONTRIBUTING.md#diffusers-own-tests) says how it works. Every
file of tests is run with every model wrapped by an empty list of methods, by methods that never act, and by methods
that act. A test is lost if it fails on wrapped models and passes on plain ones. It is refused if a method that acts
says in words why it cannot use the input of the test. Tests in which no model is wrapped count as passed and are run
once. Numbers in the last column are those of the reasons below the table, with how many tests each explains."""
UNKNOWN = "not known"


@dataclass(frozen=True)
class Summary:
    """What the page says of one file.

    Attributes:
        row: its row in a table with `COLUMNS`.
        reasons: how many tests are lost or refused when methods act, by reason.
        quiet: the first line of the error of each test that is lost where no method acts.
        unfinished: the tests that were not reached within the time limit.
        uncollected: why no test of the file could be run; None if one could.
        versions: of the packages it was run with.
    """

    row: tuple[str, ...]
    reasons: dict[str, int]
    quiet: dict[str, str]
    unfinished: tuple[str, ...]
    uncollected: str | None
    versions: dict[str, str]


def summary(findings: Findings, entries: Sequence[Expected]) -> Summary:
    """Return what the page says of a file that was run in all settings."""
    return Summary(
        row(findings),
        dict(Counter(reason(test, error, entries) or UNKNOWN for test, error in losses([findings], ACTING))),
        {test: error for setting in WRAPPED if setting != ACTING for test, error in losses([findings], setting)},
        tuple(findings.unfinished),
        findings.uncollected,
        versions(),
    )


def page(summaries: Sequence[Summary], unknown: Sequence[str] = ()) -> str:
    """Return the page, in markdown; `unknown` are files that were not run in all settings."""
    used = [", ".join(f"{name} {version}" for name, version in each.versions.items()) for each in summaries]
    methods = [f"- {setting}: {', '.join(map(_as_call, SETTINGS[setting])) or 'no method'}" for setting in WRAPPED]
    whys = dict.fromkeys(why for each in summaries for why in each.reasons)
    numbers = {why: number for number, why in enumerate(whys, 1)}
    rows = [
        (*each.row, ", ".join(f"{numbers[why]} ({count})" for why, count in each.reasons.items())) for each in summaries
    ]
    parts = [HEAD, f"{'; '.join(dict.fromkeys(used))}.", "\n".join(methods), as_table(rows, (*COLUMNS, "reasons"))]
    quiet = [f"- `{test}`: {error}" for each in summaries for test, error in each.quiet.items()]
    broken = [f"- `{each.row[0]}`: {each.uncollected}" for each in summaries if each.uncollected is not None]
    for title, lines in (
        ("Lost to methods that do not act", quiet),
        ("Reasons", [f"{number}. {why}" for why, number in numbers.items()]),
        ("Not collected", broken),
        ("Not reached within the time limit", [f"- `{test}`" for each in summaries for test in each.unfinished]),
        ("Not run in all settings", [f"- `{file}`" for file in unknown]),
    ):
        if lines:
            parts.append("\n".join([f"## {title}", "", *lines]))
    return "\n\n".join(parts) + "\n"


def _as_call(method: Method) -> str:
    """Write the call that makes a method, with the settings that were given."""
    given = ", ".join(f"{name}={value!r}" for name, value in method if name in method.model_fields_set)
    return f"`{type(method).__name__}({given})`"


def write_page(path: Path, findings: Sequence[Findings], entries: Sequence[Expected], files: Sequence[str]) -> None:
    """Write the page, and what it says as JSON beside it, from which later pages take the files that they do not know.

    Args:
        path: of the page.
        findings: files that were run in all settings.
        entries: losses that are expected.
        files: all files of the checkout; those without a row are listed.
    """
    kept = path.with_suffix(".json")
    earlier = [_read(each) for each in json.loads(kept.read_text())] if kept.exists() else []
    known = {each.row[0]: each for each in [*earlier, *(summary(each, entries) for each in findings)]}
    names = {file: file.removeprefix("tests/") for file in files}
    summaries = [known[name] for name in sorted(known) if name in names.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(summaries, [file for file, name in names.items() if name not in known]))
    kept.write_text(json.dumps([asdict(each) for each in summaries], indent=1) + "\n")


def _read(each: dict[str, Any]) -> Summary:
    """Return a summary that was written as JSON."""
    return Summary(**each | {"row": tuple(each["row"]), "unfinished": tuple(each["unfinished"])})
