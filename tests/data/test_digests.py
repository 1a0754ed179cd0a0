"""Replaced content of image files is noticed, and files are read only once for that."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests.data.latents import config, kl
from tokdyn.data import DataConfig, open_data, write_features
from tokdyn.data.digests import folder_digests
from tokdyn.data.images import ImageDataset
from tokdyn.data.opening import open_source
from tokdyn.errors import DataError

NAMES = [f"{kind}/{number}.bmp" for kind in ("cat", "dog") for number in range(3)]


def picture(path: Path, value: int) -> None:
    """Write an image of one grey value; all of them have the same number of bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKDYN_CACHE", str(tmp_path / "cache"))
    for value, name in enumerate(NAMES):
        picture(tmp_path / "images" / name, value)
    return tmp_path / "images"


def identity(path: Path) -> dict[str, object]:
    return open_data(DataConfig(kind="images", path=str(path), size=8)).identity()


def archive(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name in NAMES:
            file.write(folder / name, name)
    return path


def test_a_replaced_image_of_the_same_name_size_and_time_changes_the_identity(images: Path, tmp_path: Path) -> None:
    before, packed = identity(images), identity(archive(images, tmp_path / "one.zip"))
    assert before == packed == identity(images)
    times = (images / NAMES[4]).stat()
    picture(images / NAMES[4], 99)
    os.utime(images / NAMES[4], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (images / NAMES[4]).stat().st_size == times.st_size
    after = identity(images)
    assert {key for key in after if after[key] != before[key]} == {"content"}
    assert identity(archive(images, tmp_path / "two.zip")) == after
    picture(images / NAMES[4], 4)
    assert identity(images) == before


def test_moved_images_are_the_same(images: Path, tmp_path: Path) -> None:
    before = identity(images)
    shutil.copytree(images, tmp_path / "elsewhere")
    assert identity(tmp_path / "elsewhere") == before


def test_files_are_read_once(images: Path, tmp_path: Path) -> None:
    """What the cache says is believed of files that have not changed since, and of no others."""
    found = folder_digests(images, NAMES)
    assert found[:, 0].tolist() == [(images / name).stat().st_size for name in NAMES]
    (cache,) = (tmp_path / "cache" / "digests").iterdir()
    content = load_file(cache)
    save_file({**content, "checks": np.arange(6)}, cache)
    picture(images / NAMES[2], 2)
    picture(images / "ant" / "0.bmp", 7)
    again = folder_digests(images, ["ant/0.bmp", *NAMES])
    assert again[[1, 2, 4, 5, 6], 1].tolist() == [0, 1, 3, 4, 5]
    assert again[3, 1] == found[2, 1]
    assert again[0, 1] not in {0, -1}


def test_a_damaged_or_forbidden_cache_does_no_harm(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = folder_digests(images, NAMES)
    (cache,) = (tmp_path / "cache" / "digests").iterdir()
    for content in (b"", b"\xff" * 64, cache.read_bytes()[:-8]):
        cache.write_bytes(content)
        assert np.array_equal(folder_digests(images, NAMES), expected)
    save_file({"states": np.zeros((0, 4), dtype=np.int64), "checks": np.zeros(0, dtype=np.int64)}, cache)
    assert np.array_equal(folder_digests(images, NAMES), expected)
    (tmp_path / "file").touch()
    monkeypatch.setenv("TOKDYN_CACHE", str(tmp_path / "file"))
    assert np.array_equal(folder_digests(images, NAMES), expected)


def test_missing_files_and_names_that_are_no_text_have_rows(images: Path) -> None:
    odd = os.fsdecode(b"cat/caf\xe9.bmp")
    picture(images / odd, 5)
    found = folder_digests(images, ["cat/none.bmp", odd])
    assert found[0].tolist() == [-1, -1]
    assert found[1].tolist() == folder_digests(images, NAMES)[5].tolist()
    assert found.dtype == np.int64


def test_latents_of_replaced_images_are_not_gone_on_with(images: Path, tmp_path: Path) -> None:
    """Latents of an earlier version, whose fingerprint covers names alone, are gone on with as before."""
    settings = config(tmp_path / "latents", kind="images", path=str(images), size=(16, 16), shard_size=4)

    class Earlier(ImageDataset):
        def identity(self) -> dict[str, object]:
            return {key: value for key, value in super().identity().items() if key != "content"}

    earlier = settings.model_copy(update={"out": str(tmp_path / "earlier")})
    write_features(settings, kl())
    write_features(earlier, kl(), Earlier(open_source(images), (16, 16)))
    for made in (settings, earlier):
        (Path(made.out) / "index.json").unlink()
    assert write_features(settings, kl()).resumed == 2
    picture(images / NAMES[1], 50)
    with pytest.raises(DataError, match=r"latents"):
        write_features(settings, kl())
    assert write_features(earlier, kl()).resumed == 2
