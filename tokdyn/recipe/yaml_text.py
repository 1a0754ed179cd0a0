"""Parse and write YAML in which `1e-4` is a float and `no` is a string. Errors name the line and the column."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from tokdyn.errors import RecipeError
from tokdyn.limits import YAML_BYTES
from tokdyn.reading import one_line
from tokdyn.yaml_loading import LimitedLoader

_REPLACED = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp"))
_KNOWN = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "null", "str", "seq", "map"))


class _Loader(LimitedLoader):
    """Reads safe YAML in which `1e-4` is a number, and `on`, `no`, `010`, `1:30` and `2026-01-01` are strings."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the class attribute is how PyYAML is configured
        first: [(tag, pattern) for tag, pattern in rules if tag not in _REPLACED]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012 - sets, dates and bytes are no settings
        tag: build for tag, build in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in _KNOWN
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping; raise an error if a key is written twice."""
        seen: set[Any] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused below
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key '{one_line(key, 80)}' is written twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), "-+0123456789")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)|[0-9]+\.[0-9]*|\.[0-9]+|\.inf|\.Inf|\.INF)$"
        r"|^\.(?:nan|NaN|NAN)$"
    ),
    "-+.0123456789",
)


class _Dumper(yaml.SafeDumper):
    """Writes safe YAML that `_Loader` reads back with the same types."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _represent_list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.Node:
    """Write a list on one line, unless it holds dicts."""
    flow = not any(isinstance(item, dict) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


def _represent_text(dumper: yaml.SafeDumper, data: str) -> yaml.Node:
    """Escape the line breaks of Unicode, which PyYAML otherwise folds into spaces."""
    style = '"' if re.search("[\x85\u2028\u2029]", data) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_text)


def parse(text: str, source: str) -> Any:
    """Parse YAML text.

    Args:
        text: The YAML text.
        source: What to call the text in error messages: a path, or a setting.

    Raises:
        RecipeError: The text is not valid YAML, or larger or deeper than the limits.
    """
    if excess := YAML_BYTES.excess(len(text)):
        raise RecipeError(f"{source} has {excess}.")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = one_line(error.problem or error.context)
        raise RecipeError(f"{source}{place} is not valid YAML: {reason}.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{source} is not valid YAML: {one_line(error)}.") from error


def parse_value(text: str, source: str) -> Any:
    """Parse the value of one setting on a command line.

    Numbers, booleans, null, lists, mappings and quoted text are read as YAML. Any other text is taken literally: ` #`
    does not start a comment in it, and `: ` does not make a mapping.

    Args:
        text: The value.
        source: What to call the value in error messages.

    Raises:
        RecipeError: A list, mapping or quoted text that is not valid YAML.
    """
    plain = text.strip()
    if plain.startswith(("[", "{", "'", '"')):
        return parse(text, source)
    try:
        value = parse(plain, source)
    except RecipeError:
        return plain
    kept = isinstance(value, int | float) or (value is None and plain.lower() in ("", "null", "~"))
    return value if kept else plain


def dump(data: Any) -> str:
    """Return dicts, lists and scalars as YAML text that `parse` reads back to the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
