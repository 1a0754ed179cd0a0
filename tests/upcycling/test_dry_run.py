"""A dry run of a pipeline reads configurations alone, and works out what a training of the real one takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.upcycling.elastic import opened, recorded, student_of
from tokdyn.errors import CheckpointError, InputError
from tokdyn.scaling import ScalingSettings
from tokdyn.upcycling import DistilSettings
from tokdyn.upcycling.dry_run import dry_run
from tokdyn.upcycling.example_calls import example_call
from tokdyn.upcycling.memory import memory_of
from tokdyn.upcycling.pipeline_settings import PipelineConfig
from tokdyn.upcycling.students import prepare

KNOWN = {"Flux": (128, 192), "SD3": (64, 128), "Wan": (16, 16)}
"""Families whose calls are known, and height and width of the images of tests for a VAE of 8 pixels a latent."""


def configured(folder: Path, model: Any, pipeline: str = "FluxPipeline") -> Path:
    """A folder with the configurations of a pipeline, and no weights."""
    kind = type(model).__name__
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, "transformer": ["diffusers", kind]}))
    model.save_config(folder / "transformer")
    return folder


@pytest.mark.parametrize(
    "name", ["Flux", *(pytest.param(name, marks=pytest.mark.slow) for name in KNOWN if name != "Flux")]
)
def test_calls_are_those_that_the_pipeline_makes(name: str) -> None:
    pipe = opened(name)
    height, width = KNOWN[name]
    call = recorded(pipe, name, steps=1)[0]
    config = PipelineConfig(base="unused", height=height, width=width, frames=5 if name == "Wan" else None)
    found = example_call(type(pipe.transformer).__name__, pipe.transformer.config, config, torch.float32)
    tensors = {key for key, value in call.items() if torch.is_tensor(value)}
    assert tensors == {key for key, value in found.items() if torch.is_tensor(value)}
    for key in tensors:
        assert found[key].dtype == call[key].dtype or key == "timestep"
        assert len(found[key].shape) == len(call[key].shape)
    # texts are shorter in tests; the sequence of latents is as long
    assert found["hidden_states"].shape == call["hidden_states"].shape


@pytest.mark.slow
def test_it_is_what_the_real_transformer_takes(tmp_path: Path) -> None:
    """Of blocks, one and two are rehearsed, and weights without values; of the real student all."""
    pipe = opened("Flux")
    model = pipe.transformer
    base = configured(tmp_path / "pipe", model)
    config = PipelineConfig(
        base=str(base), trained="lora", rank=4, calls=4, height=64, width=64, target=2, tail_drops=(0.0,)
    )
    estimate = dry_run(config, ["dc"], ScalingSettings(gpus=2))
    call = example_call(type(model).__name__, model.config, config, torch.float32)
    student, settings = student_of(model), DistilSettings(trained="lora", rank=4, tail_drops=(0.0,))
    trained = prepare(student, settings)
    memory, plan = memory_of(student, settings, [call]), estimate.plan
    assert estimate.trained == sum(each.numel() for each in trained)
    assert estimate.kept_as_is + estimate.new == sum(each.numel() for each in student.parameters())
    assert plan.memory["weights"] == sum(each.numel() * 4 for each in student.parameters())
    assert plan.memory["moments"] == memory.moments
    assert plan.memory["activations"] + plan.memory["gradients"] == pytest.approx(memory.step, rel=0.1)
    assert plan.memory["other models and calls"] == 28 * memory.calls  # steps of FluxPipeline
    assert (plan.micro_batch, plan.accumulation) == (1, 2)
    assert plan.sent == 4 * estimate.trained  # twice half of it
    assert not (tmp_path / "upcycled").exists()


def test_recomputing_saves_as_much_as_in_the_real_transformer(tmp_path: Path) -> None:
    """FLOPs are counted in passes of their own: what is recomputed lives on while torch's counter counts."""
    model = opened("Flux").transformer
    base, student = configured(tmp_path / "pipe", model), student_of(model)
    found, expected = [], []
    for recomputed in (False, True):
        config = PipelineConfig(
            base=str(base), trained="lora", rank=4, height=64, width=64, target=2, tail_drops=(0.0,),
            gradient_checkpointing=recomputed,
        )  # fmt: skip
        memory = dry_run(config, ["dc"], ScalingSettings(gpus=1)).plan.memory
        found.append(memory["activations"] + memory["gradients"])
        call = example_call(type(model).__name__, model.config, config, torch.float32)
        expected.append(memory_of(student, config.distillation(True), [call]).step)
    assert found == [pytest.approx(each, rel=0.1) for each in expected]
    assert found[1] < 0.8 * found[0]


def test_what_cannot_be_worked_out_is_refused(tmp_path: Path) -> None:
    cluster = ScalingSettings(gpus=3)
    with pytest.raises(InputError, match="calls"):
        dry_run(PipelineConfig(base=str(tmp_path), calls=4), ["dc"], cluster)
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        dry_run(PipelineConfig(base=str(tmp_path), calls=3), ["dc"], cluster)
    other = configured(tmp_path / "other", opened("Z-Image").transformer)
    with pytest.raises(InputError, match="ZImageTransformer2DModel"):
        dry_run(PipelineConfig(base=str(other), calls=3), ["dc"], cluster)
    flux = configured(tmp_path / "flux", opened("Flux").transformer)
    with pytest.raises(InputError, match="multiples of 16"):
        dry_run(PipelineConfig(base=str(flux), calls=3, height=24, width=24), ["dc"], cluster)
    (flux / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel", "depth": 3}')
    with pytest.raises(CheckpointError, match="depth"):
        dry_run(PipelineConfig(base=str(flux), calls=3), ["dc"], cluster)
