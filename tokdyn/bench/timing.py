"""Time alternatives fairly: run them in turn in one process, take medians, and describe the machine.

A side is one of the alternatives, a function without arguments.
"""

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
    """Set up this process for timing: allocator, number of CPU threads (None takes all) and torch's seed.

    Call this once, before the first tensor is made.
    """
    keep_large_buffers()
    torch.set_num_threads(threads or os.cpu_count() or 1)
    torch.manual_seed(0)


def in_turn(sides: Mapping[str, Callable[[], Any]], rounds: int = 9, warmup: int = 2) -> dict[str, dict[str, float]]:
    """Time all sides in turn, once per round, so that other load on the machine slows all of them alike.

    Args:
        sides: the functions to time, by name.
        rounds: number of timed rounds.
        warmup: number of rounds before these, which are not timed.

    Returns:
        For each side "median_ms", "min_ms" and "max_ms" in milliseconds.
    """
    for _ in range(warmup):
        for side in sides.values():
            side()
    times: dict[str, list[float]] = {name: [] for name in sides}
    gc.disable()
    try:
        for _ in range(rounds):
            for name, side in sides.items():
                start = time.perf_counter()
                side()
                times[name].append((time.perf_counter() - start) * 1e3)
    finally:
        gc.enable()
    return {
        name: {"median_ms": statistics.median(ms), "min_ms": min(ms), "max_ms": max(ms)} for name, ms in times.items()
    }


def growth(times: Mapping[int, float]) -> float:
    """Fit the exponent b of `time = a * x**b` by least squares on logarithms.

    Args:
        times: time for each x, such as a number of tokens; two entries or more.
    """
    points = [(math.log(x), math.log(time)) for x, time in times.items()]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    above: float = sum((x - mean_x) * (y - mean_y) for x, y in points)
    slope: float = above / sum((x - mean_x) ** 2 for x, _ in points)
    return slope


def ratio(times: Mapping[str, Mapping[str, float]], slow: str, fast: str) -> float:
    """Return the median of the side `slow` divided by that of `fast`, from the result of `in_turn`."""
    return times[slow]["median_ms"] / times[fast]["median_ms"]


def peak_growth_mib(call: Callable[[], Any]) -> float:
    """Return by how many MiB a call raises the peak resident memory of this process. Works on Linux only."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """Return a field of this process's /proc/self/status in KiB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1])


def machine() -> dict[str, Any]:
    """Return a description of the machine and of the software versions, to store with results."""
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
    """Write a result as JSON; creates the folder if needed."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=1) + "\n")
