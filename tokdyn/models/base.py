"""The base class of DiT and DC-DiT, with their embedders, blocks, head, positions and initialisation."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from einops import rearrange
from torch import Tensor, nn

from tokdyn.errors import InputError
from tokdyn.limits import TOKENS
from tokdyn.models.arguments import ARGUMENTS
from tokdyn.models.blocks import CellEmbedder, DiTBlock, FinalLayer, LabelEmbedder, TimestepEmbedder
from tokdyn.ops import sincos_position
from tokdyn.ops.dispatch import synchronises
from tokdyn.ops.precision import autocast_is_slow
from tokdyn.reading import shown
from tokdyn.section import immense
from tokdyn.tokens import Grid, Routing


@dataclass(frozen=True)
class DiTOutput:
    """The output of a DiT.

    Attributes:
        sample: (B, out_channels, rows, columns), the prediction (noise, or velocity if the model was trained so),
            followed by the variance channels if `learn_sigma` is set.
    """

    sample: Tensor


@dataclass(frozen=True)
class DCDiTOutput(DiTOutput):
    """The output of a DC-DiT.

    Attributes:
        routing: which tokens the router kept, and the ratio loss.
    """

    routing: Routing


class Transformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The parts that `DiT` and `DCDiT` share. A subclass defines its constructor, `x_embedder` and forward."""

    x_embedder: CellEmbedder

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DiTBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["DiTBlock"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["pos_embed", "norm", "chunking"]

    def _check(self) -> None:
        """Check the registered configuration, before anything is built from it.

        Raises:
            InputError: a setting is out of range.
        """
        c = self.config
        for name, kind in ARGUMENTS["dcdit"].items():
            number: Any = {int: Integral, float: Real, float | None: Real}.get(kind)
            value = c.get(name)
            if number is None or name not in c or (value is None and kind is not int and kind is not float):
                continue
            if not (isinstance(value, number) and abs(value) < math.inf):
                raise InputError(f"{name} is {shown(value)}; give a {'whole ' * (kind is int)}number.")
            if kind is not int and (wrong := immense(value)):
                raise InputError(f"{name}: {wrong}.")
        for name in ("patch_size", "in_channels", "hidden_size", "depth", "num_heads"):
            if c[name] < 1:
                raise InputError(f"{name} is {c[name]}; give a number of at least 1.")
        size = c.sample_size
        sides = size if isinstance(size, (tuple, list)) else (size, size)
        if len(sides) != 2 or not all(isinstance(side, Integral) for side in sides):
            raise InputError(f"sample_size is {shown(size)}; give a number or (rows, columns).")
        mapping = c.timestep_map
        if (
            not isinstance(mapping, (tuple, list))
            or len(mapping) != 2
            or not all(isinstance(each, Real) and math.isfinite(each) for each in mapping)
            or not mapping[0]
        ):
            raise InputError(f"timestep_map is {shown(mapping)}; give (scale, offset) with a scale that is not 0.")
        for name, sound, wanted in (
            ("mlp_ratio", c.hidden_size * c.mlp_ratio >= 1, "a number that gives the MLP a width"),
            ("num_classes", c.num_classes >= 0, "a number of at least 0"),
            ("timestep_shift", c.timestep_shift in (0, 1), "0 or 1"),
            ("mlp_norm_eps", c.mlp_norm_eps > 0, "a number above 0"),
        ):
            if not sound:
                raise InputError(f"{name} is {c[name]}; give {wanted}.")
        if excess := TOKENS.excess(math.prod(int(side) // c.patch_size for side in sides)):
            raise InputError(f"sample_size is {size} and patch_size {c.patch_size}; these are {excess}.")
        if c.hidden_size % c.num_heads:
            raise InputError(f"hidden_size is {c.hidden_size}; give a multiple of num_heads = {c.num_heads}.")

    def _build(self, head_width: int) -> None:
        """Build embedders, positions, blocks and head from the registered configuration.

        Args:
            head_width: width of the tokens that the head gets.
        """
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
        """Return the token grid of an input of a size: (rows, columns), or one number for both.

        Raises:
            InputError: the patch size does not divide it.
        """
        rows, columns = size if isinstance(size, (tuple, list)) else (size, size)
        patch = self.config.patch_size
        if rows % patch or columns % patch or min(rows, columns) < patch:
            raise InputError(f"the input is {rows}x{columns}; give multiples of the patch size {patch}.")
        return rows // patch, columns // patch

    def _compute_precision(self, x: Tensor) -> tuple[AbstractContextManager[Any], Tensor]:
        """Return a context for the forward pass, and x in the dtype to compute in.

        If autocast asks for a dtype that this CPU has no instructions for, the context turns autocast off and x is
        fp32, which is several times as fast there and more exact. Otherwise neither changes anything.
        """
        self._check_input(x)
        if autocast_is_slow(x) and all(p.dtype == torch.float32 for p in self.parameters()):
            return torch.autocast(x.device.type, enabled=False), x.float()
        return nullcontext(), x

    def _check_input(self, x: Any) -> None:
        """Raise an InputError unless x is a tensor of floating-point numbers that the weights can be multiplied by."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.layout != torch.strided:
            kind = type(x).__name__
            if isinstance(x, Tensor):
                kind = str(x.dtype if x.layout == torch.strided else x.layout)
            raise InputError(
                f"the input is {kind}; give a tensor of floating-point numbers (B, {self.config.in_channels}, "
                "rows, columns)."
            )
        own = self.pos_embed.dtype
        if (
            x.dtype != own
            and not torch.is_autocast_enabled(x.device.type)
            and {p.dtype for p in self.parameters()} == {own}
        ):
            raise InputError(
                f"the input is {x.dtype} and the model {own}; convert one of them, as in x.to(model.dtype)."
            )

    def _embed_condition(
        self, x: Tensor, timestep: Tensor | float | None, labels: Tensor | None
    ) -> tuple[Grid, Tensor, Tensor]:
        """Check the inputs of the model and embed timestep and class.

        Args:
            x: (B, in_channels, rows, columns).
            timestep: a number, or a tensor of 1 or B elements.
            labels: a tensor of 1 or B class labels; None is the null class.

        Returns:
            The token grid, the timesteps (B,) and the condition (B, D).

        Raises:
            InputError: a shape or dtype is wrong, or the timestep is None.
        """
        c = self.config
        if x.dim() != 4 or x.shape[1] != c.in_channels or not len(x):
            raise InputError(
                f"the input has shape {tuple(x.shape)}, expected (B, {c.in_channels}, rows, columns) with B at least 1."
            )
        if timestep is None:
            raise InputError("timestep is missing; pass a number or a (B,) tensor.")
        timestep = _times(timestep, x)
        labels = _per_sample("class_labels", c.num_classes if labels is None else labels, x)
        if labels.is_floating_point() or labels.is_complex():
            raise InputError(f"class_labels are {labels.dtype}, expected integers.")
        condition = self.t_embedder(timestep, x.dtype) + self.y_embedder(labels)
        return self._grid_of(x.shape[-2:]), timestep, condition

    def _positions(self, grid: Grid) -> Tensor:
        """Return the position embeddings (N, D) of a grid: the stored table if its size is the same, else new ones."""
        if grid == self._grid_of(self.config.sample_size):
            return self.pos_embed[0]
        scale = self.config.get("position_scale", 1.0)
        return sincos_position(grid, self.config.hidden_size, scale).to(self.pos_embed)

    def _unpatchify(self, patches: Tensor, grid: Grid) -> Tensor:
        """Rearrange the patches (B, N, p * p * channels) of a grid into (B, channels, rows, columns)."""
        p = self.config.patch_size
        return rearrange(patches, "b (r c) (p q channels) -> b channels (r p) (c q)", r=grid[0], p=p, q=p)

    @torch.no_grad()
    def _initialize(self) -> None:
        """Initialise as adaLN-Zero (arXiv 2212.09748).

        Linear layers get Xavier weights and zero bias, embeddings a standard deviation of 0.02, and modulation and head
        zeros.
        """
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


def _times(given: Tensor | float, x: Tensor) -> Tensor:
    """Expand timesteps to (B,); raise an InputError if one is negative, NaN or infinite.

    A tensor on an accelerator is not looked at, because the host would wait for it.
    """
    values = _per_sample("timestep", given, x)
    if isinstance(given, (int, float)):
        sound = 0 <= given < math.inf
    else:
        sound = synchronises(values) or bool(((values >= 0) & (values < math.inf)).all())
    if not sound:
        raise InputError(f"timestep is {shown(given)}; give finite numbers of at least 0.")
    return values


def _per_sample(name: str, value: Tensor | float, x: Tensor) -> Tensor:
    """Expand a value to (B,) on the device of x. A Python number causes no synchronisation.

    Args:
        name: name of the argument, for the message.
        value: a number, or a tensor of 1 or B elements.
        x: (B, ...), the input of the model.

    Raises:
        InputError: the value is no number, or has another number of elements.
    """
    if isinstance(value, (int, float)):
        return torch.full((len(x),), value, device=x.device)
    try:
        values = torch.as_tensor(value, device=x.device).reshape(-1)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {shown(value)}; give a number, or one for each sample.") from error
    if len(values) not in (1, len(x)):
        raise InputError(f"{name} has {len(values)} entries, expected 1 or {len(x)}, one per sample.")
    return values.expand(len(x))
