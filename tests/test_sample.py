"""Sampling to files: grids, folders and archives, their records and costs, and several budgets."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.sampling import FACTS, QUICK, png, tiny
from tokdyn import DiT
from tokdyn.cost import flops_per_image
from tokdyn.diffusion.sampling import generate
from tokdyn.diffusion.settings import Sampler
from tokdyn.errors import CheckpointError, InputError, OutputError, UnsupportedModelError
from tokdyn.sample import SampleConfig, drawing, load_model, sample
from tokdyn.train.snapshot import save_model


def test_a_grid_and_its_record_are_written(saved, tmp_path):
    result = sample(SampleConfig(model=str(saved), out=tmp_path / "out", count=6, batch_size=4, **QUICK))
    assert result.budgets[0].files == (tmp_path / "out" / "grid.png",)
    assert png(tmp_path / "out" / "grid.png").shape[2] == 3
    record = json.loads((tmp_path / "out" / "sample.json").read_text())
    assert record["settings"]["steps"] == 3
    assert record["model"]["class"] == "DCDiT"
    assert record["model"]["parameters"] == sum(p.numel() for p in tiny(0).parameters())
    assert record["used"] == {"scheduler": "ddim", "clip": True, "precision": "fp32", "device": "cpu", "latents": False}
    assert record["budgets"][0]["images_per_second"] > 0
    assert len(record["budgets"][0]["steps"]) == 3


def test_kept_share_and_flops_are_measured_per_step(saved, tmp_path):
    settings = {"guidance": 2.0, "uncond_tail_drop": 0.9, "guidance_interval": (0.5, 1.0), "count": 5, "batch_size": 2}
    result = sample(SampleConfig(model=str(saved), out=tmp_path / "out", **settings, **QUICK))
    model, objective, _ = load_model(saved)
    budget = result.budgets[0]
    made = generate(
        model,
        Sampler(steps=3, scheduler="ddim", guidance=2.0, uncond_tail_drop=0.9, guidance_interval=(0.5, 1.0), clip=True),
        objective,
        [0, 1, 2, 3, 0],
        range(5),
    )
    for step, record in zip(budget.steps, made.steps, strict=True):
        assert (step.uncond_kept is None) == (not step.level >= 0.5)
        counts = [record.counts.cond, *([record.counts.uncond] if record.guided else [])]
        assert [step.kept, step.uncond_kept][: len(counts)] == pytest.approx(
            [float(c.double().mean()) / 48 for c in counts]
        )
        costs = [flops_per_image(model, count / 48) for branch in counts for count in branch.tolist()]
        assert step.gflops == pytest.approx(sum(costs) / 5 / 1e9, rel=1e-6)  # the mean of the costs of the images
        assert step.uncond_kept is None or step.uncond_kept < step.kept
    assert budget.tflops_per_image == pytest.approx(sum(step.gflops for step in budget.steps) / 1000)
    shares = [share for step in budget.steps for share in (step.kept, step.uncond_kept) if share is not None]
    assert budget.kept == pytest.approx(np.mean(shares))


def test_npz_has_the_layout_of_adm_and_the_same_images_as_a_folder(saved, tmp_path):
    settings = {"model": str(saved), "count": 5, "classes": "dog,1", "seed": 3, **QUICK}
    sample(SampleConfig(**settings, out=tmp_path / "npz", format="npz", batch_size=2))
    sample(SampleConfig(**settings, out=tmp_path / "folder", format="folder", batch_size=5))
    with np.load(tmp_path / "npz" / "samples.npz") as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
        assert list(arrays) == ["arr_0", "arr_1"]
    assert images.dtype == np.uint8
    assert images.shape == (5, 6, 8, 3)
    assert labels.tolist() == [3, 1, 3, 1, 3]
    files = sorted((tmp_path / "folder" / "images").iterdir())
    assert [file.name for file in files] == [f"{index:06d}.png" for index in range(5)]
    difference = np.abs(np.stack([png(file) for file in files]).astype(int) - images.astype(int))
    assert difference.max() <= 1  # batches of another size sum in another order
    assert not list(tmp_path.rglob("*.half"))


def test_damaged_weights_write_no_images(tmp_path):
    model = tiny(0)
    model.final_layer.linear.bias.data.fill_(float("nan"))
    save_model(model, tmp_path / "nan", FACTS)
    for form in ("grid", "folder", "npz"):
        with pytest.raises(CheckpointError, match=r"nan .*precision fp32"):
            sample(SampleConfig(model=str(tmp_path / "nan"), out=tmp_path / form, format=form, count=2, **QUICK))
        assert not [file for file in (tmp_path / form).rglob("*") if file.suffix in (".png", ".npz", ".half")]


def test_out_that_is_a_file_is_refused_before_anything_is_made(saved, tmp_path):
    (tmp_path / "file").write_text("mine")
    for form in ("grid", "folder", "npz"):
        with pytest.raises(OutputError, match=r"out=.*file"):
            sample(SampleConfig(model=str(saved), out=tmp_path / "file" / "deep", format=form, count=1, **QUICK))


def test_class_folders_are_named_by_labels(saved, tmp_path):
    settings = {"format": "folder", "class_folders": True, "count": 6, **QUICK}
    sample(SampleConfig(model=str(saved), out=tmp_path / "out", **settings))
    names = sorted(file.relative_to(tmp_path / "out" / "images").as_posix() for file in tmp_path.rglob("*.png"))
    assert names == ["0/000000.png", "0/000004.png", "1/000001.png", "1/000005.png", "2/000002.png", "3/000003.png"]


def test_several_budgets_start_from_the_same_seeds_and_are_shown_side_by_side(saved, tmp_path):
    settings = {"model": str(saved), "count": 3, **QUICK}
    result = sample(SampleConfig(**settings, out=tmp_path / "all", tail_drop="0,0.6", maps=True))
    assert [budget.tail_drop for budget in result.budgets] == [0.0, 0.6]
    assert result.budgets[1].kept < result.budgets[0].kept
    assert result.budgets[1].tflops_per_image < result.budgets[0].tflops_per_image
    assert {file.name for file in result.files} == {"budgets.png", "trajectory.png"}
    for name in ("grid.png", "maps.png"):
        assert png(tmp_path / "all" / "tail_drop_0.6" / name).size
    sample(SampleConfig(**settings, out=tmp_path / "one", tail_drop=0.6))
    assert np.array_equal(png(tmp_path / "one" / "grid.png"), png(tmp_path / "all" / "tail_drop_0.6" / "grid.png"))


def test_dit_samples_without_budgets_and_maps(tmp_path):
    save_model(tiny(0, DiT, patch_size=2), tmp_path / "dit", FACTS)
    settings = {"model": str(tmp_path / "dit"), "out": tmp_path / "out", "count": 2, **QUICK}
    budget = sample(SampleConfig(**settings, guidance=1.5)).budgets[0]
    assert budget.kept is None
    expected = 2 * flops_per_image(load_model(tmp_path / "dit")[0]) / 1e9
    assert all(step.gflops == pytest.approx(expected) for step in budget.steps)
    with pytest.raises(UnsupportedModelError, match=r"DiT.*maps"):
        sample(SampleConfig(**settings, maps=True))
    for drops in ({"tail_drop": 0.5}, {"guidance": 2.0, "uncond_tail_drop": 0.5}):
        with pytest.raises(UnsupportedModelError, match=r"DiT.*tail_drop"):
            sample(SampleConfig(**{**settings, "out": tmp_path / "none"}, format="folder", **drops))
    assert not (tmp_path / "none").exists()


def test_flow_models_sample_with_euler(tmp_path):
    save_model(tiny(0, learn_sigma=False), tmp_path / "flow", {**FACTS, "objective": {"kind": "flow"}})
    result = sample(SampleConfig(model=str(tmp_path / "flow"), out=tmp_path / "out", count=2, steps=2, device="cpu"))
    assert result.used["scheduler"] == "euler"


def test_too_large_a_batch_is_named(saved, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(drawing, "generate", full)
    with pytest.raises(InputError, match=r"2 .*cpu.*batch_size"):
        sample(SampleConfig(model=str(saved), out=tmp_path / "out", count=4, batch_size=2, **QUICK))


def test_images_of_no_class_can_be_sampled(saved, tmp_path):
    result = sample(
        SampleConfig(model=str(saved), out=tmp_path / "out", classes="none", count=1, format="npz", **QUICK)
    )
    with np.load(result.budgets[0].files[0]) as arrays:
        assert arrays["arr_1"].tolist() == [4]


def test_maps_of_a_model_without_routing_are_refused():
    from tokdyn.report.maps import MapRecorder

    with pytest.raises(InputError, match="maps"):
        MapRecorder(3).maps()
