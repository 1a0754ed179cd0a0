"""Small models that ship with the package: how a run becomes one, how they are measured, and those in the package."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tokdyn.cli.main import app
from typer.testing import CliRunner

from benchmarks import ship, shipped
from tests.train.conftest import TINY
from tokdyn import DCDiT, DiT, recipe
from tokdyn.bases import open_base, rows, table
from tokdyn.bases.names import check_name
from tokdyn.demo import DemoSettings
from tokdyn.errors import CheckpointError, RecipeError
from tokdyn.recipe import files, resolve
from tokdyn.report.pixels import Pixels
from tokdyn.sample import load_model
from tokdyn.train import train
from tokdyn.train.snapshot import save_model

FLOW: dict[str, Any] = {"name": "tiny", "objective": {"kind": "flow"}, "data": {"kind": "shapes", "size": 32}}
RESULT = Path(shipped.__file__).with_name("results") / "shipped.json"
INSTALLED = [name for name in ship.NAMES if name in rows()]


def run(*words: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def tiny(kind: type, **settings: Any) -> Any:
    """A model of 32x32 images with random weights, whose outputs are not zero."""
    torch.manual_seed(0)
    shape = {"sample_size": 32, "in_channels": 3, "num_classes": 10, "hidden_size": 32, "depth": 4, "num_heads": 2}
    model = kind(**shape, learn_sigma=False, **settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package in which both models are tiny ones."""
    root = tmp_path_factory.mktemp("bases")
    save_model(tiny(DiT, patch_size=4), root / "shapes/dit", FLOW)
    save_model(tiny(DCDiT, patch_size=4), root / "shapes/dc-dit", FLOW)
    return root


@pytest.fixture
def package(installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(table, "files", lambda _: installed)
    monkeypatch.chdir(tmp_path)
    return installed


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(resolve(files.deep_merge({**TINY, "out": str(folder)}, {"objective": {"kind": "flow"}})))
    return folder


def test_a_run_becomes_a_model_of_the_package(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "files", lambda _: tmp_path)
    with pytest.raises(CheckpointError, match="shapes/dc-dit is not part"):
        check_name("shapes/dc-dit")
    with pytest.raises(RecipeError, match=r"training\.batch_size"):
        ship.ship(trained, "shapes/dc-dit", tmp_path, steps=2)
    assert list(tmp_path.iterdir()) == []
    facts = ship.ship(trained, "shapes/dc-dit", tmp_path, steps=2, force=True)
    expected = {"steps": 2, "images": 8, "planned_steps": 2, "ema": 0.9999, "recipe": "shapes/dc-dit"}
    assert facts["training"].items() >= expected.items()
    assert [path.name for path in tmp_path.rglob("*.tmp")] == []
    row = rows()["shapes/dc-dit"]
    assert (row.objective, row.source) == ("flow", "shipped")
    stored, (whole, _, _) = open_base("shapes/dc-dit"), load_model(trained)
    for name, tensor in whole.state_dict().items():
        rounding = tensor.abs().max() / 127 / 2 + 1e-3  # half a step of eight bits, or fp16
        assert (stored.state_dict()[name] - tensor).abs().max() <= rounding, name
    is_what_its_description_says(tmp_path / "shapes/dc-dit")
    assert recipe.load(tmp_path / "shapes/dc-dit/recipe.yaml").training.steps == 2


def test_models_that_are_too_large_together_are_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {}
    for dtype in ("int8", "fp16"):
        ship.ship(trained, "shapes/dc-dit", tmp_path, dtype, steps=1, force=True)
        sizes[dtype] = ship.size(tmp_path / "shapes/dc-dit")
    assert sizes["int8"] < sizes["fp16"]
    monkeypatch.setattr(ship, "LIMIT", sizes["fp16"] + sizes["int8"])
    ship.ship(trained, "shapes/dit", tmp_path, "int8", steps=1, force=True)
    before = (tmp_path / "shapes/dit/tokdyn.json").read_text()
    with pytest.raises(RecipeError, match="MB"):
        ship.ship(trained, "shapes/dit", tmp_path, "fp16", steps=1, force=True)
    assert (tmp_path / "shapes/dit/tokdyn.json").read_text() == before


def test_recipes_differ_in_what_decides_the_training() -> None:
    one = recipe.load("shapes/dit")
    assert ship.differences(one, recipe.load("shapes/dit", ["out=elsewhere", "name=other"])) == []
    other = recipe.load("shapes/dit", ["model.depth=2", "seed=3", "training.ema=0.9"])
    assert ship.differences(one, other) == ["seed", "model.depth", "training.ema"]


def test_demo_shows_the_models_of_the_package(package: Path, tmp_path: Path) -> None:
    words = ["demo", "sampling_steps=4", "count=2"]
    found = json.loads(run(*words, "--json").stdout)
    assert Path(found["page"]) == Path("report.html")
    page = (tmp_path / "report.html").read_text()
    chunked, plain = found["rows"][:8], found["rows"][8:]
    assert [row["setting"] for row in chunked] == [
        f"tail drop {drop}{lite}" for lite in ("", ", Lite-CFG 0.9") for drop in (0, 0.2, 0.4, 0.6)
    ]
    assert [row["setting"] for row in plain] == ["every token", "FeatureCache + TokenMerge", "FeatureCache + DepthSkip"]
    assert [row["psnr"] is None for row in found["rows"]] == [True, *[False] * 7, True, False, False]
    for four in (chunked[:4], chunked[4:]):
        for more, less in pairwise(four):
            assert less["gflops"] < more["gflops"]
            assert less["tokens"] < more["tokens"]
    for full, lite in zip(chunked[:4], chunked[4:], strict=True):
        assert lite["gflops"] < full["gflops"]
        assert lite["tokens"] < full["tokens"]
    assert plain[0]["tokens"] == plain[0]["cells"] == 64
    assert all(row["gflops"] < plain[0]["gflops"] for row in plain[1:])
    assert all(row["setting"] in page for row in found["rows"] if row["setting"] != "every token")
    shown = run(*words, "out=other.html")
    assert "other.html" in shown.stdout
    assert "tokdyn sample shapes/dc-dit" in shown.stderr.splitlines()[-1]
    for row in found["rows"]:
        assert row["setting"] in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_demo_trains_where_there_is_nothing_to_show(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not DemoSettings().trains
    assert "minutes" in run("demo", "minutes=1", code=2).stderr
    for words in (["guidance=1"], ["out=folder"]):
        assert words[0].split("=")[0] in run("demo", *words, code=2).stderr
    monkeypatch.setattr(table, "files", lambda _: tmp_path)
    assert DemoSettings().trains
    assert "is not part of this installation" in run("demo", "--no-train", code=2).stderr
    assert list(tmp_path.iterdir()) == []


def test_names_of_shipped_models_are_names_of_runs(package: Path, tmp_path: Path) -> None:
    run("report", "shapes/dc-dit", "steps=2", "count=1", "tail_drop=0")
    page = (tmp_path / "report.html").read_text()
    assert "tokdyn sample shapes/dc-dit" in page


def test_shipped_models_are_measured(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On random models: the images are not recognised, and the router is hardly better than a random one."""
    monkeypatch.setattr(shipped, "SCORED", 16)
    words = ["--count", "4", "--steps", "2", "--judge-steps", "3", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["shipped", *words, "--out", "shipped.json", "--figures", "figures"])
    assert shipped.main() == 1
    result = json.loads((tmp_path / "shipped.json").read_text())
    assert [(row["model"], row["tail_drop"]) for row in result["rows"]] == [
        ("shapes/dit", 0.0), ("shapes/dc-dit", 0.0), ("shapes/dc-dit", 0.3), ("shapes/dc-dit", 0.6),
    ]  # fmt: skip
    costs = [row["gflops_per_image"] for row in result["rows"][1:]]
    assert costs == sorted(costs, reverse=True)
    assert [row["level"] for row in result["router"]] == pytest.approx([0.1, 0.3, 0.5], abs=1e-3)
    for row in result["router"]:
        assert row["random_area"] == pytest.approx(0.5, abs=0.1)
        assert max(row["area"], row["random_area"]) < row["oracle_area"] <= 1.0
    assert result["missed"]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"shipped-samples.png", "shipped-router.png"}
    assert shipped.table(result) in capsys.readouterr().out


@pytest.mark.parametrize("name", INSTALLED)
def test_models_in_the_package_are_what_their_descriptions_say(name: str) -> None:
    is_what_its_description_says(table.shipped_folder(name))
    assert name in [entry["name"] for entry in json.loads(run("models", "--json").stdout)]
    assert recipe.load(table.shipped_folder(name) / "recipe.yaml").model == recipe.load(name).model


def test_models_in_the_package_are_small() -> None:
    assert sum(ship.size(table.shipped_folder(name)) for name in ship.NAMES) <= ship.LIMIT == 8_000_000


@pytest.mark.skipif(not RESULT.is_file(), reason="the models in the package have not been measured")
def test_page_shows_the_measured_tables() -> None:
    result, page = json.loads(RESULT.read_text()), (RESULT.parents[2] / "docs/results.md").read_text()
    assert shipped.table(result) in page
    assert shipped.router_table(result) in page
    assert result["missed"] == shipped.missed(result)


def is_what_its_description_says(folder: Path) -> None:
    """Check the weights and what the first classes look like against what is stored beside them."""
    facts = json.loads((folder / "tokdyn.json").read_text())
    (weights,) = folder.glob("*.safetensors")
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == facts["weights"]["sha256"]
    with safe_open(weights, framework="pt") as file:
        assert set(file.keys()) >= {"pos_embed", "x_embedder.proj.weight"}
    with Image.open(folder / ship.SAMPLE) as image:
        stored = np.asarray(image)
    drawn = np.concatenate(list(ship.ten_images(str(folder), **facts["sampling"])), axis=1)
    assert drawn.shape == stored.shape
    # Another processor rounds differently: images agree to a few grey levels, those of other weights do not.
    assert psnr(drawn, stored) > 30


def psnr(one: Pixels, other: Pixels) -> float:
    error = float(np.square(one.astype(float) - other).mean())
    return 99.0 if error == 0 else 10 * math.log10(255**2 / error)
