"""Make hostile files that are not text: weights, arrays, archives, images and statistics."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

MARK = "tokdyn-was-let-in"
"""Name of the file that a payload would create, in the current folder."""


class Payload:
    """Creates a file when a careless reader unpickles it."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path(MARK),)


class Evaluated:
    """Runs code when a careless reader unpickles it."""

    def __reduce__(self) -> Any:
        return eval, (f"open({MARK!r}, 'w').close()",)


def pickled(value: Any, zipped: bool = True) -> bytes:
    """The bytes that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def expanded() -> dict[str, torch.Tensor]:
    """Tensors of 4 TB, all elements of which are one."""
    return {"blocks.0.attn.qkv.weight": torch.zeros(1).expand(10**6, 10**6)}


def nested(levels: int) -> dict[str, Any]:
    """Mappings within each other."""
    value: dict[str, Any] = {"x": torch.zeros(1)}
    for _ in range(levels):
        value = {"ema": value}
    return value


def deep(levels: int) -> bytes:
    """A pickle of lists within each other, written by hand because pickle cannot."""
    return b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b"."


def recompressed(content: bytes, padding: int) -> bytes:
    """A file of torch with compressed entries, one of which grows by `padding` bytes of zeros when it is unpacked."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            data = old.read(entry)
            more = bytes(padding) if entry.filename.endswith("data/0") else b""
            new.writestr(zipfile.ZipInfo(entry.filename), data + more, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def checkpoints() -> Iterator[tuple[str, bytes | str]]:
    """Files of weights."""
    for zipped in (True, False):
        for trap in (Payload, Evaluated):
            yield (
                f"{trap.__name__.lower()}-{zipped}.pt",
                pickled({"ema": {"x": torch.zeros(1)}, "args": trap()}, zipped),
            )
    for protocol in (0, 2, 4):
        yield f"raw-{protocol}.pt", pickle.dumps(Payload(), protocol=protocol)
    yield "plain-pickle.pt", pickle.dumps({"weights": [1.0, 2.0]}, protocol=2)
    yield "numpy.pt", pickle.dumps({"x": np.zeros(3)}, protocol=2)
    yield "reduced.pt", b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."
    yield (
        "stacked.pt",
        b"\x80\x02cbuiltins\ngetattr\ncbuiltins\n__import__\nX\x02\x00\x00\x00os\x85RX\x06\x00\x00\x00system\x86R.",
    )
    yield "build.pt", b"\x80\x02cargparse\nNamespace\n)\x81}X\x06\x00\x00\x00lookupK\x01sb."
    itself: dict[str, Any] = {}
    itself["ema"] = itself
    yield "itself.pt", pickled(itself)
    yield "nested.pt", pickled(nested(100))
    yield "deep.pt", deep(3000)
    yield "deeper.pt", deep(20_000)
    yield "expanded.pt", pickled(expanded())
    yield "expanded-old.pt", pickled(expanded(), False)
    yield "sparse.pt", pickled({"blocks.0.attn.qkv.weight": torch.zeros(4, 4).to_sparse()})
    yield "complex.pt", pickled({"blocks.0.attn.qkv.weight": torch.zeros(4, 4, dtype=torch.complex64)})
    yield "config-tensor.pt", pickled({"ema": {"x": torch.zeros(1)}, "config": torch.zeros(3), "args": torch.zeros(3)})
    yield "keys.pt", pickled({(1, 2): torch.zeros(1), 3: torch.zeros(1)})
    yield "compressed.pt", recompressed(pickled({"x": torch.zeros(8)}), 2**25)
    yield "block-digits.pt", pickled({f"blocks.{'9' * 5000}.attn.qkv.weight": torch.zeros(1)})
    block = {
        "blocks.0.attn.qkv.weight": torch.zeros(24, 8), "blocks.0.mlp.fc1.weight": torch.zeros(16, 8),
        "y_embedder.embedding_table.weight": torch.zeros(11, 8), "x_embedder.proj.weight": torch.zeros(8, 4, 2, 2),
        "final_layer.linear.weight": torch.zeros(32, 8),
    }  # fmt: skip
    for name, more in {
        "block-number": {"blocks.999999999.x": torch.zeros(1)}, "block-gap": {"blocks.900.x": torch.zeros(1)},
        "block-huge": {f"blocks.{'9' * 5000}.x": torch.zeros(1)},
        "width-zero": {"blocks.0.attn.qkv.weight": torch.zeros(0, 0)},
        "classes-zero": {"y_embedder.embedding_table.weight": torch.zeros(0, 8)},
        "patch-zero": {"x_embedder.proj.weight": torch.zeros(8, 4, 0, 0)},
        "positions-zero": {"pos_embed": torch.zeros(1, 0, 8)}, "positions-flat": {"pos_embed": torch.zeros(16, 8)},
        "positions-nan": {"pos_embed": torch.full((1, 16, 8), float("nan"))},
        "scalar": {"blocks.0.mlp.fc1.weight": torch.zeros(())},
        "eight-bits": {"a": torch.zeros((), dtype=torch.int8), "a.row_scale": torch.zeros(3)},
    }.items():  # fmt: skip
        yield f"{name}.safetensors", save({**block, **more})
    yield "notes-digits.safetensors", save(block, {"_tokdyn": f'{{"num_heads": {"9" * 5000}}}'})
    yield "notes-deep.safetensors", save(block, {"_tokdyn": "[" * 20_000})
    yield "notes-text.safetensors", save(block, {"_tokdyn": '{"num_heads": "two"}'})
    yield "notes-size.safetensors", save(block, {"_tokdyn": '{"num_heads": 2, "sample_size": 1000000000}'})
    yield "notes-list.safetensors", save(block, {"_tokdyn": "[1]"})
    yield "header-long.safetensors", struct.pack("<Q", 2**63) + b"{}"
    yield "header-deep.safetensors", struct.pack("<Q", 20_000) + b"[" * 20_000
    yield (
        "header-offsets.safetensors",
        header({"x": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]}}, bytes(4)),
    )
    yield (
        "header-negative.safetensors",
        header({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
    )
    yield "header-dtype.safetensors", header({"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))
    yield (
        "header-overlap.safetensors",
        header({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in ("x", "y")}, bytes(4)),
    )
    yield "index-outside.safetensors.index.json", '{"weight_map": {"x": "../../../etc/passwd"}}'
    yield "index-deep.safetensors.index.json", "[" * 20_000
    yield "index-nul.safetensors.index.json", '{"weight_map": {"x": "a\\u0000b"}}'
    yield "index-list.safetensors.index.json", '{"weight_map": [1]}'


def array(shape: Any, dtype: str = "|u1", data: bytes = b"", fortran: bool = False) -> bytes:
    """An array of an npz with a header of one's own."""
    text = repr({"descr": dtype, "fortran_order": fortran, "shape": shape}).encode()
    text += b" " * (118 - len(text) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def archive(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in files.items():
            file.writestr(zipfile.ZipInfo(name), content, method)  # of 1980, so that the bytes stay the same
    return buffer.getvalue()


def arrays() -> Iterator[tuple[str, bytes | str]]:
    """Files of images and of statistics: npz."""
    pixels = bytes(2 * 4 * 4 * 3)
    for name, content in {
        "negative": array((-1, 4, 4, 3)), "huge": array((10**12, 4, 4, 3), data=pixels),
        "wide": array((2, 10**6, 10**6, 3)),
        "overflow": array((2**62, 2**62, 2, 3)), "text": array("(2, 4, 4, 3)", data=pixels),
        "float": array((2.5, 4, 4, 3)),
        "objects": array((2, 4, 4, 3), "|O", pixels), "fields": array((2, 4, 4, 3), "|V0", pixels),
        "magic": b"\x93NUMPX" + pixels,
        "code": b"\x93NUMPY\x01\x00\x40\x00" + b"__import__('pathlib').Path('x').touch()".ljust(63) + b"\n",
        "deep": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 8999 + b"\n", "empty": b"",
        "short": array((9, 4, 4, 3), data=pixels),
    }.items():  # fmt: skip
        yield f"{name}.npz", archive({"arr_0.npy": content})
    sound = array((2, 4, 4, 3), data=pixels)
    yield "labels-huge.npz", archive({"arr_0.npy": sound, "arr_1.npy": array((10**12,), "<i8")})
    yield "labels-objects.npz", archive({"arr_0.npy": sound, "arr_1.npy": array((2,), "|O", pickle.dumps(Payload()))})
    yield "nothing.npz", archive({})
    yield "other.npz", archive({"x.npy": sound})
    yield "moments-huge.npz", archive({"mu.npy": array((10**12,), "<f8"), "sigma.npy": array((10**6, 10**6), "<f8")})
    yield "moments-objects.npz", archive({"mu.npy": array((1,), "|O", pickle.dumps(Payload())), "sigma.npy": sound})
    whole = bytearray(archive({"arr_0.npy": np.random.default_rng(0).bytes(400)}))
    whole[60:90] = bytes(30)
    yield "broken-stream.npz", bytes(whole)


def picture(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (8, 8), **options: Any) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


def noise() -> bytes:
    """An image that does not compress."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(buffer, "BMP")
    return buffer.getvalue()


def zips() -> Iterator[tuple[str, bytes | str]]:
    """Zips of images."""
    for name, method in (("deflate", zipfile.ZIP_DEFLATED), ("bzip2", zipfile.ZIP_BZIP2), ("lzma", zipfile.ZIP_LZMA)):
        content = bytearray(archive({"a/x.png": noise()}, method))
        content[200:260] = b"\xff" * 60
        yield f"broken-{name}.zip", bytes(content)
    content = bytearray(archive({"a/x.png": noise()}, zipfile.ZIP_LZMA))
    content[41:46] = b"\xff" * 5  # properties of the LZMA stream
    yield "broken-lzma-header.zip", bytes(content)
    claimed = bytearray(archive({"a/x.png": noise()}))
    place = claimed.rindex(b"PK\x01\x02")
    claimed[place + 24 : place + 28] = struct.pack("<I", 3 * 2**30)
    yield "claims-3-gb.zip", bytes(claimed)
    bomb = bytearray(archive({"a/x.png": bytes(2**20)}, zipfile.ZIP_BZIP2))
    yield "zeros.zip", bytes(bomb)
    encrypted = bytearray(archive({"a/x.png": picture()}))
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[encrypted.index(mark) + at] |= 1
    yield "encrypted.zip", bytes(encrypted)
    unknown = bytearray(archive({"a/x.png": picture()}))
    for mark, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        unknown[unknown.index(mark) + at] = 99
    yield "unknown-method.zip", bytes(unknown)
    cut = archive({"a/x.png": picture()})
    yield "cut.zip", cut[: len(cut) // 2]
    yield "only-an-end.zip", b"PK\x05\x06" + b"\xff" * 18
    yield "text.zip", "no zip"
    yield "no-images.zip", archive({"../../etc/passwd": b"x"})
    yield "escape.zip", archive({"a/\x1b[2J.png": b"x"})


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, rows: bytes, bits: int = 1, colour: int = 0, more: bytes = b"") -> bytes:
    """A PNG by hand."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def tiff(values: Any, **tags: Any) -> bytes:
    """A grey TIFF."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF", **tags)
    return buffer.getvalue()


def images() -> Iterator[tuple[str, bytes | str]]:
    """Image files."""
    yield "13000.png", png(13_000, 13_000, bytes(13_000 * 1_626))
    yield "60000.png", png(60_000, 60_000, b"\0" * 100)
    yield "zero.png", png(0, 8, b"\0")
    yield "negative.png", png(2**31 - 1, 1, b"\0")
    yield "text-chunk.png", png(8, 8, bytes(16), more=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**7), 9)))
    yield "profile-chunk.png", png(8, 8, b"", more=chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(10**7), 9)))
    yield "no-data.png", png(8, 8, b"")
    yield "palette.png", png(8, 8, bytes(72), 8, 3)
    yield "postscript.png", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) (w) file\n%%EOF\n"
    yield "program.bmp", "#!/bin/sh\ntouch " + MARK + "\n"
    yield "svg.png", "<svg xmlns='http://www.w3.org/2000/svg'/>"
    ramp = np.arange(64).reshape(8, 8)
    yield "int32-of-bytes.tif", tiff((ramp * 4).astype(np.int32))
    yield "uint16-of-12-bits.tif", tiff((ramp * 64).astype(np.uint16))
    yield "float-of-16-bits.tif", tiff((ramp * 1000.0).astype(np.float32))
    yield "float-negative.tif", tiff((ramp - 30.0).astype(np.float32))
    yield "int32-huge.tif", tiff((ramp * 10**6).astype(np.int32))
    for kind in ("PNG", "TIFF", "GIF", "BMP", "PPM", "JPEG", "WEBP", "JPEG2000", "TGA"):
        whole = picture(kind)
        yield f"half.{kind.lower()}", whole[: max(12, len(whole) // 2)]
    huge = bytearray(picture("BMP"))
    huge[18:26] = struct.pack("<ii", 10**6, 10**6)
    yield "huge.bmp", bytes(huge)
    gif = bytearray(picture("GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    yield "huge.gif", bytes(gif)
    yield "huge.ppm", b"P6 1000000 1000000 255\n"
    yield "digits.ppm", b"P6 " + b"9" * 5000 + b" 1 255\n"


def statistics() -> Iterator[tuple[str, bytes | str]]:
    """Cached statistics of `tokdyn eval`."""
    tensors = {"features": torch.zeros(2, 3), "mu": torch.zeros(3), "sigma": torch.zeros(3, 3)}
    yield "none.safetensors", save(tensors)
    yield "deep.safetensors", save(tensors, {"tokdyn": "[" * 20_000})
    yield "digits.safetensors", save(tensors, {"tokdyn": '{"format": ' + "9" * 5000 + "}"})
    yield "scalar.safetensors", save({name: torch.zeros(()) for name in tensors}, {"tokdyn": "{}"})
    yield "cut.safetensors", save(tensors)[:40]
