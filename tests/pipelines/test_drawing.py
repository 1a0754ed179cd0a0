"""Prompts from files, and the arguments of a pipeline's calls."""

import json

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from tests.contract.pipelines import build
from tokdyn.errors import InputError
from tokdyn.pipelines.drawing import Drawing, call_arguments, draw, read_prompts


@pytest.fixture
def edits(tmp_path):
    Image.new("L", (8, 6), 7).save(tmp_path / "grey.png")
    return tmp_path


ENTRIES = ["a red cube", {"prompt": "make it night", "image": "grey.png"}]


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_a_file_holds_texts_and_arguments_with_images_beside_it(kind, edits):
    import yaml

    path = edits / f"prompts.{kind}"
    path.write_text(json.dumps(ENTRIES) if kind == "json" else yaml.safe_dump(ENTRIES))
    drawing = Drawing(prompts=str(path))
    assert drawing.prompts[0] == "a red cube"
    assert drawing.prompts[1] == {"prompt": "make it night", "image": str(edits / "grey.png")}


def test_lines_of_a_text_file_are_prompts_and_other_texts_are_one(tmp_path):
    (tmp_path / "a.txt").write_text("a red cube\n\n  a street, at night \n")
    assert read_prompts(str(tmp_path / "a.txt")) == ["a red cube", "a street, at night"]
    assert read_prompts("a street, at night") == ["a street, at night"]
    assert read_prompts(["a", "b"]) == ["a", "b"]


@pytest.mark.parametrize("content", ["{", "3", '{"prompt": "a"}', "[1, 2]"])
def test_files_that_hold_something_else_are_named(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValidationError, match=r"a\.json"):
        Drawing(prompts=str(tmp_path / "a.json"))
    with pytest.raises(ValidationError, match="does not exist"):
        Drawing(prompts=str(tmp_path / "b.txt"))
    with pytest.raises(ValidationError, match="height and width"):
        Drawing(height=16)


def test_settings_and_images_become_arguments(edits):
    import diffusers

    pipe = build("Flux")
    drawing = Drawing(prompts=["a", {"prompt": "b", "guidance_scale": 1.0}], steps=3, guidance=2.0, height=16, width=24)
    first, second = call_arguments(pipe, drawing)
    assert first == {"prompt": "a", "num_inference_steps": 3, "guidance_scale": 2.0, "height": 16, "width": 24}
    assert second["guidance_scale"] == 1.0
    with pytest.raises(InputError, match="num_frames"):
        call_arguments(pipe, Drawing(prompts=["a"], frames=5))
    with pytest.raises(InputError, match="image"):
        call_arguments(pipe, Drawing(prompts=[{"prompt": "a", "image": str(edits / "grey.png")}]))
    editing = object.__new__(diffusers.FluxImg2ImgPipeline)
    entry = {"prompt": "a", "image": str(edits / "grey.png")}
    (call,) = call_arguments(editing, Drawing(prompts=[entry]))
    assert (call["image"].size, call["image"].mode) == ((8, 6), "RGB")
    with pytest.raises(InputError, match=r"none\.png"):
        call_arguments(editing, Drawing(prompts=[{**entry, "image": "none.png"}]))


def test_pictures_and_frames_are_bytes_and_refusals_are_words():
    from tests.contract.pipelines import PIPES

    for name, count in (("DiT", 2), ("Wan", 5)):
        pixels = draw(build(name), {**PIPES[name].arguments(), "num_inference_steps": 1}, 3)
        assert pixels.dtype == np.uint8
        assert pixels.shape[0] == count
        assert pixels.shape[3] == 3
    with pytest.raises(InputError, match="FluxPipeline cannot draw"):
        draw(build("Flux"), {**PIPES["Flux"].arguments(), "prompt": "a"}, 3)
