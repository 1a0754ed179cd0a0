"""The diffusion transformer DiT (arXiv 2212.09748), as a diffusers model."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor

from tokdyn.models.base import DiTOutput, Transformer
from tokdyn.models.blocks import CellEmbedder
from tokdyn.models.sizes import dit_settings


class DiT(Transformer):
    """A DiT: every patch of p x p input pixels is a token, and all blocks compute all tokens.

    Args:
        sample_size: rows and columns of the input, or one number for both.
        patch_size: p.
        in_channels: channels of the input.
        hidden_size: D.
        depth: number of blocks.
        num_heads: H, a divisor of D.
        mlp_ratio: hidden width of the MLP over D.
        num_classes: number of classes; the embedding has one more row, for no class.
        learn_sigma: whether to predict variance channels too.
        timestep_shift: see `tokdyn.ops.timestep_frequencies`; 1 for weights of diffusers' DiT.
        timestep_map: (scale, offset); the timestep is embedded as `scale * timestep + offset`, for weights that were
            trained with other timesteps than tokdyn's.
        mlp_norm_eps: epsilon of the norm before the MLP; 1e-5 in diffusers' DiT.
        out_channels: ignored and computed from the other settings; accepted so that saved configurations load.

    Raises:
        InputError: a setting is out of range.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        timestep_shift: int = 0,
        timestep_map: tuple[float, float] = (1.0, 0.0),
        mlp_norm_eps: float = 1e-6,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        self._check()
        self.x_embedder = CellEmbedder(in_channels, hidden_size, patch_size, stride=patch_size)
        self._build(head_width=hidden_size)
        self._initialize()

    @classmethod
    def named(cls, name: str, **overrides: Any) -> DiT:
        """Build the model of a name such as "XL/2" (see `tokdyn.models.sizes`), with some settings replaced."""
        model: DiT = cls(**{**dit_settings(name), **overrides})
        return model

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> DiTOutput | tuple[Tensor]:
        """Predict the noise, or the velocity if the model was trained to.

        Args:
            hidden_states: (B, in_channels, rows, columns), noisy inputs; rows and columns are multiples of the patch
                size, and may differ from `sample_size`.
            timestep: a number or (B,), from 0, the image, to 1000, pure noise. None raises an InputError.
            class_labels: (B,) int64; None is no class.
            return_dict: whether to return a `DiTOutput`, or the tuple (sample,).

        Returns:
            The prediction (B, out_channels, rows, columns), in an output or a tuple.

        Raises:
            InputError: an argument has a wrong shape, dtype or range.
        """
        precision, hidden_states = self._compute_precision(hidden_states)
        with precision:
            grid, _, condition = self._embed_condition(hidden_states, timestep, class_labels)
            x = rearrange(self.x_embedder(hidden_states), "b d r c -> b (r c) d") + self._positions(grid)
            for block in self.blocks:
                if torch.is_grad_enabled() and self.gradient_checkpointing:
                    x = self._gradient_checkpointing_func(block, x, condition)
                else:
                    x = block(x, condition)
            sample = self._unpatchify(self.final_layer(x, condition), grid)
        return DiTOutput(sample) if return_dict else (sample,)


DiT.__module__ = "tokdyn"  # diffusers writes the module into model_index.json and finds the class there again
