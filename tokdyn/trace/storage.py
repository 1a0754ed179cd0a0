"""Where and in which precision a cache keeps tensors between steps: in fewer bits, or in the memory of the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SCALED = (torch.float16, torch.float8_e4m3fn)
"""Types with a small range, in which every token is stored with a scale of its own."""


@dataclass(frozen=True)
class Stored:
    """A tensor that is kept.

    Attributes:
        values: (B, N, D) the tensor, divided by the scale, in the type and on the device in which it is kept.
        scale: (B, N, 1) fp32, on the same device; None if there is none.
    """

    values: Tensor
    scale: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def load(self, like: Tensor) -> Tensor:
        """Return the tensor on the device of another, in fp32 if it has a scale and in the kept type otherwise."""
        values = self.values.to(like.device, non_blocking=True)
        if self.scale is None:
            return values
        return values.float() * self.scale.to(like.device, non_blocking=True)


@dataclass(frozen=True)
class Storage:
    """How tensors are kept.

    Attributes:
        dtype: type; None keeps that of the tensor. For fp16 and fp8 (e4m3), each token is divided by a scale that makes
            its largest element the largest number of the type, so that nothing overflows.
        host: whether they are kept in the memory of the host, which is pinned beside a CUDA device. Copies in both
            directions are in the order of the device's work, and the host does not wait for them.
    """

    dtype: torch.dtype | None = None
    host: bool = False

    def store(self, x: Tensor) -> Stored:
        """Keep a tensor (B, N, D)."""
        if self.dtype not in _SCALED:
            return Stored(self._place(x if self.dtype is None else x.to(self.dtype)), None)
        assert self.dtype is not None
        wide = x.float()
        limits = torch.finfo(self.dtype)
        scale = (wide.abs().amax(-1, keepdim=True) / limits.max).clamp(min=torch.finfo(torch.float32).tiny)
        return Stored(self._place((wide / scale).to(self.dtype)), self._place(scale))

    def replace(self, old: Stored, new: Tensor, rows: Tensor) -> Stored:
        """Keep a tensor (B, N, D) in some rows (B), bool, and what was kept before in the others."""
        before = old.load(new)
        return self.store(torch.where(rows.to(new.device).view(-1, 1, 1), new.to(before.dtype), before))

    def _place(self, x: Tensor) -> Tensor:
        if not self.host or x.device.type == "cpu":
            return x
        held = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        return held.copy_(x, non_blocking=True)
