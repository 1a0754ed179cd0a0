"""What can be seen of a call from outside: its noise levels, its input beside the input before, and its conditioning.

Everything stays on the device until somebody asks for it, so that observing a call never makes the host wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEVEL_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "noise_level")
"""Names that models give to the argument that holds the noise level."""
_AT_ONCE = 1 << 22  # elements that are multiplied at once
SAME, UNKNOWN = 2.0, -2.0  # beyond what a correlation can be


@dataclass(frozen=True)
class Observation:
    """One call, seen from outside.

    Attributes:
        values: (B, 3 + K) fp32. The noise level of each sample (1 is pure noise), how much its input resembles that of
            the call before and how far it moved from it (`compare`), and K elements that tell its conditioning from
            others.
        branch: name of the guidance branch, where a pipeline gave one.
        step: index of the step, where a pipeline gave one.
    """

    values: Tensor
    branch: str | None = None
    step: int | None = None


def compare(x: Tensor, before: Sequence[Tensor]) -> Tensor:
    """Say how well each sample's input is explained by what was there a step before, and how far it moved.

    A sampler makes the next latents of the latents and of what the model predicted from them, so that those of one
    image are nearly explained; those of another image are not. Elements that are exactly equal to the latents before
    are left out, as reference images and masks stay what they are in every step.

    Args:
        x: (B, ...), input of a call.
        before: the input of the call before, first, and what was predicted from it; each of the shape of x.

    Returns:
        (B, 2) fp32: the multiple correlation, from 0 to 1, or `SAME` where no element changed; and the distance from
        the input before, relative to that input.
    """
    changed = (x != before[0]).flatten(1)
    vectors = torch.stack([each.flatten(1) for each in (*before, x)], dim=1).float() * changed[:, None]
    products = _inner_products(vectors)
    gram, along, whole = products[:, :-1, :-1], products[:, :-1, -1:], products[:, -1, -1]
    size = gram.diagonal(dim1=1, dim2=2)
    tiny = torch.finfo(torch.float32).tiny
    ridge = 1e-6 * size.amax(1).clamp_min(tiny)  # predictions may be nearly the same
    solved, _ = torch.linalg.solve_ex(gram + torch.diag_embed(ridge[:, None].expand_as(size)), along)
    explained = (solved * along).sum((1, 2)) / whole.clamp_min(tiny)
    alike = torch.where(changed.any(1), explained.clamp(0, 1).sqrt(), SAME)
    distance = (whole - 2 * along[:, 0, 0] + size[:, 0]).clamp_min(0)
    return torch.stack([alike, (distance / size[:, 0].clamp_min(tiny)).sqrt()], dim=1)


def _inner_products(vectors: Tensor) -> Tensor:
    """Multiply K vectors (B, K, E) with each other: (B, K, K).

    Sums, not matrix products, so that counters of FLOPs do not take them for the model's.
    """
    if vectors.numel() * vectors.shape[1] <= _AT_ONCE:
        return (vectors[:, :, None] * vectors[:, None]).sum(-1)
    return torch.stack([(vectors * vectors[:, place, None]).sum(-1) for place in range(vectors.shape[1])], dim=1)


def as_input(output: Any, x: Tensor) -> Tensor | None:
    """Bring what a model predicts to the shape of its input, along the one axis in which they may differ.

    Predicted variances lie behind the prediction and are left out; what was put beside the latents gets zeros.

    Returns:
        (B, ...) the prediction, None where there is none of such a shape.
    """
    value = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    if isinstance(value, list) and value and all(isinstance(item, Tensor) for item in value):
        value = torch.stack(value) if len({item.shape for item in value}) == 1 else None
    if not isinstance(value, Tensor) or value.dim() != x.dim() or value.device != x.device:
        return None
    axes = [axis for axis in range(x.dim()) if value.shape[axis] != x.shape[axis]]
    if not axes:
        return value
    if len(axes) > 1 or axes[0] == 0:
        return None
    axis, size = axes[0], x.shape[axes[0]]
    if value.shape[axis] > size:
        return value.narrow(axis, 0, size)
    missing = list(value.shape)
    missing[axis] = size - value.shape[axis]
    return torch.cat([value, value.new_zeros(missing)], dim=axis)


def main_input(arguments: Mapping[str, Any]) -> Tensor | None:
    """The latents that a call is about: its first floating-point tensor, or list of tensors, with an entry a sample.

    Args:
        arguments: of the call, by name.

    Returns:
        (B, ...) the tensor itself, lists stacked; None where there is none or the sizes in a list differ.
    """
    for name, value in arguments.items():
        if name in LEVEL_NAMES:
            continue
        if isinstance(value, Tensor) and value.dim() > 1 and value.is_floating_point():
            return value
        if isinstance(value, list) and value and all(isinstance(item, Tensor) for item in value):
            alike = len({item.shape for item in value}) == 1 and value[0].is_floating_point()
            return torch.stack(value) if alike else None
    return None


def conditioning(arguments: Mapping[str, Any], batch: int, device: torch.device) -> Tensor:
    """Sum up what each sample is conditioned on, so that two prompts can be told apart.

    Args:
        arguments: of the call, by name; the input itself and the noise level are left out.
        batch: B.
        device: of the result.

    Returns:
        (B, K) fp32, sums and sums of squares of every argument that has an entry a sample.
    """
    columns: list[Tensor] = []
    skipped_input = False
    for name, value in arguments.items():
        if name in LEVEL_NAMES:
            continue
        tensors = list(_per_sample(value, batch))
        if not tensors:
            continue
        if not skipped_input and _is_input(value):
            skipped_input = True
            continue
        for rows in tensors:
            wide = rows.to(device, torch.float32)
            columns += [wide.sum(1), wide.square().sum(1)]
    return torch.stack(columns, dim=1) if columns else torch.zeros(batch, 0, device=device)


def _is_input(value: Any) -> bool:
    first = value[0] if isinstance(value, list) else value
    return isinstance(first, Tensor) and first.is_floating_point() and (first.dim() > 1 or isinstance(value, list))


def _per_sample(value: Any, batch: int) -> Iterator[Tensor]:
    """(B, E) the elements of each sample of a tensor, a list of one tensor a sample, or of the items of a mapping."""
    if isinstance(value, Tensor):
        if value.dim() and len(value) == batch and not value.is_complex():
            yield value.detach().reshape(batch, -1)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _per_sample(item, batch)
    elif isinstance(value, (list, tuple)) and len(value) == batch and all(isinstance(item, Tensor) for item in value):
        sums = [item.detach().float().sum() for item in value]
        squares = [item.detach().float().square().sum() for item in value]
        yield torch.stack([torch.stack(sums), torch.stack(squares)], dim=1)
