"""The logs of a resumed run have neither a gap nor a row twice, whatever happened to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from tokdyn.recipe import Recipe
from tokdyn.train import checkpoints, metrics, train

Tiny = Callable[..., Recipe]
SETTINGS = ("training.steps=6", "training.checkpoint_every=4", "training.keep_checkpoints=9")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Path:
    folder = tmp_path_factory.mktemp("logs") / "run"
    train(tiny(folder, *SETTINGS))
    return folder


def half_a_row(text: bytes) -> bytes:
    return text[:-20]


def binary(text: bytes) -> bytes:
    return text[:300] + bytes(range(128, 256)) + text[300:]


def other_json(text: bytes) -> bytes:
    return b'{}\n[1]\n"x"\nnull\n{"step": true}\n' + text + b'{"step": NaN}\n{"step": "4"}\n'


def a_gap(text: bytes) -> bytes:
    lines = text.splitlines(keepends=True)
    return b"".join(lines[:1] + lines[2:])


def twice(text: bytes) -> bytes:
    return text + text


def another_number(text: bytes) -> bytes:
    return text.replace(b'"loss": ', b'"loss": 1', 1)


def nothing(text: bytes) -> bytes:
    return b""


def brackets(text: bytes) -> bytes:
    return text + b"[" * 100_000


@pytest.mark.fault(
    "metrics.jsonl is damaged",
    injected="half a row, binary bytes, rows that are no rows, a gap, every row twice, another number, an empty file, "
    "100,000 brackets",
    happened="it is restored from the checkpoint's copy, without a gap or a row twice, and that is said",
)
@pytest.mark.parametrize(
    "damage",
    [half_a_row, binary, other_json, a_gap, twice, another_number, nothing, brackets],
    ids=lambda each: each.__name__,
)
def test_a_damaged_log_is_mended_and_that_is_said(
    damage: Callable[[bytes], bytes], whole: Path, tmp_path: Path
) -> None:
    log, kept = tmp_path / "metrics.jsonl", checkpoints.folder_of(whole / "checkpoints", 4) / "metrics.jsonl"
    log.write_bytes(damage(kept.read_bytes()))
    said = metrics.restore(log, kept, 4)
    assert said is not None
    assert str(log) in said
    assert [row["step"] for row in metrics.read(log)] == [1, 2, 3, 4]
    assert log.read_bytes() == kept.read_bytes()
    assert metrics.restore(log, kept, 4) is None


def test_a_run_with_a_damaged_log_equals_one_without(
    whole: Path, tmp_path: Path, tiny: Tiny, console: Console, rows: Callable[[Path], list[dict[str, float]]]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(checkpoints.folder_of(folder / "checkpoints", 6))
    log = folder / "metrics.jsonl"
    log.write_bytes(other_json(a_gap(log.read_bytes()))[:-30])
    train(tiny(folder, *SETTINGS), resume=True, console=console)
    assert rows(folder) == rows(whole)
    assert "metrics.jsonl had" in console.file.getvalue()  # type: ignore[attr-defined]


def test_rows_after_the_checkpoint_are_no_damage(whole: Path, tmp_path: Path) -> None:
    log, kept = tmp_path / "metrics.jsonl", checkpoints.folder_of(whole / "checkpoints", 4) / "metrics.jsonl"
    shutil.copy(whole / "metrics.jsonl", log)
    assert metrics.restore(log, kept, 4) is None
    assert log.read_bytes() == kept.read_bytes()


def test_without_a_copy_the_good_rows_are_kept(tmp_path: Path) -> None:
    """As in runs of earlier versions."""
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 2, 3)) + '{"step')
    assert "1 damaged line" in (metrics.restore(log, None, 2) or "")
    assert [row["step"] for row in metrics.read(log)] == [1, 2]
