"""`tokdyn tune` on a pipeline of diffusers."""

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from tokdyn.cli.main import app
from typer.testing import CliRunner

import tokdyn
from tests.bench.test_tune import shown_image
from tokdyn.pipelines.drawing import draw
from tokdyn.pipelines.opening import open_pipeline

SMALL = ["steps=5", "guidance=2", "height=16", "width=16", "device=cpu"]


def run(*words, code=0):
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == code, result.output
    return result.output if code == 0 else result.stderr


def test_what_is_found_meets_the_target_and_the_printed_command_draws_with_it(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = ("a red: square", "a blue square")
    (tmp_path / "p.yaml").write_text(json.dumps(prompts))
    (tmp_path / "tuned" / "drawn").mkdir(parents=True)
    (tmp_path / "tuned" / "drawn" / "sample.json").write_text('{"settings": {"seed": 9}, "drawn": {}}')
    words = ["tune", pipeline, "flops=0.7", "prompts=p.yaml", "seed=3", "trials=4", "finalists=1", *SMALL]
    shown = run(*words)
    found = json.loads((tmp_path / "tuned" / "tuned.json").read_text())
    assert found["sample"] in shown
    errors = [trial["error"] for trial in found["trials"]]
    assert errors == sorted(errors)
    assert all(0.65 <= trial["flops"] <= 0.7 for trial in found["trials"])
    assert all(row["flops_share"] <= 0.7 for row in found["compared"]["stacks"].values())
    pipe = tokdyn.load(open_pipeline(str(pipeline), torch.device("cpu")), tmp_path / "tuned" / "methods")
    call = {"num_inference_steps": 5, "guidance_scale": 2.0, "height": 16, "width": 16, "use_resolution_binning": False}
    shares = []
    pictures = []
    for seed, prompt in enumerate(prompts):
        pictures.append(draw(pipe, {**call, "prompt": prompt}, 3 + seed)[0])
        shares.append(tokdyn.stats(pipe).share)
    (tried,) = {trial["flops"] for trial in found["trials"] if trial["stack"] == found["winner"]}
    place = next(n for n, trial in enumerate(found["trials"], 1) if trial["stack"] == found["winner"])
    page = (tmp_path / "tuned" / "quality.html").read_text()
    for number, expected in enumerate(pictures, 1):
        assert np.array_equal(shown_image(page, f"schedule {place}, image {number}"), expected)
    assert sum(shares) / 2 == pytest.approx(tried)
    command = shlex.split(found["sample"])[1:]
    assert "device=cpu" in command
    run(*command)
    drawn = json.loads((tmp_path / "tuned" / "drawn-2" / "sample.json").read_text())["drawn"].values()
    assert [entry["share"] for entry in drawn] == pytest.approx(shares)
    for entry, expected in zip(drawn, pictures, strict=True):
        with Image.open(tmp_path / "tuned" / "drawn-2" / entry["file"]) as image:
            assert np.array_equal(np.asarray(image), expected)


def test_a_few_steps_are_cached_down_to_the_first_and_the_last(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ["steps=4", *SMALL[1:]]
    run("tune", pipeline, "flops=0.52", "knobs=cache", "prompts=a red square", "trials=1", "finalists=1", *few)
    (trial,) = json.loads((tmp_path / "tuned" / "tuned.json").read_text())["trials"]
    assert trial["flops"] == pytest.approx(0.5, abs=0.02)


def test_targets_knobs_and_pipelines_that_do_not_fit_are_refused(pipeline, tmp_path):
    out = f"out={tmp_path / 'o'}"
    assert "drop" in run("tune", pipeline, "flops=0.7", "knobs=drop", out, *SMALL, code=2)
    (tmp_path / "sizes.json").write_text(json.dumps(["small", {"prompt": "large", "height": 32, "width": 16}]))
    words = [
        "flops=0.01",
        "knobs=merge",
        "trials=2",
        f"prompts={tmp_path / 'sizes.json'}",
    ]  # all are drawn first
    assert "meets flops=0.01" in run("tune", pipeline, *words, out, *SMALL, code=2)
    assert not (tmp_path / "o" / "tuned.json").exists()


@pytest.mark.slow
def test_each_of_two_denoisers_gets_settings_of_its_own(experts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = ["steps=6", "height=32", "width=32", "frames=1", "device=cpu"]
    run("tune", experts, "flops=0.7", "knobs=cache,skip", "trials=2", "finalists=1", "prompts=a red square", *size)
    found = json.loads((tmp_path / "tuned" / "tuned.json").read_text())
    names = ["transformer", "transformer_2"]
    assert all(list(trial["stack"]["methods"]) == names for trial in found["trials"])
    assert all(0.65 <= trial["flops"] <= 0.7 for trial in found["trials"])
    folders = [path.parent.name for path in (tmp_path / "tuned" / "methods").glob("*/tokdyn_config.json")]
    assert sorted(folders) == names
    run(*shlex.split(found["sample"])[1:])
    (drawn,) = json.loads((tmp_path / "tuned" / "drawn" / "sample.json").read_text())["drawn"].values()
    run("bench", "quality", experts, "--stack", "tuned/stack.yaml", "prompts=a red square", *size, "out=again")
    (row,) = json.loads((tmp_path / "again" / "quality.json").read_text())["stacks"].values()
    (tried,) = {trial["flops"] for trial in found["trials"] if trial["stack"] == found["winner"]}
    assert drawn["share"] == pytest.approx(tried)
    assert row["flops_share"] == pytest.approx(tried)


def test_methods_by_denoiser_are_for_pipelines(pipeline, saved, tmp_path):
    stack = "{name: a, methods: {transformer_2: [{method: TokenMerge}]}}"
    assert "transformer_2" in run("bench", "quality", pipeline, "--stack", stack, f"out={tmp_path}", *SMALL, code=2)
    assert "transformer_2" in run("bench", "quality", saved, "--stack", stack, f"out={tmp_path}", code=2)
    for wrong in ("3", "[3]", "{transformer: 3}", "{transformer: [{method: Merge}]}"):
        assert "methods" in run("bench", "quality", pipeline, "--stack", f"{{name: a, methods: {wrong}}}", code=2)
