"""Time calls on the device that they run on, without waiting for it until somebody asks."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Measures a stretch of time from when it is made to `stop`.

    On the CPU that is time of the process's clock. On an accelerator it is the time between two events in the current
    stream, so that what was queued before does not count and nobody waits; without such events it is time of the clock
    with the device left alone, which measures how long it takes to queue the work.

    Args:
        device: that the work runs on.
    """

    __slots__ = ("_begin", "_end", "_events", "device")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._end: float | None = None
        self._events = None if device.type == "cpu" else _events(device)
        if self._events is not None:
            self._events[0].record()
        self._begin = time.perf_counter()

    def stop(self) -> None:
        """End the stretch; once it has ended, this does nothing."""
        if self._end is None:
            self._end = time.perf_counter()
            if self._events is not None:
                self._events[1].record()

    @property
    def seconds(self) -> float | None:
        """How long it was; None before its end. Asking for it waits until the device has got there."""
        if self._end is None:
            return None
        if self._events is None:
            return self._end - self._begin
        first, last = self._events
        last.synchronize()
        return float(first.elapsed_time(last)) / 1000


def _events(device: torch.device) -> tuple[torch.Event, torch.Event] | None:
    """Make two events that note their time; None where the device has none."""
    try:
        return torch.Event(device, enable_timing=True), torch.Event(device, enable_timing=True)
    except (RuntimeError, NotImplementedError):
        return None
