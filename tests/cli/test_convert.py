"""`tokdyn convert` as users type it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from tokdyn.cli.main import app
from typer.testing import CliRunner

from tokdyn.bases import open_base
from tokdyn.checkpoints import read, to_facebook
from tokdyn.models import DiT
from tokdyn.sample.loading import load_model


def run(*words: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["convert", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = DiT(sample_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=5)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape) * parameter.requires_grad
    torch.save({"ema": to_facebook(model)}, tmp_path / "dit.pt")
    return tmp_path / "dit.pt"


def test_conversion_to_other_layouts_and_back(file: Path, tmp_path: Path) -> None:
    first = run(file, tmp_path / "there", "--to", "diffusers", "num_heads=4")
    assert "Note: diffusers" in first.stderr
    assert isinstance(DiTTransformer2DModel.from_pretrained(tmp_path / "there"), DiTTransformer2DModel)
    run(tmp_path / "there", tmp_path / "own", "to=tokdyn")
    run(tmp_path / "own", tmp_path / "back.safetensors", "--to=facebook")
    original, back = (read(path, num_heads=4).state_dict() for path in (file, tmp_path / "back.safetensors"))
    assert all(torch.equal(original[name], back[name]) for name in original)
    assert not (tmp_path / "own" / "tokdyn.json").exists()  # nothing is known about its training


def test_json_output(file: Path, tmp_path: Path) -> None:
    shown = json.loads(
        run(file, tmp_path / "own", "--to", "tokdyn", "--kind", "sit", "num_heads=4", "dtype=bf16", "--json").stdout
    )
    assert (shown["model"], shown["layout"], shown["objective"]) == ("DiT", "tokdyn", "flow")
    assert {Path(name).name for name in shown["files"]} == {
        "config.json", "diffusion_pytorch_model.safetensors", "tokdyn.json",
    }  # fmt: skip
    model, objective, _ = load_model(tmp_path / "own")  # like sampling does
    assert objective.kind == "flow"
    assert tuple(model.config.timestep_map) == (-0.001, 1.0)
    assert torch.equal(model.x_embedder.proj.weight, model.x_embedder.proj.weight.bfloat16().float())


def test_dydit_keeps_its_gates_and_can_be_sampled(tmp_path: Path) -> None:
    weights = to_facebook(DiT(sample_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=5, in_channels=3))
    draw = torch.Generator().manual_seed(1)
    weights = {name: value + 0.1 * torch.randn(value.shape, generator=draw) for name, value in weights.items()}
    for block in range(2):
        for name, outputs, inputs in (
            ("attn_rate.router", 3, 32), ("mlp_rate.router", 3, 32), ("token_selection.mlp_head.0", 2, 32),
            ("token_selection.mlp_head.2", 1, 2),
        ):  # fmt: skip
            weights[f"blocks.{block}.{name}.weight"] = torch.randn(outputs, inputs, generator=draw)
            weights[f"blocks.{block}.{name}.bias"] = torch.zeros(outputs)
    torch.save({"ema": weights}, tmp_path / "dydit.pt")
    shown = json.loads(run(tmp_path / "dydit.pt", tmp_path / "own", "--to", "tokdyn", "num_heads=4", "--json").stdout)
    assert shown["methods"] == ["DynamicWidth"]
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([100, 900]), torch.tensor([0, 3])
    with torch.no_grad():
        expected = read(tmp_path / "dydit.pt", num_heads=4)(x, timestep=t, class_labels=y).sample
        assert torch.equal(open_base(tmp_path / "own")(x, timestep=t, class_labels=y).sample, expected)
    words = [
        "sample",
        tmp_path / "own",
        f"methods={tmp_path / 'own'}",
        f"out={tmp_path / 'images'}",
        "steps=2",
        "count=2",
    ]
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert done.exit_code == 0, done.output
    refused = run(tmp_path / "dydit.pt", tmp_path / "x", "--to", "diffusers", "num_heads=4", code=2)
    assert "to=tokdyn" in refused.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["out", "--to", "diffusers"], "num_heads"),
        (["dit.pt", "--to", "tokdyn", "num_heads=4"], "dit.pt"),
        (["out", "--to", "facebook", "num_heads=4"], ".safetensors"),
        (["out.safetensors", "--to", "official", "num_heads=4"], "DCDiT"),
        (["out", "--to", "diffusers", "--kind", "sit", "num_heads=4"], "timestep_map=(1.0, 0.0)"),
        (["out", "--to", "diffusers", "--kind", "dc-dit", "num_heads=4"], "kind='dc-dit'"),
    ],
)
def test_invalid_conversions_end_in_one_sentence(file: Path, words: list[str], named: str) -> None:
    place, *rest = words
    result = run(file, file.parent / place, *rest, code=2)
    assert named in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert [path.name for path in file.parent.iterdir()] == ["dit.pt"]
