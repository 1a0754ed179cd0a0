"""MagCache's ratios are those of the paper's definition, and what is calibrated comes back from a preset file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from tokdyn.cli.main import app
from typer.testing import CliRunner

import tokdyn
from tests.calibration.trajectories import LEVELS, trajectory, watch_blocks
from tests.contract.models import TINY
from tokdyn import DepthSkip, FeatureCache, InputError
from tokdyn.calibration import calibrate_cache
from tokdyn.calibration.magnitudes import in_whole_run, magnitude_ratio, reused_steps
from tokdyn.pipelines.opening import open_pipeline
from tokdyn.presets import read

MAG = FeatureCache(rule="magcache", ratios=(1.0,), threshold=0.1)


def run(*words: object) -> str:
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return result.stdout


@torch.no_grad()
@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "FluxTransformer2DModel"])
def test_a_ratio_is_the_mean_over_tokens_of_the_growth_of_the_effect(name: str) -> None:
    """Hooks on the plain model see the same."""
    model, calls = TINY[name].build(), trajectory(name, LEVELS[:4])
    found = calibrate_cache(model, calls, MAG, steps=0.75)
    effects = []
    for call in calls:
        blocks = watch_blocks(model, call)
        effects.append(blocks[-1][1] - blocks[0][0])
    expected = [1.0]
    for step in range(1, 4):
        lengths = [effects[2 * step + branch].norm(dim=-1) for branch in (0, 1)]
        before = [effects[2 * (step - 1) + branch].norm(dim=-1) for branch in (0, 1)]
        expected.append(float(torch.cat([now / then for now, then in zip(lengths, before, strict=True)]).mean()))
    assert found.method.ratios == pytest.approx(expected, abs=2e-5)
    assert found.ratios is not None
    assert found.ratios.difference > 0
    assert 0 < found.computed <= 0.75
    assert found.fit is None


def test_tokens_without_an_effect_are_left_out_of_a_ratio() -> None:
    before = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    now = torch.tensor([[[6.0, 8.0], [1.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]])
    assert magnitude_ratio(now, before).tolist() == [2.0, 1.0]


def test_steps_are_reused_as_the_published_rule_decides() -> None:
    """A direct reading of the authors' loop: an error accumulates while steps are reused, and begins anew after."""
    ratios = (1.0, 1.2, 0.98, 0.97, 0.99, 1.01, 0.9, 0.95, 1.03, 0.6, 0.98, 0.99)
    for threshold, most, start in ((0.1, 3, 0.2), (0.3, 2, 0.0), (0.05, None, 0.5), (1.0, 5, 0.1)):
        expected, product, error, row = [], 1.0, 0.0, 0
        for step in range(len(ratios)):
            reuse = False
            if max(int(start * len(ratios)), 1) <= step < len(ratios) - 1:
                product *= ratios[step]
                row += 1
                error += abs(1 - product)
                reuse = error < threshold and (most is None or row <= most)
            if not reuse:
                product, error, row = 1.0, 0.0, 0
            expected.append(reuse)
        cache = FeatureCache(rule="magcache", ratios=ratios, threshold=threshold, max_reused=most, start=start)
        assert reused_steps(cache, len(ratios)) == expected
        assert any(expected)


def test_the_ratios_of_two_denoisers_lie_in_the_run_that_they_share() -> None:
    high = FeatureCache(rule="magcache", ratios=(1.0, 0.9, 0.8), start=0.4)
    low = FeatureCache(rule="magcache", ratios=(1.0, 0.7), start=0.5)
    placed = in_whole_run({"transformer_2": (low, 0.4), "transformer": (high, 0.98)})
    assert placed["transformer"].ratios == (1.0, 0.9, 0.8, 1.0, 1.0)
    assert placed["transformer_2"].ratios == (1.0, 1.0, 1.0, 1.0, 0.7)
    assert placed["transformer"].start == pytest.approx(1 / 5)
    assert placed["transformer_2"].start == pytest.approx(4 / 5)


def test_runs_of_several_lengths_and_rules_without_numbers_are_refused() -> None:
    model = TINY["DiT"].build()
    other = [{**call, "class_labels": call["class_labels"] + 3} for call in trajectory("DiT", LEVELS[1:], branches=1)]
    with pytest.raises(InputError, match="7 and 8 steps"):
        calibrate_cache(model, trajectory("DiT", branches=1) + other, MAG)
    with pytest.raises(InputError, match=r"easycache.* no numbers"):
        calibrate_cache(model, other, FeatureCache(rule="easycache"))


EXACTLY = {"height": 16, "width": 16, "use_resolution_binning": False}
SIZE = ("height=16", "width=16", "steps=6", "guidance=2", "count=3", "device=cpu")


@pytest.mark.parametrize(
    "words",
    [("method=mag", "cache_steps=0.6"), ("method=cache", "cache_steps=0.6", "degree=1"), ("method=skip", "flops=0.8")],
)
def test_a_calibrated_pipeline_gives_a_preset_file_that_acts_on_it(
    words: tuple[str, ...], pipeline: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a red square\na blue square\n")
    out = tmp_path / "out"
    run("calibrate", pipeline, *words, f"prompts={tmp_path / 'prompts.txt'}", *SIZE, f"out={out}")
    family = read(out / "preset.yaml")
    setting = family.models[0].settings["calibrated"]
    found = setting.calibration
    assert found is not None
    assert (found.prompts, found.seeds, setting.steps) == (2, [0, 1, 2], 6)
    assert found.spread[""]
    assert 0 < found.computed[""] < 1
    (method,) = setting.methods
    assert method.fingerprint == found.fingerprints[""]
    report = json.loads((out / "calibration.json").read_text())
    kept = {name: value for name, value in report["method"].items() if name != "method"}
    assert method == type(method)(**{k: tuple(map(_tuples, v)) if isinstance(v, list) else v for k, v in kept.items()})
    pipe = open_pipeline(str(pipeline), torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it knows the model and the sampler again
        tokdyn.wrap(pipe, out / "preset.yaml")
        pipe("a red square", num_inference_steps=6, guidance_scale=2.0, output_type="np", **EXACTLY)
    assert tokdyn.preset(out / "preset.yaml") == [method]
    assert tokdyn.stats(pipe).share < 1
    sampled = run(
        "sample", pipeline, "prompts=a red square", "height=16", "width=16", "steps=6", "guidance=2", "device=cpu",
        f"methods={out / 'preset.yaml'}", f"out={tmp_path / 'drawn'}", "--json",
    )  # fmt: skip
    assert "denoiser_seconds" in sampled
    shown = run("presets", out / "preset.yaml")
    assert "calibrated" in shown
    if isinstance(method, DepthSkip):
        assert method.table


def _tuples(value: object) -> object:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def test_two_experts_get_settings_of_their_own_in_one_file(experts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    size = ("height=32", "width=48", "frames=5", "steps=8", "count=1", "device=cpu")
    run("calibrate", experts, "method=mag", "threshold=0.5", "prompts=a red square", *size, f"out={out}")
    stack = tokdyn.preset(out / "preset.yaml")
    assert isinstance(stack, dict)
    (high,), (low,) = stack["transformer"], stack["transformer_2"]
    assert len(high.ratios) == len(low.ratios) == 8
    own = [[step for step, ratio in enumerate(one.ratios) if ratio != 1.0] for one in (high, low)]
    assert max(own[0]) < min(own[1])
    pipe = tokdyn.wrap(open_pipeline(str(experts), torch.device("cpu")), str(out / "preset.yaml"))
    assert tokdyn.pipelines.is_wrapped(pipe)
