"""Image folders and zips: order, classes, errors, memory and worker processes."""

import errno
import io
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tokdyn.data import BatchStream, DataConfig, Dataset, open_data
from tokdyn.errors import DataError


def jpeg(value: int, size: tuple[int, int] = (10, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 255 - value, 40)).save(buffer, "PNG")
    return buffer.getvalue()


FILES = {
    "cat/b.png": jpeg(10),
    "cat/a.PNG": jpeg(20, (30, 50)),
    "cat/deep/er/x.png": jpeg(30),
    "dog/1.png": jpeg(40),
    "dog/10.png": jpeg(50),
    "dog/2.png": jpeg(60),
    "ant-hill/z.png": jpeg(70),
    "ant/z.png": jpeg(80),
}
CLUTTER = {
    "__MACOSX/cat/._b.png": b"x",
    "cat/.hidden.png": b"x",
    ".git/a.png": b"x",
    "cat/notes.txt": b"x",
    "README.md": b"x",
    "dog/Thumbs.db": b"x",
}
ORDER = ["ant/z", "ant-hill/z", "cat/a", "cat/b", "cat/deep/er/x", "dog/1", "dog/10", "dog/2"]


def folder(root: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return str(root)


def archive(path: Path, files: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in reversed(files.items()):
            file.writestr(name, content)
    return str(path)


def images(path: str, **settings: object) -> Dataset:
    return open_data(DataConfig(kind="images", path=path, **{"size": 8, **settings}))


def everything(data: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    return data.batch(range(len(data)))


@pytest.mark.parametrize("in_memory", [True, False])
def test_folder_and_zip_are_the_same(tmp_path, in_memory):
    files = {**FILES, **CLUTTER}
    one = images(folder(tmp_path / "f", files), in_memory=in_memory)
    two = images(archive(tmp_path / "z.zip", files), in_memory=in_memory)
    assert one.class_names == two.class_names == ("ant", "ant-hill", "cat", "dog")
    assert [name.rsplit(".", 1)[0] for name in one.names] == ORDER
    assert one.names == two.names
    assert one.identity() == two.identity()
    assert torch.equal(everything(one)[0], everything(two)[0])
    assert everything(one)[1].tolist() == everything(two)[1].tolist() == [0, 1, 2, 2, 2, 3, 3, 3]


def test_samples_are_the_images_scaled_to_minus_one_to_one(tmp_path):
    data = images(folder(tmp_path, FILES))
    assert data.shape == (3, 8, 8)
    for index, name in enumerate(ORDER):
        value = next(content for path, content in FILES.items() if path.startswith(f"{name}."))
        with Image.open(io.BytesIO(value)) as image:
            colour = np.array(image.getpixel((0, 0)))
        sample, _ = data[index]
        assert sample.dtype == torch.float32
        np.testing.assert_allclose(
            sample.numpy(), np.broadcast_to((colour / 127.5 - 1)[:, None, None], (3, 8, 8)), atol=1e-6
        )


@pytest.mark.parametrize(
    ("size", "channels", "shape"), [("6x12", 1, (1, 6, 12)), ((12, 6), 4, (4, 12, 6)), (5, 3, (3, 5, 5))]
)
def test_any_size_and_channels(tmp_path, size, channels, shape):
    data = images(folder(tmp_path, FILES), size=size, channels=channels)
    assert data.shape == shape
    assert everything(data)[0].shape == (8, *shape)


def test_images_in_memory_equal_those_decoded_on_demand(tmp_path):
    path = folder(tmp_path, FILES)
    flips = [True, False] * 4
    held, read = images(path, in_memory=True), images(path, in_memory=False)
    assert torch.equal(held.batch(range(8), flips)[0], read.batch(range(8), flips)[0])


def test_the_memory_limit_decides_what_is_decoded_at_once(tmp_path):
    path = folder(tmp_path, {**FILES, "dog/2.png": b"broken"})
    limit = 8 * 3 * 8 * 8
    assert len(images(path, memory_limit=limit - 1)) == 8  # decoded on demand, so the broken image is not found yet
    with pytest.raises(DataError, match=r"^dog/2\.png in"):
        images(path, memory_limit=limit)


def test_images_at_the_root_are_one_class(tmp_path):
    data = images(folder(tmp_path, {"b.png": jpeg(1), "a.png": jpeg(2)}))
    assert data.class_names == ("all",)
    assert everything(data)[1].tolist() == [0, 0]


def test_all_images_can_be_put_into_one_class(tmp_path):
    data = images(folder(tmp_path, {**FILES, "root.png": jpeg(1)}), num_classes=1)
    assert data.num_classes == 1
    assert everything(data)[1].tolist() == [0] * 9


def test_a_folder_inside_a_zip(tmp_path):
    path = archive(tmp_path / "z.zip", {f"pictures/{name}": content for name, content in FILES.items()})
    with pytest.warns(UserWarning, match=r"pictures.*path=.*z\.zip/pictures"):
        assert images(path).class_names == ("pictures",)
    assert images(f"{path}/pictures").names == images(folder(tmp_path / "f", FILES)).names
    with pytest.raises(DataError, match=r"pict/.*z\.zip"):
        images(f"{path}/pict")


def test_file_names_need_not_be_unicode(tmp_path):
    """File names are bytes, and old ones are often in other encodings."""
    path = folder(tmp_path, {"cat/a.png": jpeg(1)})
    (tmp_path / "cat" / os.fsdecode(b"caf\xe9.png")).write_bytes(jpeg(2))
    data = images(path)
    assert len(data) == 2
    before = data.identity()
    (tmp_path / "cat" / "a.png").unlink()
    assert images(path).identity() != before


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    """Root may list every folder, so the error is raised where os.walk meets the folder."""
    path, real = folder(tmp_path, FILES), os.scandir

    def refuse(place):
        if str(place).endswith("dog"):
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return real(place)

    monkeypatch.setattr(os, "scandir", refuse)
    for on_error in ("raise", "skip"):
        with pytest.raises(DataError, match=r"dog .*Permission denied"):
            images(path, on_error=on_error)


def test_a_path_that_the_system_refuses_is_an_error(tmp_path):
    with pytest.raises(DataError, match="File name too long"):
        images(str(tmp_path / ("x" * 300)))


def test_a_path_has_no_effect_on_shapes(tmp_path):
    with pytest.raises(DataError, match="kind=shapes"):
        open_data(DataConfig(path=str(tmp_path)))


def test_images_decoded_on_demand_are_writable(tmp_path):
    """Grey pixels need no reordering; torch warns about read-only memory, which is an error here."""
    data = images(folder(tmp_path, FILES), channels=1, in_memory=False)
    assert everything(data)[0].shape == (8, 1, 8, 8)


def test_links_are_followed_once(tmp_path):
    folder(tmp_path / "real", {"x.png": jpeg(1)})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "data")
    assert images(str(tmp_path / "data")).names == ["cat/x.png"]


BROKEN = {"cat/b.png": FILES["cat/b.png"][:40], "dog/10.png": b"", "dog/2.png": b"not an image"}


@pytest.mark.parametrize("form", ["folder", "zip"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_broken_files_are_raised_by_name(tmp_path, form, in_memory):
    files = {**FILES, **BROKEN}
    path = folder(tmp_path / "f", files) if form == "folder" else archive(tmp_path / "f.zip", files)
    with pytest.raises(DataError, match=r"^cat/b\.png in .*f(\.zip)?\b"):
        everything(images(path, in_memory=in_memory))


def test_broken_files_are_left_out_when_all_are_decoded(tmp_path):
    with pytest.warns(UserWarning, match=r"3 of 8 .*cat/b\.png, dog/10\.png, dog/2\.png\.$"):
        data = images(folder(tmp_path / "f", {**FILES, **BROKEN}), on_error="skip")
    sound = images(folder(tmp_path / "s", {name: content for name, content in FILES.items() if name not in BROKEN}))
    assert data.names == sound.names
    assert torch.equal(everything(data)[0], everything(sound)[0])
    assert torch.equal(everything(data)[1], everything(sound)[1])


def test_many_broken_files_are_counted_and_some_are_named(tmp_path):
    files = {f"cat/{number}.png": b"x" for number in range(7)} | {"cat/good.png": jpeg(1)}
    with pytest.warns(UserWarning, match=r"7 of 8 .*cat/4\.png .*2"):
        assert len(images(folder(tmp_path, files), on_error="skip")) == 1


def test_a_class_of_broken_files_keeps_its_number(tmp_path):
    files = {"a/x.png": b"x", "b/x.png": jpeg(1)}
    with pytest.warns(UserWarning, match="1 of 2"):
        data = images(folder(tmp_path, files), on_error="skip")
    assert data.class_names == ("a", "b")
    assert everything(data)[1].tolist() == [1]


def test_the_next_readable_image_replaces_a_broken_one_on_demand(tmp_path):
    data = images(folder(tmp_path, {**FILES, **BROKEN}), on_error="skip", in_memory=False)
    assert len(data) == 8
    with pytest.warns(UserWarning, match=r"\.png") as record:
        samples, labels, used = data.fetch(range(8))
    assert used == [0, 1, 2, 4, 4, 5, 0, 0]
    assert labels.tolist() == [0, 1, 2, 2, 2, 3, 0, 0]
    assert torch.equal(samples[3], samples[4])
    messages = [str(entry.message) for entry in record]
    assert [message.split(" ", 1)[0] for message in messages] == ["1", "2", "3"]
    for message, name in zip(messages, sorted(BROKEN), strict=True):
        assert name in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(data.batch(range(8))[0], samples)  # each is reported once


@pytest.mark.parametrize("in_memory", [True, False])
def test_only_broken_files_are_an_error(tmp_path, in_memory):
    path = folder(tmp_path, {"a/1.png": b"x", "a/2.png": b"y"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=" 2 "):
            everything(images(path, on_error="skip", in_memory=in_memory))


def test_damage_inside_a_zip_is_named(tmp_path):
    path = Path(archive(tmp_path / "z.zip", FILES))
    content = bytearray(path.read_bytes())
    place = content.index(FILES["dog/1.png"])
    content[place + 20] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"^dog/1\.png in .*z\.zip .*CRC-32"):
        images(str(path))


def test_a_missing_file_is_named(tmp_path):
    data = images(folder(tmp_path, FILES), in_memory=False)
    (tmp_path / "dog" / "1.png").unlink()
    with pytest.raises(DataError, match=r"dog/1\.png in .*No such file"):
        data[5]


def test_wrong_paths_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.txt").write_text("hello")
    (tmp_path / "cut.zip").write_bytes(Path(archive(tmp_path / "z.zip", FILES)).read_bytes()[:300])
    archive(tmp_path / "none.zip", {"a.txt": b""})
    for name in ("nowhere", "empty", "words.txt", "cut.zip", "none.zip"):
        with pytest.raises(DataError, match=re.escape(name)):
            images(str(tmp_path / name))
    with pytest.raises(DataError, match="kind=images"):
        open_data(DataConfig(kind="images", size=8))
    with pytest.raises(DataError, match=r"data\.size"):
        open_data(DataConfig(kind="images", path=str(tmp_path)))


def test_a_wrong_number_of_classes_is_named(tmp_path):
    path = folder(tmp_path, FILES)
    assert images(path, num_classes=4).num_classes == 4
    with pytest.raises(DataError, match=r"4 .*\(ant, ant-hill, cat, dog\).*num_classes=5"):
        images(path, num_classes=5)
    folder(tmp_path, {"preview.png": jpeg(1)})
    with pytest.raises(DataError, match=r"1 .*preview\.png.*num_classes=1"):
        images(path)


def test_indices_outside_are_refused(tmp_path):
    data = images(folder(tmp_path, FILES))
    for index in (-1, 8):
        with pytest.raises(IndexError, match=f"{index} .*0 .. 7"):
            data[index]


@pytest.mark.parametrize(
    ("method", "in_memory"),
    [
        ("fork", True),
        ("spawn", False),
        pytest.param("fork", False, marks=pytest.mark.slow),
        pytest.param("spawn", True, marks=pytest.mark.slow),
    ],
)
def test_worker_processes_read_the_same_zip(tmp_path, method, in_memory):
    data = images(archive(tmp_path / "z.zip", FILES), in_memory=in_memory)
    stream = BatchStream(data, 3, seed=0, flip=True)
    expected = [stream[step] for step in range(6)]  # opens the archive in this process first
    workers = 2 if method == "fork" else 1
    loader = DataLoader(stream, batch_size=None, sampler=range(6), num_workers=workers, multiprocessing_context=method)
    for (samples, labels), (want, numbers) in zip(loader, expected, strict=True):
        assert torch.equal(samples, want)
        assert torch.equal(labels, numbers)


def test_a_pickled_data_set_reads_the_same_images(tmp_path):
    data = images(archive(tmp_path / "z.zip", FILES), in_memory=False)
    first = everything(data)[0]
    assert torch.equal(everything(pickle.loads(pickle.dumps(data)))[0], first)


def first_readable(data: Dataset, indices: list[int]) -> str:
    """The name of the image that is read for the first of these."""
    return data.names[data.fetch(indices)[2][0]]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("in_memory", [True, False])
def test_broken_streams_in_a_zip_are_named_and_skipped_as_asked(tmp_path, method, in_memory):
    """Decompressors have errors of their own: zlib.error, OSError, LZMAError."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "BMP")
    path = tmp_path / "z.zip"
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("cat/a.bmp", buffer.getvalue())
        file.writestr("cat/b.bmp", buffer.getvalue())
    content = bytearray(path.read_bytes())
    content[200:260] = b"\xff" * 60
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"^cat/a\.bmp in .*z\.zip"):
        everything(images(str(path), in_memory=in_memory))
    with pytest.warns(UserWarning, match=r"cat/a\.bmp"):
        assert first_readable(images(str(path), in_memory=in_memory, on_error="skip"), [0]) == "cat/b.bmp"
