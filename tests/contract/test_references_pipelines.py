"""Editing pipelines of diffusers draw the same pictures when they are unwrapped, and say what each step computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokdyn
from tests.contract.edits import EDITS
from tokdyn import DepthSkip, FeatureCache, TokenMerge

QUICK = {"Kontext", "Qwen-Image-Edit-Plus", "Flux 2", "Wan", "LTX", "LTX-2"}  # pipelines that are drawn with by default


@pytest.fixture
def edit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pipeline, and a function that makes a picture with it."""
    import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as plus

    for size in ("VAE_IMAGE_SIZE", "CONDITION_IMAGE_SIZE"):
        monkeypatch.setattr(plus, size, 32 * 32)
    build, arguments = EDITS[request.param]
    pipe = build()
    pipe.set_progress_bar_config(disable=True)

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(3)
        found = pipe(**arguments(), num_inference_steps=3, output_type="np", generator=generator)[0]
        return torch.as_tensor(found).clone()

    return pipe, draw


@pytest.mark.parametrize(
    "edit", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in EDITS], indirect=True
)
@torch.no_grad()
def test_editing_pipelines_work_wrapped(edit: Any) -> None:
    pipe, draw = edit
    plain = draw()
    tokdyn.wrap(pipe, [FeatureCache(steps=(0, 2)), DepthSkip(blocks=(1,))])
    draw()
    calls = tokdyn.stats(pipe).calls
    assert {call.step: call.reused for call in calls} == {0: 0, 1: calls[0].samples, 2: 0}
    tokdyn.unwrap(pipe)
    tokdyn.wrap(pipe, [TokenMerge(ratio=0.5)])
    assert not torch.equal(draw(), plain)
    for call in tokdyn.stats(pipe).calls:
        assert 0 < call.attention_tokens < call.cells
    with tokdyn.disabled(pipe):
        assert torch.equal(draw(), plain)
    tokdyn.unwrap(pipe)
    assert torch.equal(draw(), plain)
