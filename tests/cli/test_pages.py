"""--help fits a screen, words are never broken, and every command says what to try next."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from tokdyn.cli import pages
from tokdyn.cli.main import app
from tokdyn.cli.settings import rows
from typer.main import get_command
from typer.testing import CliRunner

LINES, COLUMNS = 40, 80
"""What the help of a command may take of a screen."""


def run(*words: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def leaves(command: Any = None, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """All commands and groups, with the words that lead to them."""
    command = get_command(app) if command is None else command
    inner = [leaf for name, child in getattr(command, "commands", {}).items() for leaf in leaves(child, (*path, name))]
    return [(path, command), *inner]


PATHS = [path for path, _ in leaves()]


@pytest.fixture(autouse=True)
def _screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_help_fits_a_screen(path: tuple[str, ...]) -> None:
    lines = run(*path, "--help").stdout.splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_no_word_is_broken(path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of a narrow page are those of a wide one."""
    option = "--help-all" if hasattr(dict(leaves())[path], "settings") else "--help"
    narrow = run(*path, option).stdout
    assert max(map(len, narrow.splitlines())) <= COLUMNS
    monkeypatch.setattr(pages, "width", lambda: 10_000)
    wide = run(*path, option).stdout
    assert narrow.replace(" \\\n", " ").split() == wide.split()


@pytest.mark.parametrize(
    "path", [path for path, command in leaves() if getattr(command, "settings", None)], ids=" ".join
)
def test_all_settings_are_behind_help_all(path: tuple[str, ...]) -> None:
    command = dict(leaves())[path]
    whole = run(*path, "--help-all").stdout
    for kind in filter(None, (command.settings, command.of_pipelines)):
        assert [key for key, _ in rows(kind()) if not re.search(rf"^  {re.escape(key)}\b", whole, re.MULTILINE)] == []
    assert all(shlex.split(example)[-1] in whole.replace(" \\\n", " ") for example in command.examples)


def test_continued_commands_are_the_same_command() -> None:
    command = 'tokdyn bench speed runs/a --stack "{name: a long name, methods: [{method: TokenMerge}]}" ' * 2
    lines = pages.command_line(command)
    assert len(lines) > 1
    assert shlex.split("\n".join(lines).replace(" \\\n", " ")) == shlex.split(command)


def test_tokdyn_alone_shows_three_commands_that_exist() -> None:
    shown = run().stdout
    found = re.findall(r"^  tokdyn (\w+)", shown, re.MULTILINE)
    assert len(found) == 3
    assert {(name,) for name in found} <= set(PATHS)


def test_completion_knows_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TOKDYN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "tokdyn sa")
    monkeypatch.setenv("COMP_CWORD", "1")
    result = CliRunner().invoke(app, [], prog_name="tokdyn")
    assert result.stdout.split() == ["sample"]
    monkeypatch.delenv("_TOKDYN_COMPLETE")
    assert "--install-completion" in run("--help").stdout


def exists(command: str) -> bool:
    """Whether the words of a command line lead to a command."""
    words = shlex.split(command)
    return words[0] == "tokdyn" and ((words[1],) in PATHS or tuple(words[1:3]) in PATHS)


@pytest.mark.parametrize(
    "words",
    [
        ["recipes", "ls"],
        ["recipes", "show", "demo"],
        ["recipes", "check", "demo"],
        ["methods", "merge"],
        ["presets", "flux"],
        ["bench", "flops", "DiT-S/8", "count=false"],
    ],
    ids=" ".join,
)
def test_commands_end_with_the_next_one(words: list[str]) -> None:
    shown = run(*words)
    (line,) = [line for line in shown.stderr.splitlines() if line.startswith("Next: ")]
    assert shown.stderr.splitlines()[-1] == line
    assert exists(line.removeprefix("Next: "))
    assert "Next:" not in shown.stdout
    if words[:2] != ["recipes", "show"] and words[:2] != ["recipes", "check"]:
        quiet = run(*words, "--json")
        json.loads(quiet.stdout)
        assert quiet.stderr == ""


def test_the_commands_that_are_proposed_run(tmp_path: Path) -> None:
    copied = tmp_path / "mine.yaml"
    line = run("recipes", "copy", "demo", copied).stderr.strip().removeprefix("Next: ")
    assert shlex.split(line)[1:3] == ["train", str(copied)]
    again = run(*shlex.split(line)[1:]).stderr.strip().splitlines()[-1].removeprefix("Next: ")
    assert shlex.split(again) == ["tokdyn", "train", str(copied)]  # without --dry-run
