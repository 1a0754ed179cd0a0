"""`tokdyn doctor` tells what works here, and exits with 1 if something that is needed does not."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokdyn.cli.main import app
from typer.testing import CliRunner

from tokdyn import doctor
from tokdyn.doctor import examine


def run(*words: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["doctor", *words])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def healthy() -> list[doctor.Finding]:
    return examine()


def test_a_working_machine_passes(healthy: list[doctor.Finding]) -> None:
    assert [each for each in healthy if each.broken] == []
    found = {each.name: each for each in healthy}
    assert found["torch"].value == importlib.metadata.version("torch")
    assert found["sdpa on cpu"].works
    assert "math" in found["sdpa on cpu"].value
    assert found["self-test"].works
    assert any(each.section == "devices" and each.name == "cpu" for each in healthy)
    assert {each.name for each in healthy if each.section == "optional"} == set(doctor.OPTIONAL)


def test_json_and_text_hold_the_same(healthy: list[doctor.Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: healthy)
    content = json.loads(run("--json").stdout)
    assert content["works"]
    assert [each["name"] for each in content["findings"]] == [each.name for each in healthy]
    shown = run().stdout
    assert all(each.name in shown for each in healthy)


def test_what_is_missing_or_too_old_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["torch>=2.10", "no-such-package>=1", "numpy>=999", "peft>=1; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needed)
    broken = {each.name: each for each in examine() if each.broken}
    assert set(broken) == {"no-such-package", "numpy"}
    assert broken["numpy"].value.startswith(importlib.metadata.version("numpy"))
    assert all(name in each.advice for name, each in broken.items())
    result = run(code=1)
    assert "no-such-package>=1" in result.stdout
    assert "Next" not in result.stderr
    assert not json.loads(run("--json", code=1).stdout)["works"]


def test_a_full_disk_is_no_failure_and_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2**20})())
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [f"torch=={torch.__version__}"])
    monkeypatch.setenv("TOKDYN_CACHE", str(tmp_path))
    full = [each for each in examine() if each.section == "files" and each.works is False]
    assert {"this folder", "cache of tokdyn"} <= {each.name for each in full}
    assert all(each.advice and not each.broken for each in full)
