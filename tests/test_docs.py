"""README.md, CONTRIBUTING.md and docs/ are true: Python blocks run, command lines parse, links lead somewhere."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tokdyn.cli.arguments import split
from tokdyn.cli.main import app
from tokdyn.cli.settings import flags, rows, take_cluster
from typer.main import get_command

from tests.hub import put_in_place_of_the_hub
from tokdyn import recipe
from tokdyn.methods import METHODS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#]+)(?:#[^)]*)?\)")


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language, in order."""
    return [text for found, text in BLOCK.findall(page.read_text()) if found == language]


def commands() -> list[Any]:
    """Return the arguments of every `tokdyn ...` line of the pages and of every example in --help."""
    found = {}
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                found[f"{page.name}: {line}"] = shlex.split(line, comments=True)
    for path, command in leaves(get_command(app), ()):
        for line in getattr(command, "examples", ()):
            found[f"--help of {' '.join(path)}: {line}"] = shlex.split(line)
    return [pytest.param(words[1:], id=name) for name, words in found.items() if words[:1] == ["tokdyn"]]


def leaves(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every command that has no subcommands, with the path that leads to it."""
    for name, child in getattr(command, "commands", {}).items():
        yield from leaves(child, (*path, name))
    if not hasattr(command, "commands"):
        yield path, command


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to")  # torch 2.10, of diffusers' own functions
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_runs_block_by_block(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block whose first line is `# name.py` is that file, which later blocks import; each runs without the others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    if page.name in {"README.md", "pipelines.md"}:
        put_in_place_of_the_hub(monkeypatch)
    files: set[str] = set()
    for number, block in enumerate(blocks(page, "python"), 1):
        named = re.match(r"# (\w+)\.py\n", block)
        if named:
            (tmp_path / f"{named[1]}.py").write_text(block)
            files.add(named[1])
        with registries_as_before(), monkeypatch.context() as patch:
            for name in files:
                patch.delitem(sys.modules, name, raising=False)
            if named:
                importlib.import_module(named[1])
            else:
                where = f"{page.name}, Python block {number}"
                exec(compile(block, where, "exec"), {"__name__": "__main__"})
            for name in files:
                sys.modules.pop(name, None)


@contextmanager
def registries_as_before() -> Iterator[None]:
    """Forget the methods and adapters that a block registers."""
    from tokdyn.adapters import registry

    methods, adapters = dict(METHODS), list(registry.REGISTERED)
    try:
        yield
    finally:
        METHODS.clear()
        METHODS.update(methods)
        registry.REGISTERED[:] = adapters


@pytest.mark.parametrize("words", commands())
def test_command_lines_parse(words: list[str]) -> None:
    """The command exists and takes these options, settings and positional arguments; a recipe takes its overrides."""
    command: Any = get_command(app)
    rest = list(words)
    if rest in (["--help"], ["--version"]):
        return
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    options = {option: parameter for parameter in command.params for option in parameter.opts} | {"--help": None}
    words, rest, dry = rest, [], list(words)
    while words:
        word = words.pop(0)
        if word not in options:
            rest.append(word)
        elif options[word] is not None and not options[word].is_flag:
            words.pop(0)  # the value of the option
    given = split(rest, flags(command.settings()) if command.settings else ())
    given, _ = take_cluster(given, "--dry-run" in dry)
    required = [word for word in command.words if not word.startswith("[")]
    several = any(word.endswith("...") for word in command.words)
    assert len(required) <= len(given.positional) <= (len(given.positional) if several else len(command.words))
    if "RECIPE" in command.words and command.settings:
        if given.positional[0] in recipe.names():
            recipe.load(given.positional[0], given.overrides())
        return
    known = {name for kind in (command.settings, command.of_pipelines) if kind for name, _ in rows(kind())}
    assert set(given.settings) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
