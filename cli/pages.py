"""Lay out the pages of --help: no line is wider than the terminal, and words are never broken."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator

_WIDEST = 100  # columns; longer lines are hard to read
_NARROWEST = 40
_TERM = 24  # columns of the longest term that its meaning stands beside


def width() -> int:
    """Return the number of columns that a line may have, on this terminal; 80 where there is none."""
    return max(_NARROWEST, min(shutil.get_terminal_size().columns, _WIDEST))


def wrapped(text: str, first: str = "", rest: str | None = None) -> list[str]:
    """Break a paragraph into lines, between words only.

    Args:
        text: the paragraph.
        first: put before the first line.
        rest: put before the other lines; None is as many blanks as `first` has characters.
    """
    rest = " " * len(first) if rest is None else rest
    return textwrap.wrap(
        text, width(), initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def paragraphs(text: str, indent: str = "") -> list[str]:
    """Break paragraphs, which blank lines separate, into lines."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        lines += [*([""] if lines else []), *wrapped(" ".join(paragraph.split()), indent)]
    return lines


def definitions(rows: Iterable[tuple[str, str]], indent: str = "  ") -> list[str]:
    """Write terms with their meanings beside them, or below a term that is long."""
    body = list(rows)
    column = max((len(term) for term, _ in body if len(term) <= _TERM), default=0)
    lines: list[str] = []
    for term, meaning in body:
        start = f"{indent}{term:<{column}}  "
        if len(term) > column:
            lines.append(f"{indent}{term}")
            start = " " * (len(indent) + column + 2)
        lines += wrapped(meaning, start, " " * (len(indent) + column + 2)) or [start.rstrip()]
    return lines


def command_line(command: str, indent: str = "  ") -> list[str]:
    """Write a shell command, continued with a backslash where it is longer than a line."""
    if len(indent) + len(command) <= width():
        return [indent + command]
    lines = [indent]
    for word in _words(command):
        blank = "" if lines[-1].isspace() else " "
        if len(lines[-1]) + len(blank) + len(word) + 2 > width() and blank:
            lines[-1] += " \\"
            lines.append(f"{indent}    {word}")
        else:
            lines[-1] += blank + word
    return lines


def _words(command: str) -> Iterator[str]:
    """Yield the words of a shell command as they are written; quoted text, and an option with its value, stay whole."""
    words = [match[0] for match in re.finditer(r"""(?:"[^"]*"|'[^']*'|\S)+""", command)]
    while words:
        word = words.pop(0)
        if word.startswith("--") and words and not words[0].startswith("-") and "=" not in words[0].partition("{")[0]:
            word = f"{word} {words.pop(0)}"
        yield word


def section(title: str, lines: Iterable[str]) -> list[str]:
    """Return a title and its lines, after a blank line; nothing without lines."""
    body = list(lines)
    return ["", f"{title}:", *body] if body else []
