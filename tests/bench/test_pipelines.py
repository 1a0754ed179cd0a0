"""`tokdyn bench speed` and `bench quality` on a pipeline of diffusers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tokdyn.cli.main import app
from typer.testing import CliRunner

import tokdyn
from tokdyn import FeatureCache
from tokdyn.bench.pipelines import PipelineBench, write_pipeline_page
from tokdyn.bench.settings import PipelineBenchConfig
from tokdyn.pipelines.opening import open_pipeline

CACHED = "{name: cached, methods: [{method: FeatureCache, steps: [0, 2]}]}"
MERGED = "{name: merged <b>, methods: [{method: TokenMerge, ratio: 0.5}]}"
SMALL = ["steps=4", "guidance=2", "height=16", "width=16", "device=cpu"]


def run(command, *words, code=0):
    result = CliRunner().invoke(app, ["bench", command, *map(str, words)])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_quality_shows_pairs_of_every_stack(pipeline, tmp_path):
    (tmp_path / "p.txt").write_text("a red square\na blue square\n")
    words = [pipeline, "--stack", "{name: plain}", "--stack", CACHED, "--stack", MERGED, *SMALL]
    shown = run("quality", *words, f"prompts={tmp_path / 'p.txt'}", f"out={tmp_path / 'q'}")
    assert "cached" in shown
    found = json.loads((tmp_path / "q" / "quality.json").read_text())["stacks"]
    assert list(found) == ["cached", "merged <b>"]
    for row in found.values():
        assert [pair["seed"] for pair in row["pairs"]] == [0, 1]
        assert all(pair["psnr"] > 0 and min(pair["seconds"]) > 0 for pair in row["pairs"])
        assert row["flops_share"] < 1
    page = (tmp_path / "q" / "quality.html").read_text()
    assert "merged &lt;b&gt;" in page
    assert page.count("<img") == 2 * 2 * 2  # stacks, prompts, with and without methods
    for place in (1, 2):
        with Image.open(tmp_path / "q" / f"pairs-{place}.png") as image:
            assert np.asarray(image).std() > 5


PRESET = """
family: tiny
models:
- name: tiny
  class: PixArtTransformer2DModel
  settings: {fast: {methods: [{method: FeatureCache, steps: [0, 2]}]}}
"""


def test_a_stack_may_be_a_preset(pipeline, tmp_path):
    """By a file here: the tiny pipeline is none of those that have published ones, which is said in words."""
    (tmp_path / "preset.yaml").write_text(PRESET)
    named = f"{{name: named, methods: {tmp_path / 'preset.yaml'}}}"
    run("quality", pipeline, "--stack", named, "--stack", CACHED, *SMALL, f"out={tmp_path / 'q'}")
    found = json.loads((tmp_path / "q" / "quality.json").read_text())["stacks"]
    assert found["named"]["psnr"] == found["cached"]["psnr"] is not None
    shown = run("quality", pipeline, "--stack", "{name: fast, methods: fast}", f"out={tmp_path / 'r'}", code=2)
    assert "no preset fits this PixArtSigmaPipeline" in shown
    assert not (tmp_path / "r").exists()


def test_many_pairs_are_on_several_pictures_of_the_page(pipeline, tmp_path):
    drawn = open_pipeline(str(pipeline), torch.device("cpu"))
    call = {"num_inference_steps": 1, "height": 16, "width": 16, "use_resolution_binning": False}
    compared = tokdyn.compare(drawn, [FeatureCache(steps=(0,))], ["a red square"], **call)
    many = replace(compared, pairs=compared.pairs * 17)
    config = PipelineBenchConfig(model="m", out=tmp_path / "q")
    _, page, *pictures = write_pipeline_page(config, PipelineBench({"cached": many, "other": compared}, {}))
    assert [path.name for path in pictures] == ["pairs-1.png", "pairs-1-2.png", "pairs-1-3.png", "pairs-2.png"]
    assert all(path.is_file() for path in pictures)
    assert page.read_text().count("<img") == 2 * (17 + 1)


def test_speed_repeats_the_first_prompt_in_turn(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [pipeline, "--stack", CACHED, *SMALL, "prompts=a red square", "rounds=2"]
    (row,) = json.loads(run("speed", *words, "--json"))["stacks"].values()
    assert len(row["pairs"]) == 2
    assert row["speedup"] > 0
    assert "PSNR" not in run("speed", *words)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_methods_is_a_stack(pipeline, tmp_path):
    pipe = tokdyn.wrap(open_pipeline(str(pipeline), torch.device("cpu")), [FeatureCache(steps=(0, 2))])
    folder = tokdyn.save(pipe, tmp_path / "methods")
    stack = f"{{name: saved, folder: {folder}}}"
    found = json.loads(run("speed", pipeline, "--stack", stack, "--stack", CACHED, *SMALL, "rounds=1", "--json"))
    saved, cached = found["stacks"].values()
    assert saved["flops_share"] == cached["flops_share"] < 1


@pytest.mark.parametrize(
    ("stack", "match"),
    [
        ("{name: plain}", "no stack with methods"),
        ("{name: a, model: x, methods: [{method: TokenMerge}]}", "names a model"),
        ("{name: a, tail_drop: 0.5}", "without Chunking"),
        ("{name: a, methods: [{method: Chunking}], tail_drop: [[0, 0.1], [1, 0.5]]}", "points"),
        ("{name: a, methods: [{method: DepthSkip, blocks: [99]}]}", "no block 99"),
    ],
)
def test_stacks_that_do_not_fit_are_refused_in_words(stack, match, pipeline, tmp_path):
    words = [pipeline, "--stack", stack, *SMALL, f"out={tmp_path / 'q'}"]
    assert match in run("quality", *words, code=2)
    assert not (tmp_path / "q" / "quality.json").exists()


def test_nothing_is_drawn_before_all_is_known_to_fit(pipeline, tmp_path, monkeypatch):
    calls = []
    pipe = open_pipeline(str(pipeline), torch.device("cpu"))
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr("tokdyn.bench.pipelines.open_pipeline", lambda *_: pipe)
    (tmp_path / "file").write_text("")
    assert "is a file" in run("quality", pipeline, "--stack", CACHED, *SMALL, f"out={tmp_path / 'file'}", code=2)
    bad = "{name: a, methods: [{method: DepthSkip, blocks: [99]}]}"
    assert "leave out out" in run("speed", pipeline, "--stack", CACHED, *SMALL, f"out={tmp_path / 'q'}", code=2)
    assert "leave out rounds" in run("quality", pipeline, "--stack", CACHED, *SMALL, "rounds=3", code=2)
    words = [pipeline, "--stack", CACHED, "--stack", bad, *SMALL, f"out={tmp_path / 'q'}"]
    assert "no block 99" in run("quality", *words, code=2)
    assert not calls
    assert not (tmp_path / "q").exists()
