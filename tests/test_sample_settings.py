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


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A DC-DiT as training saves it."""
    save_model(tiny(0), tmp_path / "saved", FACTS)
    return tmp_path / "saved"


def test_the_home_folder_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert SampleConfig(model="x", out="~/pictures").out == tmp_path / "pictures"


def test_a_name_that_looks_like_a_number_is_a_name(tmp_path):
    """Folders called 1 to 4 are common; `classes=1` and `classes=1,2` must agree."""
    save_model(tiny(0), tmp_path / "saved", {**FACTS, "class_names": ["1", "2", "3", "4"]})
    for given, expected in (("1", (0,)), (1, (0,)), ("1,2", (0, 1)), ([4], (3,)), ("0", (0,)), ("none", (4,))):
        job = prepare(SampleConfig(model=str(tmp_path / "saved"), classes=given, device="cpu"))
        assert job.classes == expected


def test_the_name_of_a_run_does_not_lead_out_of_samples(tmp_path):
    for name in ("../../elsewhere", "/elsewhere", "elsewhere"):
        save_model(tiny(0), tmp_path / "saved", {**FACTS, "name": name})
        assert prepare(SampleConfig(model=str(tmp_path / "saved"), device="cpu")).out == Path("samples/elsewhere")


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"classes": "bare"}, RecipeError, r"did you mean bear\?"),
        ({"classes": "zzz"}, RecipeError, "known are apple, bear, car, dog"),
        ({"classes": 4}, RecipeError, "class 4 does not exist: the model knows 0 to 3"),
        ({"classes": ""}, RecipeError, "classes is empty"),
        ({"device": "toaster"}, InputError, "device=toaster cannot be used here"),
        ({"scheduler": "euler"}, RecipeError, "euler cannot sample a noise objective"),
        ({"steps": 2000}, RecipeError, "takes 1 to 1000 steps"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(saved, tmp_path, settings, error, words):
    asked = {"model": str(saved), "out": tmp_path / "out", "count": 1, "format": "folder", **QUICK, **settings}
    with pytest.raises(error, match=words):
        sample(SampleConfig(**asked))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"uncond_tail_drop": 0.9}, "no effect without guidance"),
        ({"class_folders": True}, "class_folders is for format=folder"),
        ({"columns": 3, "format": "npz"}, "columns is for format=grid"),
        ({"tail_drop": [0.3, 0.3]}, "the budget 0.3 is listed twice"),
        ({"tail_drop": "0.3,0.30000001"}, "the budget 0.3 is listed twice"),
        ({"tail_drop": []}, "no budget is given"),
        ({"guidance_interval": "0.2,0.8"}, "guidance_interval has no effect without guidance"),
        ({"guidance_channels": "three"}, "guidance_channels has no effect without guidance"),
        ({"map_images": 2}, "map_images has no effect without maps"),
        ({"guidance_interval": 0.3, "guidance": 2}, "two noise levels LOW,HIGH are needed, got 0.3"),
        ({"steps": 10**9}, "less than or equal to 100000"),
        ({"tail_drop": "0,1.5"}, "less than or equal to 1"),
        ({"guidance_interval": "0.9,0.1"}, "low then high"),
        ({"colour": 1}, "Extra inputs"),
    ],
)
def test_settings_without_effect_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        SampleConfig(model="x", **settings)


def test_settings_read_from_the_command_line():
    config = SampleConfig(model="x", tail_drop="0, 0.3", guidance_interval="0.1,0.7", classes="cat,3", guidance=2)
    assert config.tail_drop == (0.0, 0.3)
    assert config.guidance_interval == (0.1, 0.7)
    assert config.classes == ("cat", "3")
    assert SampleConfig(model="x", tail_drop=0.5, classes=7).classes == (7,)
    assert SampleConfig.model_validate_json(config.model_dump_json()) == config


def test_names_that_cannot_be_drawn_become_numbers(tmp_path):
    save_model(tiny(0), tmp_path / "saved", {**FACTS, "class_names": ["犬", "caf\udce9", "car", "dog"]})
    job = prepare(SampleConfig(model=str(tmp_path / "saved"), out=tmp_path / "out", count=4, device="cpu"))
    assert job.names == ["0", "1", "car", "dog"]
    assert prepare(job.config.model_copy(update={"classes": ("犬",)})).labels == [0] * 4
