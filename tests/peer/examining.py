"""Find the tests of one file that are lost when models are wrapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from running import Job, Results, Task
from wrapping import SETTINGS, versions

ROOT = Path(__file__).parents[2]
STORE = ROOT / "runs" / "peer"
ROUNDS = 6
"""How often tests go on after one that ended the process."""


@dataclass
class Loss:
    """What a setting costs in one file.

    Attributes:
        made_of: digest of the code that the result depends on.
        lost: the first line of the error of each test that passes plain and fails in the setting, twice.
        unsteady: tests that do not fail, or do not pass plain, when they are tried again.
        wrapped: the classes that were wrapped, with the methods that fit them.
        unwrapped: classes whose structure could not be inferred, so that they were not wrapped.
    """

    made_of: str
    lost: dict[str, str] = field(default_factory=dict)
    unsteady: list[str] = field(default_factory=list)
    wrapped: dict[str, list[str]] = field(default_factory=dict)
    unwrapped: list[str] = field(default_factory=list)


@dataclass
class Findings:
    """What is known of one file.

    Attributes:
        file: relative to the checkout.
        made_of: digest of what the plain results depend on.
        passed: the tests that pass plain.
        failed: number of tests that fail plain.
        losses: by setting.
    """

    file: str
    made_of: str = ""
    passed: list[str] = field(default_factory=list)
    failed: int = 0
    losses: dict[str, Loss] = field(default_factory=dict)


def stored(file: str) -> Path:
    """Return the path at which the findings of a file are kept."""
    return STORE / (file.removeprefix("tests/").removesuffix(".py").replace("/", ".") + ".json")


def recall(file: str) -> Findings:
    """Return what is known of a file so far."""
    path = stored(file)
    if not path.exists():
        return Findings(file)
    known = json.loads(path.read_text())
    return Findings(**known | {"losses": {name: Loss(**loss) for name, loss in known["losses"].items()}})


def _keep(findings: Findings) -> None:
    path = stored(findings.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(asdict(findings), indent=1))
    path.with_suffix(".part").replace(path)


def digests(checkout: Path, file: str) -> tuple[str, str]:
    """Hash what plain results depend on, and what those of wrapped models depend on."""
    found = hashlib.sha256((checkout / file).read_bytes())
    found.update(json.dumps(versions(), sort_keys=True).encode())
    plain = found.hexdigest()[:16]
    for path in [*sorted((ROOT / "tokdyn").rglob("*.py")), Path(__file__).with_name("wrapping.py")]:
        found.update(path.read_bytes())
    return plain, found.hexdigest()[:16]


def examine(checkout: Path, file: str, limit: float, keep: bool, say: Callable[[Findings], None]) -> Task[Findings]:
    """Run a file without wrapping and in every setting; yield the jobs and return what was found.

    Args:
        checkout: folder of diffusers.
        file: relative to it.
        limit: seconds for a plain run; wrapped runs get twice as many and a minute.
        keep: whether results of earlier code are good enough.
        say: called after each setting.
    """
    findings, (plain, wrapped) = recall(file), digests(checkout, file)
    if not findings.made_of or (findings.made_of != plain and not keep):
        results = yield from _complete(checkout, file, "plain", None, (), limit)
        passed = [test for test in results.collected if results.outcomes.get(test) == "passed"]
        findings = Findings(file, plain, passed, list(results.outcomes.values()).count("failed"))
        _keep(findings)
        say(findings)
    for setting in list(SETTINGS)[1:]:
        known = findings.losses.get(setting)
        if known is None or (known.made_of != wrapped and not keep):
            findings.losses[setting] = yield from _compare(checkout, findings, setting, 60 + 2 * limit, wrapped)
            _keep(findings)
            say(findings)
    return findings


def _compare(
    checkout: Path, findings: Findings, setting: str, limit: float, made_of: str
) -> Generator[Job, tuple[Results, str], Loss]:
    """Run the tests that pass plain in a setting, and those that fail a second time in both."""
    file, unwrapped, lost = findings.file, (), list(findings.passed)
    wrapped: dict[str, list[str]] = {}
    while lost:
        again = yield from _complete(checkout, file, setting, tuple(lost), unwrapped, limit)
        wrapped |= again.wrapped
        lost = [test for test in lost if again.outcomes.get(test) != "passed"]
        if not again.inferred - set(unwrapped):
            break
        unwrapped = (*unwrapped, *sorted(again.inferred - set(unwrapped)))
    wrapped = {name: methods for name, methods in wrapped.items() if name not in unwrapped}
    loss = Loss(made_of, wrapped=wrapped, unwrapped=list(unwrapped))
    if lost:
        plain = yield from _complete(checkout, file, "plain", tuple(lost), (), limit)
        again = yield from _complete(checkout, file, setting, tuple(lost), unwrapped, limit)
        for test in lost:
            if plain.outcomes.get(test) == "passed" and (outcome := again.outcomes.get(test)) != "passed":
                loss.lost[test] = again.errors.get(test, outcome or "did not run")
            else:
                loss.unsteady.append(test)
    return loss


def _complete(
    checkout: Path, file: str, setting: str, tests: tuple[str, ...] | None, unwrapped: tuple[str, ...], limit: float
) -> Generator[Job, tuple[Results, str], Results]:
    """Run tests, going on after one that ends the process; plain tests beyond the time limit are left out."""
    log = stored(file).with_suffix("") / f"{setting}.log"
    found = Results()
    for _ in range(ROUNDS):
        results, ending = yield Job(checkout, file, setting, tests, unwrapped, limit, log)
        found.collected = found.collected or results.collected
        found.outcomes |= results.outcomes
        found.errors |= results.errors
        found.wrapped |= results.wrapped
        found.inferred |= results.inferred
        if results.begun is not None:
            found.outcomes[results.begun], found.errors[results.begun] = "failed", ending
        tests = tuple(test for test in found.collected if test not in found.outcomes)
        if not tests or results.begun is None or (setting == "plain" and ending.startswith("ran over")):
            break
    return found
