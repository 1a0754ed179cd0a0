"""Read and write preset files, the shipped ones and the user's."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tokdyn.errors import InputError, TokdynError
from tokdyn.files import replacing, shipped_recipes, user_path
from tokdyn.limits import YAML_BYTES
from tokdyn.presets.schema import Entry, Family
from tokdyn.reading import one_line, read_text


@cache
def families() -> tuple[Family, ...]:
    """Return the shipped presets, in the order of their files' names."""
    return tuple(read(path) for path in sorted((shipped_recipes() / "presets").glob("*.yaml")))


def entries() -> list[tuple[Family, Entry]]:
    """Return the models of the shipped presets, each with its family."""
    return [(family, entry) for family in families() for entry in family.models]


def read(path: str | Path) -> Family:
    """Read a preset file.

    Raises:
        InputError: it cannot be read, is not YAML, or holds something else; the message names the first mistake.
    """
    import yaml

    from tokdyn.yaml_loading import load_yaml

    where = user_path(path)
    try:
        content: Any = load_yaml(read_text(where, YAML_BYTES))
        return Family.model_validate(content)
    except yaml.YAMLError as error:
        raise InputError(f"the preset file {where} is no YAML: {one_line(error)}.") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the top"
        reason = first["msg"].removeprefix("Value error, ").removesuffix(".")
        raise InputError(f"{where} is no preset file: at {place}, {reason[0].lower()}{reason[1:]}.") from error
    except TokdynError as error:
        raise InputError(f"{where} is no preset file: {error}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"the preset file {where} cannot be read: {one_line(error)}.") from error


def write(family: Family, path: Path) -> Path:
    """Write a preset file, with lists of numbers on a line."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes lists of plain values in one line, and never an alias."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def lists(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.Node:
        plain = not any(isinstance(each, (dict, list)) for each in data)
        return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=plain)

    Dumper.add_representer(list, lists)
    content = family.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    with replacing(path) as temporary:
        temporary.write_text(yaml.dump(content, Dumper=Dumper, sort_keys=False, width=120), encoding="utf-8")
    return path
