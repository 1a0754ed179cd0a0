"""Settings of sampling: how they are read, class names, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.sampling import FACTS, QUICK, tiny
from tokdyn.errors import InputError, RecipeError
from tokdyn.sample import SampleConfig, sample
from tokdyn.sample.job import prepare
from tokdyn.train.snapshot import save_model


def test_the_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert SampleConfig(model="x", out="~/pictures").out == tmp_path / "pictures"


def test_a_name_that_looks_like_a_number_is_a_name(tmp_path):
    """Folders called 1 to 4 are common; `classes=1` and `classes=1,2` must agree."""
    save_model(tiny(0), tmp_path / "saved", {**FACTS, "class_names": ["1", "2", "3", "4"]})
    for classes, expected in (("1", (0,)), (1, (0,)), ("1,2", (0, 1)), ([4], (3,)), ("0", (0,)), ("none", (4,))):
        job = prepare(SampleConfig(model=str(tmp_path / "saved"), classes=classes, device="cpu"))
        assert job.classes == expected


def test_the_name_of_a_run_stays_below_samples(tmp_path):
    for name in ("../../elsewhere", "/elsewhere", "elsewhere"):
        save_model(tiny(0), tmp_path / "saved", {**FACTS, "name": name})
        assert prepare(SampleConfig(model=str(tmp_path / "saved"), device="cpu")).out == Path("samples/elsewhere")


@pytest.mark.parametrize(("clip", "expected"), [(None, True), (True, True), (False, False)])
def test_predictions_of_pixels_are_clipped_unless_set_otherwise(saved, clip, expected):
    job = prepare(SampleConfig(model=str(saved), clip=clip, device="cpu"))
    assert job.clip is expected
    assert job.config.sampler(0.0, job.clip).clip is expected


@pytest.mark.parametrize(
    ("settings", "error", "values"),
    [
        ({"classes": "bare"}, RecipeError, " bare .* bear"),
        ({"classes": "zzz"}, RecipeError, "zzz .*apple, bear, car, dog"),
        ({"classes": 4}, RecipeError, " 4 .*0 to 3"),
        ({"classes": ""}, RecipeError, "classes"),
        ({"device": "toaster"}, InputError, "device=toaster"),
        ({"scheduler": "euler"}, RecipeError, "scheduler=euler .*noise"),
        ({"steps": 2000}, RecipeError, "1 to 1000 .*2000"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(saved, tmp_path, settings, error, values):
    merged = {"model": str(saved), "out": tmp_path / "out", "count": 1, "format": "folder", **QUICK, **settings}
    with pytest.raises(error, match=values):
        sample(SampleConfig(**merged))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ({"uncond_tail_drop": 0.9}, "uncond_tail_drop .*guidance=1.5"),
        ({"class_folders": True}, "class_folders .*format=folder.*format=grid"),
        ({"columns": 3, "format": "npz"}, "columns .*format=grid.*format=npz"),
        ({"tail_drop": [0.3, 0.3]}, " 0.3 "),
        ({"tail_drop": "0.3,0.30000001"}, " 0.3 "),
        ({"tail_drop": []}, "tail_drop"),
        ({"guidance_interval": "0.2,0.8"}, "guidance_interval .*guidance=1.5"),
        ({"guidance_channels": "three"}, "guidance_channels .*guidance=1.5"),
        ({"map_images": 2}, "map_images .*maps=true"),
        ({"guidance_interval": 0.3, "guidance": 2}, "LOW,HIGH.* 0.3"),
        ({"steps": 10**9}, "100000"),
        ({"tail_drop": "0,1.5"}, r"tail_drop\.1"),
        ({"guidance_interval": "0.9,0.1"}, "guidance_interval"),
        ({"colour": 1}, "colour"),
    ],
)
def test_settings_without_effect_are_refused(settings, values):
    with pytest.raises(ValidationError, match=values):
        SampleConfig(model="x", **settings)


def test_settings_are_read_as_on_a_command_line():
    config = SampleConfig(model="x", tail_drop="0, 0.3", guidance_interval="0.1,0.7", classes="cat,3", guidance=2)
    assert config.tail_drop == (0.0, 0.3)
    assert config.guidance_interval == (0.1, 0.7)
    assert config.classes == ("cat", "3")
    assert SampleConfig(model="x", tail_drop=0.5, classes=7).classes == (7,)
    assert SampleConfig.model_validate_json(config.model_dump_json()) == config


def test_class_names_that_cannot_be_drawn_become_numbers(tmp_path):
    save_model(tiny(0), tmp_path / "saved", {**FACTS, "class_names": ["犬", "caf\udce9", "car", "dog"]})
    job = prepare(SampleConfig(model=str(tmp_path / "saved"), out=tmp_path / "out", count=4, device="cpu"))
    assert job.names == ["0", "1", "car", "dog"]
    assert prepare(job.config.model_copy(update={"classes": ("犬",)})).labels == [0] * 4
