"""`tokdyn tune` meets its target, keeps the best schedule it saw, and writes a stack that can be opened again."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokdyn.cli.main import app
from typer.testing import CliRunner

from tests.sampling import FACTS, tiny
from tokdyn import DiT
from tokdyn.bench.stacks import Stack, open_stack, read_stacks
from tokdyn.bench.tune import tune
from tokdyn.bench.tune_search import LEVELS, ModelTuner, Trial, Tuner, initial_shapes, mutate, search, uniform_trial
from tokdyn.bench.tune_settings import KNOBS, TuneConfig
from tokdyn.errors import InputError
from tokdyn.train.snapshot import save_model

QUICK: dict[str, Any] = {"steps": 4, "scheduler": "ddim", "images": 2, "count": 4, "trials": 6, "device": "cpu"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    top = tmp_path_factory.mktemp("tune")
    for name, kind in (("dit", DiT), ("dc", None)):
        model = tiny(0, depth=4, sample_size=8) if kind is None else tiny(0, kind, depth=4, sample_size=8)
        save_model(model, top / name, FACTS)
    return {name: str(top / name) for name in ("dit", "dc")}


def shown_image(page: str, text: str) -> np.ndarray:
    """The image of a page (H, W, 3) that is described by a text."""
    (found,) = re.findall(rf'src="data:image/png;base64,([^"]+)" alt="{text}"', page)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found)))).astype(int)


def prepared_tuner(model: str, **settings: Any) -> Tuner:
    config = TuneConfig(model=model, **{**QUICK, **settings})
    opened = open_stack(Stack(name="unmodified", model=model))
    tuner = ModelTuner(config, config.knobs or KNOBS, opened=opened)
    tuner.prepare()
    return tuner


@pytest.mark.parametrize(
    ("model", "knobs", "flops"),
    [("dc", "drop,uncond", 0.85), ("dit", "merge,skip,cache", 0.6)],
)
def test_trials_meet_the_target(saved: dict[str, str], model: str, knobs: str, flops: float) -> None:
    """No trial spends more FLOPs than the target, and trials are sorted by error."""
    tuner = prepared_tuner(saved[model], knobs=knobs, flops=flops, guidance=2.0)
    trials = search(tuner)
    assert all(trial.flops <= flops for trial in trials)
    errors = [trial.error for trial in trials]
    assert errors == sorted(errors)
    assert min(errors) > 0
    uniform = uniform_trial(tuner)
    if uniform is not None:  # the search begins with it
        assert trials[0].error <= uniform.error
        assert uniform_trial(tuner, trials) in trials


@settings(deadline=None, max_examples=200)
@given(
    st.floats(0.3, 0.95),
    st.floats(0.4, 2.5),
    st.floats(0.05, 0.5),
    st.integers(0, 12),
    st.sampled_from([None, 0.3, 1.0]),
)
def test_target_is_met_from_below_on_any_falling_curve(
    flops: float, bend: float, floor: float, steps: int, guess: float | None
) -> None:
    """Smooth curves meet it within 0.3%; curves with jumps end at the closest point below it, or fail."""
    config = TuneConfig(model="none", flops=flops)
    tuner = ModelTuner(config, ("drop",), opened=None)  # type: ignore[arg-type]
    shape: dict[Any, Any] = {"drop": (0.2, 0.5, 0.5)}

    def remaining_flops(strength: float) -> float:
        turned = (strength / 2.0) ** bend
        turned = round(turned * steps) / steps if steps else turned
        return 1.0 - (1.0 - floor) * turned

    tried: list[float] = []

    def try_strength(shape: Any, strength: float) -> Trial:
        assert 0.0 <= strength <= 2.0
        tried.append(remaining_flops(strength))
        return Trial(shape, strength, Stack(name="a"), tried[-1], 0.0)

    tuner.try_strength = try_strength  # type: ignore[method-assign]
    trial = tuner.meet_target(shape, guess)
    assert len(tried) <= 9
    if trial is None:
        assert steps or remaining_flops(2.0) > flops
        return
    assert flops - 0.05 <= trial.flops <= flops
    assert trial.flops == max(each for each in tried if each <= flops)
    assert steps or trial.flops >= flops - 0.003
    assert max(max(values) for values in trial.turned.values()) <= 1.0


def test_strength_zero_is_the_unmodified_model(saved: dict[str, str]) -> None:
    tuner = prepared_tuner(saved["dc"], knobs="drop,skip,cache", flops=0.8)
    trial = tuner.try_strength({"drop": (1.0, 1.0, 1.0), "skip": (1.0,), "cache": (1.0,)}, 0.0)
    assert trial is not None
    assert (trial.flops, trial.error) == (pytest.approx(1.0), 0.0)


def test_shapes_are_within_bounds_and_repeatable() -> None:
    def draw_shapes() -> list[Any]:
        random = np.random.default_rng(1)
        initial = initial_shapes(KNOBS, random)
        shapes = [next(initial) for _ in range(20)]
        return shapes + [mutate(shape, KNOBS, random) for shape in shapes]

    assert draw_shapes() == draw_shapes()
    for shape in draw_shapes():
        assert shape
        for knob, values in shape.items():
            assert len(values) == (1 if knob in ("skip", "cache") else len(LEVELS))
            assert all(0.0 <= value <= 1.0 for value in values)


def test_winner_is_measured_written_and_opened_again(saved: dict[str, str], tmp_path: Path) -> None:
    config = TuneConfig(model=saved["dc"], flops=0.85, knobs="drop,uncond", guidance=2.0, out=tmp_path, **QUICK)
    result = tune(config)
    names = [row.name for row in result.quality.rows]
    assert names[:3] == ["unmodified", "uniform", "tuned 1"]
    (again,) = read_stacks([str(tmp_path / "stack.yaml")])
    assert again == result.stack
    opened = open_stack(again)
    assert opened.stack.tail_drop or opened.stack.uncond_tail_drop
    content = json.loads((tmp_path / "tuned.json").read_text())
    assert len(content["trials"]) == len(result.trials)
    command = shlex.split(content["sample"])[1:]
    shown = CliRunner().invoke(app, [*command, "count=2", "format=npz", "device=cpu", f"out={tmp_path / 'images'}"])
    assert shown.exit_code == 0, shown.output
    best = min((row for row in result.quality.rows[2:]), key=lambda row: -(row.psnr or 0.0))
    chosen = next(n for n, trial in enumerate(result.trials) if trial.stack.tail_drop == result.stack.tail_drop)
    assert result.quality.rows[2 + chosen].psnr == best.psnr
    page = (tmp_path / "quality.html").read_text()
    drawn = np.load(tmp_path / "images" / "samples.npz")["arr_0"].astype(int)
    for number in range(2):
        assert np.abs(shown_image(page, f"schedule {chosen + 1}, image {number + 1}") - drawn[number]).max() <= 1
        assert (shown_image(page, f"unmodified, image {number + 1}") != drawn[number]).any()
    assert page.count('alt="schedule ') == 2 * len(result.trials)


def test_unusable_knobs_and_targets_out_of_reach_are_refused(saved: dict[str, str], tmp_path: Path) -> None:
    shared = {**QUICK, "out": tmp_path}
    with pytest.raises(InputError, match="uncond"):
        tune(TuneConfig(model=saved["dc"], flops=0.8, knobs="uncond", **shared))  # without guidance
    with pytest.raises(InputError, match=r"flops=0\.05"):
        tune(TuneConfig(model=saved["dit"], flops=0.05, knobs="merge", **shared))
    result = CliRunner().invoke(app, ["tune", saved["dit"], "flops=1.5"])
    assert result.exit_code == 2
    assert "flops" in result.output


def test_command_prints_a_sampling_command_that_runs(saved: dict[str, str], tmp_path: Path) -> None:
    words = [f"{name}={value}" for name, value in QUICK.items()]
    shown = CliRunner().invoke(app, ["tune", saved["dit"], "flops=0.7", "knobs=skip,cache", f"out={tmp_path}", *words])
    assert shown.exit_code == 0, shown.output
    content = json.loads((tmp_path / "tuned.json").read_text())
    assert content["sample"] in shown.stderr
    command = shlex.split(content["sample"])[1:]
    again = CliRunner().invoke(app, [*command, "count=2", "--json"])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "drawn" / "grid.png").is_file()
    assert "device=cpu" in command
    spent = json.loads(again.stdout)["budgets"][0]["tflops_per_image"]
    rows = {row["name"]: row for row in json.loads((tmp_path / "quality.json").read_text())["rows"]}
    assert spent < 0.8 * rows["unmodified"]["tflops_per_image"]
    assert torch.isfinite(torch.tensor(content["trials"][0]["error"]))
