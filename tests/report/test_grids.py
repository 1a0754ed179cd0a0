"""Grids are exact to the pixel: every image is in its place, unchanged but for its size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tokdyn.data.base import to_signed
from tokdyn.errors import InputError
from tokdyn.report.grids import image_grid
from tokdyn.report.pixels import to_pixels, write_png

MARGIN, GAP = 12, 4


def solid(count: int, height: int = 8, width: int = 8) -> np.ndarray:
    """Make images of one colour each, all different."""
    images = np.zeros((count, height, width, 3), dtype=np.uint8)
    images[..., 0] = np.arange(count)[:, None, None] * 3
    images[..., 2] = 200
    return images


@given(count=st.integers(1, 20), columns=st.none() | st.integers(1, 7), scale=st.integers(1, 3))
def test_every_image_is_in_its_place(count, columns, scale):
    page = image_grid(solid(count), columns, scale=scale)
    used = min(count, columns or int(np.ceil(np.sqrt(count))))
    for index in range(count):
        y = MARGIN + index // used * (8 * scale + GAP)
        x = MARGIN + index % used * (8 * scale + GAP)
        assert (page[y : y + 8 * scale, x : x + 8 * scale] == solid(count)[index, 0, 0]).all()
        assert (page[y - 1, x] == 255).all()


def test_small_images_are_enlarged_without_smoothing_and_large_ones_are_not():
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    page = image_grid(image)
    assert np.array_equal(page[MARGIN:-MARGIN, MARGIN:-MARGIN], image[0].repeat(3, 0).repeat(3, 1))
    assert image_grid(solid(1, 256, 256)).shape == (256 + 2 * MARGIN, 256 + 2 * MARGIN, 3)


def test_texts_enlarge_the_page():
    plain = image_grid(solid(6), 3)
    titled = image_grid(solid(6), 3, ["a very long caption that cannot fit"] * 6, ["row"] * 2, ["column"] * 3, "Title")
    assert titled.shape[0] > plain.shape[0]
    assert titled.shape[1] > plain.shape[1]
    assert (titled != 255).sum() > (plain != 255).sum()


@pytest.mark.parametrize("name", ["日本", "caf\udce9", "$5$ \\frac", "a\nb"])
def test_any_name_can_be_drawn(name):
    """Folder names become captions, whatever the file system holds."""
    page = image_grid(solid(2), 2, [name] * 2, [name], [name] * 2, name)
    assert page.shape[0] > image_grid(solid(2), 2).shape[0]


@pytest.mark.parametrize("texts", [{"captions": ["a"]}, {"row_titles": ["a"]}, {"column_titles": ["a"] * 4}])
def test_wrong_number_of_texts_is_refused(texts):
    with pytest.raises(InputError, match=next(iter(texts))):
        image_grid(solid(6), 3, **texts)


def test_nothing_to_show_is_refused():
    with pytest.raises(InputError, match=r"\(0, 8, 8, 3\)"):
        image_grid(solid(0))


def test_bytes_survive_conversion_to_model_inputs_and_back():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()
    assert np.array_equal(to_pixels(to_signed(levels, None)), levels.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_any_number_of_channels_is_shown_in_colour_and_clamped(channels):
    pixels = to_pixels(torch.tensor([-3.0, 5.0]).view(2, 1, 1, 1).expand(2, channels, 2, 2))
    assert pixels.shape == (2, 2, 2, 3)
    assert pixels[0].max() == 0
    assert pixels[1].min() == 255


def test_two_channels_are_refused():
    with pytest.raises(InputError, match=r"\(1, 2, 4, 4\)"):
        to_pixels(torch.zeros(1, 2, 4, 4))


def test_png_is_written_whole(tmp_path):
    path = write_png(solid(1)[0], tmp_path / "deep" / "a.png")
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), solid(1)[0])
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]
