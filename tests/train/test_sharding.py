"""Weights sharded by FSDP2: results of one process, checkpoints for any number of processes, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import processes
from tests.train.test_parallel import COMMON, DIT, FAMILIES
from tokdyn.checkpoints import shards
from tokdyn.errors import CheckpointError, RecipeError
from tokdyn.models import DCDiT
from tokdyn.recipe import Recipe, resolve
from tokdyn.sample import load_model
from tokdyn.train import checkpoints, metrics, train
from tokdyn.train.sharding import Sharding, asked_sharding

Rows = Callable[[Path], list[dict[str, Any]]]
Contents = Callable[[Path], dict[str, Tensor]]
HERE = Path(__file__).parent
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_OFFLOAD_PARAMS": "false", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_SYNC_MODULE_STATES": "true", "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD", "FSDP_USE_ORIG_PARAMS": "true", "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
}  # fmt: skip
"""What accelerate sets for a configuration with distributed_type FSDP and fsdp_version 2."""


def recipe_of(family: str, out: Path, base: Path | None = None, **training: Any) -> Recipe:
    sections = {**COMMON, **FAMILIES[family], "training": {**COMMON["training"], **training}, "out": str(out)}
    if "upcycle" in sections:
        sections["upcycle"] = {"base": str(base), **sections["upcycle"]}
    return resolve(sections)


def train_together(folder: Path, *parts: tuple[int, list[tuple[Recipe, bool]]]) -> None:
    """Train, or resume, in a number of processes that talk through gloo, then in another number, and so on."""
    dumped = [(count, [(run.model_dump(mode="json"), resume) for run, resume in runs]) for count, runs in parts]
    (folder / "runs.json").write_text(json.dumps(dumped))
    words = [sys.executable, str(HERE / "forked_worker.py"), str(folder / "runs.json")]
    subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=1800, check=True)


def whole(folder: Path) -> dict[str, Tensor]:
    """Read the weights, averaged weights and moments of a sharded checkpoint."""
    found = {}
    for part in ("model", "ema", "optimizer"):
        tensors = {
            name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shards.stored(folder / part).items()
        }
        shards.read(folder / part, tensors)
        found |= {f"{part}/{name}": tensor for name, tensor in tensors.items()}
    return found


def whole_of_one(folder: Path) -> dict[str, Tensor]:
    """Read the same from a checkpoint of one process."""
    state = load_file(folder / "state.safetensors")
    found = {name: value for name, value in state.items() if name.startswith("optimizer/") and value.dim()}
    for part in ("model", "ema"):
        weights = load_file(folder / part / "diffusion_pytorch_model.safetensors")
        found |= {f"{part}/{name}": value for name, value in weights.items()}
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same_rows(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for left, right in zip(found, expected, strict=True):
        assert left == pytest.approx(right, rel=1e-5, abs=1e-7)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DC-DiT that two processes trained for 4 steps with sharded weights, and saved at step 2.

    Beside it, "bad" is a DiT all of whose losses were above a limit.
    """
    folder = tmp_path_factory.mktemp("sharded")
    run = recipe_of("DC-DiT", folder / "run", steps=4, sharding="full", checkpoint_every=2)
    bad = recipe_of("DiT", folder / "bad", steps=3, sharding="full", on_bad_loss="roll_back", loss_limit=1e-3)
    train_together(folder, (2, [(run, False), (bad, False)]))
    return folder / "run"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training in one process, two steps longer."""
    folder = tmp_path_factory.mktemp("alone")
    train(recipe_of("DC-DiT", folder, steps=6, checkpoint_every=2))
    return folder


@pytest.fixture
def copied(sharded: Path, tmp_path: Path) -> Path:
    """A copy of the sharded run, to be resumed or damaged."""
    shutil.copytree(sharded, tmp_path / "run")
    return tmp_path / "run"


def test_two_processes_with_shards_equal_one(sharded: Path, alone: Path, rows: Rows) -> None:
    """Losses and gradient norms of every step; weights, averaged weights and moments of every checkpoint."""
    assert_same_rows(rows(sharded), rows(alone)[:4])
    for step in (2, 4):
        folder = checkpoints.folder_of(sharded / "checkpoints", step)
        assert_close(whole(folder), whole_of_one(checkpoints.folder_of(alone / "checkpoints", step)))


@pytest.mark.slow
def test_the_average_is_consolidated_at_the_end(sharded: Path, alone: Path, contents: Contents) -> None:
    expected = whole_of_one(checkpoints.folder_of(alone / "checkpoints", 4))
    model = DCDiT.from_pretrained(sharded / "model")
    assert_close({f"ema/{name}": value for name, value in model.state_dict().items()}, {
        name: value for name, value in expected.items() if name.startswith("ema/")
    })  # fmt: skip
    assert len(contents(sharded / "model")) == len(model.state_dict())


@pytest.mark.slow
def test_one_process_resumes_what_two_have_saved(copied: Path, alone: Path, rows: Rows) -> None:
    train(recipe_of("DC-DiT", copied, steps=6, checkpoint_every=2, sharding="full"), resume=True)
    assert_same_rows(rows(copied), rows(alone))
    last = "step_0000006"
    assert_close(whole_of_one(copied / "checkpoints" / last), whole_of_one(alone / "checkpoints" / last))


@pytest.mark.slow
def test_a_sharded_checkpoint_can_be_sampled(sharded: Path) -> None:
    folder = checkpoints.folder_of(sharded / "checkpoints", 2)
    model, objective, info = load_model(folder)
    assert isinstance(model, DCDiT)
    assert (objective.kind, info.step, len(info.class_names)) == ("noise", 2, 10)
    assert_close({f"ema/{name}": value for name, value in model.state_dict().items()}, {
        name: value for name, value in whole(folder).items() if name.startswith("ema/")
    })  # fmt: skip


@pytest.mark.slow
def test_processes_with_shards_roll_back_together(sharded: Path) -> None:
    """To the checkpoint of step 0, as often as there are steps, and keep its weights."""
    folder = sharded.with_name("bad")
    events = metrics.read(folder / metrics.EVENTS)
    assert [(row["step"], row["event"], row["weights_of_step"]) for row in events] == [
        (step, "rolled_back", 0) for step in (1, 2, 3)
    ]
    first, last = (whole(checkpoints.folder_of(folder / "checkpoints", step)) for step in (0, 3))
    assert all(torch.equal(first[name], last[name]) for name in first if not name.startswith("optimizer/"))


@pytest.mark.slow
def test_a_checkpoint_holds_safetensors_and_json_alone(sharded: Path) -> None:
    """torch's own metadata would be a pickle. Every process wrote its rows, and every file is covered by a hash."""
    folder = checkpoints.folder_of(sharded / "checkpoints", 4)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in files} == {".safetensors", ".json", ".jsonl"}
    assert set(checkpoints.verify(folder)["files"]) == files - {"state.json"}
    assert all(len(list((folder / part).glob("*.safetensors"))) == 2 for part in ("model", "ema", "optimizer"))


def _rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Change the header and the tensors of a file of shards."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    info = json.loads(header["DCP_SHARDING_INFO"])
    change(info, tensors)
    save_file(tensors, path, {**header, "DCP_SHARDING_INFO": json.dumps(info)})


def _halve(info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["norm.weight"] = tensors["norm.weight"].half()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a missing file": lambda path: path.unlink(),
    "no file of shards": lambda path: path.write_bytes(b"no tensors"),
    "rows at another place": lambda path: _rewrite(path, lambda info, _: info["norm.weight"].update(saved_offsets=[3])),
    "offsets of another kind": lambda path: _rewrite(path, lambda info, _: info.update({"norm.weight": ["x"]})),
    "no offsets": lambda path: _rewrite(path, lambda info, _: info.clear()),
    "a missing tensor": lambda path: _rewrite(path, lambda _, tensors: tensors.__delitem__("norm.weight")),
    "another name": lambda path: _rewrite(path, lambda _, tensors: tensors.update(t=tensors.pop("norm.weight"))),
    "another type": lambda path: _rewrite(path, _halve),
}


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shards_are_refused_in_a_sentence(damage: str, which: int, sharded: Path, tmp_path: Path) -> None:
    """Also where no hash would tell, because the file comes from a stranger."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoints.folder_of(sharded / "checkpoints", 4) / "model", folder)
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shards.stored(folder).items()}
    DAMAGES[damage](sorted(folder.glob("*.safetensors"))[which])
    with pytest.raises(CheckpointError, match=str(folder)) as refused:
        shards.read(folder, tensors)
    assert "\n" not in str(refused.value)
    assert not any(value.any() for value in tensors.values())


@pytest.mark.slow
def test_a_changed_shard_is_found_by_its_hash_and_the_checkpoint_before_is_used(copied: Path, console: Any) -> None:
    folder = checkpoints.folder_of(copied / "checkpoints", 4)
    shard = next((folder / "ema").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    result = train(recipe_of("DC-DiT", copied, steps=4, checkpoint_every=2), resume=True, console=console)
    assert result.finished
    said = console.file.getvalue()
    assert "at step 2" in said
    assert f"ema/{shard.name}" in said


def settings(**training: Any) -> Recipe:
    return resolve({**COMMON, "model": DIT, "training": {**COMMON["training"], "steps": 1, **training}})


def test_recipe_and_launcher_ask_for_shards() -> None:
    assert asked_sharding(settings(), {}) is None
    assert asked_sharding(settings(sharding="none"), {}) is None
    assert asked_sharding(settings(sharding="full"), {}) == Sharding(reshard=True)
    assert (
        asked_sharding(settings(), FSDP2) == asked_sharding(settings(sharding="full"), FSDP2) == Sharding(reshard=True)
    )
    assert asked_sharding(settings(), {**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "false"}) == Sharding(reshard=False)
    assert asked_sharding(settings(), {**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "True"}) == Sharding(reshard=True)
    named = {"FSDP_TRANSFORMER_CLS_TO_WRAP": "DiTBlock", "FSDP_ACTIVATION_CHECKPOINTING": "true"}
    mixed = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    assert asked_sharding(settings(gradient_checkpointing=True, precision="bf16"), {**FSDP2, **named, **mixed})


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron"),
        ({**FSDP2, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: 2"),
        ({**FSDP2, "FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ({**FSDP2, "FSDP_VERSION": "3"}, "fsdp_version: 2"),
        ({key: value for key, value in FSDP2.items() if "WRAP" not in key}, "fsdp_auto_wrap_policy: TRANSFORMER"),
        ({**FSDP2, "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, "fsdp_auto_wrap_policy: TRANSFORMER"),
        ({**FSDP2, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy: TRANSFORMER"),
        ({**FSDP2, "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer"}, "DiTBlock"),
        ({**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "SHARD_GRAD_OP"}, "fsdp_reshard_after_forward: true"),
        ({**FSDP2, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, "SHARDED_STATE_DICT"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: false"),
        ({**FSDP2, "FSDP_FORWARD_PREFETCH": "true"}, "fsdp_forward_prefetch: false"),
        ({**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "training.gradient_checkpointing=true"),
        ({**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"}, "fsdp_activation_checkpointing_offload: false"),
        ({**FSDP2, "FSDP_IGNORED_MODULES": "blocks.0"}, "fsdp_ignored_modules: null"),
        ({**FSDP2, "FSDP_OF_TOMORROW": "true"}, "FSDP_OF_TOMORROW"),
        ({**FSDP2, "ACCELERATE_MIXED_PRECISION": "fp16"}, "training.precision"),
        ({**FSDP2, "ACCELERATE_MIXED_PRECISION": "bf16"}, "training.precision"),
        ({**FSDP2, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend: no"),
    ],
)
def test_a_launcher_that_asks_for_more_is_refused(
    variables: dict[str, str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `train` itself, before anything is written or another process is waited for."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=named):
        train(recipe_of("DiT", tmp_path / "run", steps=1))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("key", "value"), [("sharding", "none"), ("compile", "blocks")])
def test_a_recipe_that_contradicts_the_launcher_is_refused(key: str, value: str) -> None:
    with pytest.raises(RecipeError, match=f"training.{key}"):
        asked_sharding(settings(**{key: value}), FSDP2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DiT to upcycle."""
    folder = tmp_path_factory.mktemp("base") / "dit"
    train(recipe_of("DiT", folder, steps=1))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("counts", "names"),
    [((2, 1, 4), ("DC-DiT",)), ((2, 4, 1), tuple(FAMILIES))],
    ids=["2-1-4", "2-4-1 all"],
)
def test_resuming_on_another_number_of_processes_equals_one(
    counts: tuple[int, ...], names: tuple[str, ...], base: Path, tmp_path: Path, rows: Rows, contents: Contents
) -> None:
    """Over 20 steps, also where the second part accumulates micro-batches and the third recomputes activations."""
    parts = {name: tmp_path / "parts" / str(number) for number, name in enumerate(names)}
    settings: tuple[dict[str, Any], ...] = ({}, {"accumulation": 2}, {"gradient_checkpointing": True})
    launched = []
    for count, steps, changed in zip(counts, (8, 14, 20), settings, strict=True):
        training = {"steps": steps, "sharding": "full", **changed}
        launched.append((count, [(recipe_of(name, out, base, **training), steps > 8) for name, out in parts.items()]))
    train_together(tmp_path, *launched)
    for name, out in parts.items():
        expected = tmp_path / "whole" / out.name
        train(recipe_of(name, expected, base, steps=20))
        assert_same_rows(rows(out), rows(expected))
        assert_close(contents(out / "model"), contents(expected / "model"))


@pytest.mark.slow
@pytest.mark.fault(
    "a process cannot write its shard of a checkpoint",
    injected="a limit on the size of files, in the second of two gloo processes with sharded weights",
    happened="all processes end in one sentence; no part of the checkpoint is left",
)
def test_a_shard_that_cannot_be_written_ends_all_processes(tmp_path: Path) -> None:
    recipe = recipe_of("DC-DiT", tmp_path / "run", steps=4, sharding="full")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.model_dump(mode="json")))
    processes.launch(HERE / "shard_fault_worker.py", str(tmp_path / "recipe.json"), "disk", timeout=900)
    for rank in range(2):
        said = (tmp_path / f"said_{rank}.txt").read_text()
        assert "step_0000004 could not be written (File too large)" in said
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.slow
@pytest.mark.fault(
    "processes that do not share a disk",
    injected="a folder of its own for each of two gloo processes with sharded weights",
    happened="all processes end in one sentence each at the first checkpoint, of which nothing is left",
)
def test_shards_in_folders_that_are_not_shared_are_no_checkpoint(tmp_path: Path) -> None:
    recipe = recipe_of("DiT", Path("run"), steps=4, sharding="full")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.model_dump(mode="json")))
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    processes.launch(HERE / "shard_fault_worker.py", str(tmp_path / "recipe.json"), "folder", timeout=900)
    said = [(tmp_path / f"said_{rank}.txt").read_text() for rank in range(2)]
    assert "Shards of other processes are not in" in said[0]
    assert "Another process" in said[1]
    assert list((tmp_path / "0" / "run" / "checkpoints").iterdir()) == []


def launch_by_accelerate(folder: Path, version: int) -> subprocess.CompletedProcess[str]:
    """Train a tiny model in two processes that `accelerate launch` starts with a configuration of FSDP."""
    config = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "mixed_precision": "no", "num_machines": 1,
        "num_processes": 2, "use_cpu": True, "main_process_port": 0, "machine_rank": 0, "fsdp_config": {
            "fsdp_version": version, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": True if version == 2 else "FULL_SHARD",
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        },
    }  # fmt: skip
    (folder / "fsdp.yaml").write_text(json.dumps(config))
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "fsdp.yaml"), "-m"]
    words += ["tokdyn.cli.main", "train", str(HERE / "tiny.yaml"), f"out={folder / 'run'}"]
    return subprocess.run(words, text=True, capture_output=True, timeout=900)


@pytest.mark.slow
def test_a_configuration_of_accelerate_is_honoured_or_refused(tmp_path: Path) -> None:
    refused = launch_by_accelerate(tmp_path, 1)
    assert refused.returncode != 0
    assert "set fsdp_version: 2" in refused.stderr
    assert not (tmp_path / "run").exists()
    done = launch_by_accelerate(tmp_path, 2)
    assert done.returncode == 0, done.stderr
    folder = checkpoints.folder_of(tmp_path / "run" / "checkpoints", 2)
    assert len(list((folder / "optimizer").glob("*.safetensors"))) == 2
    assert DCDiT.from_pretrained(tmp_path / "run" / "model").config.hidden_size == 32
