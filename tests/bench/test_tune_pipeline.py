"""`tokdyn tune` on a pipeline of diffusers."""

import json
import shlex

import pytest
import torch
from tokdyn.cli.main import app
from typer.testing import CliRunner

import tokdyn
from tests.contract.pipelines import build
from tokdyn.pipelines.drawing import draw
from tokdyn.pipelines.opening import open_pipeline

SMALL = ["steps=5", "guidance=2", "height=16", "width=16", "device=cpu"]


def run(*words, code=0):
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_what_is_found_meets_the_target_and_the_printed_command_draws_with_it(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a red square\na blue square\n")
    words = ["tune", pipeline, "flops=0.7", "prompts=p.txt", "trials=4", "finalists=1", *SMALL]
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
    for seed, prompt in enumerate(("a red square", "a blue square")):
        draw(pipe, {**call, "prompt": prompt}, seed)
        shares.append(tokdyn.stats(pipe).share)
    (tried,) = {trial["flops"] for trial in found["trials"] if trial["stack"] == found["winner"]}
    assert sum(shares) / 2 == pytest.approx(tried)
    run(*shlex.split(found["sample"])[1:], "device=cpu", "out=drawn", "prompts=p.txt")
    drawn = json.loads((tmp_path / "drawn" / "sample.json").read_text())["drawn"].values()
    assert [entry["share"] for entry in drawn] == pytest.approx(shares)


def test_targets_knobs_and_pipelines_that_do_not_fit_are_refused(pipeline, tmp_path):
    out = f"out={tmp_path / 'o'}"
    assert "drop" in run("tune", pipeline, "flops=0.7", "knobs=drop", out, *SMALL, code=2)
    assert "meets flops=0.01" in run("tune", pipeline, "flops=0.01", "knobs=merge", "trials=2", out, *SMALL, code=2)
    assert not (tmp_path / "o" / "tuned.json").exists()


def test_a_pipeline_with_two_denoisers_is_refused(tmp_path, monkeypatch):
    pipe = build("Wan")
    pipe.register_modules(transformer_2=build("Wan").transformer)
    monkeypatch.setattr("tokdyn.bench.tune_pipeline.open_pipeline", lambda *_: pipe)
    from tokdyn.bench.tune_pipeline import PipelineTuneConfig, tune_pipeline

    with pytest.raises(tokdyn.InputError, match="transformer_2"):
        tune_pipeline(PipelineTuneConfig(model="x", flops=0.5, out=tmp_path, device="cpu"))
