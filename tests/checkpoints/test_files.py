"""Checkpoint files and folders: which weights are taken, and how damaged, wrong and hostile files are refused."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tokdyn.checkpoints import read, to_diffusers, to_facebook, to_official
from tokdyn.checkpoints.files import weight_files
from tokdyn.errors import CheckpointError
from tokdyn.models import DCDiT, DiT


def public(model: DiT | DCDiT) -> dict[str, Any]:
    """Return the settings of a model, with the default scaffold width made explicit as a reader infers it."""
    settings = {name: value for name, value in model.config.items() if not name.startswith("_")}
    if isinstance(model, DCDiT):
        settings["scaffold_width"] = settings["scaffold_width"] or settings["hidden_size"] // 4
    return settings


def shifted(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor if name == "pos_embed" else tensor + 1 for name, tensor in weights.items()}


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".pth", ".bin"])
def test_single_files_and_folders_that_hold_one(
    same: Callable[..., bool], dcdit: Callable[..., DCDiT], tmp_path: Path, ending: str
) -> None:
    model, path = dcdit(), tmp_path / f"weights{ending}"
    (save_file if ending == ".safetensors" else torch.save)(to_official(model), path)
    for source in (path, str(path), tmp_path):
        assert same(model, read(source, num_heads=4))


def test_old_torch_format(same: Callable[..., bool], dit: Callable[..., DiT], tmp_path: Path) -> None:
    model = dit()
    torch.save(to_facebook(model), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(model, read(tmp_path / "old.pt", num_heads=4))


def test_training_files_hold_two_sets_of_weights(
    same: Callable[..., bool], dit: Callable[..., DiT], tmp_path: Path
) -> None:
    averaged = dit()
    content = {
        "model": {f"module.{name}": tensor for name, tensor in shifted(to_facebook(averaged)).items()},
        "ema": to_facebook(averaged),
        "opt": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.99)}]},
        "args": argparse.Namespace(model="DiT-XL/2", epochs=1400),
    }
    torch.save(content, tmp_path / "0400000.pt")
    plain = read(tmp_path, ema=False, num_heads=4)
    assert same(averaged, read(tmp_path, num_heads=4))
    assert torch.equal(plain.state_dict()["blocks.0.mlp.fc1.bias"], averaged.state_dict()["blocks.0.mlp.fc1.bias"] + 1)
    assert same(averaged, read({"ema": content["ema"], "model": content["model"]}, num_heads=4))
    assert same(averaged, read({"state_dict": content["ema"]}, num_heads=4))


def settings_classes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Build a module called `config` with the settings classes of the official code, as in its training files."""
    module = types.ModuleType("config")

    @dataclass
    class HNetConfig:
        num_heads: list[int] = field(default_factory=lambda: [2, 2])
        dechunk_kernel_sigma: float = 1.25

    @dataclass
    class ModelConfig:
        hnet: HNetConfig = field(default_factory=HNetConfig)

    @dataclass
    class TrainingConfig:
        downsample_factor: float = 16.0

    @dataclass
    class Config:
        model: ModelConfig = field(default_factory=ModelConfig)
        training: TrainingConfig = field(default_factory=TrainingConfig)

    for cls in (HNetConfig, ModelConfig, TrainingConfig, Config):
        cls.__module__, cls.__qualname__ = "config", cls.__name__
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "config", module)
    return module


def test_settings_inside_official_training_files(
    same: Callable[..., bool], dcdit: Callable[..., DCDiT], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dcdit(num_heads=2, sigma=1.25)
    with monkeypatch.context() as patch:
        config = settings_classes(patch).Config()
        torch.save(
            {"model": shifted(to_official(model)), "ema": to_official(model), "config": config}, tmp_path / "a.pt"
        )
    assert "config" not in sys.modules
    model_read = read(tmp_path / "a.pt")
    assert same(model, model_read)
    config_read = model_read.config
    assert (config_read["num_heads"], config_read["sigma"], config_read["target"]) == (2, 1.25, 16.0)
    assert read(tmp_path / "a.pt", sigma=1.0).config["sigma"] == 1.0
    with pytest.raises(CheckpointError, match=r"num_heads=4.* 2\.$"):
        read(tmp_path / "a.pt", num_heads=4)


class Touch:
    """Creates a file when a careless reader unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class Shell:
    """Runs a command when a careless reader unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize("trap", [Touch, Shell])
@pytest.mark.parametrize("new_format", [True, False])
def test_hostile_pickles_are_refused_without_running(
    dit: Callable[..., DiT], tmp_path: Path, trap: type, new_format: bool
) -> None:
    mark, path = tmp_path / "mark", tmp_path / "hostile.pt"
    content = {"ema": to_facebook(dit()), "args": trap(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match=r"hostile\.pt .*(getattr|eval) "):  # the refused object
        read(path, num_heads=4)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # the trap works


def test_bare_hostile_pickle_is_refused_without_running(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "hostile.pt"
    path.write_bytes(pickle.dumps(Shell(mark), protocol=2))
    with pytest.raises(CheckpointError, match=r"hostile.pt"):
        read(path)
    assert not mark.exists()


def test_damaged_and_wrong_files_are_refused(dcdit: Callable[..., DCDiT], tmp_path: Path) -> None:
    weights = to_official(dcdit())
    save_file(weights, tmp_path / "whole.safetensors")
    torch.save(weights, tmp_path / "whole.pt")
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("whole.safetensors", "whole.pt", "old.pt"):
        whole = (tmp_path / name).read_bytes()
        for share in (0, 5, len(whole) // 2, len(whole) - 3):
            path = tmp_path / f"cut{Path(name).suffix}"
            path.write_bytes(whole[:share])
            with pytest.raises(CheckpointError, match=path.name):
                read(path, num_heads=4)
    for name, expected in (
        ("picture.pt", "picture.pt"),
        ("picture.safetensors", "picture.safetensors"),
        ("picture.png", r"picture.png .*\.safetensors"),
    ):
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
        with pytest.raises(CheckpointError, match=expected):
            read(tmp_path / name)
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(CheckpointError, match=r"tensor.pt .*Tensor"):
        read(tmp_path / "tensor.pt")


def test_missing_paths_and_ambiguous_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"\.safetensors\.index\.json"):
        read(tmp_path)
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"2 .*\(a.safetensors, b.safetensors\)"):
        read(tmp_path)


def sharded(weights: dict[str, Tensor], folder: Path) -> tuple[Path, dict[str, str]]:
    """Write a checkpoint of two shards; return its index and the map from tensors to shards."""
    folder.mkdir()
    names = sorted(weights)
    places = {name: f"part-{position % 2}.safetensors" for position, name in enumerate(names)}
    for part in ("part-0.safetensors", "part-1.safetensors"):
        save_file({name: weights[name] for name in names if places[name] == part}, folder / part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index, places


def test_sharded_files(same: Callable[..., bool], dcdit: Callable[..., DCDiT], tmp_path: Path) -> None:
    model = dcdit()
    index, places = sharded(to_official(model), tmp_path / "dc")
    assert same(model, read(index.parent, num_heads=4))
    assert same(model, read(index, num_heads=4))
    assert weight_files(index.parent) == [index.parent / "part-0.safetensors", index.parent / "part-1.safetensors"]
    index.write_text(json.dumps({"weight_map": {**places, "hnet.more": "part-1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r" 1 .*'hnet.more'"):
        read(index, num_heads=4)
    for text in ("{", "[]", "{}", '{"weight_map": ["part-0.safetensors"]}', '{"weight_map": {"x": 0}}'):
        index.write_text(text)
        for reads in (partial(read, num_heads=4), weight_files):
            with pytest.raises(CheckpointError, match=r"model.safetensors.index.json"):
                reads(index)


@pytest.mark.parametrize(
    "elsewhere", ["../part-0.safetensors", "{absolute}", "inner/part-0.safetensors", "part-2", ".."]
)
def test_an_index_reads_no_shard_that_does_not_lie_beside_it(
    dcdit: Callable[..., DCDiT], tmp_path: Path, elsewhere: str
) -> None:
    """Each shard exists and holds the right tensors, so that only its place can be the reason."""
    index, places = sharded(to_official(dcdit()), tmp_path / "dc")
    shard = index.parent / "part-0.safetensors"
    for place in (tmp_path, index.parent / "inner"):
        place.mkdir(exist_ok=True)
        (place / shard.name).write_bytes(shard.read_bytes())
    name = elsewhere.format(absolute=tmp_path / shard.name)
    index.write_text(
        json.dumps({"weight_map": {key: place.replace(shard.name, name) for key, place in places.items()}})
    )
    for reads in (partial(read, num_heads=4), weight_files):
        with pytest.raises(CheckpointError, match=f"'{name}'"):
            reads(index)


def test_shards_may_be_links(same: Callable[..., bool], dcdit: Callable[..., DCDiT], tmp_path: Path) -> None:
    """The cache of the hub consists of links to files elsewhere; the index does not choose where they lead."""
    model = dcdit()
    index, _ = sharded(to_official(model), tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in index.parent.iterdir():
        link = tmp_path / "snapshot" / file.name
        link.symlink_to(os.path.relpath(file, link.parent))
    assert same(model, read(tmp_path / "snapshot", num_heads=4))


@pytest.mark.parametrize("max_shard_size", ["10GB", "50KB"])
def test_own_folders_keep_every_setting(
    same: Callable[..., bool], dit: Callable[..., DiT], dcdit: Callable[..., DCDiT], tmp_path: Path, max_shard_size: str
) -> None:
    for model in (
        dit(timestep_shift=1, mlp_norm_eps=1e-5),
        dit(sample_size=(4, 8)),
        dcdit(patch_size=2, sigma=1.5, force_ends=False, target=8.0, num_heads=8),
        dcdit(router="random", sigma=None),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        size = model.config["sample_size"]
        again = read(folder)
        assert same(model, again, size=(size, size) if isinstance(size, int) else size)
        assert public(again) == public(model)
        with pytest.raises(CheckpointError, match="num_heads=2"):
            read(folder, num_heads=2)
    assert read(folder, target=2.0, kind="tokdyn").config["target"] == 2.0
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "colour": "red"}))
    with pytest.raises(CheckpointError, match=r"'colour'.* DCDiT"):
        read(folder)


def test_training_folders_hold_two_sets_of_weights(
    same: Callable[..., bool], dit: Callable[..., DiT], tmp_path: Path
) -> None:
    averaged, plain = dit(), dit(depth=1)
    averaged.save_pretrained(tmp_path / "ema")
    plain.save_pretrained(tmp_path / "model")
    assert same(averaged, read(tmp_path))
    assert same(plain, read(tmp_path, ema=False))


def test_folders_of_diffusers_pipelines(same: Callable[..., bool], dit: Callable[..., DiT], tmp_path: Path) -> None:
    model = dit(timestep_shift=1, mlp_norm_eps=1e-5)
    config = {
        "_class_name": "Transformer2DModel",
        "num_attention_heads": 4,
        "sample_size": 8,
        "norm_type": "ada_norm_zero",
        "activation_fn": "gelu-approximate",
    }
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    torch.save(to_diffusers(model), tmp_path / "transformer" / "diffusion_pytorch_model.bin")
    place = tmp_path / "transformer" / "config.json"
    place.write_text(json.dumps(config))
    assert same(model, read(tmp_path))
    assert read(tmp_path / "transformer", mlp_norm_eps=1e-5).config["num_heads"] == 4
    place.write_text(json.dumps({**config, "activation_fn": "geglu"}))
    with pytest.raises(CheckpointError, match=r"activation_fn='geglu'.* 'gelu-approximate'"):
        read(tmp_path)
