"""Fair timing: the allocator set, both sides in turn in one process, medians, the machine beside the numbers."""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import tokdyn
from tokdyn.host import describe, keep_large_buffers
from tokdyn.ops.precision import cpu_multiplies


def prepare(threads: int | None = None) -> None:
    """Set the allocator and the threads; call once, before the first tensor."""
    keep_large_buffers()
    torch.set_num_threads(threads or os.cpu_count() or 1)
    torch.manual_seed(0)


def in_turn(sides: Mapping[str, Callable[[], Any]], rounds: int = 9, warmup: int = 2) -> dict[str, dict[str, float]]:
    """Run every side in every round, so that a busy neighbour slows all of them alike.

    Returns:
        For each side the median, least and largest milliseconds.
    """
    for _ in range(warmup):
        for run in sides.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in sides.items():
                start = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - start) * 1e3)
    finally:
        gc.enable()
    return {
        name: {"median_ms": statistics.median(ms), "min_ms": min(ms), "max_ms": max(ms)} for name, ms in times.items()
    }


def growth(times: Mapping[int, float]) -> float:
    """The exponent b of time ~ a x^b, by least squares on logarithms.

    Args:
        times: by x, such as tokens; two or more.
    """
    points = [(math.log(x), math.log(time)) for x, time in times.items()]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    above: float = sum((x - mean_x) * (y - mean_y) for x, y in points)
    slope: float = above / sum((x - mean_x) ** 2 for x, _ in points)
    return slope


def ratio(times: Mapping[str, Mapping[str, float]], slow: str, fast: str) -> float:
    """Median of one side over the median of the other."""
    return times[slow]["median_ms"] / times[fast]["median_ms"]


def peak_growth_mib(run: Callable[[], Any]) -> float:
    """How far a call raises the peak resident memory of this process above what it holds before (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is held now
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """A field of this process's status, in KiB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1])


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "processor": describe(torch.device("cpu"))["processor"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16": cpu_multiplies(torch.bfloat16),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tokdyn": tokdyn.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "load_before": os.getloadavg()[0],
    }


def write(path: str | Path, result: Mapping[str, Any]) -> None:
    """Save a result as JSON."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=1) + "\n")
