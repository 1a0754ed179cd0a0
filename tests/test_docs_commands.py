"""Shell blocks of README.md, CONTRIBUTING.md and docs/ run: each by itself, in a folder with only what it reads."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.stand_ins import StandIns, quick, run
from tests.test_docs import PAGES, ROOT, blocks

ELSEWHERE = {
    "make": "sets up an environment and takes minutes to hours",
    "bash": "runs all of CI, this test included",
    "pip": "installs from a package index",
    "python": "measures for minutes to hours, on trained models; tests/bench tries the functions",
    "tokdyn playground": "serves a page until it is stopped; tests/playground opens it in a browser",
    "tokdyn convert SiT-XL/2": "reads 2.7 GB of weights from the net",
    "tokdyn upcycle --base DiT-XL/2": "reads 2.7 GB of weights from the net",
}
"""The lines that do not run here, by their first words, each with the reason. They are parsed."""
DEFAULT = {("README.md", 2), ("bases.md", 1), ("data.md", 1), ("evaluation.md", 1)}
"""The blocks that run by default; the others run with the slow tests."""
STACKS = "- {name: plain}\n- {name: merged, methods: [{method: TokenMerge, ratio: 0.3}]}\n"


def lines(block: str) -> list[list[str]]:
    """Return the words of every command of a block."""
    found = (shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines())
    return [words for words in found if words]


def elsewhere(words: list[str]) -> bool:
    """Whether a command is one that does not run here."""
    return any(words[: len(first.split())] == first.split() for first in ELSEWHERE)


BLOCKS = [
    pytest.param(
        page, number, id=f"{page.name} {number}",
        marks=() if (page.name, number) in DEFAULT else pytest.mark.slow,
    )
    for page in PAGES
    for number, block in enumerate(blocks(page, "bash"), 1)
    if not all(map(elsewhere, lines(block)))
]  # fmt: skip
OTHERS = {
    " ".join(words): words
    for page in PAGES
    for block in blocks(page, "bash")
    for words in lines(block)
    if elsewhere(words) and words[0] != "tokdyn"
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("page", "number"), BLOCKS)
def test_commands_run_block_by_block(
    page: Path, number: int, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = blocks(page, "yaml")
    stand_ins = StandIns(pipeline, own[0] if own and "methods" in own[0] else STACKS)
    for words in lines(blocks(page, "bash")[number - 1]):
        if not elsewhere(words):
            assert words[0] == "tokdyn", f"{words[0]} is no command that runs here: add it to ELSEWHERE"
            stand_ins.put(words[1:])
            run(*quick(words[1:]))


def test_the_list_of_what_does_not_run_has_no_more_than_is_needed() -> None:
    every = [words for page in PAGES for block in blocks(page, "bash") for words in lines(block)]
    assert all(any(words[: len(first.split())] == first.split() for words in every) for first in ELSEWHERE)


class Parsed(Exception):
    """The arguments were taken."""


@pytest.mark.parametrize("line", OTHERS)
def test_other_programs_take_their_arguments(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = OTHERS[line]
    {"make": of_make, "bash": of_bash, "pip": of_pip, "python": of_python}[words[0]](words[1:], monkeypatch)


def of_make(words: list[str], _: pytest.MonkeyPatch) -> None:
    """The target and its variables are those of the Makefile."""
    text = (ROOT / "Makefile").read_text()
    for word in words:
        name, given, _value = word.partition("=")
        assert re.search(rf"\$\({name}\)" if given else rf"^{name}:", text, re.MULTILINE), word


def of_bash(words: list[str], _: pytest.MonkeyPatch) -> None:
    assert (ROOT / words[0]).is_file()


def of_pip(words: list[str], _: pytest.MonkeyPatch) -> None:
    """The extra exists."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (extras,) = re.findall(r"\[([\w,]+)\]", words[-1])
    assert set(extras.split(",")) <= set(known)


def of_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The file exists, or the module takes the options; it stops when they are parsed."""
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file()
        return
    module = importlib.import_module(words[1])
    parse = argparse.ArgumentParser.parse_known_args

    def known(parser: argparse.ArgumentParser, *given: Any) -> NoReturn:
        parse(parser, *given)
        raise Parsed

    def all_known(parser: argparse.ArgumentParser, *given: Any) -> NoReturn:
        _, rest = parse(parser, *given)
        assert not rest
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", all_known)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", known)
    monkeypatch.setattr(sys, "argv", words[1:])
    main: Callable[[], object] = module.main
    with pytest.raises(Parsed):
        main()
