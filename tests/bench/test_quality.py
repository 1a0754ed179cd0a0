"""`tokdyn bench quality` measures tiny models like independent code does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokdyn.cli.main import app
from typer.testing import CliRunner

from tests.evaluate.conftest import Kit
from tests.sampling import FACTS, tiny
from tokdyn import DiT
from tokdyn.bench.quality import QualityResult, bench_quality
from tokdyn.bench.quality_page import columns, write_page
from tokdyn.bench.settings import QualityConfig
from tokdyn.bench.stacks import read_stacks
from tokdyn.data import DataConfig, open_data
from tokdyn.diffusion.objective import Objective
from tokdyn.errors import RecipeError
from tokdyn.evaluate.held_out import held_out_loss
from tokdyn.sample import load_model
from tokdyn.train.snapshot import save_model

STACKS = """
- {name: plain}
- {name: again}
- {name: dropped, tail_drop: 0.5, uncond_tail_drop: 0.9}
- {name: late, tail_drop: [[0.0, 0.8], [1.0, 0.0]]}
- {name: cached, methods: [{method: FeatureCache, steps: [0, 2]}]}
"""
QUICK = {"count": 8, "steps": 3, "scheduler": "ddim", "guidance": 2.0, "batch_size": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[QualityConfig, QualityResult]:
    """Five stacks on a DC-DiT with random weights, judged in pixels against random images."""
    top = tmp_path_factory.mktemp("quality")
    facts = {**FACTS, "data": DataConfig(kind="images", size=16, num_classes=4).model_dump(mode="json")}
    save_model(tiny(0, depth=3, sample_size=16), top / "dc", facts)
    kit = Kit(top)
    pictures = kit.draw(12, seed=1, side=16)
    files = {f"{number % 4}/{number}.png": image for number, image in enumerate(pictures)}
    (top / "stacks.yaml").write_text(STACKS)
    config = QualityConfig(
        model=str(top / "dc"), out=top / "out", held_out=kit.zip("test", files), held_out_count=8,
        reference=kit.tree("test", files), extractor=str(kit.torchscript("judge")), rounds=2, timed=2, **QUICK,
    )  # fmt: skip
    return config, bench_quality(config, read_stacks([str(top / "stacks.yaml")]))


def _images(place: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted((place / "images").rglob("*.png"))])


def test_equal_stacks_are_at_distance_zero(made: tuple[QualityConfig, QualityResult]) -> None:
    plain, again, *_ = made[1].rows
    assert (again.psnr, again.ssim, again.feature_distance) == (float("inf"), pytest.approx(1.0), 0.0)
    assert again.flops_saved == 0.0
    assert (again.held_out, again.values) == (plain.held_out, plain.values)
    assert plain.psnr is None


def test_psnr_and_feature_distance_are_those_of_the_images(made: tuple[QualityConfig, QualityResult]) -> None:
    result = made[1]
    first = _images(result.places[0])
    images = {row.name: _images(place) for row, place in zip(result.rows, result.places, strict=True)}
    for row in result.rows[2:]:
        error = ((images[row.name].astype(float) - first) ** 2).reshape(8, -1).mean(axis=1)
        assert row.psnr == pytest.approx((10 * np.log10(255**2 / error)).mean())
        assert 0 < row.feature_distance < 2


def test_costs_and_held_out_losses(made: tuple[QualityConfig, QualityResult]) -> None:
    config, result = made
    plain, _, dropped, late, cached = result.rows
    for row, place in zip(result.rows, result.places, strict=True):
        budget = json.loads((place / "sample.json").read_text())["budgets"][0]
        assert row.tflops_per_image == budget["tflops_per_image"]
        assert row.milliseconds > 0
    assert dropped.flops_saved == pytest.approx(1 - dropped.tflops_per_image / plain.tflops_per_image)
    assert 0 < dropped.flops_saved < 1
    assert 0 < late.flops_saved < 1
    assert late.held_out not in (plain.held_out, None)
    assert 0 < cached.flops_saved < 1 / 3
    model, objective, _ = load_model(config.model)
    data = open_data(DataConfig(kind="images", path=str(config.held_out), size=16, num_classes=4))
    expected = held_out_loss(model, objective, data, images=8, tail_drop=0.5)
    assert (dropped.held_out, dropped.by_level) == (expected.loss, expected.by_level)
    assert cached.held_out is None  # its output depends on the step before


def test_no_row_beats_the_front(made: tuple[QualityConfig, QualityResult]) -> None:
    result = made[1]
    assert result.quality == "frechet_distance[judge]"
    for row in result.rows:
        better = [
            other
            for other in result.rows
            if other.tflops_per_image <= row.tflops_per_image
            and other.quality(result.quality) < row.quality(result.quality)
        ]
        assert not (row.front and better)
    assert any(row.front for row in result.rows)


def test_page_shows_every_cell(made: tuple[QualityConfig, QualityResult]) -> None:
    config, result = made
    files = write_page(config, result)
    assert [file.name for file in files] == ["quality.json", "quality.html", "samples.png", "pareto.png"]
    content = json.loads(files[0].read_text())
    assert [row["name"] for row in content["rows"]] == [row.name for row in result.rows]
    assert content["rows"][1]["psnr"] == "inf"
    page = files[1].read_text()
    assert page.partition("</table>")[0].count("<tr") == 6
    assert page.count("<img") >= 5 * 2
    assert 'src="http' not in page
    assert all(f"<td>{text}</td>" in page for texts in columns(result.rows).values() for text in texts)


def test_command_measures_and_refuses_useless_tail_drops(tmp_path: Path) -> None:
    save_model(tiny(0, DiT, depth=2, sample_size=8), tmp_path / "dit", FACTS)
    words = [f"{name}={value}" for name, value in QUICK.items()]
    stacks = ["--stack", "{name: a}", "--stack", "{name: b, methods: [{method: TokenMerge, ratio: 0.5}]}"]

    def run(*more: str) -> Any:
        command = ["bench", "quality", str(tmp_path / "dit"), f"out={tmp_path / 'out'}", "rounds=1", "timed=2"]
        return CliRunner().invoke(app, [*command, *words, *stacks, *more])

    shown = run()
    assert shown.exit_code == 0, shown.output
    assert "GFLOPs per image" in shown.output
    again = run("--json")  # reuses the images
    assert json.loads(again.stdout)["rows"][1]["methods"] == ["TokenMerge"]
    refused = run("--stack", "{name: c, tail_drop: 0.5}")
    assert refused.exit_code == 2
    assert "DiT" in refused.output


def test_images_are_held_out_for_a_model_that_was_trained_on_shapes(tmp_path: Path) -> None:
    rows = {}
    kit = Kit(tmp_path)
    files = {f"{number % 4}/{number}.png": image for number, image in enumerate(kit.draw(8, seed=1, side=16))}
    test = kit.zip("test", files)
    for kind in ("shapes", "images"):
        facts = {**FACTS, "data": DataConfig(kind=kind, size=16, num_classes=4).model_dump(mode="json")}
        save_model(tiny(0, depth=3, sample_size=16), tmp_path / kind, facts)
        config = QualityConfig(
            model=str(tmp_path / kind), out=tmp_path / f"{kind}-out", held_out=test, held_out_count=8, rounds=0, **QUICK
        )
        (rows[kind],) = bench_quality(config, read_stacks(["{name: plain}"])).rows
    assert rows["shapes"].held_out == rows["images"].held_out is not None


def test_missing_stacks_and_useless_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="stacks"):
        bench_quality(QualityConfig(out=tmp_path), [])
    with pytest.raises(ValueError, match=r"reference .*extractor"):
        QualityConfig(reference=tmp_path)
    torch.manual_seed(0)
    tiny(0, DiT).save_pretrained(tmp_path / "bare")
    config = QualityConfig(model=str(tmp_path / "bare"), out=tmp_path / "out", held_out=tmp_path, rounds=0, **QUICK)
    with pytest.raises(RecipeError, match="held_out"):
        bench_quality(config, read_stacks(["{name: a}"]))
    assert Objective(kind="noise") == load_model(tmp_path / "bare")[1]
