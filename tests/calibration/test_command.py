"""`tokdyn calibrate` writes methods that can be used, and refuses settings in one sentence."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, PixArtSigmaPipeline
from PIL import Image
from tokdyn.cli.main import app
from typer.testing import CliRunner

import tokdyn
from tests.contract.models import TINY, randomized
from tokdyn.calibration.config import CalibrateConfig
from tokdyn.calibration.trajectories import open_subject, trajectories
from tokdyn.cost import count
from tokdyn.data.config import DataConfig
from tokdyn.sample import SampleConfig, load_model, sample
from tokdyn.train.snapshot import save_model

FACTS = {
    "name": "tiny/run",
    "objective": {"kind": "flow"},
    "data": DataConfig(kind="shapes", num_classes=4).model_dump(mode="json"),
    "class_names": ["apple", "bear", "car", "dog"],
}
QUICK = ("steps=6", "count=3", "batch_size=2", "device=cpu")


def tiny(kind=tokdyn.DiT):
    torch.manual_seed(0)
    settings = {"sample_size": 8, "in_channels": 3, "hidden_size": 16, "depth": 4, "num_heads": 2, "num_classes": 4}
    return randomized(kind(**settings, patch_size=2, learn_sigma=False))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tiny(), tmp_path / "saved", FACTS)
    return tmp_path / "saved"


def run(*words: str | Path, code: int = 0):
    """Run the command in this process, where a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = CliRunner().invoke(app, ["calibrate", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


def report(*words: str | Path):
    return json.loads(run(*words, "--json").stdout)


def is_picture(path: Path) -> bool:
    """Whether a file is a PNG that is not blank."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    return min(pixels.shape) > 300 and pixels.std() > 10


def test_skip_writes_methods_report_and_picture(saved, tmp_path):
    out = tmp_path / "out"
    found = report(saved, "method=skip", "flops=0.7", "guidance=2", "levels=3", f"out={out}", *QUICK)
    assert sorted(path.name for path in out.iterdir()) == [
        "calibration.html",
        "calibration.json",
        "calibration.png",
        "preset.yaml",
        "tokdyn_config.json",
    ]
    assert is_picture(out / "calibration.png")
    assert "tiny/run" in (out / "calibration.html").read_text()
    assert {**json.loads((out / "calibration.json").read_text()), "folder": str(out)} == found
    assert found["calls"] == 2 * 6
    assert found["model"] == {"name": "tiny/run", "class": "DiT"}
    rows = found["levels"]
    assert [len(row["influence"]) for row in rows] == [4, 4, 4]
    assert all(row["relative_error"] > 0 for row in rows if row["skipped"])
    spent = sum(
        row["other_flops"] + sum(c for block, c in enumerate(row["block_flops"]) if block not in row["skipped"])
        for row in rows
    )
    whole = sum(row["other_flops"] + sum(row["block_flops"]) for row in rows)
    assert found["flops"] == pytest.approx(spent / whole)
    model = tokdyn.load(load_model(saved)[0], out)
    assert tokdyn.parts(model)[0][0].table == tuple((r["low"], r["high"], tuple(r["skipped"])) for r in rows)


def test_share_of_flops_holds_for_the_drawn_trajectories(saved, tmp_path):
    out = tmp_path / "out"
    found = report(saved, "method=skip", "flops=0.6", "guidance=2", f"out={out}", *QUICK)
    config = CalibrateConfig(model=str(saved), method="skip", flops=0.6, guidance=2, steps=6, count=3, batch_size=2)
    subject = open_subject(config, torch.device("cpu"))
    ((model, calls),) = zip(subject.models.values(), trajectories(config, subject).values(), strict=True)
    plain = sum(count(model, **call)[0] for call in calls)
    tokdyn.load(model, out)
    assert sum(count(model, **call)[0] for call in calls) / plain == pytest.approx(found["flops"])


def test_cache_writes_measurements_and_polynomial(saved, tmp_path):
    out = tmp_path / "out"
    found = report(saved, "method=cache", "cache_steps=0.5", "guidance=2", "degree=2", f"out={out}", *QUICK)
    assert is_picture(out / "calibration.png")
    assert found["computed_steps"] <= 0.5
    assert len(found["method"]["coefficients"]) == 3
    assert len(found["points"]) == 2 * 3 * 5  # branches, images, steps after the first
    assert {point["trajectory"] for point in found["points"]} == {1, 2}
    assert all(point["change"] > 0 and point["effect"] > 0 for point in found["points"])


@pytest.mark.parametrize("method", [("method=skip", "flops=0.7", "--sequential"), ("method=cache", "flops=0.7")])
def test_calibrated_methods_can_be_sampled_with(saved, tmp_path, method):
    out = tmp_path / "out"
    run(saved, *method, f"out={out}", *QUICK)
    settings = {"model": str(saved), "steps": 6, "count": 3, "device": "cpu"}
    plain = sample(SampleConfig(**settings, out=tmp_path / "plain", format="folder"))
    made = sample(SampleConfig(**settings, out=tmp_path / "made", methods=out, format="folder"))
    assert plain.budgets[0].tflops_per_image > 0
    assert 0 < made.budgets[0].tflops_per_image < plain.budgets[0].tflops_per_image
    assert made.identity["methods"] == json.loads((out / "tokdyn_config.json").read_text())["methods"]
    assert plain.identity["methods"] is None
    files = [sorted((tmp_path / name / "images").iterdir()) for name in ("plain", "made")]
    assert any(one.read_bytes() != other.read_bytes() for one, other in zip(*files, strict=True))
    with pytest.raises(tokdyn.RecipeError, match="methods"):
        sample(SampleConfig(**settings, out=tmp_path / "made", format="folder"))


def test_dc_dit_can_be_calibrated(tmp_path):
    save_model(tiny(tokdyn.DCDiT), tmp_path / "saved", FACTS)
    found = report(tmp_path / "saved", "method=skip", "flops=0.9", f"out={tmp_path / 'skip'}", *QUICK)
    assert 0.8 < found["flops"] <= 0.9
    found = report(tmp_path / "saved", "method=cache", "flops=0.7", f"out={tmp_path / 'cache'}", *QUICK)
    assert found["flops"] <= 0.7


@pytest.fixture
def of_classes(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        latent_channels=4, norm_num_groups=4, sample_size=8,
    )  # fmt: skip
    DiTPipeline(TINY["DiTTransformer2DModel"].build(), vae, DDIMScheduler()).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_pipeline_of_diffusers_can_be_calibrated(of_classes, tmp_path):
    out = tmp_path / "out"
    found = report(of_classes, "method=skip", "flops=0.7", "guidance=4", "classes=7,1", f"out={out}", *QUICK)
    assert found["model"] == {"name": "pipeline", "class": "DiTTransformer2DModel"}
    assert found["scheduler"] == "DDIMScheduler"
    assert found["calls"] == 2 * 6
    pipe = DiTPipeline.from_pretrained(of_classes)
    pipe.set_progress_bar_config(disable=True)
    tokdyn.load(pipe.transformer, out)  # fingerprints are equal: a warning would be an error
    pipe(class_labels=[1], num_inference_steps=6, output_type="np")


PROMPTED = ("height=16", "width=16", "steps=5", "guidance=2", "count=2", "device=cpu")


@pytest.mark.parametrize("words", [("method=skip", "flops=0.8"), ("method=cache", "cache_steps=0.6", "degree=1")])
def test_a_pipeline_that_draws_prompts_can_be_calibrated(words, pipeline, tmp_path):
    """What is written acts in the same pipeline, wrapped as a whole, and fits the sampler it was calibrated with."""
    (tmp_path / "prompts.yaml").write_text("[a red square, {prompt: a blue square}]")
    out = tmp_path / "out"
    found = report(pipeline, *words, f"prompts={tmp_path / 'prompts.yaml'}", *PROMPTED, f"out={out}")
    assert found["model"] == {"name": pipeline.name, "class": "PixArtTransformer2DModel"}
    assert found["calls"] == 2 * 5
    assert found["flops"] < 1
    pipe = PixArtSigmaPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    tokdyn.load(pipe, out)
    pipe("a red square", num_inference_steps=5, guidance_scale=2.0, height=16, width=16, use_resolution_binning=False)
    assert tokdyn.stats(pipe).share < 1


@pytest.mark.parametrize("word", ["classes=1", "scheduler=ddim", "num_frames=3", "frames=3"])
def test_settings_that_such_a_pipeline_does_not_have_are_refused(word, pipeline, tmp_path):
    result = run(pipeline, "method=cache", word, f"out={tmp_path / 'out'}", *PROMPTED, code=2)
    assert word.partition("=")[0] in result.stderr
    assert not (tmp_path / "out" / "calibration.json").exists()


def test_prompts_are_refused_by_models_without(saved, tmp_path):
    assert "prompts" in run(saved, "method=cache", "prompts=a cube", f"out={tmp_path / 'o'}", *QUICK, code=2).stderr


def test_default_folder_and_table(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = run(saved, "method=skip", "flops=0.7", *QUICK).stdout
    assert "skipped blocks" in text
    assert "FLOPs" in text
    assert (tmp_path / "calibrated" / "tiny" / "run" / "skip" / "tokdyn_config.json").is_file()
    text = run(saved, "method=cache", *QUICK).stdout
    assert re.search(r"threshold +0\.1\n", text)
    assert "variance" in text


def test_equal_settings_give_equal_files(saved, tmp_path):
    for name in ("one", "two"):
        run(saved, "method=skip", "flops=0.7", f"out={tmp_path / name}", *QUICK)
    one, two = ((tmp_path / name / "tokdyn_config.json").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["method=skip", "flops=0.01"], "0.01"),
        (["method=skip", "flops=0.7", "degree=2"], "degree has no effect with method=skip"),
        (["method=cache", "protected=0"], "protected has no effect with method=cache"),
        (["method=cache", "flops=0.5", "cache_steps=0.5"], "flops and cache_steps"),
        (["method=cache", "scheduler=ddim"], "scheduler=ddim"),
        (["method=cache", "classes=cat"], "class cat"),
        (["method=cache", "steps=1"], "trajectories"),
        (["method=cache", "out={saved}/config.json"], "config.json"),
    ],
)
def test_invalid_settings_end_in_one_sentence(saved, words, named):
    result = run(saved, *QUICK, *(word.format(saved=saved) for word in words), code=2)
    assert named in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_other_pipelines_and_their_settings_are_refused(of_classes, tmp_path):
    assert "scheduler=ddim" in run(of_classes, "method=cache", "scheduler=ddim", code=2).stderr
    assert " 999" in run(of_classes, "method=cache", "classes=1000", code=2).stderr
    index = json.loads((of_classes / "model_index.json").read_text())
    (of_classes / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    assert "FluxPipeline" in run(of_classes, "method=cache", code=2).stderr


def test_magcache_is_a_name_of_mag_and_thresholds_are_finite():
    assert CalibrateConfig(model="a", method="magcache") == CalibrateConfig(model="a", method="mag")
    for threshold in (float("inf"), float("nan"), 0.0):
        with pytest.raises(ValueError, match="threshold"):
            CalibrateConfig(model="a", method="mag", threshold=threshold)
