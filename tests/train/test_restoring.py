"""A checkpoint is checked before it is used: names, shapes and types of tensors, and what state.json says."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokdyn.checkpoints.optimizer import load_optimizer, optimizer_tensors
from tokdyn.errors import CheckpointError
from tokdyn.recipe import Recipe
from tokdyn.train import checkpoints, train
from tokdyn.train.resume import check_complete

Tiny = Callable[..., Recipe]
Same = Callable[[Path, Path, int], None]
Tensors = dict[str, Tensor]
SETTINGS = ("training.steps=4", "training.checkpoint_every=2", "training.keep_checkpoints=9")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(tiny(folder, *SETTINGS))
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def reseal(folder: Path, change: Callable[[dict[str, Any]], object] = lambda state: None) -> None:
    """Renew every hash of a checkpoint, after a change of state.json."""
    state = json.loads((folder / "state.json").read_text())
    for name in state["files"]:
        data = (folder / name).read_bytes()
        state["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(state)
    (folder / "state.json").write_text(json.dumps(checkpoints.sealed(state)))


def cut(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name][:1].contiguous()


def transposed(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].T.contiguous()


def integers(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].to(torch.int64)


def doubled(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].double()


def missing(tensors: Tensors, name: str) -> None:
    del tensors[name]


def another_moment(tensors: Tensors, name: str) -> None:
    tensors[name + "_"] = tensors.pop(name)


def another_parameter(tensors: Tensors, name: str) -> None:
    tensors["other." + name] = tensors.pop(name)


def a_vector_of_steps(tensors: Tensors, name: str) -> None:
    step = name.rpartition("/")[0] + "/step"
    tensors[step] = tensors[step].reshape(1)


@pytest.mark.fault(
    "the moments of the optimizer are not those of the model",
    injected="cut, transposed, of another type, missing or renamed moments, and a vector of steps; hashes renewed",
    happened="one sentence names the tensor before anything is loaded; torch alone may crash",
)
@pytest.mark.parametrize(
    "damage", [cut, transposed, integers, doubled, missing, another_moment, another_parameter, a_vector_of_steps]
)
def test_moments_are_checked(damage: Callable[[Tensors, str], None]) -> None:
    model = nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tensors = {name: value.clone() for name, value in optimizer_tensors(model, optimizer).items()}
    damage(tensors, "weight/exp_avg")
    with pytest.raises(CheckpointError, match="weight"):
        load_optimizer(model, optimizer, tensors)
    assert all(state["exp_avg"].shape == parameter.shape for parameter, state in optimizer.state.items())


def test_moments_of_frozen_parameters_are_refused() -> None:
    model = nn.Linear(3, 4)
    whole = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    whole.step()
    with pytest.raises(CheckpointError, match="weight"):
        load_optimizer(model, torch.optim.AdamW([model.bias]), optimizer_tensors(model, whole))


def moments(folder: Path) -> None:
    path = folder / "state.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if "/exp_avg" in name and tensors[name].dim() > 1]:
        cut(tensors, name)
    save_file(tensors, path)


def weights(folder: Path, change: Callable[[Tensors, str], None]) -> None:
    path = folder / "model" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors, next(name for name in tensors if tensors[name].dim() == 2))
    save_file(tensors, path)


def no_weights(folder: Path) -> None:
    weights(folder, missing)


def halves(folder: Path) -> None:
    weights(folder, lambda tensors, name: tensors.update({name: tensors[name].half()}))


def renamed_weights(folder: Path) -> None:
    weights(folder, another_parameter)


def sums(folder: Path) -> None:
    path = folder / "state.safetensors"
    save_file({name: value for name, value in load_file(path).items() if name != "window/steps"}, path)


@pytest.mark.fault(
    "the tensors of a checkpoint are not those of the model",
    injected="cut moments, missing, renamed or halved weights, missing sums of metrics; hashes renewed",
    happened="one sentence that names the file or the tensor",
)
@pytest.mark.parametrize(
    "damage",
    [moments, *(pytest.param(each, marks=pytest.mark.slow) for each in (no_weights, halves, renamed_weights, sums))],
)
def test_tensors_are_checked(damage: Callable[[Path], None], run: Path, tiny: Tiny) -> None:
    folder = checkpoints.folder_of(run / "checkpoints", 4)
    damage(folder)
    reseal(folder)
    with pytest.raises(CheckpointError, match=r"exp_avg|weights|sums of metrics"):
        train(tiny(run, *SETTINGS), resume=True)


@pytest.mark.fault(
    "state.json lacks what a run is resumed with",
    injected="`seconds`, `recipe`, `data` or `base` removed, or of another type; the hash renewed",
    happened="the checkpoint before it is used, and the line about the resumed run says why",
    lost="nothing: the steps since that checkpoint are computed again",
)
@pytest.mark.parametrize("key", ["seconds", "recipe", "data", "base"])
@pytest.mark.parametrize("value", [None, True, [1]])
def test_an_incomplete_state_is_no_checkpoint(
    key: str, value: object, run: Path, whole: Path, tiny: Tiny, console: Console, assert_same_run: Same
) -> None:
    folder = checkpoints.folder_of(run / "checkpoints", 4)
    reseal(folder, lambda state: state.pop(key) if value is None else state.update({key: value}))
    if key != "seconds" or value is not None:  # one whole run is enough
        newest = checkpoints.newest(run / "checkpoints", check_complete)
        assert newest is not None
        assert newest.step == 2
        assert key in newest.skipped[0]
        return
    train(tiny(run, *SETTINGS), resume=True, console=console)
    assert "at step 2, because a newer checkpoint is damaged" in console.file.getvalue()  # type: ignore[attr-defined]
    assert_same_run(whole, run, 4)
