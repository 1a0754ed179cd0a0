"""The Dynamic Chunking Diffusion Transformer (arXiv 2603.06351), as a diffusers model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from tokdyn.errors import InputError
from tokdyn.methods import Chunking, ChunkingModule
from tokdyn.methods.routers import RouterName
from tokdyn.models.base import DCDiTOutput, Transformer
from tokdyn.models.blocks import CellEmbedder
from tokdyn.models.scaffold import RMSNorm, Scaffold
from tokdyn.models.sizes import dc_dit_settings, renamed_settings
from tokdyn.ops.precision import product_dtype
from tokdyn.section import SMALLEST
from tokdyn.tokens import Grid, Routing


class DCDiT(Transformer):
    """A DC-DiT: a narrow encoder, a router and a narrow decoder compute every cell; the blocks compute the kept tokens.

    Args:
        sample_size: rows and columns of the input, or one number for both.
        patch_size: p; a cell is p x p input pixels. 1 in the paper.
        in_channels: channels of the input.
        hidden_size: D.
        depth: number of blocks.
        num_heads: H, a divisor of D.
        mlp_ratio: hidden width of the MLP over D.
        num_classes: number of classes; the embedding has one more row, for no class.
        learn_sigma: whether to predict variance channels too.
        encoder_depth: residual blocks before the router.
        decoder_depth: residual blocks after de-chunking.
        scaffold_width: width of encoder and decoder; None is D / 4.
        target: N, cells per kept token, more than 1.
        router: "spatial_predictability" (v2 of the paper), "cosine" (v1) or "random" (ablation).
        sigma: standard deviation, in cells, of the Gaussian by which de-chunking smooths the kept tokens, weighted by
            their probability; None leaves the smoothing out.
        force_ends: always keep the first and last cell, as the official code does.
        official_init: initialise as the official code does: router bias -1.1, Xavier residual projection. Otherwise the
            router is calibrated on noise, and the residual projection is zero.
        position_scale: difference between the coordinates of neighbouring cells. For blocks of a pretrained DiT it is p
            over the patch size of that DiT, so that the blocks get the positions that they were trained with.
        condition_adaptor: put a LayerNorm between the condition of the blocks and that of encoder, decoder and head, so
            that these can learn while the embedders are frozen (arXiv 2603.06351, upcycling).
        timestep_shift: see `tokdyn.ops.timestep_frequencies`.
        timestep_map: (scale, offset); the timestep is embedded as `scale * timestep + offset`.
        mlp_norm_eps: epsilon of the norm before the MLP.
        out_channels: ignored and computed from the other settings; accepted so that saved configurations load.

    Raises:
        InputError: a setting is out of range.
    """

    _keep_in_fp32_modules: ClassVar[list[str]] = ["chunking"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 1,
        in_channels: int = 4,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        encoder_depth: int = 2,
        decoder_depth: int = 2,
        scaffold_width: int | None = None,
        target: float = 4.0,
        router: RouterName = "spatial_predictability",
        sigma: float | None = 1.0,
        force_ends: bool = False,
        official_init: bool = False,
        position_scale: float = 1.0,
        condition_adaptor: bool = False,
        timestep_shift: int = 0,
        timestep_map: tuple[float, float] = (1.0, 0.0),
        mlp_norm_eps: float = 1e-6,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        self._check()
        width = hidden_size // 4 if scaffold_width is None else scaffold_width
        if min(encoder_depth, decoder_depth, width) < 1:
            raise InputError("encoder_depth, decoder_depth and scaffold_width must be at least 1.")
        if not target > 1.0:
            raise InputError(f"target is {target}; give more than 1 cell per kept token, or use a DiT to keep all.")
        if sigma is not None and not sigma >= SMALLEST:
            raise InputError(f"sigma is {sigma}; give more than 0 cells, or None for no smoothing.")
        if not position_scale > 0.0:
            raise InputError(f"position_scale is {position_scale}; give a number above 0.")
        chunking = Chunking(target=target, router=router, sigma=sigma, force_ends=force_ends)
        self.x_embedder = CellEmbedder(in_channels * patch_size**2, width, 3, padding=1)
        self._build(head_width=width)
        self.encoder = Scaffold(width, hidden_size, encoder_depth, hidden_size, change_first=False)
        self.chunking = ChunkingModule(chunking, hidden_size)
        self.norm = RMSNorm(hidden_size)
        self.decoder = Scaffold(hidden_size, width, decoder_depth, hidden_size, change_first=True)
        self.adaptor = nn.LayerNorm(hidden_size) if condition_adaptor else nn.Identity()
        self._initialize()

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Select the constructor's settings from a saved configuration, also one of an earlier version of tokdyn."""
        return super().extract_init_dict(renamed_settings(config_dict), **renamed_settings(kwargs))

    @classmethod
    def named(cls, name: str, **overrides: Any) -> DCDiT:
        """Build the model of a name such as "S" or "XL" (see `tokdyn.models.sizes`), with some settings replaced."""
        model: DCDiT = cls(**{**dc_dit_settings(name), **overrides})
        return model

    @torch.no_grad()
    def _initialize(self) -> None:
        super()._initialize()
        for name, parameter in self.named_parameters():
            if ".cond_proj." in name:
                (nn.init.zeros_ if name.endswith("bias") else nn.init.xavier_uniform_)(parameter)
        if self.config.official_init:
            nn.init.xavier_uniform_(self.chunking.residual.weight)
        elif not self.pos_embed.is_meta:
            self.calibrate_on_noise()

    def calibrate_on_noise(self) -> None:
        """Calibrate the router to keep 1/N of the cells of white noise; training calibrates it again on data."""
        generator = torch.Generator().manual_seed(0)
        rows, columns = self._grid_of(self.config.sample_size)
        p = self.config.patch_size
        noise = torch.randn(8, self.config.in_channels, rows * p, columns * p, generator=generator, device="cpu")
        self.calibrate_router(noise.to(self.pos_embed), 500, None)

    @torch.no_grad()
    def calibrate_router(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None,
        target: float | None = None,
    ) -> None:
        """Shift the router's bias, in place, so that 1/N of this batch's cells are kept.

        Args:
            hidden_states: as in `forward`.
            timestep: as in `forward`.
            class_labels: as in `forward`.
            target: N, more than 1; None is the model's own.

        Raises:
            InputError: the target is not above 1, or an input is wrong.
        """
        target = self.config.target if target is None else target
        if not target > 1.0:
            raise InputError(f"the target is {target}; give more than 1 cell per kept token.")
        precision, hidden_states = self._compute_precision(hidden_states)
        with precision:
            grid, steps, condition = self._embed_condition(hidden_states, timestep, class_labels)
            logits = self.chunking.logits(self._encode(hidden_states, condition), grid, steps)
        self.chunking.router.calibrate(logits, target)

    @torch.no_grad()
    def route(self, hidden_states: Tensor, timestep: Tensor | float, class_labels: Tensor | None) -> Routing:
        """Decide which cells to keep, without tail drop and without running the blocks; arguments as in `forward`.

        Raises:
            InputError: an input is wrong.
        """
        precision, hidden_states = self._compute_precision(hidden_states)
        with precision:
            grid, steps, condition = self._embed_condition(hidden_states, timestep, class_labels)
            return self.chunking.route(self._encode(hidden_states, condition), grid, steps)

    def _encode(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map (B, in_channels, rows, columns) to dense tokens (B, N, D)."""
        cells = F.pixel_unshuffle(x, self.config.patch_size)
        cells = cells.contiguous(memory_format=torch.channels_last)  # in which tokens are a view of a map
        tokens: Tensor = self.encoder(self.x_embedder(cells), self.adaptor(condition))
        return tokens

    def _decode(self, tokens: Tensor, condition: Tensor, grid: Grid) -> Tensor:
        """Map dense tokens (B, N, D) to (B, out_channels, rows, columns)."""
        cells = rearrange(tokens, "b (r c) d -> b d r c", r=grid[0])
        condition = self.adaptor(condition)
        return self._unpatchify(self.final_layer(self.decoder(cells, condition), condition), grid)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | None = None,
        class_labels: Tensor | None = None,
        tail_drop: float | Tensor = 0.0,
        return_dict: bool = True,
        plan: Tensor | None = None,
    ) -> DCDiTOutput | tuple[Tensor]:
        """Predict the noise, or the velocity if the model was trained to.

        Args:
            hidden_states: (B, in_channels, rows, columns), noisy inputs; rows and columns are multiples of the patch
                size, and may differ from `sample_size`.
            timestep: a number or (B,), from 0, the image, to 1000, pure noise. None raises an InputError.
            class_labels: (B,) int64; None is no class.
            tail_drop: share of the kept tokens to drop as well, least probable first; a number or (B,).
            return_dict: whether to return a `DCDiTOutput`, or the tuple (sample,).
            plan: (B, N) bool, the tokens to keep before tail drop. The router decides for samples in which none is set,
                and for all samples if the plan is None.

        Returns:
            The prediction (B, out_channels, rows, columns) and the routing, in an output; or the tuple (sample,).

        Raises:
            InputError: an argument has a wrong shape, dtype or range.
        """
        precision, hidden_states = self._compute_precision(hidden_states)
        with precision:
            grid, steps, condition = self._embed_condition(hidden_states, timestep, class_labels)
            tokens = self._encode(hidden_states, condition)
            tokens, routing = self._chunked(tokens, grid, steps, condition, tail_drop, plan)
            sample = self._decode(tokens, condition, grid)
        return DCDiTOutput(sample, routing) if return_dict else (sample,)

    def _chunked(
        self,
        tokens: Tensor,
        grid: Grid,
        steps: Tensor,
        condition: Tensor,
        tail_drop: float | Tensor,
        plan: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """Chunk dense tokens (B, N, D), run the blocks on the kept ones and de-chunk.

        Returns:
            Tokens (B, N, D), and the routing.
        """
        routing = self.chunking.route(tokens, grid, steps, tail_drop, plan)
        rows, packing = self.chunking.chunk(tokens, routing)
        rows = rows + self._positions(grid).index_select(0, packing.cell)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                rows = self._gradient_checkpointing_func(block, rows, condition, packing)
            else:
                rows = block(rows, condition, packing)
        dtype = product_dtype(tokens)  # of the decoder's convolutions
        return self.chunking.dechunk(self.norm(rows), tokens, routing, packing, dtype), routing


DCDiT.__module__ = "tokdyn"  # diffusers writes the module into model_index.json and finds the class there again
