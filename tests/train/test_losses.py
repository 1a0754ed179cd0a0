"""Losses that are bad or spike, and routers that collapse: stopped, skipped, rolled back or said, with the batch."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.train.faults import poison
from tokdyn.errors import TokdynError
from tokdyn.recipe import Recipe
from tokdyn.train import checkpoints, train
from tokdyn.train.guard import collapsed, spikes
from tokdyn.train.metrics import read

Tiny = Callable[..., Recipe]
Same = Callable[[Path, Path, int], None]
Contents = Callable[[Path], dict[str, torch.Tensor]]
SLOW = pytest.mark.slow
EVERY = ("training.keep_checkpoints=99", "training.checkpoint_every=1", "data.length=256", "objective.kind=flow")


def events(folder: Path) -> list[dict[str, Any]]:
    return read(folder / "events.jsonl")


@pytest.mark.fault(
    "the loss becomes NaN, infinite or huge; `on_bad_loss: stop`",
    injected="a sample of NaN, 1e30 or 1,000, with a `loss_limit`",
    happened="stops and names step, loss and batch; the checkpoint before it is kept; `--resume` with `skip` goes on",
)
@pytest.mark.parametrize("value", [float("nan"), *(pytest.param(value, marks=SLOW) for value in (1e30, 1e3))])
def test_a_bad_loss_stops_the_run(value: float, tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = (*EVERY, "training.loss_limit=500", "training.steps=6")
    recipe = tiny(tmp_path / "run", *settings)
    (bad,) = poison(monkeypatch, recipe, [4], value)
    with pytest.raises(TokdynError, match=rf"step 4\b.* sample.*\b{bad}\b.* step 3\b.*on_bad_loss=skip"):
        train(recipe)
    assert checkpoints.steps_of(tmp_path / "run" / "checkpoints") == [1, 2, 3]
    (event,) = events(tmp_path / "run")
    assert (event["event"], event["step"], event["seed"]) == ("stopped", 4, 0)
    assert bad in event["samples"]
    assert train(tiny(tmp_path / "run", *settings, "training.on_bad_loss=skip"), resume=True).finished
    assert [(row["event"], row["step"]) for row in events(tmp_path / "run")] == [("skipped", 4)]


@pytest.mark.fault(
    "the loss becomes NaN, infinite or huge; `on_bad_loss: skip`",
    injected="a sample of NaN, 1e30 or 1,000, with a `loss_limit`",
    happened="the step is left out, weights and moments stay what they were, and the batch is named",
    lost="the step",
)
@pytest.mark.parametrize("value", [1e3, *(pytest.param(value, marks=SLOW) for value in (float("nan"), 1e30))])
def test_a_bad_step_is_skipped(
    value: float, tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, console: Console, contents: Contents
) -> None:
    settings = (*EVERY, "training.loss_limit=500", "training.steps=5", "training.on_bad_loss=skip")
    recipe = tiny(tmp_path / "run", *settings)
    (bad,) = poison(monkeypatch, recipe, [4], value)
    assert train(recipe, console=console).finished
    kept = [contents(tmp_path / "run" / "checkpoints" / f"step_{step:07d}") for step in (3, 4, 5)]
    weights = [name for name in kept[0] if "window/" not in name]
    assert [name for name in weights if not torch.equal(kept[0][name], kept[1][name])] == []
    assert any(not torch.equal(kept[1][name], kept[2][name]) for name in weights)
    assert re.search(rf"Step 4 .*sample.*\b{bad}\b", console.file.getvalue())  # type: ignore[attr-defined]
    rows = {row["step"]: row for row in read(tmp_path / "run" / "metrics.jsonl")}
    assert "loss" not in rows[4]
    assert math.isfinite(rows[5]["loss"])


@pytest.mark.fault(
    "the loss becomes NaN; `on_bad_loss: roll_back`, also in a run that is killed afterwards",
    injected="a sample of NaN; checkpoints removed as if killed before them",
    happened="goes on with the next batch from the weights of the newest checkpoint; so does the resumed run",
    lost="the steps since that checkpoint",
)
def test_a_bad_step_rolls_the_run_back(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, assert_same_run: Same, contents: Contents
) -> None:
    """The expected weights are those of step 4, trained on with the batch of step 8 alone."""
    settings = ("training.checkpoint_every=4", "training.keep_checkpoints=9", "training.on_bad_loss=roll_back")
    whole, killed, expected = (tmp_path / name for name in ("whole", "killed", "expected"))
    recipe = tiny(whole, *settings, "training.steps=12")
    poison(monkeypatch, recipe, [7], float("nan"))
    train(recipe)
    assert [(row["event"], row["step"], row["weights_of_step"]) for row in events(whole)] == [("rolled_back", 7, 4)]

    shutil.copytree(whole, killed)
    for step in (8, 12):
        shutil.rmtree(checkpoints.folder_of(killed / "checkpoints", step))
    train(tiny(killed, *settings, "training.steps=12"), resume=True)
    assert_same_run(whole, killed, 12)
    assert events(whole) == events(killed)

    shutil.copytree(checkpoints.folder_of(whole / "checkpoints", 4), checkpoints.folder_of(expected / "checkpoints", 7))
    state = checkpoints.folder_of(expected / "checkpoints", 7) / "state.json"
    state.write_text(json.dumps(checkpoints.sealed({**json.loads(state.read_text()), "step": 7})))
    train(tiny(expected, *settings, "training.steps=8"), resume=True)
    left, right = (
        contents(checkpoints.folder_of(folder / "checkpoints", 8) / part)
        for folder in (whole, expected)
        for part in ["model"]
    )
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_a_run_rolls_back_to_its_start_before_the_first_checkpoint(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(tmp_path / "run", "training.on_bad_loss=roll_back")
    poison(monkeypatch, recipe, [1], float("nan"))
    assert train(recipe).finished
    assert [row["weights_of_step"] for row in events(tmp_path / "run")] == [0]


@pytest.mark.fault(
    "every loss is NaN",
    injected="all samples are NaN",
    happened="the run stops after ten steps passed over, and does not go on for ever",
)
@pytest.mark.parametrize("how", ["skip", pytest.param("roll_back", marks=SLOW)])
def test_a_run_of_bad_steps_stops(how: str, tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny(tmp_path / "run", "training.steps=1000", f"training.on_bad_loss={how}")
    poison(monkeypatch, recipe, range(1, 17), float("nan"))
    monkeypatch.setattr("tests.train.faults.Poisoned.bad", frozenset(range(64)))
    with pytest.raises(TokdynError, match=r"10 steps .* step 11\b.* optimizer\.lr"):
        train(recipe)


@pytest.mark.fault(
    "the loss of a step spikes",
    injected="a sample of 20, where pixels are at most 1",
    happened="step, loss, usual loss, seed and samples are logged; a run resumed before it repeats it",
)
def test_a_spike_is_logged_with_what_repeats_it(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    settings = (*EVERY, "training.checkpoint_every=20", "training.steps=22", "seed=3", "training.loss_limit=null")
    recipe = tiny(whole, *settings)
    (bad,) = poison(monkeypatch, recipe, [21], 20.0)
    train(recipe, console=console)
    (event,) = events(whole)
    rows = {row["step"]: row["loss"] for row in read(whole / "metrics.jsonl")}
    assert (event["event"], event["step"], event["seed"]) == ("spike", 21, 3)
    assert event["loss"] == rows[21] > 5 * event["usual"]
    assert len(event["samples"]) == 4
    assert bad in event["samples"]
    assert re.search(rf"step 21\b.* seed=3 .*\b{bad}\b", console.file.getvalue())  # type: ignore[attr-defined]
    shutil.copytree(whole, again)
    shutil.rmtree(checkpoints.folder_of(again / "checkpoints", 22))
    train(tiny(again, *settings), resume=True)
    assert events(again) == [event]


def test_a_spike_is_one_beside_those_before_it() -> None:
    recent: list[float] = []
    assert spikes(recent, [(step, 100.0) for step in range(1, 16)] + [(16, 1e9)], 5.0) == []  # too few to tell
    recent = []
    assert spikes(recent, [(step, 1.0 + 0.01 * step) for step in range(1, 17)], 5.0) == []
    assert spikes(recent, [(17, 6.0), (18, 5.0), (19, math.nan)], 5.0)[:1] == [(17, 6.0, pytest.approx(1.085))]
    assert max(recent) == 5.0  # a spike is no measure for the next one
    assert spikes(recent, [(step, 4.0) for step in range(20, 220)], 5.0) == []
    assert len(recent) == 64


@pytest.mark.fault(
    "the router collapses",
    injected="no ratio loss, with a learning rate of 0.3, and with the published initialisation",
    happened="one sentence with the share that is kept, once; with `on_collapse: stop` the run stops",
)
@pytest.mark.parametrize(
    ("words", "low", "high"),
    [
        pytest.param(("optimizer.lr=0.3", "training.loss_limit=null", "training.spike=null"), 0.75, 1.0, marks=SLOW),
        (("model.official_init=true", "optimizer.lr=1e-9", "training.steps=6"), 0.0, 0.08),
    ],
    ids=["everything", "nothing"],
)
def test_a_collapsed_router_is_said_once(
    words: tuple[str, ...], low: float, high: float, tmp_path: Path, tiny: Tiny, console: Console
) -> None:
    settings = ("chunking.ratio_weight=0", "training.steps=40", "training.log_every=2", *words)
    train(tiny(tmp_path / "said", *settings), console=console)
    (row,) = events(tmp_path / "said")
    assert row["event"] == "router"
    assert low < row["kept"] < high
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("The router keeps") == 1
    assert f"{row['kept']:.1%}" in shown
    with pytest.raises(TokdynError, match=rf"{row['kept']:.1%} .* step {row['step']}\b.* 25"):
        train(tiny(tmp_path / "stopped", *settings, "chunking.on_collapse=stop"))


@pytest.mark.parametrize(
    ("kept", "target", "expected"),
    [
        (0.25, 4, False),
        (0.09, 4, False),
        (0.08, 4, True),
        (0.74, 4, False),
        (0.76, 4, True),
        (0.5, 2, False),
        (1, 2, True),
    ],
)
def test_a_router_has_collapsed_far_from_its_target(kept: float, target: float, expected: bool) -> None:
    assert collapsed(kept, target) is expected
