"""One of two processes that train wrapped models together: parallel_worker.py FOLDER. It writes what it found."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
package = types.ModuleType("tests")  # others install a package of this name
package.__path__ = [str(ROOT / "tests")]
sys.modules["tests"] = package

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import tokdyn  # noqa: E402
from tests.contract.ecosystem import FIXED, RANDOM, equip, half, halves, step_loss  # noqa: E402
from tests.contract.models import TINY, sample  # noqa: E402
from tokdyn.errors import TokdynError  # noqa: E402
from tokdyn.methods import Chunking, DepthSkip, FeatureCache, TokenMerge  # noqa: E402


def whole(value: Tensor) -> Tensor:
    """A tensor that may be cut over processes."""
    found = value.full_tensor() if isinstance(value, DTensor) else value
    return found.detach().clone()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    names = ((key.removeprefix("module."), value) for key, value in model.named_parameters())
    return {key: whole(value.grad) for key, value in names if value.grad is not None}


def refused(action: Any) -> str:
    """The sentence of a refusal; empty if there was none."""
    try:
        action()
    except TokdynError as error:
        return str(error)
    return ""


def data_parallel(name: str, methods: list[Any], rank: int) -> dict[str, Any]:
    """Three steps; the parts of methods start from other numbers in every process."""
    torch.manual_seed(50 + rank)
    model = equip(TINY[name].build(), methods).train()
    for part in model.tokdyn.parameters():
        nn.init.normal_(part, std=0.1)
    skipping = any(isinstance(method, DepthSkip) and method.blocks for method in methods)
    together = DistributedDataParallel(model, find_unused_parameters=skipping)  # what is skipped is not used
    start = {key: value.detach().clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(together.parameters(), lr=1e-3)
    found: dict[str, Any] = {"start": start, "losses": []}
    for step in range(3):
        torch.manual_seed(100 * step + rank)
        optimizer.zero_grad()
        loss = step_loss(together, name, half(name, rank))
        loss.backward()
        if step == 0:
            found["gradients"] = gradients(together)
        optimizer.step()
        found["losses"].append(loss.item())
    found["end"] = {key: value.detach().clone() for key, value in model.state_dict().items()}
    found["calls"] = len(tokdyn.stats(together).calls)
    if any(isinstance(method, Chunking) for method, _ in tokdyn.parts(together)):
        found["calibration"] = refused(lambda: tokdyn.calibrate_router(together, **half(name, rank)))
    found["unwrapping"] = refused(lambda: tokdyn.unwrap(together))
    found["wrapping"] = refused(lambda: tokdyn.wrap(together, [TokenMerge()]))
    return found


def accelerated(name: str, rank: int, folder: Path) -> dict[str, Any]:
    """A step through accelerate in bf16, and the methods saved by one process."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = equip(TINY[name].build(), RANDOM).train()
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    torch.manual_seed(rank)
    accelerator.backward(step_loss(prepared, name, half(name, rank)))
    optimizer.step()
    own = accelerator.unwrap_model(prepared)
    if accelerator.is_main_process:
        tokdyn.save(own, folder / "methods")
    end = {key: value.detach().clone() for key, value in own.tokdyn.state_dict().items()}
    return {"same": own is model, "kind": type(prepared).__name__, "end": end, "gradients": gradients(own)}


def sharded(name: str, rank: int) -> dict[str, Any]:
    """Weights cut over both processes by FSDP: a step, sampling, and what is refused."""
    mesh = dist.init_device_mesh("cpu", (2,))

    def shard(model: nn.Module) -> nn.Module:
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    model = shard(equip(TINY[name].build(), FIXED)).train()
    step_loss(model, name, half(name, rank)).backward()
    found: dict[str, Any] = {"gradients": gradients(model)}
    model = shard(equip(TINY[name].build(), [FeatureCache(steps=(0, 2)), TokenMerge(), DepthSkip(blocks=(1,))]))
    with torch.no_grad():
        calls = [sample(model(**{**half(name, rank), **TINY[name].at(2, level)})) for level in (0.9, 0.6, 0.3)]
    found["samples"] = torch.stack(calls)
    found["unwrapping"] = refused(lambda: tokdyn.unwrap(model))
    for key, methods in (
        ("levels", [DepthSkip(blocks=(1,), levels=(0.5, 1.0))]),
        ("gates", [DepthSkip(learned=True)]),
        ("cache", [FeatureCache(threshold=0.1)]),
        ("ragged", [Chunking(target=2, ragged=True)]),
    ):
        other = shard(equip(TINY[name].build(), methods))
        found[key] = refused(lambda other=other: other(**half(name, rank)))
    late = shard(TINY[name].build())
    found["late"] = refused(lambda: tokdyn.wrap(late, [Chunking(target=2)]))
    found["late levels"] = refused(lambda: tokdyn.wrap(late, [DepthSkip(blocks=(1,), levels=(0.5, 1.0))]))
    tokdyn.unwrap(tokdyn.wrap(late, [DepthSkip(blocks=(1,))]))
    found["plain"] = sample(late(**half(name, rank))).detach()
    return found


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {
        "fixed DiT": data_parallel("DiT", FIXED, rank),
        "random DiT": data_parallel("DiT", RANDOM, rank),
        "fixed diffusers": data_parallel("PixArtTransformer2DModel", FIXED, rank),
        "random diffusers": data_parallel("PixArtTransformer2DModel", RANDOM, rank),
        "sharded": sharded("DiT", rank),
        "accelerated": accelerated("DiT", rank, folder),
    }
    assert halves("DiT")
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
