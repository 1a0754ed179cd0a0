"""The data section of a recipe."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from tokdyn.data import DataConfig, FeaturesConfig
from tokdyn.data.config import rows_and_columns


@pytest.mark.parametrize(
    ("given", "size"), [(32, 32), ("32", 32), ("32x48", (32, 48)), ([32, 48], (32, 48)), (None, None)]
)
def test_ways_to_write_a_size(given, size):
    config = DataConfig(size=given)
    assert config.size == size
    assert DataConfig.model_validate_json(config.model_dump_json()) == config


def test_rows_and_columns():
    assert rows_and_columns(8) == (8, 8)
    assert rows_and_columns((8, 9)) == (8, 9)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "video"},
        {"size": 0},
        {"size": "1x2x3"},
        {"size": (8, -8)},
        {"channels": 2},
        {"on_error": "ignore"},
        {"num_classes": 0},
        {"length": 0},
        {"memory_limit": -1},
        {"colour": "red"},
    ],
)
def test_wrong_values_and_unknown_keys_are_refused(settings):
    with pytest.raises(ValidationError):
        DataConfig(**settings)


@pytest.mark.parametrize("size", [0, -3, True, "16x", "x", "1x2x3", (8, 0), 8.5, "big", []])
def test_an_invalid_size_is_one_error_that_shows_the_form(size):
    with pytest.raises(ValidationError) as caught:
        DataConfig(size=size)
    (error,) = caught.value.errors()
    assert error["loc"] == ("size",)
    assert "ROWSxCOLUMNS" in error["msg"]


def test_configs_cannot_be_changed():
    with pytest.raises(ValidationError):
        DataConfig().size = 3
    with pytest.raises(ValidationError):
        FeaturesConfig(out="x").out = "y"


def test_features_read_each_image_once():
    config = FeaturesConfig(out="x", path="pictures", size="8x16", on_error="skip", num_classes=3)
    expected = DataConfig(kind="images", path="pictures", size=(8, 16), on_error="skip", num_classes=3, in_memory=False)
    assert config.data == expected


def test_the_data_package_does_not_load_diffusers():
    code = "import sys, tokdyn.data; sys.exit(any(m in sys.modules for m in ('diffusers', 'accelerate', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
