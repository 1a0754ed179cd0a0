"""Transformers of text-to-image pipelines learn from recorded calls to do with fewer tokens."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tokdyn
from tests.contract.models import TINY
from tests.contract.pipelines import PIPES, build, images
from tokdyn import Chunking, FeatureCache
from tokdyn.errors import CheckpointError, InputError, TokdynError
from tokdyn.upcycling.pipelines import CallSettings, distil

QUICK = CallSettings(steps=40, lr=3e-3, checkpoint_every=20)


def recorded(pipe: Any, name: str) -> list[dict[str, Any]]:
    with tokdyn.recording(pipe.transformer) as calls:
        images(pipe, name)
    return calls


@pytest.mark.parametrize("name", ["Flux", "PixArt", "Z-Image"])
@pytest.mark.parametrize("trained", ["methods", "all"])
def test_the_loss_falls_and_the_pipeline_runs(name: str, trained: str, tmp_path: Path) -> None:
    pipe = build(name)
    calls = recorded(pipe, name)
    student = tokdyn.upcycle(pipe.transformer, "dc", target=2)
    frozen = copy.deepcopy(pipe.transformer.state_dict())
    teacher = pipe.transformer if trained == "all" else None
    settings = QUICK.model_copy(update={"trained": trained})
    result = distil(student, calls, tmp_path / "run", settings, teacher=teacher)
    first, last = (sum(row["output"] for row in rows) for rows in (result.rows[:10], result.rows[-10:]))
    assert last < 0.9 * first
    assert all("Chunking" in row for row in result.rows)
    assert all(torch.equal(value, frozen[key]) for key, value in pipe.transformer.state_dict().items())
    if trained == "all":
        assert (tmp_path / "run" / "transformer" / "config.json").is_file()
        pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path / "run" / "transformer").eval()
    tokdyn.load(pipe.transformer, tmp_path / "run" / "methods")
    pipe.transformer.eval()
    out = images(pipe, name)
    assert torch.isfinite(out).all()
    assert tokdyn.stats(pipe.transformer).calls[0].kept[0] < tokdyn.stats(pipe.transformer).calls[0].cells


def test_resuming_equals_never_stopping(tmp_path: Path) -> None:
    calls = [TINY["FluxTransformer2DModel"].inputs(1)]

    def fresh() -> Any:
        torch.manual_seed(3)
        return tokdyn.upcycle(TINY["FluxTransformer2DModel"].build(), "dc", target=2)

    settings = CallSettings(steps=6, checkpoint_every=2)
    whole = fresh()
    all_rows = distil(whole, calls, tmp_path / "whole", settings).rows
    distil(fresh(), calls, tmp_path / "half", settings.model_copy(update={"steps": 4}))
    resumed = fresh()
    rows = distil(resumed, calls, tmp_path / "half", settings, resume=True).rows
    assert rows == all_rows
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="not empty"):
        distil(fresh(), calls, tmp_path / "half", settings)
    with pytest.raises(CheckpointError, match=r"other settings \(lr\)"):
        distil(fresh(), calls, tmp_path / "half", settings.model_copy(update={"lr": 1.0}), resume=True)
    shutil.rmtree(tmp_path / "half")
    with pytest.raises(CheckpointError, match="holds no run"):
        distil(fresh(), calls, tmp_path / "half", settings, resume=True)


def test_losses_that_are_not_finite_stop_it(tmp_path: Path) -> None:
    student = tokdyn.upcycle(TINY["FluxTransformer2DModel"].build(), "dc", target=2)
    calls = [TINY["FluxTransformer2DModel"].inputs(1)]
    with pytest.raises(TokdynError, match=r"not finite in step \d+; lower lr"):
        distil(student, calls, tmp_path / "run", CallSettings(steps=50, lr=1e18, clip=1e18))
    assert not (tmp_path / "run" / "methods").exists()


def test_a_run_that_was_cut_off_between_two_files_goes_on(tmp_path: Path) -> None:
    """Metrics are written before the state, so there are never too few of them."""
    calls = [TINY["FluxTransformer2DModel"].inputs(1)]
    student = tokdyn.upcycle(TINY["FluxTransformer2DModel"].build(), "dc", target=2)
    distil(student, calls, tmp_path / "run", CallSettings(steps=2))
    with open(tmp_path / "run" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 3.0, "output": 1.0}\n')
    rows = distil(student, calls, tmp_path / "run", CallSettings(steps=3), resume=True).rows
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["output"] != 1.0


def test_what_cannot_learn_is_refused(tmp_path: Path) -> None:
    model = TINY["FluxTransformer2DModel"].build()
    calls = [TINY["FluxTransformer2DModel"].inputs(1)]
    with pytest.raises(InputError, match="is not wrapped"):
        distil(model, calls, tmp_path / "run")
    tokdyn.wrap(model, [FeatureCache()])
    with pytest.raises(InputError, match="has anything to learn"):
        distil(model, calls, tmp_path / "run")
    tokdyn.wrap(tokdyn.unwrap(model), [Chunking(target=2)])
    with pytest.raises(InputError, match="no calls"):
        distil(model, [], tmp_path / "run")
    with pytest.raises(InputError, match="as teacher"):
        distil(model, calls, tmp_path / "run", CallSettings(trained="all"))
    assert not (tmp_path / "run").exists()
    assert set(PIPES) >= {"Flux", "PixArt"}
