"""The playground of a pipeline of diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.contract.pipelines import PIPES, build
from tokdyn.pipelines.drawing import draw
from tokdyn.pipelines.opening import open_pipeline
from tokdyn.playground.previews import Preview, clean_of
from tokdyn.playground.prompts import PromptStudio
from tokdyn.playground.scene import Sketch
from tokdyn.playground.settings import PipelinePlaygroundConfig, Wanted
from tokdyn.playground.studio import scenes

ASKED = {"subject": "a red square", "seed": 5, "steps": 3, "guidance": 2.0}


@pytest.fixture
def studio(pipeline):
    return PromptStudio(PipelinePlaygroundConfig(model=str(pipeline), height=16, width=24, device="cpu"))


def test_prompts_are_drawn_as_without_a_playground(studio, pipeline):
    found = list(scenes(studio, Wanted(**ASKED, methods="[{method: cache, steps: [0, 2]}, {method: merge}]")))
    sketches = [scene.drawn for scene in found if isinstance(scene.drawn, Sketch)]
    drawn, beside = found[-1].drawn, found[-1].beside
    pipe = open_pipeline(str(pipeline), torch.device("cpu"))
    arguments = {
        "prompt": "a red square", "num_inference_steps": 3, "guidance_scale": 2.0, "height": 16, "width": 24,
        "use_resolution_binning": False,
    }  # fmt: skip
    assert np.array_equal(beside.picture, draw(pipe, arguments, 5)[0])
    assert not np.array_equal(drawn.picture, beside.picture)
    assert [sketch.step for sketch in sketches] == [1, 2, 3]
    assert np.array_equal(sketches[-1].picture, drawn.picture)
    assert 0 < sketches[0].keep.sum() < sketches[0].keep.size
    assert not sketches[1].keep.any()
    assert drawn.cached == 1
    assert drawn.gflops < beside.gflops
    assert drawn.seconds > 0
    assert studio.offer.begin.steps == 20  # the pipeline's own


def test_a_cancelled_picture_leaves_the_pipeline_as_it_was(studio):
    wanted = Wanted(**ASKED, methods="merge")
    *_, expected = scenes(studio, wanted)
    drawing = scenes(studio, wanted)
    next(drawing)
    drawing.close()
    *_, again = scenes(studio, wanted)
    assert np.array_equal(again.drawn.picture, expected.drawn.picture)
    assert np.array_equal(again.beside.picture, expected.beside.picture)


@pytest.mark.parametrize("wrong", [{"steps": 5000}, {"prompts": ({"prompt": "x"},)}, {"methods": "[{method: x}]"}])
def test_settings_that_the_page_cannot_begin_with_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        PipelinePlaygroundConfig(model="nowhere", **wrong)


def test_clean_latents_follow_from_two_noisy_ones():
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for earlier, now in (((0.6, 0.8), (0.8, 0.6)), ((0.2, 0.8), (0.7, 0.3)), ((0.3, 0.9), (1.0, 0.0))):
        one, other = (a * clean + s * noise for a, s in (earlier, now))
        assert torch.allclose(clean_of(one, earlier, other, now).double(), clean, atol=1e-5)  # in single precision
    assert clean_of(clean, (1.0, 0.0), noise, (1.0, 0.0)) is noise


@pytest.mark.parametrize("name", ["PixArt", "SD3", "Flux", "Z-Image", "Wan"])
def test_the_last_preview_is_the_picture(name):
    """At the end no noise is left, so that the preview must unpack, scale and decode as the pipeline does."""
    pipe, arguments = build(name), PIPES[name].arguments()
    preview, seen = Preview(pipe, arguments["height"], arguments["width"]), []

    def at_end(pipe: Any, index: int, timestep: Any, tensors: Any) -> Any:
        seen.append(preview.picture(index, tensors["latents"]))
        return tensors

    given = {"callback_on_step_end": at_end}
    if name == "PixArt":
        given = {"callback": lambda index, timestep, latents: at_end(pipe, index, timestep, {"latents": latents})}
    made = draw(pipe, {**arguments, **given, "num_inference_steps": 3}, seed=3)
    assert len(seen) == 3
    assert seen[-1].shape == made[0].shape
    assert np.abs(seen[-1].astype(int) - made[0]).max() <= 1  # rounded from another precision
    assert not np.array_equal(seen[0], seen[-1])


def test_latents_that_cannot_be_decoded_are_shown_themselves():
    shown = Preview(build("LTX"), 32, 32).picture(0, torch.randn(1, 18, 4, generator=torch.Generator().manual_seed(0)))
    assert shown.shape == (4, 4, 3)
    assert (shown.min(), shown.max()) == (0, 255)
