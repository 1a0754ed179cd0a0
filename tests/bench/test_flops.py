"""`tokdyn bench flops` agrees with published costs and with torch's counter."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokdyn.cli.main import app
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from tests.sampling import FACTS, tiny
from tokdyn import DCDiT, DiT
from tokdyn.bench import flops as bench
from tokdyn.bench.flops import bench_flops
from tokdyn.bench.published import MATCHED_STEPS, compare_with_paper, paper_columns
from tokdyn.bench.settings import FlopsConfig
from tokdyn.bench.stacks import open_stack, read_stacks
from tokdyn.cost.counter import operator_formulas
from tokdyn.diffusion.sampling import generate
from tokdyn.diffusion.settings import Sampler
from tokdyn.errors import TokdynError
from tokdyn.train.snapshot import save_model

SMALL = {"sample_size": 8, "in_channels": 3, "num_classes": 5}


def run(*words: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["bench", "flops", *words])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    top = tmp_path_factory.mktemp("flops")
    for name, kind in (("dit", DiT), ("dc", DCDiT)):
        model = tiny(0, kind, depth=3, sample_size=8)
        save_model(model, top / name, FACTS)
    return {name: str(top / name) for name in ("dit", "dc")}


def test_published_costs_are_reproduced() -> None:
    """DiTs within 0.6%. The paper does not print the share that its DC-DiTs keep; one share fits all rows within 2%."""
    rows = compare_with_paper(FlopsConfig(kept=0.2355))
    assert len(rows) == 21
    for row in rows:
        allowed = 0.02 if row["model"].startswith("DC-") else 0.006
        assert row["computed"] == pytest.approx(row["printed"], rel=allowed), row
    implied = [row["implied_kept"] for row in rows if row["implied_kept"] is not None]
    assert max(implied) - min(implied) < 0.01
    table = paper_columns(rows)
    assert table["printed, GFLOPs/image"][:2] == ["3,020", "11,460"]  # 3.02 and 11.46 TFLOPs
    assert {len(texts) for texts in table.values()} == {21}


def test_named_models_and_matched_steps() -> None:
    rows = {
        row.model: row for row in bench_flops(FlopsConfig(models="DiT-S/2,DC-DiT-S,DiT-XL/2,DC-DiT-XL", count=False))
    }
    assert rows["DiT-XL/2"].tflops_per_image == pytest.approx(59.00, rel=0.006)
    assert rows["DiT-S/2"].kept is None
    for name in ("DC-DiT-S", "DC-DiT-XL"):
        assert rows[name].tokens_from == "target"
        assert rows[name].matched_steps == pytest.approx(MATCHED_STEPS[name], rel=0.025)
    for row in rows.values():
        assert sum(row.parts.values()) == pytest.approx(row.gflops_per_forward)


@pytest.mark.parametrize("kept", [None, 0.4])
def test_named_models_are_counted(kept: float | None) -> None:
    """Fewer tokens cost less, and torch's counter agrees for the given share."""
    rows = bench_flops(FlopsConfig(models="DiT-tiny/2,DC-DiT-tiny", kept=kept, **SMALL))
    for row in rows:
        assert row.counted_gflops == pytest.approx(row.computed_gflops, rel=1e-6)
    assert rows[1].kept == pytest.approx(kept or 0.25)


STACKS = {
    "plain": "{name: plain, model: MODEL}",
    "cached": "{name: cached, model: MODEL, methods: [{method: FeatureCache, steps: [0, 2]}]}",
    "merged": "{name: merged, model: MODEL, methods: [{method: TokenMerge, ratio: 0.5}]}",
}


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("model", ["dit", "dc"])
def test_trajectory_cost_is_what_torch_counts(saved: dict[str, str], model: str, name: str, guidance: float) -> None:
    stacks = read_stacks([STACKS[name].replace("MODEL", saved[model])])
    config = FlopsConfig(steps=4, guidance=guidance, images=1, scheduler="ddim")
    (row,) = bench_flops(config, stacks)
    opened = open_stack(stacks[0])
    sampler = Sampler(steps=4, scheduler="ddim", guidance=guidance, clip=True)
    with FlopCounterMode(display=False, custom_mapping=operator_formulas()) as counter:
        generate(opened.model, sampler, opened.objective, [0], [0])
    assert row.tflops_per_image * 1e12 == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert sum(row.parts.values()) == pytest.approx(row.gflops_per_forward)
    assert row.tokens_from == ("measured" if model == "dc" or name != "plain" else "all")


def test_given_share_of_a_checkpoint_is_used(saved: dict[str, str]) -> None:
    few, many = (bench_flops(FlopsConfig(models=saved["dc"], steps=2, kept=kept))[0] for kept in (0.1, 0.9))
    assert (few.tokens_from, many.kept) == ("given", pytest.approx(0.9))
    assert few.tflops_per_image < many.tflops_per_image


def test_difference_between_computed_and_counted_flops_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model_parts = bench.model_parts

    def one_percent_more(*args: Any, **settings: Any) -> dict[str, int]:
        return {name: round(1.01 * value) for name, value in model_parts(*args, **settings).items()}

    monkeypatch.setattr("tokdyn.cost.forward_pass.model_parts", one_percent_more)
    with pytest.raises(TokdynError, match=r"DiT-tiny/2.*1\.00%.*0\.1%"):
        bench_flops(FlopsConfig(models="DiT-tiny/2", **SMALL))


def test_command_writes_tables_and_json(tmp_path: Path, saved: dict[str, str]) -> None:
    words = ["DiT-tiny/2,DC-DiT-tiny", "sample_size=8", f"csv={tmp_path / 'f.csv'}", f"plot={tmp_path / 'f.png'}"]
    shown = run(*words).stdout
    assert "DC-DiT-tiny" in shown
    assert "FLOPs" in shown
    with open(tmp_path / "f.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["model"] for line in lines] == ["DiT-tiny/2", "DC-DiT-tiny"]
    assert float(lines[1]["gflops_router"]) > 0
    with Image.open(tmp_path / "f.png") as image:
        assert image.width > 400
    content = json.loads(run("DiT-tiny/2", "steps=10", "--json").stdout)
    assert set(content["models"][0]) >= {"model", "tflops_per_image", "gflops_per_forward", "params", "parts"}
    assert len(json.loads(run("--paper", "--json").stdout)["rows"]) == 21
    assert run("DiT-XL/3", code=2).output.count("\n") == 1
