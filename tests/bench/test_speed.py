"""`tokdyn bench speed` runs and derives the right quantities. No test looks at a time."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokdyn.cli.main import app
from typer.testing import CliRunner

from tests.sampling import FACTS, tiny
from tokdyn import DiT
from tokdyn.bench.settings import SpeedConfig
from tokdyn.bench.speed import Case, SpeedRow, bench_speed, cases, growth, model_of
from tokdyn.bench.speed_table import columns, curves
from tokdyn.bench.stacks import Stack, read_stacks
from tokdyn.cost import flops, model_parts
from tokdyn.errors import InputError, RecipeError
from tokdyn.report.style import figure_style
from tokdyn.train.snapshot import save_model

QUICK: dict[str, Any] = {"rounds": 3, "warmup": 1, "device": "cpu", "threads": 1}


def row(size: int, milliseconds: float, name: str = "a") -> SpeedRow:
    case = Case(1, size, None, "fp32", "sample", "none")
    return SpeedRow(name, case, size**2, milliseconds, 0.0, 1.0, 1.0, 1.0)


def test_every_combination_of_settings_is_a_case() -> None:
    config = SpeedConfig(batch="1,2", size=(8, 16), kept=0.25, precision="fp32,bf16", mode="sample,train")
    found = list(cases(config))
    assert len(found) == len(set(found)) == 16
    assert Case(2, 16, 0.25, "bf16", "train", "none") in found


def test_rows_follow_from_times_and_flops() -> None:
    stacks = read_stacks(
        [
            "{name: a, model: DiT-tiny/2}",
            "{name: b, model: DC-DiT-tiny}",
            "{name: c, model: DC-DiT-tiny, tail_drop: 0.5}",
        ]
    )
    config = SpeedConfig(size=16, batch=3, kept=0.5, mode="sample,train", **QUICK)
    rows = bench_speed(config, stacks)
    assert [row.stack for row in rows] == list("abcabc")
    assert [row.tokens for row in rows[:3]] == [64, 256, 256]
    for first, row in zip(rows[:1] * 3 + rows[3:4] * 3, rows, strict=True):
        assert row.speedup == pytest.approx(first.milliseconds / row.milliseconds)
        assert row.realised == pytest.approx(row.speedup * row.gflops / first.gflops)
        assert row.images_per_second == pytest.approx(3e3 / row.milliseconds)
        assert row.spread >= 0
    for sampled, trained in zip(rows[:3], rows[3:], strict=True):
        assert trained.gflops == pytest.approx(3 * sampled.gflops)
    model = model_of(config, stacks[1], Case(3, 16, 0.5, "fp32", "sample", "none"))
    assert rows[1].gflops * 1e9 == pytest.approx(sum(model_parts(model, 0.5, 3).values()), rel=1e-6)
    assert rows[2].gflops * 1e9 == pytest.approx(sum(model_parts(model, 0.25, 3).values()), rel=1e-6)


def test_methods_of_checkpoints_and_named_models(tmp_path: Path) -> None:
    """A merged stack costs less on a checkpoint and on a named model."""
    save_model(tiny(0, DiT, sample_size=8), tmp_path / "dit", FACTS)
    merged = "methods: [{method: TokenMerge, ratio: 0.5}]"
    for model in (str(tmp_path / "dit"), "DiT-tiny/2"):
        config = SpeedConfig(model=model, batch=2, **QUICK)
        plain, less = bench_speed(config, read_stacks(["{name: plain}", f"{{name: merged, {merged}}}"]))
        assert less.gflops < plain.gflops


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sample", "train"])
def test_peak_memory_is_that_of_a_new_process(mode: str) -> None:
    """What this process has used before hides nothing: a call holds at least what its MLPs compute, one or all."""
    config = SpeedConfig(model="DiT-tiny/2", batch=64, mode=mode, memory=True, **QUICK)
    (found,) = bench_speed(config, (Stack(name="plain"),))
    model = model_of(config, Stack(name="plain"), next(cases(config)))
    tokens = 64 * model.pos_embed.shape[-2]
    hidden = [tokens * block.mlp.fc1.out_features * 4 / 2**20 for block in model.blocks]
    assert found.peak_mib is not None
    assert found.peak_mib > (sum(hidden) if mode == "train" else hidden[0])


def test_compiled_parts_cost_the_same() -> None:
    config = SpeedConfig(model="DC-DiT-tiny", size=8, batch=1, kept=0.25, compile="none,scaffold", **QUICK)
    plain, compiled = bench_speed(config, (Stack(name="a"),))
    assert compiled.gflops == plain.gflops
    assert "compile" in columns([plain, compiled])


def test_exponent_of_a_power_law_is_found() -> None:
    rows = [row(size, 0.3 * (size**2) ** 1.5) for size in (8, 16, 32, 64)] + [row(8, 1.0, "b"), row(16, 2.0, "b")]
    assert growth(rows, "tokens") == {"a sample fp32 batch=1": pytest.approx(1.5)}
    assert growth(rows, "batch") == {}


def test_tick_labels_are_plain_numbers() -> None:
    with figure_style():
        figure = curves([row(size, 0.02 * size**2) for size in (8, 16, 32, 64, 128)])
        figure.canvas.draw()
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["64", "256", "1,024", "4,096", "16,384"]
    assert "100" in [label.get_text() for label in axes.get_yticklabels()]
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_stacks_that_cannot_be_timed_are_refused() -> None:
    config = SpeedConfig(model="DiT-tiny/2", **QUICK)
    cached = read_stacks(["{name: a, methods: [{method: FeatureCache, threshold: 0.2}]}"])
    with pytest.raises(RecipeError, match=r"stack a .*FeatureCache"):
        bench_speed(config, cached)
    with pytest.raises(RecipeError, match="stacks"):
        bench_speed(config, ())
    with pytest.raises(RecipeError, match=r"stack a .*model"):
        bench_speed(SpeedConfig(**QUICK), (Stack(name="a"),))
    with pytest.raises(InputError, match="tiny/3"):
        bench_speed(SpeedConfig(model="DiT-tiny/3", **QUICK), (Stack(name="a"),))


def test_command_writes_plot_and_json(tmp_path: Path) -> None:
    words = ["DC-DiT-tiny", "size=8,12,16", "batch=1", "kept=0.25", *(f"{k}={v}" for k, v in QUICK.items())]

    def run(*more: str, code: int = 0) -> Any:
        result = CliRunner().invoke(app, ["bench", "speed", *words, *more])
        assert result.exit_code == code, result.output
        return result

    shown = run(f"plot={tmp_path / 's.png'}", f"out={tmp_path / 's.json'}").stdout
    assert re.search(r"tokens .* -?\d+\.\d\d: DC-DiT-tiny", shown)
    with Image.open(tmp_path / "s.png") as image:
        assert image.width > 400
    content = json.loads((tmp_path / "s.json").read_text())
    assert [row["tokens"] for row in content["rows"]] == [64, 144, 256]
    assert content["machine"]["torch"] == torch.__version__
    assert len(json.loads(run("--json").stdout)["growth"]["tokens"]) == 1
    assert "size=16,32,64" in run("size=8", f"plot={tmp_path / 't.png'}", code=2).output


def test_timed_plan_keeps_the_same_number_of_tokens_in_every_image() -> None:
    """Its counted FLOPs are those of a plan that keeps 19 of 64 tokens."""
    config = SpeedConfig(model="DC-DiT-tiny", size=8, batch=3, kept=0.3, **QUICK)
    (row,) = bench_speed(config, (Stack(name="a"),))
    model = model_of(config, Stack(name="a"), next(cases(config)))
    plan = torch.zeros(3, 64, dtype=torch.bool)
    plan[:, :19] = True
    labels = torch.zeros(3, dtype=torch.long)
    with torch.no_grad():
        expected = flops(model.eval(), torch.randn(3, 4, 8, 8), torch.zeros(3), labels, plan=plan)
    assert row.gflops * 1e9 == pytest.approx(expected.total)
