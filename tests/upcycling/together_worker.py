"""One of two processes that train LoRA together: together_worker.py FOLDER PIPELINE. It writes into the folder."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parents[2]
package = types.ModuleType("tests")  # others install a package of this name
package.__path__ = [str(ROOT / "tests")]
sys.modules["tests"] = package

import torch.distributed as dist  # noqa: E402

from tests.contract.models import TINY  # noqa: E402
from tests.upcycling.elastic import COMMAND, TWO, student_of  # noqa: E402
from tokdyn.errors import InputError  # noqa: E402
from tokdyn.upcycling import distil  # noqa: E402
from tokdyn.upcycling.command import upcycle_pipeline  # noqa: E402
from tokdyn.upcycling.pipeline_settings import PipelineConfig  # noqa: E402
from tokdyn.upcycling.processes import together  # noqa: E402

FLUX = TINY["FluxTransformer2DModel"]


def main(folder: Path, pipeline: str) -> None:
    call = FLUX.inputs(1)
    calls = [{**call, "hidden_states": scale * call["hidden_states"]} for scale in (0.5, 1.0, 1.5)]
    with together("cpu"):
        assert dist.get_world_size() == 2
        distil(student_of(FLUX.build()), calls, folder / "whole", TWO)
        distil(student_of(FLUX.build()), calls, folder / "half", TWO.model_copy(update={"steps": 2}))
        distil(student_of(FLUX.build()), calls, folder / "half", TWO, resume=True)
        try:
            distil(student_of(FLUX.build()), calls, folder / "odd", TWO.model_copy(update={"calls": 3}))
        except InputError as error:
            (folder / f"refused-{dist.get_rank()}.txt").write_text(str(error))
    assert not dist.is_initialized()
    config = PipelineConfig(base=pipeline, out=folder / "command", device="cpu", **COMMAND)
    told: list[str] = []
    result = upcycle_pipeline(config, ["dc"], tell=told.append)
    assert bool(result.report) == bool(told) == (os.environ["RANK"] == "0")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
