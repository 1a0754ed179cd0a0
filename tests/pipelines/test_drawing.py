"""Prompts from files, and the arguments of a pipeline's calls."""

import json

import diffusers
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

import tokdyn
from tests.contract.pipelines import build
from tokdyn.errors import InputError
from tokdyn.pipelines.drawing import call_arguments, draw
from tokdyn.prompts import Drawing, read_prompts


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


@pytest.mark.parametrize("content", ["{", "3", '{"prompt": "a"}', "[1, 2]", "[]", "caf\xe9"])
@pytest.mark.parametrize("kind", ["json", "yaml", "txt"])
def test_files_that_hold_something_else_are_named_in_one_line(content, kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    path.write_bytes((content if kind != "txt" else content[3:]).encode("latin-1"))
    if kind == "txt" and content in ('{"prompt": "a"}', "[1, 2]"):
        assert len(Drawing(prompts=str(path)).prompts) == 1
        return
    with pytest.raises(ValidationError, match=rf"a\.{kind}") as raised:
        Drawing(prompts=str(path))
    assert "\n" not in raised.value.errors()[0]["msg"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", "prompt\na red cube\n"), ("a.json", "[" * 100_000), ("a.yaml", "- {prompt: 2020-01-01}")],
    ids=["table", "nested", "date"],
)
def test_files_of_other_kinds_are_not_taken_for_prompts(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValidationError, match=name):
        Drawing(prompts=str(tmp_path / name))
    assert read_prompts(str(tmp_path / "b.csv")) == [str(tmp_path / "b.csv")]  # no file, so a text
    assert read_prompts("a.b" * 1000) == ["a.b" * 1000]


@pytest.mark.parametrize("kind", ["text", "cut", "huge"])
def test_files_that_are_no_images_are_named(kind, tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.bmp")
    content = bytearray((tmp_path / "a.bmp").read_bytes())
    if kind == "huge":
        content[18:26] = b"\xff\x7f\0\0\xff\x7f\0\0"  # width and height
    (tmp_path / "a.bmp").write_bytes({"text": b"hello", "cut": content[: len(content) // 2], "huge": content}[kind])
    drawing = Drawing(prompts=[{"prompt": "a", "image": str(tmp_path / "a.bmp")}])
    with pytest.raises(InputError, match=r"a\.bmp cannot be read as an image"):
        call_arguments(build("Flux"), drawing)


def test_missing_files_and_half_a_size_are_refused(tmp_path):
    with pytest.raises(ValidationError, match="does not exist"):
        Drawing(prompts=str(tmp_path / "b.txt"))
    with pytest.raises(ValidationError, match="height and width"):
        Drawing(height=16)


def test_settings_and_images_become_arguments(edits):
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


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"generator": 3}, "generator"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt.*entry for each"),
        ({"prompt": ["a", "b"]}, "entry for each"),
        ({"num_images_per_prompt": 1}, None),
    ],
)
def test_a_prompt_is_one_picture_with_the_noise_of_its_seed(more, match):
    drawing = Drawing(prompts=[{"prompt": "a", **more}])
    if match is None:
        assert call_arguments(build("Flux"), drawing) == [{"prompt": "a", **more}]
        return
    with pytest.raises(InputError, match=match):
        call_arguments(build("Flux"), drawing)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_inference_steps", -1),
        ("num_inference_steps", 0),
        ("num_inference_steps", 10**9),
        ("num_inference_steps", 2.0),
        ("height", -8),
        ("height", 10**9),
        ("width", True),
        ("num_frames", 0),
        ("frames", "nine"),
        ("guidance_scale", float("nan")),
        ("guidance_scale", -1.0),
        ("true_cfg_scale", float("inf")),
        ("sigmas", [1.0, float("nan")]),
        ("strength", 1.5),
    ],
)
def test_numbers_that_mean_nothing_are_refused_before_a_pipeline_is_opened(name, value, tmp_path):
    """PixArt, among others, takes -1 steps, and draws noise."""
    (tmp_path / "p.json").write_text(json.dumps(["a", {"prompt": "b", name: value}]))
    for prompts in (str(tmp_path / "p.json"), ["a", {"prompt": "b", name: value}]):
        with pytest.raises(ValidationError, match=f"in prompt 2, {name} is ") as raised:
            Drawing(prompts=prompts)
        assert "\n" not in raised.value.errors()[0]["msg"]
    with pytest.raises(InputError, match=f"{name} is "):
        tokdyn.compare(build("DiT"), [tokdyn.TokenMerge()], [1], **{name: value})


def test_numbers_that_pipelines_take_are_left_alone():
    entry = {
        "prompt": "a", "num_inference_steps": 1, "height": 8, "width": None, "guidance_scale": 0.0, "strength": 1,
        "sigmas": [1.0, 0.5], "negative_prompt": "nan", "attention_kwargs": {"scale": -0.5},
    }  # fmt: skip
    assert Drawing(prompts=[entry]).prompts == (entry,)


@pytest.mark.parametrize("name", ["steps", "height", "frames"])
@pytest.mark.parametrize("value", [0, -8, 10**9, float("nan")])
def test_settings_that_mean_nothing_are_refused(name, value):
    with pytest.raises(ValidationError, match=name):
        Drawing(**{name: value})


def test_photos_are_upright(edits):
    """Cameras write how to turn a photo beside its pixels."""
    photo = Image.new("RGB", (8, 6))
    how = photo.getexif()
    how[0x0112] = 6  # turn right by 90 degrees
    photo.save(edits / "photo.jpg", exif=how)
    editing = object.__new__(diffusers.FluxImg2ImgPipeline)
    (call,) = call_arguments(editing, Drawing(prompts=[{"prompt": "a", "image": str(edits / "photo.jpg")}]))
    assert call["image"].size == (6, 8)


def test_pictures_and_frames_are_bytes_and_refusals_are_words():
    from tests.contract.pipelines import PIPES

    for name, count in (("DiT", 2), ("Wan", 5)):
        pixels = draw(build(name), {**PIPES[name].arguments(), "num_inference_steps": 1}, 3)
        assert pixels.dtype == np.uint8
        assert pixels.shape[0] == count
        assert pixels.shape[3] == 3
    with pytest.raises(InputError, match="FluxPipeline cannot draw"):
        draw(build("Flux"), {**PIPES["Flux"].arguments(), "prompt": "a"}, 3)


class Sound(diffusers.DiTPipeline):
    def __call__(self, **_):
        return (np.zeros((1, 2, 100), np.float32),)


def test_what_is_no_picture_is_refused():
    with pytest.raises(InputError, match=r"Sound .*\(1, 2, 100\)"):
        draw(Sound(**build("DiT").components), {}, 3)
