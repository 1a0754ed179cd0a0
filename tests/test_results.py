"""The results page shows what the committed measurements say."""

import json
from pathlib import Path

from benchmarks import attention, cifar10, dcdit, sampling, tuning, upcycling

ROOT = Path(__file__).parents[1]


def test_the_table_of_cifar10_is_the_measured_one():
    result = json.loads((ROOT / "benchmarks/results/cifar10.json").read_text())
    assert cifar10.table(result) in (ROOT / "docs/results.md").read_text()
    assert {row["run"] for row in result["rows"]} == set(cifar10.RUNS)
    assert all(row["training"]["images"] >= 250_000 and row["images"] == 5000 for row in result["rows"])


def test_the_table_of_upcycling_is_the_measured_one():
    result = json.loads((ROOT / "benchmarks/results/upcycling.json").read_text())
    assert upcycling.table(result["rows"]) in (ROOT / "docs/results.md").read_text()
    measured = {(row["run"], row["share"]) for row in result["rows"]}
    for kind in ("scratch", "upcycled", "distilled"):
        assert measured >= {(f"{kind}-0", share) for share in upcycling.SHARES} | {(f"{kind}-1", 0.125)}
    assert all(row["held_out"]["0"]["images"] == 5000 for row in result["rows"])


def test_the_tables_of_speed_are_the_measured_ones_and_what_they_miss_is_said():
    missed = {
        "dcdit-cpu": {"training step S fp32", "training step S bf16"},
        "dcdit-amx-cpu": {"against the blocks on all tokens bf16"},
    }
    for name, known in missed.items():
        result = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
        assert dcdit.table(result["rows"]) in (ROOT / "docs/performance.md").read_text()
        assert set(result["missed"]) <= known  # as the page says
        forward = {(row["size"], row["precision"]) for row in result["rows"] if row["what"] == "forward"}
        assert forward == set(dcdit.FORWARD)


def test_what_packed_blocks_reach_is_the_measured_one_and_what_they_miss_is_said():
    page = (ROOT / "docs/performance.md").read_text()
    for name, missed in {"flagship-cpu": [], "flagship-amx-cpu": ["packed blocks fp32", "packed blocks bf16"]}.items():
        result = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
        assert result["missed"] == missed
        packed = (result["packed_fp32"], result["packed_bf16"])
        for each in ("realised", "realised_over_plain"):
            if each in packed[0]:
                assert all(f"{row[each]:.1%}" in page for row in packed)


def test_the_tables_of_attention_are_the_measured_ones():
    rows = json.loads((ROOT / "benchmarks/results/attention-cpu.json").read_text())["rows"]
    for samples in ("ragged", "equal"):
        assert attention.table(rows, samples) in (ROOT / "docs/performance.md").read_text()


def test_the_table_of_stacks_at_the_shapes_of_the_paper_is_the_measured_one_and_meets_its_bars():
    result = json.loads((ROOT / "benchmarks/results/sampling-cpu.json").read_text())
    assert sampling.table(result["stacks"]) in (ROOT / "docs/results.md").read_text()
    assert [row["stack"] for row in result["stacks"]] == sampling.NAMES
    assert result["met"]
    assert result["inside"]["share"] >= sampling.SHARE


def test_the_table_of_tuning_is_the_measured_one_and_tuned_schedules_win_at_three_budgets():
    result = json.loads((ROOT / "benchmarks/results/tuning.json").read_text())
    assert tuning.table(result["budgets"]) in (ROOT / "docs/results.md").read_text()
    assert len({each["budget"] for each in result["budgets"]}) >= 3
    for each in result["budgets"]:
        assert tuning.beats(each["tuned"][0], each["uniform"], each["plain"])
        assert each["images"] >= 256
