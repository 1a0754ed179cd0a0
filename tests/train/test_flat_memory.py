"""Memory stays flat over training, sampling and wrapping: the same tensors and objects live after more of each.

The default tests count what lives; the slow ones, over 2,000 steps, 1,000 samplings and 300 wraps, also the memory
that the process holds. A test plants a leak of one small tensor a step, and of one object, and finds them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tokdyn
from tests.contract.models import TINY
from tests.sampling import tiny as tiny_model
from tokdyn import Chunking, DepthSkip, FeatureCache, TokenMerge
from tokdyn.recipe import Recipe
from tokdyn.train import train

PAGES = Path("/proc/self/statm")
GROWTH = 16 * 2**20  # bytes that the allocator and the interpreter may keep for themselves
OBJECTS = 20  # of caches that fill late; a leak of one object a time is at least 20 more
Tiny = Callable[..., Recipe]


@dataclass(frozen=True)
class Living:
    """What lives in this process.

    Attributes:
        tensors: number of tensors.
        bytes: of their storages.
        objects: number of objects that the garbage collector knows.
        resident: bytes of memory that the process holds.
    """

    tensors: int
    bytes: int
    objects: int
    resident: int

    @staticmethod
    def now() -> Living:
        """Count after a collection."""
        gc.collect()
        objects = gc.get_objects()
        plain = (torch.Tensor, torch.nn.Parameter)  # others, such as fake tensors of other tests, may hold nothing
        tensors = [each for each in objects if type(each) in plain and each.device.type != "meta"]
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
        found = Living(len(tensors), sum(storages.values()), len(objects), int(PAGES.read_text().split()[1]) * 4096)
        del objects, tensors, storages
        return found


def require_flat(before: Living, after: Living, resident: bool = False) -> None:
    """Fail if more lives than before, or with `resident` if the process has grown."""
    assert after.tensors <= before.tensors, f"{after.tensors - before.tensors} more tensors live"
    assert after.bytes <= before.bytes, f"tensors hold {after.bytes - before.bytes} bytes more"
    assert after.objects <= before.objects + OBJECTS, f"{after.objects - before.objects} more objects live"
    if resident:
        assert after.resident <= before.resident + GROWTH, f"{after.resident - before.resident} bytes more are held"


def measured(action: Callable[[], object], warm: int, times: int) -> tuple[Living, Living]:
    """What lives after some repetitions of an action, and after many more."""
    for _ in range(warm):
        action()
    Living.now()  # torch keeps an object of every storage that was looked at
    before = Living.now()
    for _ in range(times):
        action()
    return before, Living.now()


def trained(recipe: Recipe, each_step: Callable[[], object] = lambda: None) -> list[Living]:
    """What lives at every preview of a run; the function is called at each of them."""
    found: list[Living] = []

    def look(*_: Any) -> None:
        each_step()
        found.append(Living.now())

    assert train(recipe, preview=look).finished
    return found


def sampler() -> Callable[[], object]:
    """A function that draws one image with a cache, on a wrapped DC-DiT that it wrapped before."""
    model = tokdyn.wrap(
        TINY["DiTTransformer2DModel"].build().eval(), [FeatureCache(threshold=0.5), TokenMerge(ratio=0.3)]
    )
    own = tiny_model(0).eval()
    call = TINY["DiTTransformer2DModel"].inputs(1)
    size = own.config.sample_size
    x = torch.randn(1, own.config.in_channels, *(size if isinstance(size, (tuple, list)) else (size, size)))

    @torch.no_grad()
    def draw() -> None:
        with tokdyn.trajectory(model, steps=2):
            for level in (900, 100):
                model(**{**call, "timestep": torch.full_like(call["timestep"], level)})
        tokdyn.stats(model)
        for level in (900.0, 100.0):
            own(x, level, None, tail_drop=0.3)

    return draw


def wrapper() -> Callable[[], object]:
    """A function that wraps a model, calls it and unwraps it."""
    tiny = TINY["DiTTransformer2DModel"]
    model, call = tiny.build().eval(), tiny.inputs(1)

    @torch.no_grad()
    def wrap() -> None:
        tokdyn.wrap(model, [FeatureCache(threshold=0.5), Chunking(target=2), DepthSkip(blocks=(1,))])
        model(**call)
        tokdyn.unwrap(model)

    return wrap


def test_training_is_flat(tmp_path: Path, tiny: Tiny) -> None:
    found = trained(tiny(tmp_path / "run", "training.steps=100", "training.log_every=10", "training.sample_every=10"))
    require_flat(found[3], found[-2])  # of steps 40 and 90; the last preview comes as the run ends


@pytest.fixture
def short_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let attachments remember so few calls that their history is full after some images."""
    monkeypatch.setattr("tokdyn.attach.attachment.REMEMBERED", 12)


@pytest.mark.usefixtures("short_history")
def test_sampling_is_flat() -> None:
    require_flat(*measured(sampler(), warm=8, times=50))


def test_wrapping_is_flat() -> None:
    require_flat(*measured(wrapper(), warm=30, times=30))


@pytest.mark.usefixtures("short_history")
def test_planted_leaks_are_found(tmp_path: Path, tiny: Tiny) -> None:
    kept: list[Any] = []
    recipe = tiny(tmp_path / "run", "training.steps=12", "training.log_every=4", "training.sample_every=1")
    found = trained(recipe, lambda: kept.append(torch.zeros(1)))
    with pytest.raises(AssertionError, match="more tensors live"):
        require_flat(found[3], found[-2])
    draw, wrap = sampler(), wrapper()
    with pytest.raises(AssertionError, match="more tensors live"):
        require_flat(*measured(lambda: (draw(), kept.append(torch.zeros(1))), warm=8, times=3))
    with pytest.raises(AssertionError, match="more objects live"):
        require_flat(*measured(lambda: (wrap(), kept.append([len(kept)])), warm=2, times=OBJECTS + 5))


@pytest.mark.slow
@pytest.mark.fault(
    "memory grows with every step",
    injected="2,000 steps of training; another test plants a leak of one number a step, which is found",
    happened="tensors and objects that live, and the memory of the process, are at the end what they were after 200",
)
def test_two_thousand_steps_are_flat(tmp_path: Path, tiny: Tiny) -> None:
    settings = ("training.steps=2000", "training.log_every=100", "training.sample_every=100")
    found = trained(tiny(tmp_path / "run", *settings))
    require_flat(found[1], found[-2], resident=True)


@pytest.mark.slow
@pytest.mark.fault(
    "memory grows with every image or wrap",
    injected="1,000 images, and 300 times wrapping, calling and unwrapping; another test plants leaks, which are found",
    happened="tensors and objects that live, and the memory of the process, are at the end what they were at first",
)
@pytest.mark.parametrize(("what", "times"), [("sampling", 1000), ("wrapping", 300)])
def test_a_thousand_images_and_hundreds_of_wraps_are_flat(what: str, times: int) -> None:
    action = sampler() if what == "sampling" else wrapper()
    warm = 400 if what == "sampling" else 60  # the history of calls is full then
    require_flat(*measured(action, warm=warm, times=times), resident=True)
