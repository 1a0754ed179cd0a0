"""All measurements on an accelerator in one run of under nine minutes: correctness first, then speed, then memory.

    python -m benchmarks.gpu --out benchmarks/results/gpu.json            # on a machine with a GPU
    python -m benchmarks.gpu --device cpu --models DC-DiT-tiny,DiT-tiny/2 --minutes 1   # the same, small, to try it

1. Outputs and gradients of a small DC-DiT on the device against the CPU, in fp32; packed attention in bf16.
2. Calls of DiT and DC-DiT at 256 and 512 pixels (32x32 and 64x64 latents), bf16, a quarter of the tokens kept.
3. Training steps of the same, images per second.
4. How often a call makes the host wait for the device, and peak memory.

What does not fit into the minutes is left out and listed. Exits with 1 if a comparison with the CPU fails.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from dataclasses import asdict
from typing import Any

import torch

from tokdyn.bench import timing
from tokdyn.bench.speed import SpeedConfig, bench_speed
from tokdyn.bench.stacks import Stack
from tokdyn.models import DCDiT

MODELS = "DiT-S/2,DC-DiT-S,DiT-B/2,DC-DiT-B,DiT-XL/2,DC-DiT-XL"
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}  # of the norm; fp32 products on a GPU may use TF32 only if asked to


class Clock:
    """Minutes that are left."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


def correctness(device: torch.device) -> list[dict[str, Any]]:
    """A small DC-DiT with random weights on both: what it says, its gradients, and what the router keeps."""
    torch.manual_seed(0)
    model = DCDiT(sample_size=16, hidden_size=128, depth=4, num_heads=4, num_classes=10)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    inputs = torch.randn(4, 4, 16, 16), torch.tensor([3.0, 300.0, 600.0, 990.0]), torch.tensor([0, 3, 7, 10])
    plan = torch.rand(4, 256) < torch.tensor([0.1, 0.25, 0.5, 0.9])[:, None]
    rows = []
    for name in ("fp32", "bf16"):
        found = []
        for place in (torch.device("cpu"), device):
            here = DCDiT.from_config(model.config).to(place)
            here.load_state_dict(model.state_dict())
            with torch.autocast(place.type, torch.bfloat16, enabled=name == "bf16"):
                out = here(*(each.to(place) for each in inputs), plan=plan.to(place)).sample
            out.float().square().mean().backward()
            gradient = torch.cat([p.grad.flatten().float().cpu() for p in here.parameters() if p.grad is not None])
            found.append((out.detach().float().cpu(), gradient))
        (wanted, slope), (said, own) = found
        apart = {
            "output": ((said - wanted).norm() / wanted.norm()).item(),
            "gradient": ((own - slope).norm() / slope.norm()).item(),
        }
        rows.append({"precision": name, **apart, "met": max(apart.values()) < TOLERANCE[name]})
    return rows


def speed(models: list[str], device: torch.device, clock: Clock) -> dict[str, Any]:
    """Calls and training steps, each DC-DiT beside the DiT of its size."""
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for dit, dc in zip(models[::2], models[1::2], strict=True):
        stacks = [Stack(name=name, model=name) for name in (dit, dc)]
        for mode, size, batch in (("sample", 32, 32), ("sample", 64, 8), ("train", 32, 16), ("train", 64, 4)):
            if clock.left < 45:
                left_out.append(f"{dit} and {dc}, {mode}, {8 * size} pixels")
                continue
            settings = {"size": size, "batch": batch, "kept": 0.25, "precision": "bf16", "mode": mode}
            try:
                found = bench_speed(SpeedConfig(**settings, rounds=5, memory=False, device=str(device)), stacks)
            except torch.OutOfMemoryError:
                left_out.append(f"{dit} and {dc}, {mode}, {8 * size} pixels: does not fit into the memory")
                continue
            rows += [asdict(row) for row in found]
            for row in found:
                print(
                    f"{row.stack} {mode} {8 * size} pixels: {row.milliseconds:.1f} ms, {row.images_per_second:.0f} "
                    f"images/s, {row.speedup:.2f}x, {row.realised:.2f} of the FLOPs",
                    flush=True,
                )
    return {"rows": rows, "left_out": left_out}


def waits(name: str, device: torch.device) -> dict[str, Any]:
    """How often a call in bf16 makes the host wait, and the memory that it adds at its peak."""
    if device.type != "cuda":
        return {"model": name, "waits": None, "peak_mib": None}
    torch.manual_seed(0)
    model = DCDiT.named(name).to(device).eval()
    x, steps, labels = torch.randn(8, 4, 32, 32), torch.randint(1000, (8,)), torch.randint(1000, (8,))
    inputs = [each.to(device) for each in (x, steps, labels)]
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        model(*inputs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            model(*inputs)
            torch.cuda.set_sync_debug_mode("default")
    found = [str(each.message) for each in said if "synchroniz" in str(each.message)]
    return {
        "model": name, "waits": len(found), "peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20
    }  # fmt: skip


def main() -> int:
    """Measure, print, save after every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="save the result as JSON")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", default=MODELS, help="pairs of a DiT and a DC-DiT")
    parser.add_argument("--minutes", type=float, default=8.5)
    given = parser.parse_args()
    clock, device = Clock(given.minutes), torch.device(given.device)
    timing.prepare()
    result: dict[str, Any] = {"machine": timing.machine(), "units": "milliseconds; a multiply-add is 2 FLOPs"}

    def note(name: str, found: Any) -> None:
        result[name] = found
        if given.out:
            timing.write(given.out, result)

    note("correctness", correctness(device))
    for row in result["correctness"]:
        print(
            f"{row['precision']}: output {row['output']:.1e}, gradient {row['gradient']:.1e} from the CPU", flush=True
        )
    models = given.models.split(",")
    note("waits", [waits(name, device) for name in models if name.startswith("DC-")])
    for row in result["waits"]:
        print(f"{row['model']}: the host waits {row['waits']} times, peak {row['peak_mib']} MiB", flush=True)
    note("speed", speed(models, device, clock))
    for text in result["speed"]["left_out"]:
        print(f"left out: {text}")
    return 0 if all(row["met"] for row in result["correctness"]) else 1


if __name__ == "__main__":
    sys.exit(main())
