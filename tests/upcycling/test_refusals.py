"""What `tokdyn upcycle` refuses of a pipeline and its settings, before it draws anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
from pydantic import ValidationError

from tests.contract.models import TINY
from tests.contract.pipelines import vae
from tests.upcycling.models import small_base
from tokdyn import DCDiT
from tokdyn.bases.names import names_pipeline
from tokdyn.errors import CheckpointError, InputError, OutputError
from tokdyn.upcycling import DistilSettings
from tokdyn.upcycling.command import upcycle_pipeline
from tokdyn.upcycling.pipeline_settings import TAIL_DROPS, PipelineConfig

SIZE = {"height": 16, "width": 16}


def class_conditional(model: Any, folder: Path) -> Path:
    """Save a pipeline that draws classes."""
    diffusers.DiTPipeline(model, vae(), diffusers.DDIMScheduler()).save_pretrained(folder)
    return folder


def without_transformer(folder: Path) -> Path:
    """Save a pipeline with a U-Net."""
    model = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


def test_only_pipelines_that_no_recipe_trains_are_upcycled_as_such(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert names_pipeline(str(pipeline))
    assert not names_pipeline(str(pipeline / "transformer"))
    monkeypatch.chdir(pipeline)
    assert not names_pipeline(None)
    models = {
        "theirs": TINY["DiTTransformer2DModel"].build(),
        "dit": small_base(in_channels=4),
        "dcdit": DCDiT(sample_size=8, hidden_size=16, depth=1, num_heads=2, num_classes=3),
    }
    for name, model in models.items():
        assert not names_pipeline(str(class_conditional(model, tmp_path / name)))
    assert not names_pipeline(str(without_transformer(tmp_path / "unet")))
    monkeypatch.setenv("HOME", str(pipeline.parent))
    assert names_pipeline(f"~/{pipeline.name}")


def test_what_cannot_be_upcycled_is_refused(pipeline: Path, tmp_path: Path) -> None:
    """With the name of the pipeline's class, where it is one."""
    classes = class_conditional(TINY["DiTTransformer2DModel"].build(), tmp_path / "classes")
    unet = without_transformer(tmp_path / "unet")
    cases: list[tuple[Path, dict[str, Any], type[Exception], str]] = [
        (tmp_path, {}, CheckpointError, str(tmp_path)),
        (unet, {}, CheckpointError, "DDPMPipeline"),
        (classes, SIZE, InputError, "DiTPipeline .*height"),
        (classes, {}, InputError, "DiTPipeline"),
        (pipeline, {}, InputError, "PixArtSigmaPipeline"),  # its own size is none of those that it binds images to
    ]
    for base, settings, kind, named in cases:
        with pytest.raises(kind, match=named) as refused:
            upcycle_pipeline(PipelineConfig(base=str(base), out=tmp_path / "out", **settings), ["dc"])
        assert (refused.value.__cause__ is None) == (base in (unet, classes))  # nothing was tried
    assert not (tmp_path / "out").exists()


def test_methods_and_folders_are_looked_at_before_the_pipeline(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    nowhere = PipelineConfig(base=str(tmp_path), out=tmp_path / "out")  # no pipeline
    with pytest.raises(InputError, match="'cache'"):
        upcycle_pipeline(nowhere, ["dc", "cache"])
    for out, kind in (("used", CheckpointError), ("file", OutputError), ("file/out", OutputError)):
        with pytest.raises(kind, match=f"{tmp_path / out}\\b") as refused:
            upcycle_pipeline(nowhere.model_copy(update={"out": tmp_path / out}), ["dc"])
        assert f"{tmp_path} cannot" not in str(refused.value)
    (tmp_path / "used" / "settings.json").write_text(json.dumps({"target": 3.0}))
    with pytest.raises(CheckpointError, match="target"):
        upcycle_pipeline(nowhere.model_copy(update={"out": tmp_path / "used"}), ["dc"], resume=True)
    with pytest.raises(CheckpointError, match=f"{tmp_path} "):
        upcycle_pipeline(nowhere, ["dc"], resume=True)  # nothing was begun there


def test_prompts_are_one_several_or_a_file(tmp_path: Path) -> None:
    assert PipelineConfig(base="x", prompts="a red square").prompts == ("a red square",)
    assert PipelineConfig(base="x", prompts=["a", "b.txt"]).prompts == ("a", "b.txt")
    (tmp_path / "some.txt").write_text("  a café \n\n\n b\n", encoding="utf-8")
    assert PipelineConfig(base="x", prompts=str(tmp_path / "some.txt")).prompts == ("a café", "b")
    edit = {"prompt": "make it night", "image": str(tmp_path / "street.png")}
    (tmp_path / "some.yaml").write_text("[a, {prompt: make it night, image: street.png}]")
    assert PipelineConfig(base="x", prompts=str(tmp_path / "some.yaml")).prompts == ("a", edit)
    (tmp_path / "none.txt").write_text("\n")
    for wrong in ([], str(tmp_path / "none.txt"), str(tmp_path / "nowhere.txt")):
        with pytest.raises(ValidationError, match="prompts"):
            PipelineConfig(base="x", prompts=wrong)


def test_settings_that_exclude_each_other_are_refused() -> None:
    for wrong in ({"height": 8}, {"width": 8}, {"trained": "all", "precision": "bf16"}, {"lr": float("inf")}):
        with pytest.raises(ValidationError):
            PipelineConfig(base="x", **wrong)
    for good in ({"height": 8, "width": 16}, {"trained": "all"}, {"precision": "bf16"}):
        config = PipelineConfig(base="x", **good)
        assert {name: getattr(config, name) for name in good} == good


def test_the_training_has_the_defaults_of_distil_and_takes_every_setting() -> None:
    assert PipelineConfig(base="x").distillation(chunking=False) == DistilSettings()
    assert PipelineConfig(base="x").distillation(chunking=True) == DistilSettings(tail_drops=TAIL_DROPS)
    changed = {"steps": 7, "calls": 3, "lr": 0.5, "warmup_steps": 4, "trained": "all", "seed": 9, "checkpoint_every": 2}
    assert PipelineConfig(base="x", **changed).distillation(chunking=False) == DistilSettings(**changed)
