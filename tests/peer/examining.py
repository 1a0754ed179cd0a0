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
        unsteady: tests that do not fail, or do not pass plain, when they are tried again.
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
        passed: the tests that pass plain.
        failed: number of tests that fail plain.
        uncollected: why no test of the file could be run; None if one could.
        losses: by setting.
    """

    file: str
    made_of: str = ""
    passed: list[str] = field(default_factory=list)
    failed: int = 0
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
    """Runs the tests of one file without wrapping and in every setting.

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
        if not findings.made_of or (findings.made_of != plain and not self.keep):
            results = yield from self._complete("plain", None)
            passed = [test for test in results.collected if results.outcomes.get(test) == "passed"]
            failed = list(results.outcomes.values()).count("failed")
            findings = Findings(self.file, plain, passed, failed, results.uncollected)
            self._note(findings)
        for setting in list(SETTINGS)[1:]:
            known = findings.losses.get(setting)
            if known is None or (known.made_of != wrapped and not self.keep):
                findings.losses[setting] = yield from self._compare(findings.passed, setting, wrapped)
                self._note(findings)
        return findings

    def _note(self, findings: Findings) -> None:
        self.store.keep(findings)
        self.say(findings)

    def _compare(self, passed: list[str], setting: str, made_of: str) -> Task[Loss]:
        """Run the tests that pass plain in a setting; run those that fail a second time, plain and in the setting."""
        loss, lost, refused = Loss(made_of), tuple(passed), set[str]()
        while lost:
            results = yield from self._complete(setting, lost, loss.unwrapped)
            loss.wrapped |= results.wrapped
            refused |= results.refused
            lost = tuple(test for test in lost if results.outcomes.get(test) != "passed")
            unwrapped = sorted(results.inferred - set(loss.unwrapped))
            if not unwrapped:
                break
            loss.unwrapped += unwrapped
        loss.unwrapped = sorted({*loss.unwrapped, *refused})
        for name in loss.unwrapped:
            loss.wrapped.pop(name, None)
        if lost:
            plain = yield from self._complete("plain", lost)
            again = yield from self._complete(setting, lost, loss.unwrapped)
            for test in lost:
                if plain.outcomes.get(test) == "passed" != again.outcomes.get(test):
                    loss.lost[test] = again.errors.get(test, again.outcomes.get(test, "did not run"))
                else:
                    loss.unsteady.append(test)
        words = [test for test, error in loss.lost.items() if error.startswith("tokdyn.errors.")]
        if words and setting == ACTING:
            again = yield from self._complete(setting, tuple(words), loss.unwrapped, whole=True)
            for test in words:
                if again.outcomes.get(test) == "passed":
                    loss.refused[test] = loss.lost.pop(test)
                else:
                    loss.lost[test] = again.errors.get(test, loss.lost[test])
        return loss

    def _complete(
        self, setting: str, tests: tuple[str, ...] | None, unwrapped: Sequence[str] = (), whole: bool = False
    ) -> Task[Results]:
        """Run tests, going on after one that ends the process; plain tests beyond the time limit are left out."""
        limit = self.limit if setting == "plain" else 60 + 2 * self.limit
        log = self.store.log(self.file, setting)
        found = Results()
        for _ in range(ROUNDS):
            results, ending = yield Job(self.checkout, self.file, setting, tests, tuple(unwrapped), whole, limit, log)
            found.collected = found.collected or results.collected
            found.uncollected = results.uncollected
            found.outcomes |= results.outcomes
            found.errors |= results.errors
            found.wrapped |= results.wrapped
            found.inferred |= results.inferred
            found.refused |= results.refused
            if results.begun is not None:
                found.outcomes[results.begun], found.errors[results.begun] = "failed", ending
            tests = tuple(test for test in found.collected if test not in found.outcomes)
            if not tests or results.begun is None or (setting == "plain" and ending == OVER):
                break
        return found
