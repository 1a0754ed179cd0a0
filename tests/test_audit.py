"""`make audit` lists what is vulnerable, and says in its last line what was audited and what was not."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "audit"
REPORT = {
    "dependencies": [
        {
            "name": "pyyaml",
            "version": "5.3",
            "vulns": [{"id": "CVE-2020-1747", "fix_versions": ["5.3.1"], "aliases": ["PYSEC-2020-96"]}],
        },
        {"name": "idna", "version": "3.20", "vulns": []},
        {"name": "own", "skip_reason": "Dependency not found on PyPI and could not be audited: own (1.0)"},
    ]
}
"""As pip-audit 2.10 writes it."""


def test_vulnerabilities_and_packages_that_nobody_knows_are_told_apart() -> None:
    script = runpy.run_path(str(SCRIPT))
    found, skipped = script["listed"](REPORT)
    assert skipped == ["own"]
    assert len(found) == 1
    for word in ("pyyaml 5.3", "CVE-2020-1747", "PYSEC-2020-96", "5.3.1"):
        assert word in found[0]
    said = script["summary"](3, found, skipped, "why")
    assert "2 of 3" in said
    assert "own (why)" in said
    assert "Nothing was audited" in script["summary"](1, [], ["own"], "why")
    assert "why" not in script["summary"](2, [], [], "why")


def test_versions_are_those_that_advisories_know() -> None:
    lines = 'Typing_Extensions\t4.1\t\ntorch\t2.10.0+cpu\t\ntokdyn\t0.1\t{"dir_info": {"editable": true}}\n'
    assert runpy.run_path(str(SCRIPT))["packages"](lines) == {"typing-extensions": "4.1", "torch": "2.10.0"}


@pytest.mark.parametrize("missing", [{"PIP_NO_INDEX": "1"}, {"AUDIT_SECONDS": "0.001"}])
def test_without_a_network_one_sentence_says_so(missing: dict[str, str], tmp_path: Path) -> None:
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), sys.executable, str(tmp_path / "own")],
        env={**quiet, "PIP_CONFIG_FILE": os.devnull, **missing},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Nothing was audited" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert not done.stderr
