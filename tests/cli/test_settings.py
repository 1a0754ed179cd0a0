"""Words become settings, and --help explains every setting."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field
from tokdyn.cli.settings import flags, read, rows

from tokdyn.errors import RecipeError


class Inner(BaseModel):
    """A section.

    Attributes:
        rate: Learning rate,
            per step.
        compile: Whether to compile.
    """

    model_config = ConfigDict(extra="forbid")
    rate: float = 1e-4
    compile: bool = False


class Outer(BaseModel):
    """A command's settings.

    Attributes:
        folder: Where from.
        scheduler: Which one (noise: ddpm, ddim): as in diffusers.
    """

    model_config = ConfigDict(extra="forbid")
    folder: Path
    scheduler: Literal["ddpm", "ddim"] = "ddpm"
    maps: bool = False
    interval: tuple[float, float] = (0.0, 1.0)
    limit: Annotated[int, Field(ge=2)] | None = Field(None, description="At most so many.")
    inner: Inner = Inner()


def test_flags_reach_into_sections() -> None:
    assert set(flags(Outer)) == {"maps", "inner.compile"}


def test_rows_name_every_setting() -> None:
    table = dict(rows(Outer))
    assert table == {
        "folder": "Where from. [path, required]",
        "scheduler": "Which one (noise: ddpm, ddim): as in diffusers. [ddpm | ddim, default ddpm]",
        "maps": "[bool, default false]",
        "interval": "[tuple[float, float], default (0.0, 1.0)]",
        "limit": "At most so many. [int or null, default null]",
        "inner.rate": "Learning rate, per step. [float, default 0.0001]",
        "inner.compile": "Whether to compile. [bool, default false]",
    }


class Wider(Outer):
    """A command with more settings.

    Attributes:
        folder: Where to.
        count: How many.
    """

    count: int = 1


def test_settings_of_a_base_class_are_explained_once() -> None:
    table = dict(rows(Wider))
    assert table["folder"].startswith("Where to. ")
    assert table["count"].startswith("How many. ")
    assert table["scheduler"].startswith("Which one ")


def test_read_builds_the_model() -> None:
    args = ["runs/a", "--maps", "inner.rate=3e-4", "--interval", "[0.1, 0.5]", "--scheduler=ddim", "--inner.compile"]
    settings = read(args, Outer, ["folder"])
    assert settings == Outer(
        folder=Path("runs/a"), maps=True, scheduler="ddim", interval=(0.1, 0.5), inner=Inner(rate=3e-4, compile=True)
    )


@pytest.mark.parametrize("path", ["photos #1", "a: b", "2024", "1e3", "true", "[set] b", "{x}", "'it'", "*", "%d"])
def test_paths_are_taken_as_typed(path: str) -> None:
    assert read([path], Outer, ["folder"]).folder == Path(path)
    assert read([f"folder={path}"], Outer, ["folder"]).folder == Path(path)


@pytest.mark.parametrize("word", ["null", "~", ""])
def test_null_is_written_as_in_yaml(word: str) -> None:
    assert read(["x", f"limit={word}"], Outer, ["folder"]).limit is None
    with pytest.raises(RecipeError, match="'folder'"):
        read([f"folder={word}"], Outer, ["folder"])


def test_positional_word_and_key_are_one_setting() -> None:
    assert read(["folder=runs/b"], Outer, ["folder"]).folder == Path("runs/b")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["runs/a", "schduler=ddim"], r"'schduler' .*'scheduler'"),
        (["runs/a", "scheduler=dmd"], r"'scheduler' .*'ddpm' .*'ddim'.* 'dmd'"),
        (["runs/a", "inner.rat=1"], r"'inner.rat' .*'rate'"),
        (["runs/a", "limit=1"], "'limit'.* 2"),
        (["runs/a", "runs/b"], r"'runs/b' .*FOLDER"),
        ([], "'folder'"),
    ],
)
def test_errors_name_the_key_and_what_was_expected(args: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        read(args, Outer, ["folder"])
    assert "\n" not in str(error.value)
