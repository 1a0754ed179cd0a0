"""The base class of DiT and DC-DiT: embedders, blocks, head, positions and initialisation."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from einops import rearrange
from torch import Tensor, nn

from tokdyn.errors import InputError
from tokdyn.models.blocks import CellEmbedder, DiTBlock, FinalLayer, LabelEmbedder, TimestepEmbedder
from tokdyn.ops import sincos_position
from tokdyn.ops.precision import autocast_is_slow
from tokdyn.tokens import Grid, Routing


@dataclass(frozen=True)
class DiTOutput:
    """The output of a DiT.

    Attributes:
        sample: (B, out_channels, rows, columns), the predicted noise and, with learn_sigma, the variance channels.
    """

    sample: Tensor


@dataclass(frozen=True)
class DCDiTOutput(DiTOutput):
    """The output of a DC-DiT.

    Attributes:
        routing: the router's decisions, with their losses and counts.
    """

    routing: Routing


class Transformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The parts that `DiT` and `DCDiT` have in common; each of them defines its forward."""

    x_embedder: CellEmbedder

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DiTBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["DiTBlock"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["pos_embed", "norm", "chunking"]

    def _check(self) -> None:
        """Raise an InputError that names an impossible setting, before anything is built from it."""
        c = self.config
        for name in ("patch_size", "in_channels", "hidden_size", "depth", "num_heads"):
            if c[name] < 1:
                raise InputError(f"{name} is {c[name]}, expected at least 1.")
        size = c.sample_size
        if not isinstance(size, Integral) and (not isinstance(size, (tuple, list)) or len(size) != 2):
            raise InputError(f"sample_size is {size!r}, expected a number or (rows, columns).")
        mapping = c.timestep_map
        if (
            not isinstance(mapping, (tuple, list))
            or len(mapping) != 2
            or not all(map(math.isfinite, mapping))
            or not mapping[0]
        ):
            raise InputError(f"timestep_map is {mapping!r}, expected (scale, offset) with a scale that is not 0.")
        if c.hidden_size % c.num_heads:
            raise InputError(f"hidden_size is {c.hidden_size}, expected a multiple of num_heads = {c.num_heads}.")

    def _build(self, head_width: int) -> None:
        """Build the parts that follow from the registered configuration."""
        c = self.config
        out_channels = c.in_channels * (2 if c.learn_sigma else 1)
        self.register_to_config(out_channels=out_channels)
        self.gradient_checkpointing = False
        self.t_embedder = TimestepEmbedder(c.hidden_size, c.timestep_shift, *c.timestep_map)
        self.y_embedder = LabelEmbedder(c.num_classes, c.hidden_size)
        position = sincos_position(self._grid_of(c.sample_size), c.hidden_size, c.get("position_scale", 1.0))
        self.pos_embed = nn.Parameter(position[None].to(torch.get_default_dtype()), requires_grad=False)
        self.blocks = nn.ModuleList(
            DiTBlock(c.hidden_size, c.num_heads, c.mlp_ratio, c.mlp_norm_eps) for _ in range(c.depth)
        )
        self.final_layer = FinalLayer(head_width, c.patch_size**2 * out_channels, c.hidden_size)

    def _grid_of(self, size: int | tuple[int, int] | list[int] | torch.Size) -> Grid:
        """Return the token grid of an input of that many rows and columns."""
        rows, columns = size if isinstance(size, (tuple, list)) else (size, size)
        patch = self.config.patch_size
        if rows % patch or columns % patch or min(rows, columns) < patch:
            raise InputError(f"the input is {rows}x{columns}, expected multiples of the patch size {patch}.")
        return rows // patch, columns // patch

    def _compute_precision(self, x: Tensor) -> tuple[AbstractContextManager[Any], Tensor]:
        """Return the context to compute in, and x in its type.

        Where autocast asks for a type that the CPU has no instructions for, that is fp32: several times as fast there,
        and more exact.
        """
        if autocast_is_slow(x) and all(p.dtype == torch.float32 for p in self.parameters()):
            return torch.autocast(x.device.type, enabled=False), x.float()
        return nullcontext(), x

    def _embed_condition(
        self, x: Tensor, timestep: Tensor | float | None, labels: Tensor | None
    ) -> tuple[Grid, Tensor, Tensor]:
        """Check the inputs; return the token grid, the timesteps (B,) and the condition (B, D)."""
        c = self.config
        if x.dim() != 4 or x.shape[1] != c.in_channels or not len(x):
            raise InputError(
                f"the input has shape {tuple(x.shape)}, expected (B, {c.in_channels}, rows, columns) with B at least 1."
            )
        if timestep is None:
            raise InputError("timestep is missing; pass a number or a (B,) tensor.")
        timestep = _per_sample("timestep", timestep, x)
        labels = _per_sample("class_labels", c.num_classes if labels is None else labels, x)
        if labels.is_floating_point() or labels.is_complex():
            raise InputError(f"class_labels are {labels.dtype}, expected integers.")
        condition = self.t_embedder(timestep, x.dtype) + self.y_embedder(labels)
        return self._grid_of(x.shape[-2:]), timestep, condition

    def _positions(self, grid: Grid) -> Tensor:
        """Return the (N, D) positions of a grid: the stored table, or computed ones if the size is another."""
        if grid == self._grid_of(self.config.sample_size):
            return self.pos_embed[0]
        scale = self.config.get("position_scale", 1.0)
        return sincos_position(grid, self.config.hidden_size, scale).to(self.pos_embed)

    def _unpatchify(self, patches: Tensor, grid: Grid) -> Tensor:
        """Lay the patches (B, N, p * p * channels) of a grid out as (B, channels, rows, columns)."""
        p = self.config.patch_size
        return rearrange(patches, "b (r c) (p q channels) -> b channels (r p) (c q)", r=grid[0], p=p, q=p)

    @torch.no_grad()
    def _initialize(self) -> None:
        """Initialise as adaLN-Zero (arXiv 2212.09748): Xavier layers, small embeddings, zero modulation and head."""
        for module in (*self.blocks.modules(), *self.t_embedder.modules(), *self.final_layer.modules()):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.x_embedder.reset()
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.startswith("t_embedder.mlp") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)


def _per_sample(name: str, value: Tensor | float, x: Tensor) -> Tensor:
    """Return (B,) values on the device of x from one value or B, without a synchronisation for a number."""
    if isinstance(value, (int, float)):
        return torch.full((len(x),), value, device=x.device)
    values = torch.as_tensor(value, device=x.device).reshape(-1)
    if len(values) not in (1, len(x)):
        raise InputError(f"{name} has {len(values)} entries, expected 1 or {len(x)}, one per sample.")
    return values.expand(len(x))
