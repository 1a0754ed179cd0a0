"""The results page shows what the committed measurements say."""

import json
from pathlib import Path

from benchmarks import cifar10

ROOT = Path(__file__).parents[1]


def test_the_table_of_cifar10_is_the_measured_one():
    result = json.loads((ROOT / "benchmarks/results/cifar10.json").read_text())
    assert cifar10.table(result) in (ROOT / "docs/results.md").read_text()
    assert {row["run"] for row in result["rows"]} == set(cifar10.RUNS)
    assert all(row["training"]["images"] >= 250_000 and row["images"] == 5000 for row in result["rows"])
