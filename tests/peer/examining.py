"""Find the tests of one file that are lost when models are wrapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from running import OVER, Job, Results, Task
from wrapping import ACTING, SETTINGS, versions

ROOT = Path(__file__).parents[2]
WRAPPED = tuple(SETTINGS)[1:]
ROUNDS = 6
"""How often tests go on after one that ended the process."""


@dataclass
class Loss:
    """What a setting costs in one file.

    Attributes:
        made_of: digest of the code that the result depends on.
        lost: the first line of the error of each test that passes plain and fails in the setting, twice.
        refused: likewise of tests whose inputs a method that acts refuses in words, and that pass when only methods act
            which keep all tokens.
        unsteady: tests that fail in the setting, but not when they are tried again.
        wrapped: the classes that were wrapped, with the methods that fit them.
        unwrapped: classes that were not wrapped, because their structure could not be inferred or wrapping is refused.
    """

    made_of: str
    lost: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    unsteady: list[str] = field(default_factory=list)
    wrapped: dict[str, list[str]] = field(default_factory=dict)
    unwrapped: list[str] = field(default_factory=list)


@dataclass
class Findings:
    """What is known of one file.

    Attributes:
        file: relative to the checkout.
        made_of: digest of what the plain results depend on.
        passed: the tests that pass, plain or, where that was enough, in the first setting.
        failed: the tests that fail plain.
        unfinished: the tests that were not reached within the time limit.
        touched: the tests in which a model was wrapped. The others are the same in every setting.
        uncollected: why no test of the file could be run; None if one could.
        losses: by setting.
    """

    file: str
    made_of: str = ""
    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    touched: list[str] = field(default_factory=list)
    uncollected: str | None = None
    losses: dict[str, Loss] = field(default_factory=dict)


@dataclass(frozen=True)
class Store:
    """A folder that keeps findings, so that finished files are not run again, and the output of the last runs."""

    folder: Path

    def path(self, file: str) -> Path:
        """Return the path at which the findings of a file are kept."""
        return self.folder / (file.removeprefix("tests/").removesuffix(".py").replace("/", ".") + ".json")

    def log(self, file: str, setting: str) -> Path:
        """Return the path of the output of a run."""
        return self.path(file).with_suffix("") / f"{setting}.log"

    def recall(self, file: str) -> Findings:
        """Return what is known of a file so far."""
        if not self.path(file).exists():
            return Findings(file)
        known = json.loads(self.path(file).read_text())
        return Findings(**known | {"losses": {name: Loss(**loss) for name, loss in known["losses"].items()}})

    def keep(self, findings: Findings) -> None:
        """Write what is known of a file."""
        path = self.path(findings.file)
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


@dataclass(frozen=True)
class Examination:
    """Runs the tests of one file in every setting, and those that fail there without wrapping.

    A test is lost if it fails in a setting and passes plain, so one that passes in the setting need not run plain. Nor
    need a test run in the other settings in which the first one, which fits most models, wrapped nothing.

    Attributes:
        checkout: folder of diffusers.
        file: relative to it.
        store: keeps findings.
        limit: seconds for a plain run; wrapped runs get twice as many and a minute.
        keep: whether results of earlier code are good enough.
        say: called after each setting.
    """

    checkout: Path
    file: str
    store: Store
    limit: float
    keep: bool
    say: Callable[[Findings], None]

    def run(self) -> Task[Findings]:
        """Yield the jobs that are left to do, and return what was found."""
        findings, (plain, wrapped) = self.store.recall(self.file), digests(self.checkout, self.file)
        if findings.made_of != plain and not (findings.made_of and self.keep):
            findings = Findings(self.file, plain)
        for setting in WRAPPED:
            known = findings.losses.get(setting)
            if known is None or (known.made_of != wrapped and not self.keep):
                findings.losses[setting] = yield from self._examine(findings, setting, wrapped)
                self.store.keep(findings)
                self.say(findings)
        return findings

    def _examine(self, findings: Findings, setting: str, made_of: str) -> Task[Loss]:
        """Run tests in a setting; run those that fail there plain, and once more in the setting."""
        loss, first = Loss(made_of), setting == WRAPPED[0]
        tests = None if first else tuple(test for test in findings.touched if test not in findings.failed)
        while tests != ():
            results = yield from self._complete(setting, tests, loss.unwrapped)
            if tests is None:
                findings.uncollected = results.uncollected
                findings.passed, findings.touched, findings.unfinished = [], [], []
            if first:
                findings.passed += [test for test, outcome in results.outcomes.items() if outcome == "passed"]
                findings.touched += [test for test in sorted(results.touched) if test not in findings.touched]
            loss.wrapped |= results.wrapped
            loss.unwrapped += sorted(results.refused - set(loss.unwrapped))
            tests = tuple(
                test
                for test in results.collected
                if results.outcomes.get(test) not in ("passed", "skipped") and test not in findings.failed
            )
            unwrapped = sorted(results.inferred - set(loss.unwrapped))
            if not unwrapped:
                break
            loss.unwrapped += unwrapped
        loss.unwrapped.sort()
        for name in loss.unwrapped:
            loss.wrapped.pop(name, None)
        if tests:
            yield from self._compare(findings, setting, loss, tests)
        words = [test for test, error in loss.lost.items() if error.startswith("tokdyn.errors.")]
        if words and setting == ACTING:
            again = yield from self._complete(setting, tuple(words), loss.unwrapped, whole=True)
            for test in words:
                if again.outcomes.get(test) == "passed":
                    loss.refused[test] = loss.lost.pop(test)
                else:
                    loss.lost[test] = again.errors.get(test, loss.lost[test])
        return loss

    def _compare(self, findings: Findings, setting: str, loss: Loss, tests: tuple[str, ...]) -> Task[None]:
        """Run tests that failed in a setting plain, and those that pass there once more in the setting."""
        plain = yield from self._complete("plain", tests)
        passed = tuple(test for test in tests if plain.outcomes.get(test) == "passed")
        findings.passed += [test for test in passed if test not in findings.passed]
        findings.failed += [test for test in tests if plain.outcomes.get(test) == "failed"]
        findings.unfinished += [test for test in tests if test not in plain.outcomes]
        if passed:
            again = yield from self._complete(setting, passed, loss.unwrapped)
            for test in passed:
                if again.outcomes.get(test) == "passed":
                    loss.unsteady.append(test)
                else:
                    loss.lost[test] = again.errors.get(test, again.outcomes.get(test, "did not run"))

    def _complete(
        self, setting: str, tests: tuple[str, ...] | None, unwrapped: Sequence[str] = (), whole: bool = False
    ) -> Task[Results]:
        """Run tests, going on after one that ends the process, and beyond the time limit if the tests are given."""
        limit = self.limit if setting == "plain" else 60 + 2 * self.limit
        log = self.store.log(self.file, setting)
        found, once = Results(), setting == "plain" or tests is None
        for _ in range(ROUNDS):
            results, ending = yield Job(self.checkout, self.file, setting, tests, tuple(unwrapped), whole, limit, log)
            found.collected = found.collected or results.collected
            found.uncollected = results.uncollected
            found.outcomes |= results.outcomes
            found.errors |= results.errors
            found.wrapped |= results.wrapped
            found.inferred |= results.inferred
            found.refused |= results.refused
            found.touched |= results.touched
            if results.begun is not None:
                found.outcomes[results.begun], found.errors[results.begun] = "failed", ending
            tests = tuple(test for test in found.collected if test not in found.outcomes)
            if not tests or results.begun is None or (once and ending == OVER):
                break
        return found
