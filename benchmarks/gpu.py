"""All measurements on an accelerator in under nine minutes: correctness, host synchronisations, memory and speed.

    python -m benchmarks.gpu --out benchmarks/results/gpu.json            # on a machine with a GPU
    python -m benchmarks.gpu --device cpu --models DiT-tiny/2,DC-DiT-tiny --minutes 1   # a small run to try it

1. Outputs and gradients of a small DC-DiT on the device against the CPU, in fp32 and with packed attention in bf16.
2. How often a call makes the host wait for the device, and its peak memory.
3. Calls of DiT and DC-DiT at 256 and 512 pixels (32x32 and 64x64 latents), bf16, with a quarter of the tokens kept.
4. Training steps of the same models, in images per second.

Measurements that do not fit into the minutes are skipped and listed. Exits with 1 if a comparison with the CPU fails.
"""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import command_line
from tokdyn.bench import timing
from tokdyn.bench.settings import SpeedConfig
from tokdyn.bench.speed import bench_speed
from tokdyn.bench.stacks import Stack
from tokdyn.models import DCDiT

MODELS = "DiT-S/2,DC-DiT-S,DiT-B/2,DC-DiT-B,DiT-XL/2,DC-DiT-XL"
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}  # relative to the norm; GPUs use TF32 for fp32 products only on request


class Deadline:
    """The time that is left for measurements."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.end - time.monotonic()


def correctness(device: torch.device) -> list[dict[str, Any]]:
    """Compare outputs and gradients of a small DC-DiT with random weights on the device and on the CPU."""
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
        results = []
        for place in (torch.device("cpu"), device):
            copy = DCDiT.from_config(model.config).to(place)
            copy.load_state_dict(model.state_dict())
            with torch.autocast(place.type, torch.bfloat16, enabled=name == "bf16"):
                out = copy(*(each.to(place) for each in inputs), plan=plan.to(place)).sample
            out.float().square().mean().backward()
            gradient = torch.cat([p.grad.flatten().float().cpu() for p in copy.parameters() if p.grad is not None])
            results.append((out.detach().float().cpu(), gradient))
        errors = {
            kind: ((actual - expected).norm() / expected.norm()).item()
            for kind, expected, actual in zip(("output", "gradient"), *results, strict=True)
        }
        rows.append({"precision": name, **errors, "met": max(errors.values()) < TOLERANCE[name]})
    return rows


def speed(models: list[str], device: torch.device, deadline: Deadline) -> dict[str, Any]:
    """Time calls and training steps of every DC-DiT beside the DiT of its size."""
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for dit, dc in zip(models[::2], models[1::2], strict=True):
        stacks = [Stack(name=name, model=name) for name in (dit, dc)]
        for mode, size, batch in (("sample", 32, 32), ("sample", 64, 8), ("train", 32, 16), ("train", 64, 4)):
            if deadline.left < 45:
                left_out.append(f"{dit} and {dc}, {mode}, {8 * size} pixels")
                continue
            settings = {"size": size, "batch": batch, "kept": 0.25, "precision": "bf16", "mode": mode}
            try:
                measured = bench_speed(SpeedConfig(**settings, rounds=5, memory=False, device=str(device)), stacks)
            except torch.OutOfMemoryError:
                left_out.append(f"{dit} and {dc}, {mode}, {8 * size} pixels: out of memory")
                continue
            rows += [asdict(row) for row in measured]
            for row in measured:
                print(
                    f"{row.stack} {mode} {8 * size} pixels: {row.milliseconds:.1f} ms, {row.images_per_second:.0f} "
                    f"images/s, {row.speedup:.2f}x, {row.realised:.2f} of the FLOPs",
                    flush=True,
                )
    return {"rows": rows, "left_out": left_out}


def waits(name: str, device: torch.device) -> dict[str, Any]:
    """Count how often a call in bf16 makes the host wait for the device, and measure the memory it adds at its peak."""
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
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            model(*inputs)
            torch.cuda.set_sync_debug_mode("default")
    count = sum("synchroniz" in str(each.message) for each in caught)
    return {
        "model": name, "waits": count, "peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20
    }  # fmt: skip


def main() -> int:
    """Measure, print, and save after every part on request."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", default=MODELS, help="pairs of a DiT and a DC-DiT")
    parser.add_argument("--minutes", type=float, default=8.5)
    given = command_line.start(parser.parse_args())
    deadline, device = Deadline(given.minutes), torch.device(given.device)
    result: dict[str, Any] = {"machine": timing.machine(), "units": "milliseconds; a multiply-add is 2 FLOPs"}

    def add(name: str, part: Any) -> None:
        result[name] = part
        if given.out:
            timing.write(given.out, result)

    add("correctness", correctness(device))
    for row in result["correctness"]:
        print(
            f"{row['precision']}: relative difference from the CPU {row['output']:.1e} (output), "
            f"{row['gradient']:.1e} (gradient)",
            flush=True,
        )
    models = given.models.split(",")
    add("waits", [waits(name, device) for name in models if name.startswith("DC-")])
    for row in result["waits"]:
        print(f"{row['model']}: the host waits {row['waits']} times per call, peak {row['peak_mib']} MiB", flush=True)
    add("speed", speed(models, device, deadline))
    for text in result["speed"]["left_out"]:
        print(f"skipped: {text}")
    return command_line.finish([f"{row['precision']} correctness" for row in result["correctness"] if not row["met"]])


if __name__ == "__main__":
    sys.exit(main())
