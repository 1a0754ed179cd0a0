"""Data of a web server and of fsspec are those of the local disk, whatever goes wrong on the way."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.data.server import Server, serving
from tests.hostile.packing import archive, picture
from tokdyn.data import BatchStream, DataConfig, Dataset, LatentDataset, open_data
from tokdyn.data.remote import ahead, cache, store
from tokdyn.data.remote.addresses import Address, expand
from tokdyn.data.remote.cache import make_room, open_files
from tokdyn.data.shards import LatentIndex, ShardEntry, VaeIdentity, shard_name, write_index, write_shard
from tokdyn.data.vae import LatentScaling
from tokdyn.errors import DataError, OutputError, TokdynError

LIMIT = 2**30


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Short pauses, small blocks, and a cache of the test's own."""
    monkeypatch.setattr(store, "PAUSE", 0.001)
    monkeypatch.setattr(ahead, "PAUSE", 0.01)
    monkeypatch.setattr(cache, "BLOCK", 512)
    monkeypatch.setenv("TOKDYN_CACHE", str(tmp_path / "tokdyn"))
    cache.said_once.clear()


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    scaling = LatentScaling(factor=1.0)
    draw, entries = torch.Generator().manual_seed(0), []
    for number, count in enumerate((4, 4, 2)):
        path = folder / shard_name(number)
        plain, mirrored = (torch.randn(count, 4, 2, 3, generator=draw) for _ in range(2))
        write_shard(path, plain, torch.arange(count), mirrored, "f")
        entries.append(ShardEntry(file=path.name, count=count, size=path.stat().st_size))
    vae = VaeIdentity(kind="AutoencoderTiny", source=None, subfolder=None, sha256="0")
    names = ("a", "b", "c", "d")
    write_index(
        folder,
        LatentIndex(
            fingerprint="f",
            count=10,
            shape=(4, 2, 3),
            dtype="fp32",
            flipped=True,
            class_names=names,
            image_size=(16, 24),
            posterior="mean",
            seed=0,
            scaling=scaling,
            vae=vae,
            shards=tuple(entries),
        ),
    )
    return folder


@pytest.fixture
def server(latents: Path, tmp_path: Path) -> Iterator[Server]:
    """A copy of the latents, which a test may spoil."""
    (tmp_path / "served").mkdir()
    for file in latents.iterdir():
        (tmp_path / "served" / file.name).write_bytes(file.read_bytes())
    with serving(tmp_path / "served") as served:
        yield served


def remote(url: str, folder: Path, **settings: object) -> Dataset:
    return open_data(DataConfig(kind="latents", path=url, cache=folder / "cache", **settings))


def equal(found: Dataset, local: Dataset, steps: int = 6) -> None:
    """Compare the batches of several epochs, in which samples are mirrored."""
    streams = [BatchStream(data, 4, seed=3, flip=local.can_flip) for data in (found, local)]
    for step in range(steps):
        for left, right in zip(streams[0][step], streams[1][step], strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=0)
    assert found.identity() == local.identity()


def blob(folder: Path, size: int = 10_000) -> bytes:
    content = bytes((7 * place + place // 251) % 256 for place in range(size))
    folder.mkdir(exist_ok=True)
    (folder / "blob").write_bytes(content)
    return content


def test_latents_of_a_server_are_those_of_the_disk(server: Server, latents: Path, tmp_path: Path) -> None:
    local = LatentDataset(latents)
    equal(remote(server.url, tmp_path, flip=True), local)
    with pytest.raises(IndexError):
        remote(server.url, tmp_path).batch([10])


@pytest.mark.parametrize("fault", ["500", "429", "cut", "slow"])
def test_a_server_that_fails_now_and_then(fault: str, server: Server, latents: Path, tmp_path: Path) -> None:
    """A part that breaks off is continued where it did, so even a server that always cuts gets through."""
    server.fault = lambda number, path: fault if number % 3 or fault == "cut" else ""
    equal(remote(server.url, tmp_path), LatentDataset(latents), steps=1)


def test_what_broke_off_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    content = blob(server.folder)
    (file,) = open_files([Address(f"{server.url}/blob")], tmp_path / "cache", LIMIT)
    server.requests.clear()
    server.fault = lambda number, path: "cut" if number == 1 else ""
    assert file.read_at(0, 3 * 512) == content[: 3 * 512]
    assert server.requests == [("blob", 0, 1535), ("blob", 512, 1535)]


@pytest.mark.parametrize(
    ("fault", "named"), [("404", "index.json"), ("403", "credentials|signature"), ("whole", "Range")]
)
def test_what_another_try_does_not_change(fault: str, named: str, server: Server, tmp_path: Path) -> None:
    server.fault = lambda number, path: fault
    with pytest.raises(DataError, match=named):
        remote(server.url, tmp_path)
    assert len(server.requests) == 1


def test_a_server_that_stays_away_and_a_shard_that_is_gone(server: Server, tmp_path: Path) -> None:
    data = remote(server.url, tmp_path)
    (server.folder / "shard_00001.safetensors").unlink()
    with pytest.raises(DataError, match=r"shard_00001\.safetensors does not exist"):
        data.batch(range(10))
    server.fault = lambda number, path: "503"
    with pytest.raises(DataError, match=r"8 tries.*503"):
        remote(server.url, tmp_path / "other")


def test_a_shard_that_is_replaced_while_it_is_read(server: Server, tmp_path: Path) -> None:
    data = remote(server.url, tmp_path)
    shard = server.folder / "shard_00000.safetensors"
    os.utime(shard, ns=(1, 1))
    with pytest.raises(DataError, match=r"shard_00000\.safetensors changed"):
        data.batch([0])


def test_shards_that_are_not_what_was_written(server: Server, tmp_path: Path) -> None:
    shard = server.folder / "shard_00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    data = remote(server.url, tmp_path)
    with pytest.raises(DataError, match=r"shard_00000.*checksum"):
        data.batch([0, 1, 2, 3])
    shard.write_bytes(bytes([255] * 8) + bytes(content[8:]))
    with pytest.raises(DataError, match=r"shard_00000.*damaged"):
        remote(server.url, tmp_path).batch([0])
    shard.write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"{len(content) - 1} bytes"):
        remote(server.url, tmp_path)


def test_a_second_run_reads_from_the_cache_alone(server: Server, latents: Path, tmp_path: Path) -> None:
    remote(server.url, tmp_path).batch(range(10))
    server.requests.clear()
    data = remote(server.url, tmp_path)
    data.batch(range(10))
    assert {(first, last) for _, first, last in server.requests} == {(0, 0)}  # the version of each file is asked for


def test_a_damaged_cache_is_read_anew(server: Server, latents: Path, tmp_path: Path) -> None:
    """A crash can leave a table that promises blocks that never reached the disk."""
    remote(server.url, tmp_path).batch(range(10))
    cache.opened_here.clear()
    for path in (tmp_path / "cache").glob("*.cached"):
        with path.open("r+b") as file:
            file.seek(520)
            file.write(bytes(200))
    equal(remote(server.url, tmp_path), LatentDataset(latents), steps=3)


def test_a_replaced_file_begins_anew_and_a_partial_one_goes_on(server: Server, tmp_path: Path) -> None:
    content = blob(server.folder)
    address = Address(f"{server.url}/blob")
    (file,) = open_files([address], tmp_path / "cache", LIMIT)
    assert file.read_at(4000, 100) == content[4000:4100]
    cache.opened_here.clear()
    (file,) = open_files([address], tmp_path / "cache", LIMIT)
    server.requests.clear()
    assert list(file.fill())
    asked = sum(last - first + 1 for _, first, last in server.requests)
    assert (asked, file.settled()) == (10_000 - 2 * 512, True)
    (server.folder / "blob").write_bytes(content[::-1])
    (file,) = open_files([address], tmp_path / "cache", LIMIT)
    assert file.read_at(0, 10_000) == content[::-1]


def test_the_cache_keeps_to_its_limit(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    for name in ("a", "b", "c"):
        (server.folder / name).write_bytes(name.encode() * 50_000)
    files = {name: open_files([Address(f"{server.url}/{name}")], folder, LIMIT)[0] for name in ("a", "b", "c")}
    for number, file in enumerate(files.values()):
        assert len(file.read_at(0, 50_000)) == 50_000
        os.utime(file.path, (number, number))
    make_room(folder, 120_000, [files["b"]])
    assert [file.path.exists() for file in files.values()] == [False, True, True]
    assert files["a"].read_at(1000, 3) == b"aaa"  # a process that has it open goes on
    with pytest.raises(DataError, match=r"150,000.*120,000.*data\.cache_limit"):
        make_room(folder, 120_000, list(files.values()))


def test_a_cache_that_cannot_be_written(
    server: Server, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(OutputError, match=r"data\.cache"):
        remote(server.url, tmp_path)
    (tmp_path / "cache").unlink()
    data = remote(server.url, tmp_path)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    cache.opened_here.clear()
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.warns(UserWarning, match="No space left"):
        equal(data, LatentDataset(latents), steps=3)


def test_a_full_disk_ends_what_is_brought_ahead(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the cache does not take would be requested for nothing, again and again."""
    content = blob(server.folder, 40_000)
    (file,) = open_files([Address(f"{server.url}/blob")], tmp_path / "cache", LIMIT)
    server.requests.clear()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.warns(UserWarning, match="No space left"):
            assert list(file.fill()) == [False]
        assert (len(server.requests), file.settled(), file.missing(0, 40_000)) == (1, True, set())
        assert file.read_at(100, 1000) == content[100:1100]
    assert file.read_at(0, 512) == content[:512]  # is written: there is room again
    assert (file.settled(), file.missing(0, 1024)) == (False, {1})
    assert all(file.fill())
    assert file.settled()


def _read(url: str, folder: Path, results: object) -> None:
    (file,) = open_files([Address(url)], folder, LIMIT)
    results.put(file.read_at(0, file.size))  # type: ignore[attr-defined]


def test_several_processes_share_the_cache(server: Server, tmp_path: Path) -> None:
    content = blob(server.folder, 40_000)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_read, args=(f"{server.url}/blob", tmp_path / "cache", results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    assert [results.get(timeout=30) == content for _ in processes] == [True] * 3
    for process in processes:
        process.join(30)
    (file,) = open_files([Address(f"{server.url}/blob")], tmp_path / "cache", LIMIT)
    server.requests.clear()
    assert file.read_at(0, file.size) == content
    assert server.requests == []


def test_workers_read_what_the_disk_holds(server: Server, latents: Path, tmp_path: Path) -> None:
    streams = [BatchStream(data, 3, seed=1) for data in (remote(server.url, tmp_path), LatentDataset(latents))]
    loaded = [list(stream.loader(2, 6, workers)) for stream, workers in zip(streams, (2, 0), strict=True)]
    for left, right in zip(*loaded, strict=True):
        torch.testing.assert_close(left[0], right[0], rtol=0, atol=0)


def test_data_come_before_they_are_needed(server: Server, tmp_path: Path) -> None:
    """After one step everything else comes by itself; other processes begin elsewhere."""
    data = remote(server.url, tmp_path)
    BatchStream(data, 2, seed=0, rank=1, world=2)[0]
    waited = time.monotonic() + 20
    while not all(file.settled() for file in data.files):  # type: ignore[attr-defined]
        assert time.monotonic() < waited
        time.sleep(0.01)
    server.requests.clear()
    data.batch(range(10))
    assert server.requests == []
    pickle.loads(pickle.dumps(data)).batch([0])


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_latents_of_fsspec(protocol: str, latents: Path, tmp_path: Path) -> None:
    import fsspec

    url = f"memory://{tmp_path}/bucket" if protocol == "memory" else f"file://{latents}"
    if protocol == "memory":
        for file in latents.iterdir():
            fsspec.filesystem("memory").pipe_file(f"{tmp_path}/bucket/{file.name}", file.read_bytes())
    equal(remote(url, tmp_path), LatentDataset(latents), steps=3)
    with pytest.raises(DataError, match=rf"{protocol}://.*nowhere does not exist"):
        remote(f"{url}/nowhere", tmp_path)


def test_a_transient_error_of_fsspec_is_tried_again(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    calls, read = list[str](), LocalFileSystem.cat_file

    def flaky(self: LocalFileSystem, path: str, **range: object) -> bytes:
        calls.append(path)
        if len(calls) % 2:
            raise ConnectionResetError("reset")
        found: bytes = read(self, path, **range)
        return found

    monkeypatch.setattr(LocalFileSystem, "cat_file", flaky)
    equal(remote(f"file://{latents}", tmp_path), LatentDataset(latents), steps=2)
    monkeypatch.setattr(LocalFileSystem, "cat_file", lambda *_, **__: (_ for _ in ()).throw(PermissionError("no")))
    with pytest.raises(DataError, match="must not be read"):
        remote(f"file://{latents}", tmp_path / "other")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    with pytest.raises(DataError, match=r"s3://bucket/x.*s3fs"):
        remote("s3://bucket/x", tmp_path)


@pytest.mark.parametrize("path", ["my latents?sig=abc", "l\u00e4tents?sig=abc"])
def test_an_address_that_no_request_can_hold_is_not_tried_again(
    path: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PAUSE", 60.0)
    with pytest.raises(DataError, match="is no address of a file") as refused:
        remote(f"{server.url}/{path}", tmp_path)
    assert "abc" not in str(refused.value)


@pytest.mark.parametrize("url", ["ftp://host/x", "simplecache::s3://b/x", "s3://a::memory://x", "reference://x"])
def test_other_protocols_are_refused(url: str, tmp_path: Path) -> None:
    if "::" in url and not url.startswith("s3"):
        url = "memory://a" + url  # a chain behind a protocol that is known
    with pytest.raises(DataError, match="no address"):
        remote(url, tmp_path)


def test_signatures_and_passwords_are_not_shown() -> None:
    address = Address("https://me:word@host/latents?sig=abc")
    assert str(address / "index.json") == "https://host/latents/index.json"
    assert (address / "index.json").url == "https://me:word@host/latents/index.json?sig=abc"


def test_zips_of_images(server: Server, tmp_path: Path) -> None:
    names = [f"top/{label}/{number}.png" for label in "ab" for number in range(4)]
    pictures = {name: picture(size=(8 + place, 8)) for place, name in enumerate(names)}
    (server.folder / "x.zip").write_bytes(archive(pictures, zipfile.ZIP_STORED))
    for in_memory in (True, False):
        settings = {"kind": "images", "size": 8, "in_memory": in_memory}
        local = open_data(DataConfig(path=str(server.folder / "x.zip/top"), **settings))
        found = open_data(DataConfig(path=f"{server.url}/x.zip/top", cache=tmp_path / "cache", **settings))
        assert found.class_names == ("a", "b")
        equal(found, local)
    (server.folder / "my.zips").mkdir()
    (server.folder / "my.zips/X.ZIP").write_bytes((server.folder / "x.zip").read_bytes())
    for path in ("x.zip/top?sig=abc.zip", "my.zips/X.ZIP/top"):
        equal(open_data(DataConfig(path=f"{server.url}/{path}", cache=tmp_path / "cache", **settings)), local)
    with pytest.raises(DataError, match="does not list folders"):
        open_data(DataConfig(kind="images", path=server.url, size=8))
    (server.folder / "y.zip").write_bytes(b"PK" + bytes(3000))
    with pytest.raises(DataError, match=r"y\.zip is not a readable zip"):
        open_data(DataConfig(kind="images", path=f"{server.url}/y.zip", size=8))


def test_loose_images_are_refused(latents: Path) -> None:
    with pytest.raises(DataError, match="zip"):
        open_data(DataConfig(kind="images", path=f"file://{latents}", size=8))


def test_patterns() -> None:
    assert expand("s/{08..11}.tar") == ["s/08.tar", "s/09.tar", "s/10.tar", "s/11.tar"]
    assert expand("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
    for wrong in ("{3..1}", "{x}", "{0..99999999}", "{0..9999}{0..9999}"):
        with pytest.raises(DataError):
            expand(wrong)


def test_an_error_of_a_thread_is_raised() -> None:
    done = threading.Event()

    def fail() -> None:
        raise DataError("x is gone.")

    with pytest.raises(TokdynError, match="x is gone"):
        store.in_parallel([done.set, fail])
