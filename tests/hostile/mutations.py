"""Strategies of hypothesis that spoil files: recipes setting by setting, and all others byte by byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from hypothesis import strategies as st

TOKENS = (
    b"0", b"-1", b"9" * 30, b"1e999", b"nan", b".inf", b"null", b"true", b"\0", b"\xff\xff\xff\xff", b"\0\0\0\x80",
    b"[", b"]",
    b"{", b"}", b"[" * 2000, b"&a ", b"*a", b"!!int ", b"!!python/name:os.system ", b"? ", b": ", b"- ", b"\n", b"\t",
    b"'", b'"', b"../",
    b"~", b"%", b"\x1b[2J", b"\xc3\x28", b"PK\x03\x04", b"cos\nsystem\n", b"R.", b"\x80\x02",
)  # fmt: skip
"""What is written into files."""
NONSENSE: dict[type, tuple[Any, ...]] = {
    int: (float("nan"), float("inf"), -float("inf"), True, False, "12", "abc", "", [1, [2]], {"a": 1}, 1e30, -1e30,
        0.5, 10**60, -7, 10**13),
    float: (float("nan"), float("inf"), -float("inf"), True, False, "0.1", "abc", "", [[0.1]], {"a": 1}, 1e300, -1e300,
        1e13),
    bool: ("maybe", 2, 0.5, [True], {"a": True}, float("nan"), ""),
    str: (3.5, True, ["a"], {"a": "b"}, "a\0b", "\ud800"),
    list: (3, True, "abc", {"a": 1}, [[[1]]], float("nan")),
    type(None): ([1, [2]], {"a": [1]}, "a\0b", ["\ud800"]),
}  # fmt: skip
"""Values that no setting of the type takes, by the type that the setting has."""
TAKEN = {("size", "12"), ("seed", -7), ("seed", 10**13), ("memory_limit", 10**13)}
"""Values of NONSENSE that settings of these names take."""


def values(path: Sequence[Any], value: Any) -> list[Any]:
    """List the values that a setting does not take, given its keys and what it is."""
    return [
        bad
        for bad in NONSENSE[type(value)]
        if not any((path[-1], type(bad), bad) == (name, type(each), each) for name, each in TAKEN)
    ]


def leaves(settings: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """List the values in nested settings, each with the keys and places that lead to it."""
    if isinstance(settings, dict) and settings:
        return [leaf for key, value in settings.items() for leaf in leaves(value, (*path, key))]
    if isinstance(settings, list) and settings:
        return [leaf for place, value in enumerate(settings) for leaf in leaves(value, (*path, place))]
    return [(path, settings)]


def replaced(settings: Any, path: Sequence[Any], value: Any) -> Any:
    """Return nested settings with another value at a path."""
    if not path:
        return value
    if isinstance(settings, dict):
        return {**settings, path[0]: replaced(settings[path[0]], path[1:], value)}
    return [*settings[: path[0]], replaced(settings[path[0]], path[1:], value), *settings[path[0] + 1 :]]


def renamed(settings: Any, path: Sequence[Any], name: str) -> Any:
    """Return nested settings in which the last key of a path has another name."""
    if len(path) == 1:
        return {name if key == path[0] else key: value for key, value in settings.items()}
    return replaced(settings, path[:1], renamed(settings[path[0]], path[1:], name))


@st.composite
def nonsense(draw: st.DrawFn, recipes: Sequence[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Draw a recipe with a setting that cannot be meant, and say what was done to it."""
    settings = draw(st.sampled_from(recipes))
    known = [(path, value) for path, value in leaves(settings) if type(value) in NONSENSE]
    path, value = draw(st.sampled_from(known))
    where = ".".join(map(str, path))
    if isinstance(path[-1], str) and draw(st.integers(0, 4)) == 0:
        name = draw(st.sampled_from([f"{path[-1]}x", path[-1][1:] or "x", path[-1].upper() + "_", "", "a.b"]))
        return f"{where} renamed {name!r}", renamed(settings, path, name)
    bad = draw(st.sampled_from(values(path, value)))
    return f"{where}={bad!r}", replaced(settings, path, bad)


def written(settings: dict[str, Any]) -> bytes:
    """Return settings as YAML that this project's reader reads with the same types."""
    from tokdyn.recipe import yaml_text

    return yaml_text.dump(settings).encode("utf-8", "surrogatepass")


places = st.floats(0.0, 1.0, exclude_max=True)


@st.composite
def spoiled(draw: st.DrawFn, files: Sequence[bytes]) -> bytes:
    """Draw a file with bytes changed, removed, repeated, or replaced by tokens or by parts of other files."""
    content = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, 6))):
        at = int(draw(places) * (len(content) + 1))
        length = draw(st.integers(0, 40))
        match draw(st.integers(0, 6)):
            case 0 if at < len(content):
                content[at] ^= 1 << draw(st.integers(0, 7))
            case 1:
                del content[at : at + length]
            case 2:
                content[at:at] = content[at : at + length] * draw(st.integers(1, 8))
            case 3:
                content[at:at] = draw(st.sampled_from(TOKENS))
            case 4:
                token = draw(st.sampled_from(TOKENS))
                content[at : at + len(token)] = token
            case 5:
                other = draw(st.sampled_from(files))
                start = int(draw(places) * len(other))
                content[at:at] = other[start : start + 4 * length]
            case _:
                content[at : at + length] = draw(st.binary(max_size=40))
    return bytes(content[: 2**20])


def parsed(text: str) -> dict[str, Any]:
    """Return a dumped recipe as nested settings."""
    settings: dict[str, Any] = yaml.safe_load(text)
    return settings
