"""Compare the input of a call with that of the call before.

A sampler makes the next latents of the latents and of what the model predicted from them, so that those of one image
are nearly explained by both; those of another image are not. Large inputs are compared by some of their elements. On
the CPU a glance at a few elements comes first: a cached step of a small model takes two milliseconds, in which more
would be felt.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import mul, ne

import torch
from torch import Tensor

RESEMBLES = 0.4
"""Correlation from which on an input is taken for the latents that follow those of the call before.

Steps of ODE samplers of first order lie at 1, of DDPM in 25 steps above 0.65; independent noise lies around 0.1.
"""
SAMPLED = 2048
"""Elements of each sample's input that are compared, where it has more.

A correlation over n random elements has a standard error below n ** -0.5, here 0.02: a tenth of what lies between
`RESEMBLES` and the inputs of one image, and less than that of two images.
"""
FEW = 256
"""Changed elements below which a comparison of some elements says nothing.

Over 256 elements, noise that is independent of five vectors reaches `RESEMBLES` with a probability of 2e-8.
"""
GLANCED, SURELY = 32, 0.9
"""Elements that a glance compares, and the correlation from which on it decides that an input resembles the one before.

Over 32 elements, independent noise reaches it with a probability of 5e-13. In doubt more elements are compared.
"""
SAME, UNKNOWN, FEW_CHANGED = 2.0, -2.0, -3.0  # beyond what a correlation can be
UNSURE = UNKNOWN, 0.0  # what a glance says in doubt
_TINY = torch.finfo(torch.float32).tiny
_AT_ONCE = 1 << 22  # elements that are multiplied at once

Resemblance = tuple[float, float]
"""The multiple correlation of an input with what explains it, and its distance from the input before, relative to that.

In the place of the correlation stands `SAME` where no element changed, `UNKNOWN` where nothing can be said, and
`FEW_CHANGED` where more elements have to be compared to say something.
"""


def reads_freely(x: Tensor) -> bool:
    """Whether reading a value of a tensor makes the host wait for no device."""
    return x.is_cpu


def version(x: Tensor) -> int | None:
    """How often a tensor was written to; None where that is not counted."""
    return None if x.is_inference() else x._version


def take(x: Tensor, elements: int, size: int | None = None) -> Tensor:
    """Copy some elements of each sample, the same in every call, or all where there are not more.

    Args:
        x: (B, ...).
        elements: M.
        size: E, where that is known.

    Returns:
        (B, M) or (B, E).
    """
    x, batch = x.detach() if x.requires_grad else x, x.shape[0]
    size = x.shape[1:].numel() if size is None else size
    if size <= elements:
        return x.clone(memory_format=torch.contiguous_format).view(batch, -1)
    return x.take(_positions(batch, size, elements, x.device))


@lru_cache(maxsize=16)
def _positions(batch: int, size: int, elements: int, device: torch.device) -> Tensor:
    """(B, M) positions among B * E, for each sample one at random in each of M equal parts of its elements.

    With a stride, channels or columns would be left out.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        drawn = torch.arange(elements) + torch.rand(elements, generator=generator, dtype=torch.float64)
        among = (drawn * (size / elements)).long().clamp_max(size - 1)
        return (among + size * torch.arange(batch)[:, None]).to(device)


@dataclass(frozen=True)
class Prediction:
    """What a model made of an input.

    Attributes:
        value: a copy (B, M) of some elements of the prediction, or what the model returned, which may be no prediction.
        written: how often that was written to when it was noted; None for a copy.
    """

    value: Tensor
    written: int | None

    @staticmethod
    def of(value: Tensor, x: InputSeen) -> Prediction | None:
        """Note what was returned for an input: on the CPU the tensor, which is rarely asked for, else a copy."""
        value = value.detach() if value.requires_grad else value
        written = version(value) if x.on_host else None
        if written is not None:
            return Prediction(value, written)
        fitting = as_input(value, x.shape)
        return None if fitting is None else Prediction(take(fitting, x.elements), None)

    def read(self, x: InputSeen) -> list[Tensor]:
        """(B, M) each: its elements, and those with its halves exchanged; none where it was written over.

        With guidance as halves of a batch, the prediction for each half explains the other, too.
        """
        taken: Tensor | None = self.value
        if self.written is not None:
            fitting = as_input(self.value, x.shape) if self.written == version(self.value) else None
            taken = None if fitting is None else take(fitting, x.elements)
        if taken is None:
            return []
        return [taken] if len(taken) % 2 else [taken, taken.roll(len(taken) // 2, 0)]


class Glance:
    """A few elements of one sample's input.

    Args:
        values: the elements.
    """

    __slots__ = ("_square", "_values")

    def __init__(self, values: list[float]) -> None:
        self._values, self._square = values, sum(map(mul, values, values))

    def beside(self, before: Glance) -> Resemblance:
        """Compare them with those of the call before; `UNSURE` where that does not settle it."""
        along, size = sum(map(mul, before._values, self._values)), math.sqrt(before._square * self._square)
        if not (along > SURELY * size and all(map(ne, self._values, before._values))):
            return UNSURE
        moved = max(0.0, self._square - 2 * along + before._square) / before._square
        return min(1.0, along / size), math.sqrt(moved)


@dataclass
class InputSeen:
    """The input of a call, to compare the next one with.

    Attributes:
        elements: M, how many of each sample are compared.
        values: (B, M) copies of them, since latents may be written over; None where there was no input.
        shape: of the input.
        size: E, elements of each sample.
        source: the input itself, as long as it is there.
        written: how often that was written to.
        predictions: what the model made of it.
        on_host: whether reading values waits for no device.
        glance: a few of the values, on the host alone.
    """

    elements: int = SAMPLED
    values: Tensor | None = None
    shape: Sequence[int] = ()
    size: int = 0
    source: weakref.ref[Tensor] | None = None
    written: int | None = None
    predictions: list[Prediction] = field(default_factory=list)
    on_host: bool = True
    glance: list[Glance] | None = None

    @staticmethod
    def of(x: Tensor, elements: int, on_host: bool) -> InputSeen:
        """Look at some elements of each sample of an input."""
        shape = x.shape
        size = x.numel() // max(1, shape[0])
        few = list(map(Glance, take(x, GLANCED, size).tolist())) if on_host and size >= GLANCED else None
        return InputSeen(elements, take(x, elements, size), shape, size, weakref.ref(x), version(x), [], on_host, few)

    def is_of(self, x: Tensor) -> bool:
        """Whether this tensor was looked at, and nothing was written to it since."""
        if self.source is None or self.source() is not x or self.written is None:
            return False
        return self.written == version(x)

    def fits(self, other: InputSeen) -> bool:
        """Whether another input has the same elements."""
        if self.values is None or other.values is None or self.shape != other.shape:
            return False
        return self.elements == other.elements and self.values.device == other.values.device


class Comparison:
    """The comparison of an input with the one before: computed at once on an accelerator, on the host when it is read.

    Attributes:
        columns: on an accelerator (B, 1 + V * V) `products`, to be handed to `read`; none on the host.
    """

    def __init__(self, now: InputSeen, before: InputSeen) -> None:
        self._partial = now.size > now.elements
        self._inputs = (now, before) if now.on_host else None
        self.columns = () if now.on_host else (_products_of(now, before),)

    def read(self, *columns: list[list[float]]) -> list[Resemblance]:
        """Say of each sample how its input resembles the one before; `columns` are those of this object on the host."""
        if self._inputs is not None:
            now, before = self._inputs
            if now.glance is not None and before.glance is not None:
                glanced = list(map(Glance.beside, now.glance, before.glance))
                if UNSURE not in glanced:
                    return glanced
            columns = (_products_of(now, before).tolist(),)
        return [self._judge(row[0], row[1:]) for row in columns[0]]

    def _judge(self, changed: float, inner: Sequence[float]) -> Resemblance:
        """Judge one sample by the number of elements that changed and their inner products."""
        if not changed:
            return SAME, 0.0
        return (FEW_CHANGED, UNKNOWN) if self._partial and changed < FEW else resemblance(inner)


def _products_of(now: InputSeen, before: InputSeen) -> Tensor:
    """Compute the `products` of an input and of all that explains it."""
    assert now.values is not None
    assert before.values is not None
    predicted = (each for prediction in before.predictions for each in prediction.read(before))
    return products(now.values, [before.values, *predicted])


def as_input(value: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Bring what a model predicts to the shape of its input, along the one axis in which they may differ.

    Predicted variances lie behind the prediction and are left out; what was put beside the latents gets zeros.

    Returns:
        (B, ...) the prediction, None where it has no such shape.
    """
    if value.shape == shape:
        return value
    axes = [axis for axis, size in enumerate(shape) if value.dim() == len(shape) and value.shape[axis] != size]
    if len(axes) != 1 or axes[0] == 0:
        return None
    axis, size = axes[0], shape[axes[0]]
    if value.shape[axis] > size:
        return value.narrow(axis, 0, size)
    missing = list(value.shape)
    missing[axis] = size - value.shape[axis]
    return torch.cat([value, value.new_zeros(missing)], dim=axis)


def products(x: Tensor, before: Sequence[Tensor]) -> Tensor:
    """Multiply the input of a call with what was there a step before, where it changed.

    Elements that are exactly equal to the latents before are left out, as reference images and masks stay what they are
    in every step.

    Args:
        x: (B, M), input of a call.
        before: the input of the call before, first, and what was predicted from it; each of the shape of x.

    Returns:
        (B, 1 + V * V) fp32: how many elements changed, and the inner products of the V vectors (*before, x). They are
        sums, not matrix products, so that counters of FLOPs do not take them for the model's.
    """
    vectors = torch.stack([*before, x], dim=1).float()
    changed = vectors[:, -1] != vectors[:, 0]
    vectors *= changed[:, None]
    if vectors.numel() * vectors.shape[1] <= _AT_ONCE:
        inner = (vectors[:, :, None] * vectors[:, None]).sum(-1)
    else:
        inner = torch.stack([(vectors * vectors[:, each, None]).sum(-1) for each in range(vectors.shape[1])], dim=1)
    return torch.cat([changed.sum(1, keepdim=True), inner.flatten(1)], dim=1)


def resemblance(inner: Sequence[float]) -> Resemblance:
    """Say how well an input is explained by what was there a step before, and how far it moved.

    What is left unexplained is the last pivot of Gaussian elimination on the inner products.

    Args:
        inner: V * V inner products of V vectors, the input before first and the input last.
    """
    if not all(map(math.isfinite, inner)):
        return UNKNOWN, UNKNOWN
    size = math.isqrt(len(inner))
    rows = [list(inner[start : start + size]) for start in range(0, size * size, size)]
    before, along, whole = rows[0][0], rows[0][-1], rows[-1][-1]
    ridge = 1e-6 * max(_TINY, *(rows[each][each] for each in range(size - 1)))  # predictions may be nearly the same
    for pivot in range(size - 1):
        top = rows[pivot]
        for row in rows[pivot + 1 :]:
            factor = row[pivot] / (max(top[pivot], 0.0) + ridge)
            for column in range(pivot + 1, size):
                row[column] -= factor * top[column]
    explained = 1 - rows[-1][-1] / max(whole, _TINY)
    moved = max(0.0, whole - 2 * along + before) / max(before, _TINY)
    return math.sqrt(min(1.0, max(0.0, explained))), math.sqrt(moved)
