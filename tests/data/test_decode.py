"""Decoding image files of every mode and orientation, and broken ones."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tokdyn.data.decode import decode, fit, quiet
from tokdyn.errors import DataError

SIZE = (12, 16)


def picture(seed: int = 0, levels: int = 256) -> np.ndarray:
    """Draw random colours (rows, columns, 3) uint8."""
    return (np.random.default_rng(seed).integers(0, levels, (*SIZE, 3)) * (255 // (levels - 1))).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """Write a PNG by hand, because Pillow does not write every kind."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def read(content: bytes, channels: int = 3, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Decode to pixels (rows, columns, channels)."""
    with quiet():
        pixels = decode(content, "x.png", size, channels)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (channels, *size)
    return pixels.transpose(1, 2, 0)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_colour_is_exact_in_lossless_formats(kind):
    settings = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(read(encoded(Image.fromarray(picture()), kind, **settings)), picture())


def test_jpeg_is_close():
    smooth = np.broadcast_to(np.linspace(0, 255, SIZE[1])[None, :, None], (*SIZE, 3)).astype(np.uint8)
    assert abs(read(encoded(Image.fromarray(smooth), "JPEG", quality=95)).astype(int) - smooth).max() <= 6


def test_grey_becomes_three_equal_channels_and_back():
    grey = picture()[..., 0]
    content = encoded(Image.fromarray(grey))
    np.testing.assert_array_equal(read(content), np.stack([grey] * 3, -1))
    np.testing.assert_array_equal(read(content, 1)[..., 0], grey)
    colour = picture().astype(float)
    luma = colour @ [0.299, 0.587, 0.114]  # ITU-R 601
    assert abs(read(encoded(Image.fromarray(picture())), 1)[..., 0] - luma).max() <= 1


def test_black_and_white():
    bits = picture()[..., 0] > 127
    np.testing.assert_array_equal(read(encoded(Image.fromarray(bits)), 1)[..., 0], bits * 255)


def test_transparent_pixels_are_put_on_white():
    alpha = picture(1)[..., 0]
    rgba = np.dstack([picture(), alpha])
    content = encoded(Image.fromarray(rgba, "RGBA"))
    assert abs(read(content) - on_white(picture(), alpha)).max() <= 1
    np.testing.assert_array_equal(read(content, 4), rgba)
    grey = np.dstack([picture()[..., 0], alpha])
    content = encoded(Image.fromarray(grey, "LA"))
    assert abs(read(content, 1) - on_white(grey[..., :1], alpha)).max() <= 1


def test_opaque_images_get_a_full_alpha():
    np.testing.assert_array_equal(read(encoded(Image.fromarray(picture())), 4)[..., 3], 255)


def test_palette_with_and_without_transparency():
    image = Image.fromarray(picture(levels=4)).convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(read(encoded(image)), expected)
    np.testing.assert_array_equal(read(encoded(image, "GIF")), expected)
    clear = int(np.asarray(image)[0, 0])
    transparent = read(encoded(image, transparency=clear))
    np.testing.assert_array_equal(transparent, np.where((np.asarray(image) == clear)[..., None], 255, expected))


def test_a_transparent_colour_key():
    colour = picture()
    key = tuple(int(value) for value in colour[3, 4])
    expected = np.where((colour == key).all(-1)[..., None], 255, colour)
    np.testing.assert_array_equal(read(encoded(Image.fromarray(colour), transparency=key)), expected)


def test_cmyk():
    ink = 255 - picture()  # without black ink, the complement of the colour
    image = Image.merge("CMYK", [*Image.fromarray(ink).split(), Image.new("L", SIZE[::-1], 0)])
    assert abs(read(encoded(image, "TIFF")).astype(int) - picture()).max() <= 1
    flat = Image.new("CMYK", SIZE[::-1], (0, 255, 255, 0))  # red
    assert abs(read(encoded(flat, "JPEG", quality=95)).astype(int) - (255, 0, 0)).max() <= 4


def test_sixteen_bits():
    grey = picture()[..., 0]
    wide = grey.astype(np.uint16) * 257  # 0 .. 65535 as 0 .. 255
    np.testing.assert_array_equal(read(encoded(Image.fromarray(wide)), 1)[..., 0], grey)
    np.testing.assert_array_equal(read(encoded(Image.fromarray(wide), "TIFF"), 3)[..., 1], grey)
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).astype(">u2").tobytes() for row in picture().reshape(SIZE[0], -1))
    np.testing.assert_array_equal(read(png(SIZE[1], SIZE[0], 16, 2, rows)), picture())


def test_integers_and_floats():
    grey = picture()[..., 0]
    np.testing.assert_array_equal(read(encoded(Image.fromarray(grey.astype(np.int32) * 257), "TIFF"), 1)[..., 0], grey)
    unit = grey.astype(np.float32) / 255
    np.testing.assert_array_equal(read(encoded(Image.fromarray(unit), "TIFF"), 1)[..., 0], grey)
    np.testing.assert_array_equal(read(encoded(Image.fromarray(unit * 255), "TIFF"), 1)[..., 0], grey)
    with pytest.raises(DataError, match=r"^x\.png\b"):
        read(encoded(Image.fromarray(unit * np.float32("nan")), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation(orientation, kind):
    image = Image.fromarray(picture())
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(image, kind, exif=exif)
    with Image.open(io.BytesIO(content)) as stored:
        expected = ImageOps.exif_transpose(stored)
    size = (expected.height, expected.width)
    assert size == (SIZE if orientation < 5 else SIZE[::-1])
    np.testing.assert_array_equal(read(content, size=size), np.asarray(expected))


def test_a_damaged_or_absurd_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 77
    image = Image.fromarray(picture())
    np.testing.assert_array_equal(read(encoded(image, exif=exif)), picture())
    np.testing.assert_array_equal(read(encoded(image, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")), picture())


def test_square_targets_are_prepared_as_for_dit():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 101, 3), dtype=np.uint8))
    # By hand: 101x70 -> 50x35 -> (25x17: both sides at least 16) -> 24x16 -> centre.
    by_hand = image.resize((50, 35), Image.Resampling.BOX).resize((25, 17), Image.Resampling.BOX)
    by_hand = by_hand.resize((24, 16), Image.Resampling.BICUBIC).crop((4, 0, 20, 16))
    np.testing.assert_array_equal(np.asarray(fit(image, (16, 16))), np.asarray(by_hand))


@settings(max_examples=60)
@given(*[st.integers(1, 90)] * 4)
def test_any_size_can_be_fitted_to_any_size(width, height, rows, columns):
    image = fit(Image.new("RGB", (width, height), (9, 99, 199)), (rows, columns))
    assert image.size == (columns, rows)
    assert image.getcolors() == [(rows * columns, (9, 99, 199))]  # nothing but the picture is in it


@pytest.mark.parametrize("turned", [False, True])
def test_an_elongated_image_is_cropped_before_it_is_resized(turned, monkeypatch):
    """1x60000 pixels resized to cover 128x128 would be 128x7680000; the result equals that of the middle part."""
    line = np.random.default_rng(0).integers(0, 256, (1, 60_000, 3), dtype=np.uint8)
    line = line.transpose(1, 0, 2) if turned else line
    middle = line[29_990:30_010] if turned else line[:, 29_990:30_010]
    real, made = Image.Image.resize, []

    def resize(image, size, *settings, **named):
        made.append(size[0] * size[1])
        return real(image, size, *settings, **named)

    monkeypatch.setattr(Image.Image, "resize", resize)
    found = np.asarray(fit(Image.fromarray(line), (128, 128)))
    assert max(made) <= 64 * 128 * 128
    expected = np.asarray(fit(Image.fromarray(np.ascontiguousarray(middle)), (128, 128)))
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_the_centre_is_kept_in_both_directions():
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = 255
    assert np.asarray(fit(Image.fromarray(wide), (20, 20))).min() == 255
    assert np.asarray(fit(Image.fromarray(wide.transpose(1, 0, 2)), (20, 20))).min() == 255
    assert np.asarray(fit(Image.fromarray(wide), (20, 60))).tolist() == wide.tolist()


def test_an_image_of_the_right_size_is_not_touched():
    assert read(encoded(Image.fromarray(picture()))).tolist() == picture().tolist()


JPEG = encoded(Image.fromarray(picture()).resize((64, 64)), "JPEG")
PNG = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))


BROKEN = {
    "empty": b"",
    "text": b"these are words",
    "half a JPEG": JPEG[: len(JPEG) // 2],
    "the head of a JPEG": JPEG[:40],
    "half a PNG": PNG[: len(PNG) // 2],
    "a PNG with zeros at its end": PNG[:-1000] + b"\0" * 1000,
    "a PNG with a hole": PNG[:1000] + bytes(50) + PNG[1050:],
    "the head of a TIFF": encoded(Image.fromarray(picture()), "TIFF")[:100],
    "the head of a GIF": encoded(Image.fromarray(picture()), "GIF")[:100],
    "the head of a WEBP": encoded(Image.fromarray(picture()), "WEBP")[:40],
    "the head of a BMP": encoded(Image.fromarray(picture()), "BMP")[:90],
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_broken_files_are_named(content):
    with quiet(), pytest.raises(DataError, match=r"^cats/7\.jpg\b.*on_error=skip") as caught:
        decode(content, "cats/7.jpg", SIZE, 3)
    assert " object at 0x" not in str(caught.value)


def test_without_a_size_images_keep_their_own():
    exif = Image.Exif()
    exif[0x0112] = 6
    with quiet():
        assert decode(encoded(Image.fromarray(picture())), "x.png", None, 3).shape == (3, *SIZE)
        assert decode(encoded(Image.fromarray(picture()), exif=exif), "x.png", None, 1).shape == (1, *SIZE[::-1])


def test_decompression_bombs_are_refused_by_name():
    bomb = png(60_000, 60_000, 1, 0, b"\0" * 100)
    with pytest.raises(DataError, match=r"^cats/7\.png\b.*3600000000"):
        decode(bomb, "cats/7.png", SIZE, 3)


RAMP = np.arange(192, dtype=np.int64).reshape(SIZE)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (RAMP.astype(np.int32), "191"),  # 0 .. 255 in 32 bits: black, if white were 65535
        ((RAMP * 21).astype(np.uint16), "4011"),  # 12 bits in 16
        ((RAMP * 300.0).astype(np.float32), "57300"),  # 16 bits as floats: white
        ((RAMP - 90.0).astype(np.float32), "-90"),
        ((RAMP * 10**6).astype(np.int32), "1.91e\\+08"),
        ((RAMP * 50 - 900).astype(np.int32), "-900"),
    ],
    ids=str,
)
def test_tiffs_whose_white_is_unknown_are_refused(values, named):
    with pytest.raises(DataError, match=rf"^x\.png\b.*{named}"):
        read(encoded(Image.fromarray(values), "TIFF"), 1)


@pytest.mark.parametrize(
    ("values", "tag", "white"),
    [
        (RAMP.astype(np.int32), 281, 255),
        ((RAMP * 21).astype(np.uint16), 281, 4095),
        ((RAMP * 300.0).astype(np.float32), 341, 65535.0),
    ],
    ids=["int32", "uint16", "float"],
)
def test_tiffs_that_say_their_white_are_scaled_by_it(values, tag, white):
    content = encoded(Image.fromarray(values), "TIFF", tiffinfo={tag: white})
    np.testing.assert_array_equal(read(content, 1)[..., 0], np.rint(values * (255.0 / white)).astype(np.uint8))


def test_black_pictures_of_any_type_are_black():
    for kind in (np.int32, np.uint16, np.float32):
        assert not read(encoded(Image.fromarray(np.zeros(SIZE, kind)), "TIFF"), 1).any()


def test_a_dark_png_of_16_bits_is_dark():
    """PNG says that white is 65535."""
    wide = (RAMP * 21).astype(np.uint16)
    np.testing.assert_array_equal(read(encoded(Image.fromarray(wide)), 1)[..., 0], np.rint(wide / 257.0))


def test_files_of_other_formats_are_refused_whatever_they_are_called():
    """Pillow would run ghostscript for the first."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PCX")
    for content in (postscript, buffer.getvalue()):
        with pytest.raises(DataError, match=r"^x\.png\b"):
            read(content)
