"""Split the arguments of a command into positional words and `key=value` settings.

A setting can be written `key=value`, `--key=value` or `--key value`. Dashes in a key become underscores, and dots lead
into sections (`optimizer.lr=1e-4`). A flag, the key of a boolean, needs no value: `--maps` is `maps=true`, and
`--no-maps` is `maps=false`. If a key is repeated, the last value counts, so that settings can be overridden by
appending others.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from tokdyn.errors import RecipeError

_KEY = r"[A-Za-z_][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+)*"
_PAIR = re.compile(rf"({_KEY})=(.*)", re.DOTALL)
_OPTION = re.compile(rf"--({_KEY})(?:=(.*))?", re.DOTALL)
_BOOLEANS = frozenset({"true", "false", "yes", "no", "on", "off"})


@dataclass(frozen=True)
class Words:
    """The words after the name of a command.

    Attributes:
        positional: words that are not settings, in order.
        settings: text of each setting by key.
    """

    positional: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)

    def take(self, required: Sequence[str] = (), optional: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the positional words, one for each name; "" for optional ones that are missing.

        Args:
            required: names of words that must be there, for error messages.
            optional: names of words that may follow them.

        Raises:
            RecipeError: a required word is missing, or there are too many words.
        """
        names = [*required, *optional]
        if len(self.positional) > len(names):
            after = f"after {' '.join(names)}, " if names else ""
            raise RecipeError(
                f"'{self.positional[len(names)]}' is one word too many: {after}settings are written key=value."
            )
        if len(self.positional) < len(required):
            raise RecipeError(f"{required[len(self.positional)]} is missing; see the examples of --help.")
        return (*self.positional, *[""] * (len(names) - len(self.positional)))

    def no_settings(self) -> Words:
        """Return these words; raise a RecipeError if there are settings, for a command that has none."""
        if self.settings:
            raise RecipeError(f"{self.overrides()[0]} has no effect, because this command has no settings; remove it.")
        return self

    def overrides(self) -> list[str]:
        """Return the settings as `key=value` strings, in the order in which they were given."""
        return [f"{key}={value}" for key, value in self.settings.items()]


def split(args: Sequence[str], flags: Collection[str] = ()) -> Words:
    """Split the words of a command line into positional words and settings.

    Args:
        args: the words, without the name of the command.
        flags: keys of booleans, which need no value.

    Raises:
        RecipeError: a setting has no value, or a word is neither a setting nor positional.
    """
    positional: list[str] = []
    settings: dict[str, str] = {}

    def put(key: str, value: str) -> None:
        settings.pop(key, None)  # a repeated key moves to its last place
        settings[key] = value

    rest = list(args)
    while rest:
        word = rest.pop(0)
        if pair := _PAIR.fullmatch(word):
            put(_name(pair[1]), pair[2])
        elif option := _OPTION.fullmatch(word):
            key, value = _name(option[1]), option[2]
            negated = key.removeprefix("no_")
            if value is not None:
                put(key, value)
            elif key in flags:
                put(key, rest.pop(0) if rest and rest[0].lower() in _BOOLEANS else "true")
            elif key != negated and negated in flags:
                put(negated, "false")
            elif rest and not rest[0].startswith("--"):
                put(key, rest.pop(0))
            else:
                raise RecipeError(f"{word} needs a value; write {key}=VALUE or {word} VALUE.")
        elif word.startswith("-") and word != "-":
            raise RecipeError(f"{word} is not an option; write settings as key=value or --key value.")
        else:
            positional.append(word)
    return Words(tuple(positional), settings)


def _name(key: str) -> str:
    """Return a key with underscores in place of dashes."""
    return key.replace("-", "_")
