"""The results page shows what the committed measurements say."""

import json
from pathlib import Path

from benchmarks import cifar10, dcdit, sampling, upcycling

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


def test_the_table_of_speed_is_the_measured_one_and_what_it_misses_is_said():
    result = json.loads((ROOT / "benchmarks/results/dcdit-cpu.json").read_text())
    assert dcdit.table(result["rows"]) in (ROOT / "docs/performance.md").read_text()
    assert set(result["missed"]) <= {"training step S fp32", "training step S bf16"}  # narrowly, as the page says
    assert all(row["speedup"] >= 0.99 * row["bar"] for row in result["rows"] if "speedup" in row)
    assert {(row["size"], row["precision"]) for row in result["rows"] if row["what"] == "forward"} == set(dcdit.FORWARD)


def test_the_table_of_stacks_at_the_shapes_of_the_paper_is_the_measured_one_and_meets_its_bars():
    result = json.loads((ROOT / "benchmarks/results/sampling-cpu.json").read_text())
    assert sampling.table(result["stacks"]) in (ROOT / "docs/results.md").read_text()
    assert [row["stack"] for row in result["stacks"]] == sampling.NAMES
    assert result["met"]
    assert result["inside"]["share"] >= sampling.SHARE
