"""Tar shards of samples: their order, labels and limits, here and on a server."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.server import serving
from tests.hostile.packing import archive, picture
from tokdyn.data import BatchStream, DataConfig, Dataset, open_data
from tokdyn.data.remote import cache
from tokdyn.data.tars import index
from tokdyn.errors import DataError
from tokdyn.evaluate.images import open_images
from tokdyn.recipe.proposal import propose

Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOKDYN_CACHE", str(tmp_path / "tokdyn"))
    monkeypatch.setattr(cache, "BLOCK", 1024)


def tar(path: Path, files: Files, form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as file:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


def images(path: Path | str, **settings: Any) -> Dataset:
    return open_data(DataConfig(kind="images", path=str(path), **{"size": 8, "in_memory": False, **settings}))


def latents(path: Path | str, **settings: Any) -> Dataset:
    return open_data(DataConfig(kind="latents", path=str(path), **settings))


def array(value: float, shape: tuple[int, ...] = (4, 2, 3), dtype: Any = np.float16) -> bytes:
    file = io.BytesIO()
    np.save(file, np.full(shape, value, dtype), allow_pickle=True)
    return file.getvalue()


def shards(folder: Path, count: int = 3) -> Path:
    """Shards of two images each, with keys that begin anew in each and a class that is the number of the image."""
    for number in range(count):
        pairs = [(f"{place:06d}", 2 * number + place) for place in range(2)]
        files = {f"{key}.png": picture(size=(9 + label, 8)) for key, label in pairs}
        tar(folder / f"{number:06d}.tar", files | {f"{key}.cls": b"%d" % label for key, label in pairs})
    return folder


@pytest.mark.parametrize("way", ["folder", "pattern", "list"])
def test_shards_are_read_in_their_order(way: str, tmp_path: Path) -> None:
    shards(tmp_path / "s")
    name = {"folder": "", "pattern": "{000000..000002}.tar", "list": "{000000,000001,000002}.tar"}[way]
    data = images(tmp_path / "s" / name)
    samples, labels, used = data.fetch(range(6))
    assert (labels.tolist(), used, data.num_classes) == ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], 6)
    assert data.class_names == ("0", "1", "2", "3", "4", "5")
    apart = images(tmp_path / "s" / "000001.tar", num_classes=6)
    torch.testing.assert_close(apart.batch([0, 1])[0], samples[2:4], rtol=0, atol=0)
    assert apart.batch([0, 1])[1].tolist() == [2, 3]


def test_images_of_tars_are_those_of_a_zip(tmp_path: Path) -> None:
    """Without labels the first folder is the class, so the same files make the same data set, but for its identity."""
    files = {f"{label}/{number}.v2.png": picture(size=(8 + 3 * number, 9)) for label in "ab" for number in range(3)}
    (tmp_path / "x.zip").write_bytes(archive(files))
    tar(tmp_path / "x.tar", files | {"./a/._0.v2.png": b"of macOS", "notes.txt": b"none", "a/0.txt": b"a caption"})
    streams = [
        BatchStream(images(tmp_path / name, in_memory=memory), 4, seed=2, flip=True)
        for name, memory in (("x.zip", True), ("x.tar", False), ("x.tar", True))
    ]
    for step in range(4):
        first, *others = (stream[step] for stream in streams)
        for other in others:
            torch.testing.assert_close(other[0], first[0], rtol=0, atol=0)
            assert other[1].tolist() == first[1].tolist()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_every_format(form: int, tmp_path: Path) -> None:
    name = "/".join(["class", "d" * 90, "e" * 60, "x.png"])
    assert len(images(tar(tmp_path / "x.tar", {name: picture(), "class/ü.png": picture()}, form))) == 2
    folder = tmp_path / "made"
    (folder / "class").mkdir(parents=True)
    (folder / "class" / "x.png").write_bytes(picture())
    with tarfile.open(tmp_path / "y.tar", "w", format=form) as file:
        file.add(folder, ".")  # as `tar cf y.tar .` does, folders included
    assert images(tmp_path / "y.tar").class_names == ("class",)


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([{"label": "dog"}, {"cls": "cat"}, {"label": "dog"}], ("cat", "dog"), [1, 0, 1]),
        ([{"label": 2, "caption": "x"}, {"class": 0}, {"cls": 1, "label": 7}], ("0", "1", "2"), [2, 0, 1]),
        ([{"label": "10"}, {"label": "9"}, {"label": "10"}], ("9", "10"), [1, 0, 1]),
    ],
)
def test_labels_of_json(labels: list[Any], names: tuple[str, ...], expected: list[int], tmp_path: Path) -> None:
    files: Files = {}
    for number, label in enumerate(labels):
        files |= {f"{number}.json": json.dumps(label).encode(), f"{number}.jpg": picture("JPEG")}
    data = images(tar(tmp_path / "x.tar", files))
    assert (data.class_names, data.batch(range(3))[1].tolist()) == (names, expected)
    assert images(tmp_path / "x.tar", num_classes=1).class_names == ("all",)


def test_cls_counts_more_than_json_and_classes_may_be_absent(tmp_path: Path) -> None:
    files = {"0.json": b'{"label": 5}', "0.cls": b"1\n", "0.png": picture(), "1.png": picture(), "1.cls": b"0"}
    path = tar(tmp_path / "x.tar", files)
    assert images(path).batch([0, 1])[1].tolist() == [1, 0]
    assert images(path, num_classes=1000).num_classes == 1000
    with pytest.raises(DataError, match=r"num_classes=3"):
        images(tar(tmp_path / "y.tar", files | {"1.cls": b"2"}), num_classes=2)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"0.png": b"", "1.png": b"", "1.cls": b"0"}, r"0\.png has no label and .*1\.png has a number"),
        ({"0.png": b"", "0.cls": b"cat", "1.png": b"", "1.cls": b"0"}, "number as its class and .* name as its class"),
        ({"0.png": b"", "a/1.png": b""}, r"such as 0\.png"),
        ({"0.png": b"", "0.cls": b""}, "0.cls gives the class ''"),
        ({"0.png": b"", "0.cls": b"99999999"}, "TOKDYN_MAX_CLASSES"),
        ({"0.png": b"", "0.json": b'{"label": -1}'}, r"0\.json gives the class -1"),
        ({"0.png": b"", "0.json": b"[" * 5000}, r"0\.json is no JSON"),
        ({"0.png": b"", "0.cls": bytes(2000)}, "2,000 bytes"),
        ({"0.png": b"", "0.cls": b"\xff"}, "utf-8"),
        ({"0.txt": b""}, "holds no images"),
        ({}, "holds no images"),
    ],
)
def test_labels_that_are_none(files: Files, named: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=named):
        images(tar(tmp_path / "x.tar", files))


def member(kind: bytes, name: str = "x.png", size: int = 0, link: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.size, entry.linkname = kind, size, link
    return entry


HOSTILE: dict[str, tuple[Any, str]] = {
    "a symbolic link": (member(tarfile.SYMTYPE, link="/etc/passwd"), "x.png is a link"),
    "a hard link": (member(tarfile.LNKTYPE, link="a.png"), "x.png is a link"),
    "a device": (member(tarfile.CHRTYPE), "a device"),
    "a pipe": (member(tarfile.FIFOTYPE), "a named pipe"),
    "a sparse file": (member(tarfile.GNUTYPE_SPARSE), "a sparse file"),
    "an unknown kind": (member(b"Z"), "unknown kind"),
    "an absolute name": (member(tarfile.REGTYPE, "/etc/x.png"), "/etc/x.png is no path within"),
    "a way out": (member(tarfile.REGTYPE, "a/../../x.png"), r"\.\./\.\./x.png is no path within"),
    "an escape": (member(tarfile.REGTYPE, "/\x1b[2Jx.png"), r"\\x1b"),
    "a size of exabytes": (member(tarfile.REGTYPE, "x.png", 2**60), "cut off"),
    "a negative size": (member(tarfile.REGTYPE, "x.png", -5), "size of an entry is no number"),
    "a large header": (member(b"L", "././@LongLink", 2**30), "TOKDYN_MAX_TAR_HEADER_BYTES"),
    "a header without end": (member(b"x", "x", 5000), "cut off in a header"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_entries_are_refused(name: str, tmp_path: Path) -> None:
    entry, named = HOSTILE[name]
    sound = tar(tmp_path / "sound.tar", {"a/a.png": picture()}).read_bytes()[: 512 + 512 * -(-len(picture()) // 512)]
    (tmp_path / "x.tar").write_bytes(sound + entry.tobuf(tarfile.GNU_FORMAT)[-512:] + bytes(1024))
    with pytest.raises(DataError, match=rf"x\.tar cannot be read.*{named}"):
        images(tmp_path / "x.tar")


def spoilt(name: str, content: bytes) -> bytes:
    """A tar that is damaged in some way."""
    header = bytearray(content)
    header[0] ^= 1
    records = b"99 path=x\n"
    extended = member(b"x", "p", len(records)).tobuf()[-512:] + records.ljust(512, b"\0")
    huge = b"29 size=99999999999999999999\n"
    return {
        "cut in a file": content[:520],
        "cut in a header": content[:100],
        "empty": b"",
        "text": b"hello" * 400,
        "a header": bytes(header),
        "compressed": b"\x1f\x8b" + content,
        "twice": content + content,
        "records": extended + content,
        "size": member(b"x", "p", len(huge)).tobuf()[-512:] + huge.ljust(512, b"\0") + content,
        "of all": member(b"g", "p", 10).tobuf()[-512:] + b"10 path=x\n".ljust(512, b"\0") + content,
    }[name]


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("cut in a file", "cut off: a/a.png"),
        ("cut in a header", "no tar"),
        ("empty", "no tar"),
        ("text", "no tar"),
        ("a header", "no tar"),
        ("compressed", "gzip"),
        ("twice", "follow its end"),
        ("records", "extended header"),
        ("size", "no number"),
        ("of all", "all entries"),
    ],
)
def test_damaged_tars_are_refused(name: str, named: str, tmp_path: Path) -> None:
    content = tar(tmp_path / "sound.tar", {"a/a.png": picture(), "a/b.png": picture()}).read_bytes()
    (tmp_path / "x.tar").write_bytes(spoilt(name, content))
    with pytest.raises(DataError, match=rf"x\.tar cannot be read.*{named}"):
        images(tmp_path / "x.tar")


def test_a_tar_without_its_end_is_refused(tmp_path: Path) -> None:
    """It would lose the samples behind the place where its copy broke off."""
    size = 512 + 512 * -(-len(picture()) // 512)
    content = tar(tmp_path / "sound.tar", {"a/a.png": picture(), "a/b.png": picture()}).read_bytes()
    (tmp_path / "x.tar").write_bytes(content[:size])
    with pytest.raises(DataError, match="cut off"):
        images(tmp_path / "x.tar")


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        for name in ("a/x.png", "./a/x.png"):
            file.addfile(tarfile.TarInfo(name))
    with pytest.raises(DataError, match=r"a/x\.png is in it twice"):
        images(tmp_path / "x.tar")


def test_limits_of_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tar(tmp_path / "s" / "x.tar", {f"a/{number}.png": picture() for number in range(4)})
    for variable, at in (("ARCHIVE_ENTRIES", "3"), ("IMAGE_BYTES", "30")):
        monkeypatch.setenv(f"TOKDYN_MAX_{variable}", at)
        with pytest.raises(DataError, match=f"TOKDYN_MAX_{variable}"):
            images(path)
        monkeypatch.delenv(f"TOKDYN_MAX_{variable}")
    tar(tmp_path / "s" / "y.tar", {"a/0.png": picture()})
    monkeypatch.setenv("TOKDYN_MAX_SHARDS", "1")
    with pytest.raises(DataError, match="TOKDYN_MAX_SHARDS"):
        images(tmp_path / "s")


def test_the_index_is_built_once_and_again_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = shards(tmp_path / "s", 2), list[str]()
    original = index.read_index
    monkeypatch.setattr(index, "read_index", lambda file: read.append(file.name) or original(file))
    first = images(folder)
    assert sorted(read) == ["000000.tar", "000001.tar"]
    again = images(folder)
    assert (len(read), again.identity()) == (2, first.identity())
    tar(folder / "000001.tar", {"000000.png": picture(size=(20, 8)), "000000.cls": b"2"})
    changed = images(folder)
    assert read[2:] == ["000001.tar"]
    assert changed.identity() != first.identity()
    with pytest.raises(DataError, match=r"000001\.tar"):  # what the first index says is not there any more
        first.batch([2, 3])
    for path in (tmp_path / "tokdyn" / "tars").glob("*.safetensors"):
        path.write_bytes(b"damaged")
    assert images(folder).identity() == changed.identity()


def test_an_unreadable_image_is_named_or_skipped(tmp_path: Path) -> None:
    tar(tmp_path / "x.tar", {"a/0.png": b"none", "a/1.png": picture()})
    with pytest.raises(DataError, match=r"x\.tar/a/0\.png"):
        images(tmp_path / "x.tar").batch([0])
    with pytest.warns(UserWarning, match=r"a/0\.png"):
        assert images(tmp_path / "x.tar", on_error="skip").fetch([0])[2] == [1]


def test_patterns_and_folders_that_lead_nowhere(tmp_path: Path) -> None:
    shards(tmp_path / "s", 2)
    with pytest.raises(DataError, match=r"1 of 3 files.*000002\.tar"):
        images(tmp_path / "s" / "{000000..000002}.tar")
    (tmp_path / "s" / "a").mkdir()
    (tmp_path / "s" / "a" / "x.png").write_bytes(picture())
    assert images(tmp_path / "s").class_names == ("a",)  # a folder of images that has tars beside them


def test_a_folder_of_tars_is_proposed_and_evaluated_by_its_labels(tmp_path: Path) -> None:
    """Its files lie in tars, which are no class folders."""
    folder = shards(tmp_path / "s", 2)
    assert propose(str(folder)).classes == {"0": 1, "1": 1, "2": 1, "3": 1}
    found = open_images(folder)
    assert found.labels is not None
    assert found.labels.values.tolist() == [0, 1, 2, 3]
    before = found.fingerprint()
    tar(folder / "000001.tar", {"000000.png": picture(size=(20, 8)), "000000.cls": b"2"})
    assert open_images(folder).fingerprint() != before


def test_latents_of_tars(tmp_path: Path) -> None:
    files: Files = {}
    for number in range(3):
        files |= {
            f"{number}.npy": array(number),
            f"{number}.flip.npy": array(-number - 1),
            f"{number}.cls": b"%d" % number,
        }
    tar(tmp_path / "s" / "0.tar", files)
    tar(tmp_path / "s" / "1.tar", {"0.npy": array(3.5), "0.flip.npy": array(-9), "0.cls": b"1"})
    data = latents(tmp_path / "s", size=(2, 3), flip=True)
    samples, labels = data.batch([3, 0, 2], [False, True, True])
    assert (data.shape, len(data), data.num_classes) == ((4, 2, 3), 4, 3)
    assert (samples[:, 0, 0, 0].tolist(), labels.tolist()) == ([3.5, -1.0, -3.0], [1, 0, 2])
    tar(tmp_path / "s" / "1.tar", {"0.npy": array(4), "0.cls": b"1"})
    assert not latents(tmp_path / "s").can_flip
    assert latents(tmp_path / "s").identity() != data.identity()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (array(0, (4, 2, 4)), r"\(4, 2, 4\)"),
        (array(0, dtype=np.int64), "int64"),
        (array(0, dtype=object), "object|pickle|allow"),
        (b"\x93NUMPY\x01\x00", "no array"),
        (array(0)[:-1], "no array"),
        (array(0) + b"more", "no array"),
    ],
)
def test_latents_that_are_none(content: bytes, named: str, tmp_path: Path) -> None:
    data = latents(tar(tmp_path / "x.tar", {"0.npy": array(1), "1.npy": content}))
    with pytest.raises(DataError, match=rf"1\.npy in .*({named})"):
        data.batch([0, 1])
    with pytest.raises(DataError, match="holds no latents"):
        latents(tar(tmp_path / "y.tar", {"0.png": picture()}))


def test_tars_of_a_server(tmp_path: Path) -> None:
    """Images and latents of a server, whose index is built from what the cache then holds."""
    local = shards(tmp_path / "served", 3)
    tar(local / "latents.tar", {f"{number}.npy": array(number) for number in range(5)})
    with serving(local) as server:
        settings: dict[str, Any] = {"cache": tmp_path / "cache"}
        found = images(f"{server.url}/{{000000..000002}}.tar", **settings)
        (local / "other").mkdir()
        shutil.move(local / "latents.tar", local / "other" / "latents.tar")
        streams = [BatchStream(data, 4, seed=5) for data in (found, images(local / "{000000..000002}.tar"))]
        for step in range(3):
            torch.testing.assert_close(streams[0][step], streams[1][step], rtol=0, atol=0)
        streams = [
            BatchStream(latents(path, **settings), 3, seed=5)
            for path in (f"{server.url}/other/latents.tar", local / "other")
        ]
        for step in range(3):
            torch.testing.assert_close(streams[0][step], streams[1][step], rtol=0, atol=0)
        assert found.identity() == images(f"file://{local}/{{000000..000002}}.tar", **settings).identity()
        server.requests.clear()
        images(f"{server.url}/{{000000..000002}}.tar", **settings).batch(range(6))
        assert {last for _, _, last in server.requests} == {0}
        with pytest.raises(DataError, match=r"00000\d\.tar does not exist"):
            images(f"{server.url}/{{000002..000009}}.tar", **settings)
