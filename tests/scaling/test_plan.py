"""What GPUs hold and send follows from what a step takes; torch's own collectives carry the bytes worked out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.scaling.steps import recipe, work
from tokdyn.models import DiT
from tokdyn.scaling import HARDWARE, ScalingSettings, Work, worked_out
from tokdyn.scaling.work import Weight

STEP = Work(
    of="images", batch=256, micro_batch=4, accumulation=1, steps=1000, precision="bf16", flops=1e12,
    units=((Weight(10, 100, True),), (Weight(15, 100, True),)), root=(Weight(5, 300, True), Weight(1, 100, False)),
    averaged=True, beside=70, activations=9000,
)  # fmt: skip
RANKS = 4


@pytest.fixture
def ranks() -> Iterator[None]:
    """One of four processes of torch's fake process group, whose collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    dist.destroy_process_group()


class Sent(TorchDispatchMode):
    """Counts the bytes that gathers and reductions are called with, by operator, and what a ring sends for them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.ring = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if "_allgather_base_" in name or "_reduce_scatter_base_" in name:
            whole = max(each.numel() * each.element_size() for each in args[:2])
            self.ring += whole * (RANKS - 1) / RANKS
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


def tiny() -> Any:
    """The model of the recipe "dit", and inputs of it."""
    torch.manual_seed(0)
    model: Any = DiT.named(
        "tiny/1", sample_size=16, in_channels=3, num_classes=10, hidden_size=96, depth=4, num_heads=4
    )
    return model.train(), (torch.randn(1, 3, 16, 16), torch.tensor([500]), torch.tensor([1]))


@pytest.mark.usefixtures("ranks")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # the output of our models is a view
def test_sharded_weights_send_what_fsdp2_sends() -> None:
    """The table of positions has one row, which is padded to as many as there are processes."""
    model, inputs = tiny()
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with Sent() as sent:
        model(*inputs).sample.sum().backward()
    plan = worked_out(work(recipe("dit"), RANKS), ScalingSettings(gpus=RANKS, sharding="full"))
    assert sent.calls
    assert plan.sent == sent.ring


@pytest.mark.usefixtures("ranks")
def test_replicas_reduce_their_gradients_once() -> None:
    """DDP hands its buckets to the hook; a ring sends them twice, but for the part of the process itself."""
    model, inputs = tiny()
    replica, given = DistributedDataParallel(model), []

    def hook(_, bucket):  # DDP reads annotations, and these would be text
        given.append(bucket.buffer().numel() * bucket.buffer().element_size())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    replica.register_comm_hook(None, hook)
    replica(*inputs).sample.sum().backward()
    plan = worked_out(work(recipe("dit"), RANKS), ScalingSettings(gpus=RANKS))
    assert plan.sent == round(2 * (RANKS - 1) / RANKS * sum(given))
    assert plan.memory["buffers of collectives"] == sum(given)


def test_shares_and_wholes_of_memory() -> None:
    one, whole, shards = (
        worked_out(STEP, ScalingSettings(gpus=gpus, sharding=sharding)).memory
        for gpus, sharding in ((1, "none"), (5, "none"), (5, "full"))
    )
    assert list(one.values()) == [4100, 4000, 8000, 4100, 0, 70, 9000]
    assert whole == {**one, "buffers of collectives": 4000}
    # the tensor of one row is padded to five; the root and two blocks are gathered, and the gradients of one
    gathered = 1500 + 5 * 100 + 2 * 1500 + 1500
    assert list(shards.values()) == [900, 800, 1600, 900, gathered, 70, 9000]
    assert worked_out(STEP, ScalingSettings(gpus=1, sharding="full")).memory == one


def test_bytes_on_the_wire_by_hand() -> None:
    def sent(gpus: int, sharding: Any, **changes: Any) -> int:
        return worked_out(replace(STEP, **changes), ScalingSettings(gpus=gpus, sharding=sharding)).sent

    assert sent(1, "none") == sent(1, "full") == 0
    assert sent(2, "none") == 4000
    assert sent(2, "none", accumulation=8) == 4000
    # rows of a GPU: 5 and 8 of the blocks, twice, 3 and 1 of the root; gradients of all but the last
    assert sent(2, "full") == 2 * (500 + 800) + 900 + 100 + (500 + 800 + 900)
    assert sent(2, "full", accumulation=8) == 8 * sent(2, "full")
    assert sent(2, "full", passes=3) == sent(2, "full") + 500 + 800


def test_time_by_hand() -> None:
    """A node of 8 H100 computes 1e12 FLOPs for each of 256 images, and sends over NVLink; two over the network."""
    settings = ScalingSettings(gpus=8, utilisation=0.5, link_utilisation=1.0)
    plan = worked_out(replace(STEP, units=(), root=(Weight(10**6, 4000, True),)), settings)
    assert plan.compute_seconds == pytest.approx(256e12 / 8 / (989.4e12 * 0.5))
    assert plan.wire_seconds == pytest.approx(2 * 7 / 8 * 4e9 / 450e9)
    both = plan.compute_seconds + plan.wire_seconds
    assert plan.rates == pytest.approx((256 / both, 256 / plan.compute_seconds))
    assert plan.hours == pytest.approx((1000 * both / 3600, 1000 * plan.compute_seconds / 3600))
    assert plan.nodes == 1
    two = worked_out(
        replace(STEP, units=(), root=(Weight(10**6, 4000, True),)), settings.model_copy(update={"gpus": 16})
    )
    assert two.wire_seconds == pytest.approx(2 * 15 / 16 * 4e9 / 400e9)  # eight cards of 400 Gb/s
    assert two.nodes == 2
    slow = worked_out(replace(STEP, precision="fp32"), settings)
    assert slow.compute_seconds == pytest.approx(256e12 / 8 / (67e12 * 0.5))


def test_what_does_not_fit_is_said() -> None:
    large = worked_out(replace(STEP, activations=90 * 10**9), ScalingSettings(gpus=8))
    assert not large.fits
    assert "more than the 80 GB" in dict(large.lines())["memory per GPU"]
    assert worked_out(replace(STEP, activations=90 * 10**9), ScalingSettings(gpus=8, gpu="h200")).fits


def test_hardware_is_what_is_published() -> None:
    for gpu in HARDWARE.values():
        assert all(each.startswith("https://") for each in gpu.sources)
        assert gpu.bf16 > gpu.fp32
        assert gpu.bandwidth(gpu.per_node) >= gpu.bandwidth(gpu.per_node + 1)
