"""Files are written atomically by every writer, and output folders are checked before long work begins."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from tokdyn.data.shards import write_shard
from tokdyn.errors import OutputError
from tokdyn.evaluate.extractor import ExtractorInfo
from tokdyn.evaluate.statistics import Moments, Origin, save_statistics
from tokdyn.files import replacing, require_folder
from tokdyn.report.pixels import write_png
from tokdyn.report.style import save_figure
from tokdyn.sample.sinks import NpzSink

Limit = Callable[[int], AbstractContextManager[None]]

NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)  # does not compress


def figure(path: Path) -> None:
    page = Figure()
    page.subplots().imshow(NOISE)
    save_figure(page, path)


def statistics(path: Path) -> None:
    features = torch.zeros(100, 16)
    info = ExtractorInfo(kind="torchscript", name="n", sha256="0")
    origin = Origin(extractor=info, images=100, image_size=None, source="s", fingerprint="f")
    save_statistics(path, features, Moments(np.zeros(16), np.eye(16)), origin)


def npz(path: Path) -> None:
    sink = NpzSink(path, [0, 1])
    try:
        sink.write([0], NOISE[None])
        sink.write([1], NOISE[None])
        sink.close()
    except OutputError:
        sink.discard()
        raise


WRITERS: dict[str, Callable[[Path], object]] = {
    "image.png": lambda path: write_png(NOISE, path),
    "figure.png": figure,
    "figure.svg": figure,
    "cache.safetensors": statistics,
    "shard.safetensors": lambda path: write_shard(path, torch.zeros(9, 4, 8, 8), torch.zeros(9).long(), None, "f"),
    "samples.npz": npz,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_an_error_and_keeps_the_previous_file(name: str, tmp_path: Path, largest_file: Limit) -> None:
    path = tmp_path / "new" / name
    with largest_file(2000), pytest.raises(OutputError, match=rf"{name} .*[Ff]ile too large"):
        WRITERS[name](path)
    assert list(path.parent.iterdir()) == []
    WRITERS[name](path)
    before = path.read_bytes()
    with largest_file(2000), pytest.raises(OutputError):
        WRITERS[name](path)
    assert [(file.name, file.read_bytes()) for file in path.parent.iterdir()] == [(name, before)]


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_in_the_place_of_the_folder_is_an_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=name):
        WRITERS[name](tmp_path / "file" / name)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_error_of_the_writer_is_raised_and_leaves_no_file(tmp_path: Path) -> None:
    def fail(half: Path) -> None:
        half.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a") as half:
        fail(half)
    assert list(tmp_path.iterdir()) == []


def test_folders_are_checked_and_not_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deep"):
        with pytest.raises(OutputError, match=r"cache=.*file"):
            require_folder(folder, "cache")
    require_folder(tmp_path)
    require_folder(tmp_path / "new" / "deep")
    if Path("/proc/self").exists():  # where not even root can make a folder
        with pytest.raises(OutputError, match="out=/proc/nope"):
            require_folder(Path("/proc/nope"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("permission", [os.W_OK, os.X_OK])
def test_a_protected_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, permission: int) -> None:
    """Root may write anywhere, so the lack of one permission is imitated where it is asked for."""
    monkeypatch.setattr("os.access", lambda _, mode: not mode & permission)
    with pytest.raises(OutputError, match=r"out=.*new"):
        require_folder(tmp_path / "new")
