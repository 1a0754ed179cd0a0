"""Pipelines with several denoisers, each calibrated on the calls that it gets."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from tokdyn.cli.main import app
from typer.testing import CliRunner

import tokdyn
from tokdyn import DepthSkip, FeatureCache, InputError
from tokdyn.calibration.threshold import simulate
from tokdyn.pipelines.opening import open_pipeline

STEPS = 8


CALL = {"prompt": "a red square", "num_inference_steps": STEPS, "height": 32, "width": 48, "num_frames": 5}
SIZE = [f"steps={STEPS}", "height=32", "width=48", "frames=5", "device=cpu"]


def draw(pipe):
    """Draw the same video every time."""
    found = pipe(**CALL, generator=torch.Generator().manual_seed(3), output_type="np", return_dict=False)
    return torch.as_tensor(found[0])


@pytest.fixture(scope="module")
def recorded(experts):
    pipe = open_pipeline(str(experts), torch.device("cpu"))
    with tokdyn.recording(pipe) as calls:
        draw(pipe)
    return pipe, calls


def test_calls_are_recorded_by_the_denoiser_that_gets_them(recorded):
    pipe, calls = recorded
    high, low = ({float(call["timestep"][0]) for call in calls[name]} for name in ("transformer", "transformer_2"))
    assert min(high) >= 875 > max(low)
    assert len(calls["transformer"]) + len(calls["transformer_2"]) == 2 * STEPS
    with tokdyn.recording(pipe.transformer) as one:
        draw(pipe)
    assert len(one) == len(calls["transformer"])


def test_each_is_calibrated_on_its_own_calls_and_the_result_is_what_wrap_takes(recorded, tmp_path):
    pipe, calls = recorded
    cache = tokdyn.calibrate(pipe, calls, FeatureCache(), steps=0.7, degree=1)
    skip = tokdyn.calibrate(pipe, calls, DepthSkip(), flops=0.7, levels=2)
    for name, own in calls.items():
        model = getattr(pipe, name)
        assert cache[name] == [tokdyn.calibrate(model, own, FeatureCache(), steps=0.7, degree=1)]
    assert cache["transformer"] != cache["transformer_2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # both know their model and their sampler again
        tokdyn.wrap(pipe, {name: [*cache[name], *skip[name]] for name in calls})
        expected = draw(pipe)
        found = tokdyn.stats(pipe)
        tokdyn.save(pipe, tmp_path)
        tokdyn.load(tokdyn.unwrap(pipe), tmp_path)
        assert torch.equal(draw(pipe), expected)
    tokdyn.unwrap(pipe)
    assert found.share <= 0.7
    reused = [call.step for call in found.calls if call.reused]
    for name, own in calls.items():
        steps = tokdyn.calibration.calibrate_cache(getattr(pipe, name), own, FeatureCache(), 1, steps=0.7).steps
        first = 0 if name == "transformer" else len(calls["transformer"]) // 2
        expected = [first + at // 2 for at, reuse in enumerate(simulate(steps, cache[name][0])) if reuse.any()]
        here = [step for step in reused if first <= step < first + len(own) // 2]
        assert set(here) == set(expected) - {STEPS - 1}  # the pipeline knows its last step


def test_calls_that_do_not_fit_are_refused_in_words(recorded):
    pipe, calls = recorded
    own = calls["transformer"]
    for wrong, named in (
        (own, "transformer, transformer_2"),
        ({}, "transformer, transformer_2"),
        ({"unet": own}, "transformer, transformer_2"),
        ({"transformer": own, "transformer_2": []}, "transformer_2 .*no calls"),
        ({"transformer": own, "transformer_2": own[:2]}, "transformer_2: "),
    ):
        with pytest.raises(InputError, match=named):
            tokdyn.calibrate(pipe, wrong, FeatureCache())
    assert list(tokdyn.calibrate(pipe, {"transformer": own}, FeatureCache(), degree=1)) == ["transformer"]
    with pytest.raises(InputError, match="WanTransformer3DModel"):
        tokdyn.calibrate(pipe.transformer, calls, FeatureCache())


def run(*words, code=0):
    """Run a command in this process, where a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_the_command_writes_a_folder_for_each_which_sample_applies_again(experts, recorded, tmp_path):
    out = tmp_path / "out"
    words = ["method=cache", "cache_steps=0.7", "degree=1", "prompts=a red square", "count=1", "seed=3", *SIZE]
    found = json.loads(run("calibrate", experts, *words, f"out={out}", "--json"))["denoisers"]
    pipe, calls = recorded
    expected = tokdyn.calibrate(pipe, calls, FeatureCache(), steps=0.7, degree=1)
    assert list(found) == ["transformer", "transformer_2"]
    assert sorted(path.name for path in out.iterdir()) == ["preset.yaml", *found]
    for name, report in found.items():
        here = out / name
        assert {**json.loads((here / "calibration.json").read_text()), "folder": str(here)} == report
        assert (report["calls"], report["computed_steps"] <= 0.7) == (len(calls[name]), True)
        assert report["method"]["threshold"] == pytest.approx(expected[name][0].threshold)
        assert (here / "calibration.png").is_file()
    run("sample", experts, "prompts=a red square", "seed=3", *SIZE, f"methods={out}", f"out={tmp_path / 'drawn'}")
    (drawn,) = json.loads((tmp_path / "drawn" / "sample.json").read_text())["drawn"].values()
    tokdyn.wrap(pipe, expected)
    draw(pipe)
    assert (drawn["cached"], drawn["share"]) == (tokdyn.stats(pipe).cached, pytest.approx(tokdyn.stats(pipe).share))
    tokdyn.unwrap(pipe)


def test_an_expert_without_a_step_is_named(experts, tmp_path):
    words = ["method=cache", "count=1", *SIZE, "steps=1", f"out={tmp_path / 'out'}"]
    assert "transformer_2" in run("calibrate", experts, *words, code=2)
    assert not (tmp_path / "out" / "transformer").exists()
