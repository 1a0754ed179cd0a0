"""One of two processes that decide together what a cache reuses: agreement_worker.py FOLDER. It writes its findings."""

from __future__ import annotations

import sys
import types
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    package = types.ModuleType("tests")  # others install a package of this name
    package.__path__ = [str(ROOT / "tests")]
    sys.modules["tests"] = package

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402

import tokdyn  # noqa: E402
from tests.contract.models import TINY, sample  # noqa: E402
from tokdyn.errors import InputError  # noqa: E402
from tokdyn.methods import FeatureCache  # noqa: E402

SPLIT = ("FluxTransformer2DModel", "WanTransformer3DModel", "QwenImageTransformer2DModel")
"""Models whose tokens diffusers splits: of Flux in the whole model, of the others in their first block."""
CACHES = {
    "input": FeatureCache(threshold=0.2),
    "first block": FeatureCache(threshold=0.6, indicator="first_block", forecast=1),
    "steps": FeatureCache(steps=(0, 1, 4), forecast=2),
}
MOVES = ((0.05, 0.02), (0.1, 0.3), (0.02, 0.02), (0.3, 0.05), (0.03, 0.1), (0.02, 0.02), (0.2, 0.02))
"""By how much the latents of two samples move from step to step."""


def reused(model: nn.Module) -> list[list[int]]:
    """The samples that were reused in each call."""
    return [sorted(trace.cached) for trace in tokdyn.traces(model)]


@torch.no_grad()
def run(model: nn.Module, name: str, rank: int, batch: int, outputs: list[Tensor] | None = None) -> list[list[int]]:
    """Call a model along a trajectory, which differs from rank to rank; return the samples reused in each call."""
    tiny = TINY[name]
    inputs = tiny.inputs(batch)
    key = next(iter(inputs))
    noise = torch.randn(inputs[key].shape, generator=torch.Generator().manual_seed(rank))
    moved = torch.zeros(batch)
    with tokdyn.trajectory(model, steps=len(MOVES) + 1) as here:
        for step, moves in enumerate([(0.0, 0.0), *MOVES]):
            here.step = step
            moved = moved + torch.tensor((moves[rank], moves[1 - rank]) * batch)[:batch]
            x = inputs[key] + moved.view(-1, *[1] * (noise.dim() - 1)) * noise
            given = {**inputs, **tiny.at(batch, 0.9 - 0.1 * step), key: x}
            out = sample(model(**given, **({"return_dict": False} if name in SPLIT else {})))  # as pipelines do
            if outputs is not None:
                outputs.append(out)
        return reused(model)


def split_tokens(name: str, method: FeatureCache, batch: int) -> dict[str, Any]:
    """Split the tokens of a model between both processes, by the hooks and attention of diffusers.

    `enable_parallelism` does the same on an accelerator.
    """
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig

    model = TINY[name].build()
    mesh = dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=("ring", "ulysses"))
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=2))
    config.setup(dist.get_rank(), 2, torch.device("cpu"), mesh=mesh)
    model._parallel_config = config
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = config
    apply_context_parallel(model, config.context_parallel_config, model._cp_plan)
    tokdyn.wrap(model, [method])
    outputs: list[Tensor] = []
    return {"reused": run(model, name, 0, batch=batch, outputs=outputs), "outputs": torch.stack(outputs)}


def exchanging(agreed: bool) -> str:
    """Whether a trajectory ends whose blocks wait for the other process."""
    group = dist.new_group(timeout=timedelta(seconds=5))
    model = tokdyn.wrap(TINY["DiT"].build(), [FeatureCache(threshold=0.2)])
    block = model.blocks[2]
    block.register_forward_pre_hook(lambda *_: dist.all_reduce(torch.zeros(1), group=group))
    if agreed:
        tokdyn.agree(model, dist.group.WORLD)
    try:
        run(model, "DiT", dist.get_rank(), batch=1)
        dist.barrier(group)
    except RuntimeError:
        return "waited"
    return "finished"


def sharded() -> dict[str, Any]:
    """Weights cut over both processes by FSDP, which wait for each other in every block."""
    mesh = dist.init_device_mesh("cpu", (2,))

    def shard(model: nn.Module) -> nn.Module:
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    found: dict[str, Any] = {}
    model = shard(tokdyn.wrap(TINY["DiT"].build(), [FeatureCache(threshold=0.2)]))
    try:
        run(model, "DiT", dist.get_rank(), batch=2)
    except InputError as error:
        found["refused"] = str(error)
    model = tokdyn.wrap(TINY["DiT"].build(), [FeatureCache(threshold=0.2)])
    tokdyn.agree(model, mesh)
    found["reused"] = run(shard(model), "DiT", dist.get_rank(), batch=2)
    return found


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found: dict[str, Any] = {"sharded": sharded(), "agreed": exchanging(agreed=True)}
    for name in SPLIT:
        for cache, method in CACHES.items():
            for batch in (1, 2):
                found[f"{name} {cache} {batch}"] = split_tokens(name, method, batch)
    found["alone"] = exchanging(agreed=False)
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
