"""Every setting of a recipe has its effect on a run: none of them can be ignored without a test failing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from tokdyn.data import BatchStream
from tokdyn.models import DCDiT
from tokdyn.recipe import Recipe
from tokdyn.train import train
from tokdyn.train.resume import HARMLESS, ROUNDING, flatten
from tokdyn.train.setup import Run, open_accelerator, set_up

Tiny = Callable[..., Recipe]

# Settings that change what is trained: a value other than the default, and settings under which it has an effect.
BUDGETS = "chunking.budget_warmup_steps=0"
CURRICULUM = "chunking.curriculum=[[0, 2], [5, 4]]"
CHANGES: dict[str, tuple[str, ...]] = {
    "seed": ("1",),
    "data.size": ("24",),
    "data.channels": ("1",),
    "data.flip": ("true",),
    "data.seed": ("1",),
    "data.num_classes": ("5",),
    "data.length": ("32",),
    "objective.kind": ("flow",),
    "objective.num_train_timesteps": ("100",),
    "objective.beta_schedule": ("squaredcos_cap_v2",),
    "objective.learn_sigma": ("false",),
    "objective.timestep_sampling": ("logit_normal", "objective.kind=flow"),
    "optimizer.lr": ("2e-3",),
    "optimizer.weight_decay": ("0.5",),
    "optimizer.betas": ("[0.5, 0.9]",),
    "optimizer.eps": ("1e-2",),
    "optimizer.warmup_steps": ("4",),
    "optimizer.decay": ("cosine",),
    "optimizer.final_lr": ("0.5", "optimizer.decay=linear"),
    "optimizer.clip": ("1e-12",),
    "chunking.ratio_weight": ("3",),
    "chunking.ratio_group": ("1",),
    "chunking.tail_drops": ("[0.5]", BUDGETS),
    "chunking.draw": ("sample", BUDGETS),
    "chunking.budget_warmup_steps": ("0",),
    "chunking.curriculum": ("[[0, 2], [5, 4]]", "chunking.calibrate=false"),  # the calibration follows it too
    "chunking.interpolation": ("hold", CURRICULUM),
    "chunking.calibrate": ("false",),
    "training.batch_size": ("8",),
    "training.images": ("12", "training.steps=null", "training.images=8"),
    "training.steps": ("3",),
    "training.ema": ("0.05",),
    "training.ema_warmup": ("false",),
    "training.label_dropout": ("1.0",),
}
ELSEWHERE = {
    "model": "tests/test_recipe.py builds them",
    "data.kind": "needs files: tests of tokdyn.data",
    "data.on_error": "needs files: tests of tokdyn.data",
    "training.precision": "below, because not every CPU computes in bf16",
    "compute_match": "test_estimate.py",
    "upcycle": "test_upcycling_runs.py",
}


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that trains with some settings, once for each of them, and returns the folder."""
    folders: dict[tuple[str, ...], Path] = {}

    def run(*settings: str) -> Path:
        if settings not in folders:
            folders[settings] = tmp_path_factory.mktemp("run") / "run"
            assert train(tiny(folders[settings], *settings)).finished
        return folders[settings]

    return run


@pytest.fixture
def built(tiny: Tiny, tmp_path: Path) -> Callable[..., Run]:
    """A function that builds a run and takes no step."""

    def build(*settings: str) -> Run:
        recipe = tiny(tmp_path / "built", *settings)
        return set_up(recipe, open_accelerator(recipe))

    return build


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def checkpoint(folder: Path, part: str, step: int = 1) -> dict[str, Tensor]:
    """Return the weights ("model") or the averaged weights ("ema") of a checkpoint."""
    return state(DCDiT.from_pretrained(folder / "checkpoints" / f"step_{step:07d}" / part))


def largest_change(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return max((after[name] - value).abs().max().item() for name, value in before.items())


def test_every_setting_is_tested(tiny: Tiny, tmp_path: Path) -> None:
    """A new setting belongs to one of the lists: it changes the run, its rounding, or nothing that is computed."""
    known = {*CHANGES, *ELSEWHERE, *HARMLESS, *ROUNDING}
    keys = flatten(tiny(tmp_path).model_dump(mode="json"))
    unknown = [key for key in keys if not any(key == name or key.startswith(f"{name}.") for name in known)]
    assert unknown == []


@pytest.mark.parametrize("key", CHANGES)
def test_a_setting_changes_the_trained_model(
    key: str, trained: Callable[..., Path], contents: Callable[[Path], dict[str, Tensor]]
) -> None:
    value, *others = CHANGES[key]
    default, changed = (contents(trained(*words) / "model") for words in (others, [*others, f"{key}={value}"]))
    assert any(
        value.shape != changed[name].shape or not torch.equal(value, changed[name]) for name, value in default.items()
    )


@pytest.mark.parametrize(("warmup", "rate"), [(0, 1e-3), (4, 2.5e-4)])
def test_the_first_step_moves_weights_by_the_learning_rate(
    warmup: int, rate: float, built: Callable[..., Run], trained: Callable[..., Path]
) -> None:
    """AdamW's first step is the rate times the sign of the gradient, up to eps."""
    settings = (f"optimizer.warmup_steps={warmup}", "training.steps=1")
    before = state(built(*settings).trainee.model)
    assert largest_change(before, checkpoint(trained(*settings), "model")) == pytest.approx(rate, rel=1e-3)


def test_a_tiny_clip_leaves_almost_no_gradient(built: Callable[..., Run], trained: Callable[..., Path]) -> None:
    """Gradients of 1e-12 against eps = 1e-8 move weights by 1e-4 of the rate at most, which is 1e-7; plus rounding."""
    settings = ("optimizer.clip=1e-12", "training.steps=1")
    before = state(built(*settings).trainee.model)
    assert largest_change(before, checkpoint(trained(*settings), "model")) < 5e-7


def test_without_a_clip_gradients_stay_as_they_are(
    trained: Callable[..., Path], contents: Callable[[Path], dict[str, Tensor]]
) -> None:
    """Under a large weight of the ratio loss, whose gradients have a norm far above 1."""
    unlimited, large, one = (
        contents(trained("chunking.ratio_weight=1e4", f"optimizer.clip={clip}") / "model")
        for clip in ("null", "1e9", "1")
    )
    assert all(torch.equal(value, large[name]) for name, value in unlimited.items())
    assert not all(torch.equal(value, one[name]) for name, value in unlimited.items())


@pytest.mark.parametrize(
    ("settings", "decay"),
    [((), 0.1), (("training.ema=0.05",), 0.05), (("training.ema=0.75", "training.ema_warmup=false"), 0.75)],
)
def test_the_first_average_weighs_start_and_step_by_the_decay(
    settings: tuple[str, ...], decay: float, built: Callable[..., Run], trained: Callable[..., Path]
) -> None:
    """With the warm-up, the decay after the first step is min(ema, (1 + 0) / (10 + 0)): 0.1 start + 0.9 new."""
    start = state(built(*settings).trainee.model)
    folder = trained(*settings, "training.checkpoint_every=1")
    weights, average = checkpoint(folder, "model"), checkpoint(folder, "ema")
    assert largest_change(start, weights) > 5e-4
    for name, value in start.items():
        expected = decay * value + (1.0 - decay) * weights[name]
        torch.testing.assert_close(average[name], expected, atol=1e-7, rtol=1e-6, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_dropped_labels_train_the_null_class(
    dropout: float, built: Callable[..., Run], trained: Callable[..., Path]
) -> None:
    """The rows of the label table that a run uses are those that move: the last one is the null class."""
    settings = (f"training.label_dropout={dropout}", "training.steps=3")
    before, after = state(built(*settings).trainee.model), checkpoint(trained(*settings), "model", 3)
    (table,) = [name for name, value in before.items() if name.startswith("y_embedder.") and len(value) == 11]
    moved = [bool(row.any()) for row in after[table] - before[table]]
    assert moved[-1] == (dropout == 1.0)
    assert any(moved[:-1]) == (dropout == 0.0)


def test_betas_and_eps_are_those_of_adamw(built: Callable[..., Run]) -> None:
    """Two steps on known gradients against the formula (arXiv 1711.05101) in fp64."""
    run = built("optimizer.betas=[0.5, 0.75]", "optimizer.eps=0.1", "optimizer.lr=0.01")
    parameter = run.trainee.optimizer.param_groups[0]["params"][0]
    expected = parameter.detach().double().clone()
    first, second = torch.zeros_like(expected), torch.zeros_like(expected)
    for step, gradient in enumerate((0.3, -0.2), 1):
        run.trainee.optimizer.zero_grad()
        parameter.grad = torch.full_like(parameter, gradient)
        run.trainee.optimizer.step()
        first, second = 0.5 * first + 0.5 * gradient, 0.75 * second + 0.25 * gradient**2
        expected -= 0.01 * (first / (1 - 0.5**step)) / ((second / (1 - 0.75**step)).sqrt() + 0.1)
    torch.testing.assert_close(parameter.detach().double(), expected, atol=1e-7, rtol=1e-6)


def training_calls(recipe: Recipe) -> list[bool]:
    """Train, and return for every call of the model in training mode whether autocast was on."""
    calls: list[bool] = []

    def note(module: nn.Module, _: Any) -> None:
        if isinstance(module, DCDiT) and module.training:
            calls.append(torch.is_autocast_enabled("cpu"))

    handle = register_module_forward_pre_hook(note)
    try:
        train(recipe)
    finally:
        handle.remove()
    return calls


@pytest.mark.parametrize(("precision", "enabled"), [("fp32", False), ("bf16", True)])
def test_bf16_trains_under_autocast(precision: str, enabled: bool, tiny: Tiny, tmp_path: Path) -> None:
    assert training_calls(tiny(tmp_path / "run", f"training.precision={precision}")) == [enabled] * 2


def test_every_step_calls_the_model_once_per_micro_batch(tiny: Tiny, tmp_path: Path) -> None:
    assert len(training_calls(tiny(tmp_path / "run", "training.accumulation=4"))) == 2 * 4


def test_gradient_checkpointing_is_enabled(built: Callable[..., Run]) -> None:
    assert not built().trainee.model.is_gradient_checkpointing
    assert built("training.gradient_checkpointing=true").trainee.model.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("parts", "compiled"),
    [
        ("false", []),
        ("scaffold", ["Scaffold"] * 2),
        ("blocks", ["DiTBlock"]),
        ("all", ["DiTBlock", "Scaffold", "Scaffold"]),
    ],
)
def test_the_named_parts_are_compiled(
    parts: str, compiled: list[str], built: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: names.append(type(module).__name__))
    built(f"training.compile={parts}")
    assert sorted(names) == compiled


@pytest.mark.parametrize("implementation", ["fused", "foreach", "loop"])
def test_the_implementation_of_adamw_is_the_named_one(implementation: str, built: Callable[..., Run]) -> None:
    chosen = built(f"optimizer.implementation={implementation}").trainee.optimizer.defaults
    assert (chosen["fused"], chosen["foreach"]) == (implementation == "fused", implementation == "foreach")


def test_workers_load_the_batches(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    loader = BatchStream.loader

    def noted(stream: BatchStream, start: int, stop: int, workers: int) -> Any:
        counts.append(workers)
        return loader(stream, start, stop, 0)

    monkeypatch.setattr(BatchStream, "loader", noted)
    train(tiny(tmp_path / "run", "training.workers=3"))
    assert counts == [3]


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        (("training.checkpoint_every=2",), [2, 4, 5]),
        (("training.checkpoint_every=2", "training.keep_checkpoints=1"), [5]),
        (("training.checkpoint_minutes=1e-9",), [1, 2, 3, 4, 5]),
        (("training.checkpoint_minutes=1000",), [5]),
    ],
)
def test_checkpoints_are_written_when_asked_for(
    settings: tuple[str, ...], saved: list[int], tiny: Tiny, tmp_path: Path
) -> None:
    train(tiny(tmp_path / "run", "training.steps=5", "training.keep_checkpoints=9", *settings))
    assert steps_saved(tmp_path / "run") == saved


@pytest.mark.parametrize("every", [1, 2, 5])
def test_metrics_are_logged_when_asked_for(
    every: int, tiny: Tiny, tmp_path: Path, rows: Callable[[Path], list[dict[str, Any]]]
) -> None:
    """The mean over a window is the mean of the rows that a run with a row per step has."""
    settings = ("training.steps=4", "chunking.budget_warmup_steps=0")
    train(tiny(tmp_path / "single", *settings))
    train(tiny(tmp_path / "run", *settings, f"training.log_every={every}"))
    single, logged = rows(tmp_path / "single"), rows(tmp_path / "run")
    assert [row["step"] for row in logged] == sorted({*range(every, 5, every), 4})
    start = 0
    for row in logged:
        window = single[start : row["step"]]
        start = row["step"]
        for name in ("loss", "ratio", "kept", "tail_drop", "grad_norm"):
            assert row[name] == pytest.approx(sum(each[name] for each in window) / len(window), rel=1e-5), name
