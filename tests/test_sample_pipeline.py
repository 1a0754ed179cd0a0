"""`tokdyn sample` with a pipeline of diffusers."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from PIL import Image
from tokdyn.cli.main import app
from typer.testing import CliRunner

import tokdyn
from tests.hub import kontext
from tokdyn import FeatureCache, TokenMerge
from tokdyn.bases.names import names_pipeline
from tokdyn.pipelines.opening import open_pipeline

SIZE = ["steps=3", "guidance=2", "height=16", "width=16", "device=cpu"]


def run(*words, code=0):
    result = CliRunner().invoke(app, ["sample", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


@pytest.fixture
def methods(pipeline, tmp_path):
    pipe = tokdyn.wrap(open_pipeline(str(pipeline), torch.device("cpu")), [FeatureCache(steps=(0, 2)), TokenMerge()])
    return tokdyn.save(pipe, tmp_path / "methods")


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_prompts_are_drawn_as_diffusers_draws_them(pipeline, tmp_path):
    prompts = ["a red square", {"prompt": "a blue square", "height": 32}]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    found = json.loads(
        run(pipeline, f"prompts={tmp_path / 'prompts.json'}", "seed=5", *SIZE, f"out={tmp_path / 'o'}", "--json")
    )
    assert [each["seed"] for each in found["drawn"]] == [5, 6]
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline)
    for number, each in enumerate(found["drawn"]):
        expected = pipe(
            ("a red square", "a blue square")[number], generator=torch.Generator().manual_seed(5 + number),
            num_inference_steps=3, guidance_scale=2.0, height=(16, 32)[number], width=16, use_resolution_binning=False,
            output_type="np",
        ).images[0]  # fmt: skip
        assert np.array_equal(read(tmp_path / "o" / each["file"]), (255 * expected).round().astype(np.uint8))
    assert each["seconds"] > 0
    assert each["denoiser_seconds"] is None
    assert read(tmp_path / "o" / "grid.png").shape[1] > 32


def test_methods_in_a_folder_act_and_their_costs_are_printed(pipeline, methods, tmp_path):
    words = [pipeline, "prompts=a red square", *SIZE, f"out={tmp_path / 'o'}"]
    shown = run(*words, f"methods={methods}")
    assert "in attention" in shown
    (entry,) = json.loads((tmp_path / "o" / "sample.json").read_text())["drawn"].values()
    assert entry["cached"] > 0
    assert entry["share"] < 1
    assert 0 < entry["denoiser_seconds"] < entry["seconds"]
    assert all(f" {1e3 * entry[name]:,.1f} " in shown for name in ("seconds", "denoiser_seconds"))
    run(*words[:-1], f"out={tmp_path / 'plain'}")
    assert not np.array_equal(read(tmp_path / "o" / entry["file"]), read(tmp_path / "plain" / entry["file"]))


def test_a_repeated_command_draws_what_is_missing_and_refuses_other_settings(pipeline, methods, tmp_path):
    out = tmp_path / "o"
    (tmp_path / "p.txt").write_text("a red square\na blue square\n")
    words = [pipeline, f"prompts={tmp_path / 'p.txt'}", *SIZE, f"out={out}"]
    first = json.loads(run(*words, "--json"))["drawn"]
    (out / first[0]["file"]).unlink()
    before = (out / first[1]["file"]).stat().st_mtime_ns
    (tmp_path / "p.txt").write_text("a red square\na blue square\na red blue square\n")
    again = json.loads(run(*words, "--json"))["drawn"]
    assert (out / again[1]["file"]).stat().st_mtime_ns == before
    assert again[1] == first[1]
    assert len(again) == 3
    assert all((out / each["file"]).is_file() for each in again)
    kept = (out / "sample.json").read_text()
    assert "steps" in run(*words, "steps=2", code=2)
    assert "methods" in run(*words, f"methods={methods}", code=2)
    assert (out / "sample.json").read_text() == kept


def test_wrong_names_and_settings_are_refused_in_words(pipeline, methods, tmp_path):
    assert "does not exist" in run(pipeline, "prompts=none.txt", code=2)
    assert "holds no methods" in run(pipeline, f"methods={tmp_path}", f"out={tmp_path / 'o'}", code=2)
    assert "num_frames" in run(pipeline, "frames=3", f"out={tmp_path / 'o'}", code=2)
    assert "count" in run(pipeline, "count=3", code=2)
    broken = shutil.copytree(pipeline, tmp_path / "broken")
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert "cannot be read as a pipeline" in run(broken, f"out={tmp_path / 'o'}", code=2)
    assert not (tmp_path / "o" / "sample.json").exists()


def test_only_pipelines_of_other_models_than_tokdyn_samples_itself_are_pipelines(pipeline, tmp_path):
    assert names_pipeline(str(pipeline))
    assert not names_pipeline(None)
    assert not names_pipeline(str(tmp_path))
    assert not names_pipeline("nobody/no-such-pipeline")
    assert not names_pipeline("./no-such-folder")  # looks like an id of the hub, which the hub's client refuses
    assert not names_pipeline(str(tmp_path / "none"))
    with pytest.raises(tokdyn.CheckpointError, match="no such folder"):
        names_pipeline(str(tmp_path / "none"), wanted=True)
    with pytest.raises(tokdyn.CheckpointError, match=r"model_index\.json is missing"):
        names_pipeline(str(tmp_path), wanted=True)
    from tests.contract.pipelines import build

    build("DiT").save_pretrained(tmp_path / "dit")
    assert not names_pipeline(str(tmp_path / "dit"))
    with pytest.raises(tokdyn.CheckpointError, match="no transformer that draws prompts"):
        names_pipeline(str(tmp_path / "dit"), wanted=True)


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (GatedRepoError, "licence"),
        (RepositoryNotFoundError, "no such repository"),
        (LocalEntryNotFoundError, "cannot be reached"),
    ],
)
def test_what_the_hub_says_is_passed_on(error, match, monkeypatch, tmp_path):
    """Settings of pipelines are no mistake then, but the name is."""

    def refuse(*_):
        raise error.__new__(error)

    monkeypatch.setattr("tokdyn.bases.hub.reachable", lambda: True)
    monkeypatch.setattr("tokdyn.bases.hub.hf_hub_download", refuse)
    monkeypatch.chdir(tmp_path)
    words = ["somebody/some-pipeline", "prompts=a", "height=8", "width=8"]
    shown = run(*words, code=2)
    assert match in shown
    assert "somebody/some-pipeline" in shown
    assert shown.count("\n") == 1


def test_an_edit_is_drawn_again_if_its_image_has_changed(tmp_path, monkeypatch):
    """Images are named by path, and people change them."""
    folder = tmp_path / "kontext"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"transformer": ["diffusers", "FluxTransformer2DModel"]}')
    monkeypatch.setattr("tokdyn.sample.pipeline.open_pipeline", lambda *_: kontext("tiny"))
    (tmp_path / "edits.yaml").write_text("- {prompt: make it night, image: street.png}\n")
    entries = []
    for color in ("black", "black", "red"):
        Image.new("RGB", (8, 8), color).save(tmp_path / "street.png")
        run(folder, f"prompts={tmp_path / 'edits.yaml'}", f"out={tmp_path / 'o'}")
        entries.append(json.loads((tmp_path / "o" / "sample.json").read_text())["drawn"]["0"])
    first, again, changed = entries
    assert again == first
    assert changed["seconds"] != first["seconds"]
    (tmp_path / "street.png").unlink()
    assert "no such file" in run(folder, f"prompts={tmp_path / 'edits.yaml'}", f"out={tmp_path / 'o'}", code=2)


def test_prompts_are_shown_and_not_their_arguments(tmp_path, pipeline):
    (tmp_path / "p.yaml").write_text("- {prompt: a red square, clean_caption: false}\n")
    shown = run(pipeline, f"prompts={tmp_path / 'p.yaml'}", *SIZE, f"out={tmp_path / 'o'}")
    assert "a red square" in shown
    assert "{" not in shown


@pytest.mark.parametrize(
    ("part", "content"),
    [("text_encoder/model.safetensors", None), ("tokenizer/tokenizer_config.json", "[1]"), ("vae/config.json", "{")],
)
def test_a_pipeline_with_a_damaged_part_is_refused(part, content, pipeline, tmp_path):
    folder = shutil.copytree(pipeline, tmp_path / "damaged")
    before = (folder / part).read_bytes()
    (folder / part).write_bytes(before[: len(before) // 2] if content is None else content.encode())
    shown = run(folder, "prompts=a red square", *SIZE, f"out={tmp_path / 'o'}", code=2)
    assert f"{folder} cannot be read as a pipeline" in shown
    assert not (tmp_path / "o").exists()


def test_methods_without_their_settings_are_refused(pipeline, methods, tmp_path):
    (path,) = methods.rglob("tokdyn_config.json")
    path.write_text("{}")
    assert "tokdyn_config.json" in run(pipeline, f"methods={methods}", *SIZE, f"out={tmp_path / 'o'}", code=2)
    assert not (tmp_path / "o").exists()


def test_damaged_results_are_not_continued(pipeline, tmp_path):
    words = [pipeline, "prompts=a red square", *SIZE, f"out={tmp_path}"]
    run(*words)
    (picture,), record = tmp_path.glob("0*.png"), tmp_path / "sample.json"
    whole, content = picture.read_bytes(), json.loads(record.read_text())
    picture.write_bytes(whole[: len(whole) // 2])
    assert picture.name in run(*words, code=2)
    picture.unlink()
    run(*words)
    assert picture.read_bytes() == whole
    for wrong in ({"settings": 3}, {"drawn": []}, {"drawn": {"0": {"file": "a.png"}}}, {"drawn": {"first": {}}}):
        record.write_text(json.dumps({**content, **wrong}))
        assert "sample.json" in run(*words, code=2)
