"""Jobs that processes share: team_worker.py FOLDER, in each of them. `work` does them in this process alone, too."""

from __future__ import annotations

import json
import os
import sys
import types
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    package = types.ModuleType("tests")  # others install a package of this name
    package.__path__ = [str(ROOT / "tests")]
    sys.modules["tests"] = package

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from tests.data.latents import config, kl  # noqa: E402
from tokdyn.bench.quality import bench_quality  # noqa: E402
from tokdyn.bench.quality_page import write_page  # noqa: E402
from tokdyn.bench.settings import QualityConfig  # noqa: E402
from tokdyn.bench.stacks import Stack  # noqa: E402
from tokdyn.data import write_features  # noqa: E402
from tokdyn.errors import InputError  # noqa: E402
from tokdyn.evaluate import EvalConfig, evaluate  # noqa: E402
from tokdyn.sample import SampleConfig, sample  # noqa: E402
from tokdyn.team import Team, joining  # noqa: E402

QUICK: dict[str, Any] = {"steps": 2, "scheduler": "ddim", "guidance": 2.0, "batch_size": 2, "device": "cpu"}
STACKS = (
    Stack(name="plain"),
    Stack(name="dropped", tail_drop=0.5),
    Stack(name="cached", methods=({"method": "FeatureCache", "steps": [0]},)),
)


def work(top: Path, out: Path, team: Team) -> None:
    """Sample, encode and measure into a folder, and write what was returned to result_RANK.json in it.

    Args:
        top: holds a model, images and a judge.
        out: the folder.
        team: the processes.
    """
    model = str(top / "dc")
    grids = sample(
        SampleConfig(model=model, out=out / "grids", count=5, tail_drop=(0.0, 0.6), maps=True, **QUICK), team
    )
    array = sample(SampleConfig(model=model, out=out / "npz", count=5, format="npz", **QUICK), team)
    features = write_features(config(out / "latents", batch_size=2, flip=True), kl(), team=team)
    judged: dict[str, Any] = {"extractor": str(top / "judge.ts"), "device": "cpu"}
    mixed = EvalConfig(
        generated=top / "mixed", reference=top / "test", batch_size=2, on_error="skip", out=out / "mixed", **judged
    )
    measured = evaluate(mixed, team)
    quality = QualityConfig(
        model=model, out=out / "quality", count=7, held_out=top / "test", held_out_count=300, reference=top / "test",
        rounds=1, timed=1, extractor=judged["extractor"], **QUICK,
    )  # fmt: skip
    compared = bench_quality(quality, STACKS, team)
    if team.first:
        write_page(quality, compared)
    results = {
        "grids": grids.model_dump(mode="json"),
        "npz": array.model_dump(mode="json"),
        "features": asdict(features),
        "mixed": measured.model_dump(mode="json"),
        "quality": asdict(compared),
    }
    (out / f"result_{team.rank}.json").write_text(json.dumps(results, default=str))


def main(top: Path) -> None:
    try:
        with joining() as team:
            work(top, top / "two", team)
            print("the report")
            if team.rank == 1:
                raise InputError("Process 1 does not like it.")
            team.collect(torch.zeros(2))
    except InputError as error:
        (top / "two" / f"refused_{os.environ['RANK']}.txt").write_text(str(error))
    assert not dist.is_initialized()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
