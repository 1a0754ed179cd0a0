"""Folders of images that are resumed, jobs that are interrupted, and folders that are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

import tokdyn
from tests.sampling import FACTS, QUICK, png, tiny
from tokdyn import FeatureCache
from tokdyn.errors import RecipeError
from tokdyn.sample import SampleConfig, drawing, sample
from tokdyn.train.snapshot import save_model


def test_existing_images_are_kept_and_missing_ones_sampled(saved, tmp_path):
    settings = {"model": str(saved), "out": tmp_path, "format": "folder", **QUICK}
    sample(SampleConfig(**settings, count=3))
    files = [tmp_path / "images" / f"{index:06d}.png" for index in range(5)]
    third = png(files[2])
    files[2].unlink()
    files[0].write_bytes(b"kept as it is")
    result = sample(SampleConfig(**settings, count=5, batch_size=2))
    assert result.budgets[0].made == 3
    assert files[0].read_bytes() == b"kept as it is"
    assert np.abs(png(files[2]).astype(int) - third.astype(int)).max() <= 1
    assert all(file.is_file() for file in files)
    again = sample(SampleConfig(**settings, count=5))
    assert again.budgets[0].made == 0
    assert again.budgets[0].images_per_second is None


def test_a_resumed_folder_records_the_cost_of_all_its_images(saved, tmp_path):
    settings = {"model": str(saved), "format": "folder", "batch_size": 2, "guidance": 2.0, **QUICK}
    whole = sample(SampleConfig(**settings, out=tmp_path / "whole", count=7)).budgets[0]
    assert (whole.images, whole.made, whole.measured) == (7, 7, 7)
    sample(SampleConfig(**settings, out=tmp_path / "parts", count=2))
    for made, count in ((5, 7), (0, 7), (0, 3)):
        parts = sample(SampleConfig(**settings, out=tmp_path / "parts", count=count)).budgets[0]
        assert (parts.images, parts.made, parts.measured) == (count, made, 7)
        assert parts.kept == pytest.approx(whole.kept)
        assert parts.tflops_per_image == pytest.approx(whole.tflops_per_image)
        for one, other in zip(parts.steps, whole.steps, strict=True):
            assert (one.timestep, one.level) == (other.timestep, other.level)
            assert (one.kept, one.uncond_kept, one.gflops) == pytest.approx(
                (other.kept, other.uncond_kept, other.gflops)
            )
        record = json.loads((tmp_path / "parts" / "sample.json").read_text())["budgets"][0]
        assert record["kept"] == parts.kept


def interrupt(monkeypatch, batches: int) -> None:
    """Raise KeyboardInterrupt once, after so many batches."""
    real, calls = drawing.generate, []

    def generated(*args, **keywords):
        calls.append(None)
        if len(calls) == batches + 1:
            raise KeyboardInterrupt
        return real(*args, **keywords)

    monkeypatch.setattr(drawing, "generate", generated)


def test_an_interrupted_job_records_the_cost_of_its_images(saved, tmp_path, monkeypatch):
    settings = {"model": str(saved), "format": "folder", "batch_size": 2, **QUICK}
    whole = sample(SampleConfig(**settings, out=tmp_path / "whole", count=6)).budgets[0]
    interrupt(monkeypatch, batches=2)
    with pytest.raises(KeyboardInterrupt):
        sample(SampleConfig(**settings, out=tmp_path / "interrupted", count=6))
    (record,) = json.loads((tmp_path / "interrupted" / "sample.json").read_text())["budgets"]
    assert (record["images"], record["made"], record["measured"]) == (4, 4, 4)
    rest = sample(SampleConfig(**settings, out=tmp_path / "interrupted", count=6)).budgets[0]
    assert (rest.images, rest.made, rest.measured) == (6, 2, 6)
    assert rest.kept == pytest.approx(whole.kept)


def test_an_interrupted_archive_is_removed(saved, tmp_path, monkeypatch):
    interrupt(monkeypatch, batches=1)
    with pytest.raises(KeyboardInterrupt):
        sample(SampleConfig(model=str(saved), out=tmp_path / "out", format="npz", count=4, batch_size=2, **QUICK))
    assert not (tmp_path / "out").exists()


def test_maps_of_a_complete_folder_are_kept_or_refused(saved, tmp_path):
    settings = {"model": str(saved), "format": "folder", "count": 2, **QUICK}
    sample(SampleConfig(**settings, out=tmp_path / "out"))
    with pytest.raises(RecipeError, match=r"out .*maps"):
        sample(SampleConfig(**settings, out=tmp_path / "out", maps=True))
    sample(SampleConfig(**settings, out=tmp_path / "mapped", maps=True))
    again = sample(SampleConfig(**settings, out=tmp_path / "mapped", maps=True))
    assert again.budgets[0].files == (tmp_path / "mapped" / "images", tmp_path / "mapped" / "maps.png")


@pytest.mark.parametrize("content", ["[]", "{}", '{"identity": null}', "{"])
def test_images_beside_a_broken_record_are_not_resumed(saved, tmp_path, content):
    settings = {"model": str(saved), "out": tmp_path, "format": "folder", "count": 1, **QUICK}
    sample(SampleConfig(**settings))
    (tmp_path / "sample.json").write_text(content)
    with pytest.raises(RecipeError, match=r"sample\.json"):
        sample(SampleConfig(**settings))


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 4},
        {"seed": 1},
        {"tail_drop": 0.5},
        {"drop_curve": ((0.2, 0.6), (0.8, 0.0))},
        {"uncond_tail_drop": 0.9},
        {"guidance": 3.0},
        {"guidance_channels": "three"},
        {"guidance_interval": (0.2, 0.8)},
        {"classes": "apple"},
        {"scheduler": "dpm"},
        {"clip": False},
        {"precision": "bf16"},
        {"class_folders": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_folder_of_other_images_is_not_resumed(saved, tmp_path, change):
    settings = {"model": str(saved), "out": tmp_path / "out", "format": "folder", "count": 1, "guidance": 2.0, **QUICK}
    sample(SampleConfig(**settings))
    with pytest.raises(RecipeError, match=f" {next(iter(change))}: .*out"):
        sample(SampleConfig(**{**settings, **change}))


def test_a_folder_of_another_objective_or_other_methods_is_not_resumed(saved, tmp_path):
    settings = {"out": tmp_path / "out", "format": "folder", "count": 1, **QUICK}
    sample(SampleConfig(model=str(saved), **settings))
    objective = {"kind": "noise", "beta_schedule": "squaredcos_cap_v2"}
    save_model(tiny(0), tmp_path / "other", {**FACTS, "objective": objective})
    with pytest.raises(RecipeError, match=r" objective: .*out"):
        sample(SampleConfig(model=str(tmp_path / "other"), **settings))
    tokdyn.save(tokdyn.wrap(tiny(0), [FeatureCache(steps=(0,))]), tmp_path / "methods")
    with pytest.raises(RecipeError, match=r" methods: .*out"):
        sample(SampleConfig(model=str(saved), methods=tmp_path / "methods", **settings))


def test_a_folder_of_other_weights_or_unknown_origin_is_not_resumed(saved, tmp_path):
    settings = {"out": tmp_path / "out", "format": "folder", "count": 1, **QUICK}
    sample(SampleConfig(model=str(saved), **settings))
    save_model(tiny(1), tmp_path / "other", FACTS)
    with pytest.raises(RecipeError, match=" weights: "):
        sample(SampleConfig(model=str(tmp_path / "other"), **settings))
    (tmp_path / "out" / "sample.json").unlink()
    with pytest.raises(RecipeError, match=r"sample\.json"):
        sample(SampleConfig(model=str(saved), **settings))
