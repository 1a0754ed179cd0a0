"""Times the steps of a sampling run without making the host wait for the device."""

from __future__ import annotations

from time import perf_counter

import torch


class StepClock:
    """Marks points in time and reads the differences once, at the end.

    On CUDA the marks are events in the stream; elsewhere they are the host's clock.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def mark(self) -> None:
        """Mark the point that the work enqueued so far leads to."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)
        else:
            self._times.append(perf_counter())

    def seconds(self) -> list[float]:
        """Seconds between each two neighbouring marks; waits for the device once."""
        if self._cuda:
            self._events[-1].synchronize()
            pairs = zip(self._events, self._events[1:], strict=False)
            return [start.elapsed_time(end) / 1000.0 for start, end in pairs]
        return [end - start for start, end in zip(self._times, self._times[1:], strict=False)]
