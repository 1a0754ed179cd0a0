"""Put a training step on a number of GPUs: what each holds and sends, how long the step takes, and whether it fits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tokdyn.progress import duration
from tokdyn.scaling.hardware import HARDWARE
from tokdyn.scaling.settings import ScalingSettings
from tokdyn.scaling.work import Work, shards

_MOMENTS = 2  # of AdamW, for every trained weight
_GATHERED = 2  # blocks that FSDP2 has gathered at a time: the one that computes, and the next one


@dataclass(frozen=True)
class Plan:
    """A training step on a number of GPUs. Bytes are those of one GPU.

    Attributes:
        gpus: GPUs that train together.
        nodes: nodes that they are in.
        gpu: name of the GPU.
        gpu_memory: bytes of memory of the GPU, as published.
        sharding: "none" or "full".
        of: what is counted per second, "images" or "calls".
        batch: of a step, on all GPUs together.
        micro_batch: what a GPU computes at once.
        accumulation: micro-batches of a GPU in a step.
        memory: bytes by what they hold.
        flops_step: FLOPs of a step, of all GPUs together; a multiply-add is 2.
        sent: bytes that a GPU sends in a step.
        compute_seconds: seconds of a step for its FLOPs, at the given utilisation.
        wire_seconds: seconds of a step for its collectives, at the given utilisation of the links.
        hours: hours of the whole run without and with overlap of both.
    """

    gpus: int
    nodes: int
    gpu: str
    gpu_memory: int
    sharding: str
    of: str
    batch: int
    micro_batch: int
    accumulation: int
    memory: dict[str, int]
    flops_step: float
    sent: int
    compute_seconds: float
    wire_seconds: float
    hours: tuple[float, float]

    @property
    def total(self) -> int:
        """Bytes that a GPU holds at most."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether this is less than the GPU has."""
        return self.total <= self.gpu_memory

    @property
    def rates(self) -> tuple[float, float]:
        """Images per second of all GPUs together, without and with overlap of computing and sending."""
        together = self.compute_seconds + self.wire_seconds
        return self.batch / together, self.batch / max(self.compute_seconds, self.wire_seconds)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan with what follows from it, for JSON."""
        slow, fast = self.rates
        follows = {"memory_total": self.total, "fits": self.fits}
        return {**asdict(self), **follows, "per_second": slow, "per_second_overlapped": fast}

    def lines(self) -> list[tuple[str, str]]:
        """Return the plan as pairs of a name and a text: the value with its unit."""
        nodes = f"{self.nodes} node{'s' if self.nodes > 1 else ''}"
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in self.memory.items() if size)
        fits = "" if self.fits else f": more than the {self.gpu_memory / 1e9:.0f} GB of a {self.gpu}"
        slow, fast = self.rates
        total, computing, sending = self.flops_step / 1e12, 1e3 * self.compute_seconds, 1e3 * self.wire_seconds
        return [
            ("GPUs", f"{self.gpus} x {self.gpu} in {nodes}, sharding={self.sharding}"),
            ("batch", f"{self.batch:,} = {self.gpus} GPUs x {self.accumulation} x {self.micro_batch} {self.of}"),
            ("memory per GPU", f"{_gib(self.total)} GiB{fits}"),
            ("of it, in GiB", parts),
            ("step", f"{total:,.2f} TFLOPs (a multiply-add is 2), {total / self.gpus:,.2f} per GPU"),
            ("on the wire", f"{self.sent / 1e9:,.2f} GB sent by each GPU in a step"),
            ("time of a step", f"{computing:,.1f} ms computing, {sending:,.1f} ms sending"),
            (f"{self.of}/s", f"{slow:,.0f} without overlap, {fast:,.0f} with it"),
            ("run", f"{duration(3600 * self.hours[0])} without overlap, {duration(3600 * self.hours[1])} with it"),
        ]


def worked_out(work: Work, settings: ScalingSettings, sharding: str = "none") -> Plan:
    """Work out a plan.

    A ring over n GPUs sends (n - 1) / n of a tensor from each of them to gather it or to reduce and scatter it, and
    twice as much to reduce it everywhere.

    Args:
        work: what a step takes.
        settings: the GPUs.
        sharding: how weights are sharded if the settings do not say it.
    """
    gpu, count = HARDWARE[settings.gpu], settings.gpus
    sharding = settings.sharding or sharding
    ring = (count - 1) / count
    if sharding == "full":  # gathered and scattered are whole tensors, padding included
        gathered = work.passes * sum(shards(unit, count) for unit in work.units) + shards(work.root, count)
        sent = work.accumulation * (count - 1) * (gathered + shards(work.trained, count))
    else:
        sent = round(2 * ring * shards(work.trained, 1))
    compute = work.flops * work.batch / count / (gpu.peak(work.precision) * settings.utilisation)
    wire = sent / (gpu.bandwidth(count) * settings.link_utilisation)
    seconds = (compute + wire, max(compute, wire))
    return Plan(
        gpus=count,
        nodes=-(-count // gpu.per_node),
        gpu=gpu.name,
        gpu_memory=gpu.memory,
        sharding=sharding,
        of=work.of,
        batch=work.batch,
        micro_batch=work.micro_batch,
        accumulation=work.accumulation,
        memory=_memory(work, count, sharding),
        flops_step=work.flops * work.batch,
        sent=sent,
        compute_seconds=compute,
        wire_seconds=wire,
        hours=(work.steps * seconds[0] / 3600, work.steps * seconds[1] / 3600),
    )


def _memory(work: Work, gpus: int, sharding: str) -> dict[str, int]:
    """Return the bytes that a GPU holds at most, by what they hold."""
    parts = gpus if sharding == "full" else 1
    if parts > 1:
        largest = max((shards(unit, parts) for unit in work.units), default=0)
        learned = max((shards((each for each in unit if each.trained), parts) for unit in work.units), default=0)
        buffers = parts * (shards(work.root, parts) + _GATHERED * largest + learned)
    else:
        buffers = shards(work.trained, 1) * (gpus > 1)  # gradients are summed in a copy of them
    weights, trained = shards(work.weights, parts), shards(work.trained, parts)
    return {
        "weights": weights,
        "gradients": trained,
        "moments": _MOMENTS * trained,
        "averaged weights": weights * work.averaged,
        "buffers of collectives": buffers,
        "other models and calls": work.beside,
        "activations": work.activations,
    }


def _gib(size: int) -> str:
    """Write bytes in GiB."""
    return f"{size / 2**30:,.2f}"
