"""LoRA and Chunking, trained together, make a transformer of a pipeline a model with a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tokdyn
from tests import processes
from tests.contract.models import TINY
from tests.contract.pipelines import PIPES
from tests.contract.quantised import WAYS
from tests.upcycling.elastic import COMMAND, FAMILIES, TWO, drawn, opened, recorded, student_of, trained_tensors
from tokdyn import Chunking, TokenMerge
from tokdyn.errors import CheckpointError, InputError
from tokdyn.upcycling import DistilSettings, distil
from tokdyn.upcycling.command import upcycle_pipeline
from tokdyn.upcycling.pipeline_settings import PipelineConfig
from tokdyn.upcycling.streaming import DrawnCalls
from tokdyn.upcycling.students import mean_errors, prepare

DROPS = (0.0, 0.3, 0.6)
FLUX = TINY["FluxTransformer2DModel"]
QUICK = DistilSettings(steps=3, trained="lora", rank=2, lr=3e-3, checkpoint_every=2)


@pytest.mark.parametrize("name", [pytest.param(each, marks=pytest.mark.slow) for each in FAMILIES])
def test_the_error_falls_at_every_budget(name: str, tmp_path: Path) -> None:
    pipe = opened(name)
    calls = recorded(pipe, name)
    student = student_of(pipe.transformer)
    untrained = mean_errors(student, calls, DROPS)
    settings = DistilSettings(steps=200, trained="lora", rank=16, lr=5e-3, tail_drops=DROPS, checkpoint_every=200)
    distil(student, calls, tmp_path / "run", settings)
    tokdyn.load(pipe, tmp_path / "run" / "methods.safetensors")
    found = mean_errors(pipe.transformer, calls, DROPS)
    for drop, before, after in zip(DROPS, untrained, found, strict=True):
        assert after < before / 2, f"{name} at a tail drop of {drop}: {before:.4f}, then {after:.4f}"
    kept = []
    for drop in DROPS:
        tokdyn.set_tail_drop(pipe, drop)
        assert torch.isfinite(drawn(pipe, name)).all()
        kept.append(tokdyn.stats(pipe).calls[0].kept[0])
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]


def test_base_and_teacher_are_the_same_weights(tmp_path: Path) -> None:
    """Nothing but LoRA and the methods is trained; with both disabled, the student is the original, bit for bit."""
    base, call = FLUX.build(), FLUX.inputs(1)
    student = student_of(base)
    with torch.no_grad():
        plain = base(**call).sample
    distil(student, [call], tmp_path / "run", QUICK)
    trained = trained_tensors(student)
    assert {name.split(".")[0] for name in trained} == {"tokdyn", "transformer_blocks", "single_transformer_blocks"}
    assert any(value.abs().sum() > 0 for name, value in trained.items() if "lora_B" in name)
    student.eval()
    with torch.no_grad(), tokdyn.disabled(student):
        assert torch.equal(student(**call).sample, plain)
    assert all(parameter.grad is None for parameter in student.parameters())
    tokdyn.unwrap(student)
    assert all(torch.equal(*pair) for pair in zip(student.parameters(), base.parameters(), strict=True))


def test_the_result_is_one_small_file(tmp_path: Path) -> None:
    student, call = student_of(FLUX.build()), FLUX.inputs(1)
    result = distil(student, [call], tmp_path / "run", QUICK)
    assert sorted(path.name for path in result.folder.iterdir()) == [
        "methods.safetensors", "metrics.jsonl", "state.safetensors",
    ]  # fmt: skip
    model = tokdyn.load(FLUX.build(), result.folder / "methods.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(model(**call).sample, student.eval()(**call).sample)


def test_methods_without_parameters_are_adapted_to(tmp_path: Path) -> None:
    student = tokdyn.wrap(FLUX.build(), [TokenMerge(ratio=0.5, where="both")])
    with pytest.raises(InputError, match="Chunking"):
        distil(student, [FLUX.inputs(1)], tmp_path / "run", DistilSettings(steps=1))
    rows = distil(student, [FLUX.inputs(1)], tmp_path / "run", QUICK.model_copy(update={"steps": 20})).rows
    assert rows[-1]["output"] < rows[0]["output"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_resumed_run_equals_one_that_never_stopped(checkpointing: bool, tmp_path: Path) -> None:
    """With budgets, and with activations that are recomputed; these give the same as those that are kept."""
    calls = [FLUX.inputs(1), {**FLUX.inputs(1), "timestep": torch.tensor([0.2])}]
    settings = TWO.model_copy(update={"gradient_checkpointing": checkpointing})
    whole, resumed, plain = (student_of(FLUX.build()) for _ in range(3))
    rows = distil(whole, calls, tmp_path / "whole", settings).rows
    distil(student_of(FLUX.build()), calls, tmp_path / "half", settings.model_copy(update={"steps": 2}))
    assert distil(resumed, calls, tmp_path / "half", settings, resume=True).rows == rows
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert {row["tail_drop"] for row in rows} <= {0.0, 0.25, 0.5}
    assert not whole.is_gradient_checkpointing
    if checkpointing:
        distil(plain, calls, tmp_path / "plain", TWO)
        for name, value in trained_tensors(plain).items():
            torch.testing.assert_close(trained_tensors(whole)[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_run_of_another_model_or_rank_is_not_continued(tmp_path: Path) -> None:
    calls = [FLUX.inputs(1)]
    distil(student_of(FLUX.build()), calls, tmp_path / "run", QUICK)
    for changes, named in (({"rank": 4}, "rank"), ({"tail_drops": (0.0, 0.5)}, "tail_drops")):
        with pytest.raises(CheckpointError, match=named):
            distil(student_of(FLUX.build()), calls, tmp_path / "run", QUICK.model_copy(update=changes), resume=True)
    other = tokdyn.wrap(TINY["SD3Transformer2DModel"].build(), [Chunking(target=2)])
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        distil(other, calls, tmp_path / "run", QUICK, resume=True)


def test_lora_that_is_there_is_trained_further(tmp_path: Path) -> None:
    first = distil(student_of(FLUX.build()), [FLUX.inputs(1)], tmp_path / "first", QUICK).folder
    student = tokdyn.load(FLUX.build(), first / "methods.safetensors")
    before = trained_tensors(student)
    with pytest.raises(InputError, match=r"rank is 4, .* rank 2"):
        distil(student, [FLUX.inputs(1)], tmp_path / "second", QUICK.model_copy(update={"rank": 4}))
    distil(student, [FLUX.inputs(1)], tmp_path / "second", QUICK)
    after = trained_tensors(student)
    assert before.keys() == after.keys()
    assert any(not torch.equal(value, after[name]) for name, value in before.items() if "lora" in name)


def test_settings_without_an_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rank .*trained=lora"):
        DistilSettings(rank=4)
    student = tokdyn.wrap(FLUX.build(), [TokenMerge()])
    with pytest.raises(InputError, match="tail_drops"):
        distil(student, [FLUX.inputs(1)], tmp_path, QUICK.model_copy(update={"tail_drops": (0.5,)}))
    own = tokdyn.wrap(TINY["DiT"].build(), [Chunking(target=2)])
    own._supports_gradient_checkpointing = False
    with pytest.raises(InputError, match="gradient_checkpointing"):
        distil(own, [TINY["DiT"].inputs(1)], tmp_path, QUICK.model_copy(update={"gradient_checkpointing": True}))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("way", WAYS)
def test_the_base_may_be_quantised(way: str, tmp_path: Path) -> None:
    """Its weights stay as they are, and cannot be trained themselves."""
    base = WAYS[way](TINY["SD3Transformer2DModel"].build())
    student, call = tokdyn.wrap(base, [Chunking(target=2)]), TINY["SD3Transformer2DModel"].inputs(1)
    with torch.no_grad(), tokdyn.disabled(student.eval()):
        plain = student(**call).sample
    with pytest.raises(InputError, match="trained=lora"):
        distil(student, [call], tmp_path / "all", DistilSettings(steps=1, trained="all"), teacher=student)
    rows = distil(student, [call], tmp_path / "run", QUICK.model_copy(update={"steps": 20})).rows
    assert rows[-1]["output"] < rows[0]["output"]
    with torch.no_grad(), tokdyn.disabled(student.eval()):
        assert torch.equal(student(**call).sample, plain)
    again = tokdyn.load(WAYS[way](TINY["SD3Transformer2DModel"].build()), tmp_path / "run" / "methods.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**call).sample, student(**call).sample)


def test_calls_are_drawn_while_the_student_is_trained(tmp_path: Path) -> None:
    """Images follow their numbers alone, whatever was trained: a resumed run gets the same ones."""
    pipe = opened("Flux")
    words = [{**PIPES["Flux"].arguments(), "num_inference_steps": 2}]

    def stream(model: Any) -> DrawnCalls:
        pipe.transformer = model
        return DrawnCalls(pipe, words, calls=2, steps=2, seed=7)

    original = pipe.transformer
    found = stream(original)
    first, same, other, later = found(0, 0), found(1, 0), found(0, 1), found(2, 0)
    assert first is same
    noise = [each[0]["hidden_states"] for each in (first, other, later)]
    assert not any(torch.equal(noise[a], noise[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    whole, resumed = student_of(original), student_of(original)
    rows = distil(whole, stream(whole), tmp_path / "whole", TWO).rows
    half = student_of(original)
    distil(half, stream(half), tmp_path / "half", TWO.model_copy(update={"steps": 3}))
    assert distil(resumed, stream(resumed), tmp_path / "half", TWO, resume=True).rows == rows
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert all(
        torch.equal(a["hidden_states"], b["hidden_states"]) for a, b in zip(stream(whole)(0, 1), other, strict=True)
    )


@pytest.mark.slow
def test_two_processes_train_as_one_does(pipeline: Path, tmp_path: Path) -> None:
    """To the rounding of sums; a run of two is resumed bit for bit, and the first one alone writes."""
    processes.launch(Path(__file__).with_name("together_worker.py"), str(tmp_path), str(pipeline), timeout=400)
    call = FLUX.inputs(1)
    calls = [{**call, "hidden_states": scale * call["hidden_states"]} for scale in (0.5, 1.0, 1.5)]
    alone = student_of(FLUX.build())
    rows = distil(alone, calls, tmp_path / "alone", TWO).rows
    whole, half = (tokdyn.load(FLUX.build(), tmp_path / name / "methods.safetensors") for name in ("whole", "half"))
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), half.parameters(), strict=True))
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (tmp_path / "half" / "metrics.jsonl").read_text()
    for name, value in trained_tensors(alone).items():
        torch.testing.assert_close(trained_tensors(whole)[name], value, rtol=1e-4, atol=1e-5, msg=name)
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    for row, line in zip(rows, lines, strict=True):
        assert json.loads(line) == pytest.approx(row, rel=1e-5)
    for rank in range(2):
        assert "calls is 3" in (tmp_path / f"refused-{rank}.txt").read_text()
    assert not (tmp_path / "odd").exists()
    config = PipelineConfig(base=str(pipeline), out=tmp_path / "command alone", device="cpu", **COMMAND)
    report = upcycle_pipeline(config, ["dc"]).report
    both = json.loads((tmp_path / "command" / "upcycle.json").read_text())
    assert (both["processes"], report["processes"]) == (2, 1)
    for found, expected in zip(both["budgets"], report["budgets"], strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_preparing_adds_lora_once() -> None:
    student = student_of(FLUX.build())
    first = prepare(student, QUICK)
    assert [id(each) for each in prepare(student, QUICK)] == [id(each) for each in first]
