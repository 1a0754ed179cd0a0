"""Transformers of text-to-image pipelines learn from recorded calls to predict with fewer tokens."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

import tokdyn
from tests.contract.models import TINY
from tests.contract.pipelines import build, images
from tests.upcycling.models import inputs, small_base
from tokdyn import Chunking, FeatureCache
from tokdyn.errors import CheckpointError, InputError, TokdynError
from tokdyn.upcycling import DistilSettings, distil
from tokdyn.upcycling.distillation import normalised_mse

QUICK = DistilSettings(steps=40, lr=3e-3, checkpoint_every=20)
FLUX = TINY["FluxTransformer2DModel"]


def recorded(pipe: Any, name: str) -> list[dict[str, Any]]:
    """Return the calls that a pipeline makes while it draws."""
    with tokdyn.recording(pipe.transformer) as calls:
        images(pipe, name)
    return calls


def new_student() -> Any:
    """Build the same student every time."""
    torch.manual_seed(3)
    return tokdyn.upcycle(FLUX.build(), "dc", target=2)


def trained_tensors(student: Any) -> dict[str, torch.Tensor]:
    """Copy the parameters of a student's methods."""
    return {name: value.detach().clone() for name, value in student.tokdyn.named_parameters()}


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("Flux", "methods"),
        ("PixArt", "all"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in [("Flux", "all"), ("PixArt", "methods"), ("Z-Image", "methods"), ("Z-Image", "all")]
        ),
    ],
)
def test_the_error_falls_and_the_pipeline_draws(name: str, trained: str, tmp_path: Path) -> None:
    pipe = build(name)
    calls = recorded(pipe, name)
    student = tokdyn.upcycle(pipe.transformer, "dc", target=2)
    original = copy.deepcopy(pipe.transformer.state_dict())
    teacher = pipe.transformer if trained == "all" else None
    settings = QUICK.model_copy(update={"trained": trained})
    result = distil(student, calls, tmp_path / "run", settings, teacher=teacher)
    first, last = (sum(row["output"] for row in rows) for rows in (result.rows[:10], result.rows[-10:]))
    assert last < 0.9 * first
    assert all("Chunking" in row for row in result.rows)
    assert all(torch.equal(value, original[key]) for key, value in pipe.transformer.state_dict().items())
    if trained == "all":
        pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path / "run" / "transformer").eval()
    tokdyn.load(pipe.transformer, tmp_path / "run" / "methods.safetensors")
    pipe.transformer.eval()
    assert torch.isfinite(images(pipe, name)).all()
    assert tokdyn.stats(pipe.transformer).calls[0].kept[0] < tokdyn.stats(pipe.transformer).calls[0].cells


def test_the_first_error_is_the_one_of_the_untrained_student(tmp_path: Path) -> None:
    call = FLUX.inputs(1)
    student = new_student().train()
    with torch.no_grad():
        with tokdyn.disabled(student):
            target = student(**call).sample
        expected = normalised_mse(student(**call).sample.reshape(-1, 1), target.reshape(-1, 1)).item()
    rows = distil(new_student(), [call], tmp_path / "run", DistilSettings(steps=1)).rows
    assert rows[0]["step"] == 1
    assert rows[0]["output"] == pytest.approx(expected, rel=1e-4)  # fp32


def test_predictions_are_read_from_outputs_with_names_and_from_tuples(tmp_path: Path) -> None:
    """The output of a `DiT` has a name and no index; a pipeline asks for tuples."""
    own = tokdyn.wrap(small_base(), [Chunking(target=2)])
    call = dict(zip(("hidden_states", "timestep", "class_labels"), inputs(), strict=True))
    (row,) = distil(own, [call], tmp_path / "dit", DistilSettings(steps=1)).rows
    assert row["output"] > 0
    errors = [
        distil(
            new_student(), [{**FLUX.inputs(1), "return_dict": named}], tmp_path / str(named), DistilSettings(steps=1)
        ).rows[0]["output"]
        for named in (True, False)
    ]
    assert errors[0] == errors[1]


def test_the_first_step_moves_parameters_by_the_learning_rate(tmp_path: Path) -> None:
    """AdamW's first step is the rate times the sign of the gradient; a warm-up of four steps starts at a quarter."""
    for warmup, rate in ((0, 1e-3), (4, 2.5e-4)):
        student = new_student()
        before = trained_tensors(student)
        distil(student, [FLUX.inputs(1)], tmp_path / str(warmup), DistilSettings(steps=1, lr=1e-3, warmup_steps=warmup))
        moved = max((value - before[name]).abs().max().item() for name, value in trained_tensors(student).items())
        assert moved == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("name", ["lr", "clip"])
@pytest.mark.parametrize("value", [0.0, -1e-3, float("nan"), float("inf")])
def test_rates_and_norms_are_positive_and_finite(name: str, value: float) -> None:
    with pytest.raises(ValidationError, match=name):
        DistilSettings(**{name: value})


@pytest.mark.parametrize("changes", [{"clip": 1e-12}, {"calls": 2}, {"seed": 1}])
def test_settings_change_what_is_learned(changes: dict[str, Any], tmp_path: Path) -> None:
    call = FLUX.inputs(1)
    calls = [{**call, "hidden_states": scale * call["hidden_states"]} for scale in (0.5, 1.0, 1.5, 2.0)]
    students = [new_student(), new_student()]
    distil(students[0], calls, tmp_path / "plain", DistilSettings(steps=3))
    distil(students[1], calls, tmp_path / "changed", DistilSettings(steps=3, **changes))
    plain, changed = (trained_tensors(student) for student in students)
    assert any(not torch.equal(value, changed[name]) for name, value in plain.items())


def test_only_the_methods_learn_unless_all_is_asked_for(tmp_path: Path) -> None:
    student = new_student().eval()
    required = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    before = {name: value.clone() for name, value in student.state_dict().items()}
    distil(student, [FLUX.inputs(1)], tmp_path / "run", DistilSettings(steps=2))
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert not student.training
    assert all(name.startswith("tokdyn.") for name in moved)
    assert {name: parameter.requires_grad for name, parameter in student.named_parameters()} == required
    assert all(parameter.grad is None for parameter in student.parameters())


def test_frozen_methods_learn_and_are_frozen_again(tmp_path: Path) -> None:
    student = new_student().requires_grad_(False)
    before = trained_tensors(student)
    distil(student, [FLUX.inputs(1)], tmp_path / "run", DistilSettings(steps=1))
    assert any(not torch.equal(value, before[name]) for name, value in trained_tensors(student).items())
    assert not any(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("trained", ["methods", "all"])
def test_a_resumed_run_equals_one_that_never_stopped(trained: str, tmp_path: Path) -> None:
    """The state of a run holds the tensors that it trains, and no others."""
    calls, teacher = [FLUX.inputs(1)], FLUX.build() if trained == "all" else None
    settings = DistilSettings(steps=3, checkpoint_every=2, trained=trained)
    whole = new_student()
    all_rows = distil(whole, calls, tmp_path / "whole", settings, teacher=teacher).rows
    distil(new_student(), calls, tmp_path / "half", settings.model_copy(update={"steps": 2}), teacher=teacher)
    resumed = new_student()
    rows = distil(resumed, calls, tmp_path / "half", settings, teacher=teacher, resume=True).rows
    assert rows == all_rows
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    stored = load_file(tmp_path / "half" / "state.safetensors")
    module = whole if trained == "all" else whole.tokdyn
    assert sum(name.startswith("model/") for name in stored) == len(module.state_dict())


@pytest.mark.parametrize("damage", ["first tensor", "last tensor", "setting", "row", "nothing"])
def test_a_damaged_state_is_refused(damage: str, tmp_path: Path) -> None:
    calls, run, settings = [FLUX.inputs(1)], tmp_path / "run", DistilSettings(steps=1)
    distil(new_student(), calls, run, settings)
    state, metrics = run / "state.safetensors", run / "metrics.jsonl"
    content = bytearray(state.read_bytes())
    if damage == "setting":
        content = bytearray(bytes(content).replace(b'\\"lr\\":0.001', b'\\"lr\\":0.002'))
        assert content != state.read_bytes()
    elif damage == "row":
        text = metrics.read_text()
        metrics.write_text(text.replace(next(each for each in text if each in "12345678"), "9", 1))
        assert metrics.read_text() != text
    elif damage != "nothing":
        content[-1 if damage == "last tensor" else 8 + int.from_bytes(content[:8], "little")] ^= 1
    state.write_bytes(bytes(content))
    if damage == "nothing":
        distil(new_student(), calls, run, settings.model_copy(update={"steps": 2}), resume=True)
        return
    changed = settings.model_copy(update={"lr": 0.002} if damage == "setting" else {})
    with pytest.raises(CheckpointError, match=r"state\.safetensors or metrics\.jsonl"):
        distil(new_student(), calls, run, changed, resume=True)


def test_the_chance_of_a_step_is_its_own_and_that_of_a_call_too(tmp_path: Path) -> None:
    """What layers draw in training follows the seed, the step and the place of the call, also after resuming."""

    def seeds(folder: str, steps: int, seed: int = 0, resume: bool = False) -> list[int]:
        student, seen = new_student(), []
        student.register_forward_pre_hook(lambda *_: seen.append(torch.initial_seed()))
        settings = DistilSettings(steps=steps, calls=2, seed=seed)
        distil(student, [FLUX.inputs(1)], tmp_path / folder, settings, resume=resume)
        return seen

    torch.manual_seed(1)
    whole = seeds("whole", 2)
    assert len(set(whole)) == 2 * 2  # teacher and student share one
    assert not set(whole) & set(seeds("other", 2, seed=1))
    torch.manual_seed(2)
    assert seeds("half", 1) + seeds("half", 2, resume=True) == whole


def test_a_folder_that_does_not_fit_is_rejected(tmp_path: Path) -> None:
    calls, run = [FLUX.inputs(1)], tmp_path / "run"
    settings = DistilSettings(steps=1)
    distil(new_student(), calls, run, settings)
    with pytest.raises(CheckpointError, match="run"):
        distil(new_student(), calls, run, settings)
    with pytest.raises(CheckpointError, match=r"\blr\b"):
        distil(new_student(), calls, run, settings.model_copy(update={"lr": 1.0}), resume=True)
    with pytest.raises(CheckpointError, match="clip, seed"):
        distil(new_student(), calls, run, settings.model_copy(update={"clip": 2.0, "seed": 1}), resume=True)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl has 0 rows for 1 steps"):
        distil(new_student(), calls, run, settings, resume=True)
    shutil.rmtree(run)
    with pytest.raises(CheckpointError, match="run"):
        distil(new_student(), calls, run, settings, resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(TokdynError, match=r"step \d+; .*lr"):
        distil(new_student(), [FLUX.inputs(1)], tmp_path / "run", DistilSettings(steps=50, lr=1e12, clip=1e12))
    assert not (tmp_path / "run" / "methods.safetensors").exists()


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(tmp_path: Path) -> None:
    student = new_student()
    before = trained_tensors(student)
    next(student.tokdyn.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TokdynError, match=r"step 1;"):
        distil(student, [FLUX.inputs(1)], tmp_path / "run", DistilSettings(steps=2))
    assert all(torch.equal(value, before[name]) for name, value in trained_tensors(student).items())


def test_a_run_that_stopped_between_metrics_and_state_is_resumed(tmp_path: Path) -> None:
    """Metrics are written first, so a stop in between leaves a row too many and never one too few."""
    calls = [FLUX.inputs(1)]
    student = new_student()
    distil(student, calls, tmp_path / "run", DistilSettings(steps=2))
    with open(tmp_path / "run" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 3.0, "output": 1.0}\n')
    rows = distil(student, calls, tmp_path / "run", DistilSettings(steps=3), resume=True).rows
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["output"] != 1.0


def test_models_without_anything_to_learn_are_rejected(tmp_path: Path) -> None:
    model, calls = FLUX.build(), [FLUX.inputs(1)]
    with pytest.raises(InputError, match=type(model).__name__):
        distil(model, calls, tmp_path / "run")
    tokdyn.wrap(model, [FeatureCache()])
    with pytest.raises(InputError, match="Chunking"):
        distil(model, calls, tmp_path / "run")
    tokdyn.wrap(tokdyn.unwrap(model), [Chunking(target=2)])
    with pytest.raises(InputError, match=r"tokdyn\.recording"):
        distil(model, [], tmp_path / "run")
    with pytest.raises(InputError, match="teacher"):
        distil(model, calls, tmp_path / "run", DistilSettings(trained="all"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("calls", "clip", "warmup"), [(1, 1e9, 0), (2, 0.05, 3)])
def test_training_is_adamw_without_decay_on_the_clipped_mean_gradient(
    calls: int, clip: float, warmup: int, tmp_path: Path
) -> None:
    """Against a loop written with PyTorch alone; every draw is the same call, so the mean gradient is its gradient.

    In fp64: AdamW divides gradients by their size, and with them their rounding errors.
    """
    call = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in FLUX.inputs(1).items()
    }
    reference, rows = new_student().double().train(), []
    parameters = list(reference.tokdyn.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    for step in range(4):
        with torch.no_grad(), tokdyn.disabled(reference):
            target = reference(**call).sample
        error = (reference(**call).sample - target).square().mean() / target.var(unbiased=False)
        terms = {"output": error, **tokdyn.losses(reference)}
        rows.append({name: value.item() for name, value in terms.items()})
        gradients = torch.autograd.grad(sum(terms.values()), parameters)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * min(1.0, clip / float(norm))
        optimizer.param_groups[0]["lr"] = 2e-3 * (min(1.0, (step + 1) / warmup) if warmup else 1.0)
        optimizer.step()
    student = new_student().double()
    settings = DistilSettings(steps=4, calls=calls, clip=clip, warmup_steps=warmup, lr=2e-3)
    result = distil(student, [call], tmp_path / "run", settings)
    for found, expected in zip(result.rows, rows, strict=True):
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert [row["step"] for row in result.rows] == [1, 2, 3, 4]
    for name, value in trained_tensors(student).items():
        torch.testing.assert_close(value, dict(reference.tokdyn.named_parameters())[name], rtol=0, atol=1e-6)


def test_every_call_is_drawn_and_draws_follow_the_seed(tmp_path: Path) -> None:
    call = FLUX.inputs(1)
    calls = [{**call, "hidden_states": scale * call["hidden_states"]} for scale in (0.5, 1.0, 2.0)]
    seen: list[float] = []
    for seed in (0, 0, 1):
        student = new_student()
        student.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["hidden_states"].std().item()), with_kwargs=True
        )
        distil(student, calls, tmp_path / f"{len(seen)}", DistilSettings(steps=8, calls=2, seed=seed))
    first, again, other = (seen[start : start + len(seen) // 3] for start in range(0, len(seen), len(seen) // 3))
    assert first == again != other
    assert len(set(first)) == 3
    assert first[::2] == first[1::2]  # the teacher and the student are given the same call


def test_an_interrupted_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    calls, settings = [FLUX.inputs(1)], DistilSettings(steps=6, checkpoint_every=3)
    whole = new_student()
    rows = distil(whole, calls, tmp_path / "whole", settings).rows
    stopped, count = new_student().eval(), 0
    required = [parameter.requires_grad for parameter in stopped.parameters()]

    def stop(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == 2 * 4 + 1:  # in the fifth step: each asks the teacher and the student
            raise KeyboardInterrupt

    handle = stopped.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        distil(stopped, calls, tmp_path / "run", settings)
    handle.remove()
    assert not stopped.training
    assert [parameter.requires_grad for parameter in stopped.parameters()] == required
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    resumed = new_student()
    assert distil(resumed, calls, tmp_path / "run", settings, resume=True).rows == rows
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_facts_are_written_beside_the_run_and_an_empty_folder_will_do(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    result = distil(new_student(), [FLUX.inputs(1)], tmp_path / "run", DistilSettings(steps=1), facts={"model": "Flux"})
    assert json.loads((tmp_path / "run" / "settings.json").read_text()) == {"model": "Flux"}
    assert result.folder == tmp_path / "run"
    assert not (tmp_path / "run" / "transformer").exists()
    distil(new_student(), [FLUX.inputs(1)], tmp_path / "bare", DistilSettings(steps=1))
    with pytest.raises(AttributeError):  # a result cannot be changed
        result.folder = tmp_path
    assert not (tmp_path / "bare" / "settings.json").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        distil(new_student(), [FLUX.inputs(1)], tmp_path / "file", DistilSettings(steps=1))


def test_steps_and_checkpoints_may_change_when_a_run_is_resumed(tmp_path: Path) -> None:
    calls, settings = [FLUX.inputs(1)], DistilSettings(steps=2, checkpoint_every=1)
    distil(new_student(), calls, tmp_path / "run", settings)
    longer = settings.model_copy(update={"steps": 3, "checkpoint_every": 5})
    assert len(distil(new_student(), calls, tmp_path / "run", longer, resume=True).rows) == 3
    for name, value in (("seed", 1), ("calls", 2), ("clip", 2.0), ("warmup_steps", 1), ("trained", "all")):
        changed = settings.model_copy(update={name: value})
        with pytest.raises(CheckpointError, match=rf"settings of {name};"):
            distil(new_student(), calls, tmp_path / "run", changed, teacher=FLUX.build(), resume=True)
