"""All spellings of a setting are equal, and no word is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokdyn.cli.arguments import Words, split

from tokdyn.errors import RecipeError

keys = st.from_regex(r"[a-z][a-z_]{0,8}[a-z](\.[a-z]{1,6})?", fullmatch=True).filter(lambda k: not k.startswith("no_"))
values = st.text(max_size=12).filter(lambda v: not v.startswith("-"))
paths = st.from_regex(r"[a-z]{1,6}(/[a-z]{1,6})?(\.yaml)?", fullmatch=True)


@given(key=keys, value=values)
def test_three_spellings_are_equal(key: str, value: str) -> None:
    expected = Words((), {key: value})
    assert split([f"{key}={value}"]) == expected
    assert split([f"--{key}={value}"]) == expected
    assert split([f"--{key}", value]) == expected
    assert split([f"--{key.replace('_', '-')}", value]) == expected


@given(words=st.lists(st.one_of(paths.map(lambda p: (p,)), st.tuples(keys, values)), max_size=8))
def test_nothing_is_lost_and_order_is_kept(words: list[tuple[str, ...]]) -> None:
    found = split(["=".join(word) for word in words])
    assert found.positional == tuple(word[0] for word in words if len(word) == 1)
    assert found.settings == dict(word for word in words if len(word) == 2)


@given(settings=st.dictionaries(keys, values, max_size=5))
def test_overrides_read_back(settings: dict[str, str]) -> None:
    words = Words((), settings)
    assert split(words.overrides()) == words


@pytest.mark.parametrize(
    ("args", "value"),
    [
        (["--maps"], "true"),
        (["--no-maps"], "false"),
        (["--maps", "false"], "false"),
        (["--maps=off"], "off"),
        (["maps=1"], "1"),
    ],
)
def test_flags(args: list[str], value: str) -> None:
    assert split(args, flags={"maps"}) == Words((), {"maps": value})


def test_flag_leaves_the_next_word_alone() -> None:
    assert split(["--maps", "runs/a", "steps=5"], flags={"maps"}) == Words(("runs/a",), {"maps": "true", "steps": "5"})


def test_last_value_counts_and_moves_to_the_end() -> None:
    assert split(["a=1", "b=2", "--a", "3"]).overrides() == ["b=2", "a=3"]


def test_negative_numbers_are_values() -> None:
    assert split(["--seed", "-1", "shift=-0.5"]).settings == {"seed": "-1", "shift": "-0.5"}


def test_paths_with_an_equals_sign_are_paths() -> None:
    assert split(["runs/lr=3/model", "./a=b"]) == Words(("runs/lr=3/model", "./a=b"), {})


@pytest.mark.parametrize("args", [["--steps"], ["--steps", "--seed", "3"]])
def test_missing_values_are_refused(args: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"--steps .*steps=VALUE"):
        split(args)


def test_short_options_are_refused() -> None:
    with pytest.raises(RecipeError, match="-n"):
        split(["-n", "3"])


def test_take_fills_places() -> None:
    assert split(["a"]).take(["RECIPE"], ["TO"]) == ("a", "")
    assert split(["a", "b"]).take(["RECIPE"], ["TO"]) == ("a", "b")


def test_take_names_missing_and_superfluous_words() -> None:
    with pytest.raises(RecipeError, match="RECIPE"):
        split([]).take(["RECIPE"])
    with pytest.raises(RecipeError, match=r"'b' .*RECIPE.* key=value"):
        split(["a", "b"]).take(["RECIPE"])
    with pytest.raises(RecipeError, match=r"'b' .* key=value"):
        split(["b"]).take()


def test_settings_of_commands_without_settings_are_refused() -> None:
    with pytest.raises(RecipeError, match="steps=3"):
        split(["steps=3"]).no_settings()
