"""Tiny models of diffusers that no adapter knows, or none once `undeclared` has been called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from tests.contract.kit import Tiny, latents, of_diffusers
from tests.contract.siblings import FLUX, FLUX_CLOCK, flux_inputs
from tokdyn.adapters import ADAPTERS, registry


@dataclass(frozen=True)
class Foreign:
    """A model and what its source says of its blocks.

    Attributes:
        tiny: how to build and call it.
        blocks: for each list in the order of the calls, the arguments that a block gives back, changed, in order.
    """

    tiny: Tiny
    blocks: dict[str, tuple[str, ...]]


def undeclared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test see these classes as if the package had no adapter for them."""
    names = {*INFERRED, *REFUSED, *UNFIT}
    others = tuple(adapter for adapter in ADAPTERS if not names & {*adapter.classes})
    monkeypatch.setattr(registry, "ADAPTERS", others)
    monkeypatch.setattr(registry, "REFUSED", {name: why for name, why in registry.REFUSED.items() if name in UNFIT})


def tokens(batch: int, **more: Any) -> dict[str, Any]:
    """An 8x8 latent, six text tokens and a timestep to 1000."""
    return {
        "hidden_states": latents(batch, 4, 8, 8),
        "encoder_hidden_states": latents(batch, 6, 16),
        "timestep": torch.full((batch,), 500),
        **more,
    }


def video(batch: int, *shape: int, **more: Any) -> dict[str, Any]:
    return {**tokens(batch), "hidden_states": latents(batch, *shape), **more}


def build(name: str, **config: Any) -> Callable[[], nn.Module]:
    return lambda: of_diffusers(name, **config)


ONE, TWO = ("hidden_states",), ("hidden_states", "encoder_hidden_states")
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 3}

INFERRED = {
    "HunyuanDiT2DModel": Foreign(  # long skip connections from the first half of the blocks to the second
        Tiny(
            build(
                "HunyuanDiT2DModel",
                num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, num_layers=4,
                hidden_size=16, mlp_ratio=2.0, cross_attention_dim=16, cross_attention_dim_t5=16, text_len=6,
                pooled_projection_dim=16, text_len_t5=4, use_style_cond_and_image_meta_size=False,
                activation_fn="gelu-approximate",
            ),
            lambda b: tokens(
                b,
                timestep=torch.full((b,), 500.0),
                text_embedding_mask=torch.ones(b, 6),
                encoder_hidden_states_t5=latents(b, 4, 16),
                text_embedding_mask_t5=torch.ones(b, 4),
                image_rotary_emb=(latents(16, 8), latents(16, 8)),
            ),
        ),
        {"blocks": ONE},
    ),
    "StableAudioDiTModel": Foreign(  # sound, with a token of its own before the others
        Tiny(
            build(
                "StableAudioDiTModel",
                sample_size=8, **HEADS, num_key_value_attention_heads=2, cross_attention_dim=12, time_proj_dim=8,
                global_states_input_dim=12, cross_attention_input_dim=12,
            ),
            lambda b: {
                "hidden_states": latents(b, 4, 8),
                "timestep": torch.full((b,), 0.5),
                "encoder_hidden_states": latents(b, 5, 12),
                "global_hidden_states": latents(b, 1, 12),
                "rotary_embedding": (latents(9, 4), latents(9, 4)),
            },
            clock=FLUX_CLOCK,
        ),
        {"transformer_blocks": ONE},
    ),
    "AllegroTransformer3DModel": Foreign(
        Tiny(
            build(
                "AllegroTransformer3DModel",
                **{**HEADS, "attention_head_dim": 12}, patch_size=2, patch_size_t=1, cross_attention_dim=24,
                sample_height=8, sample_width=8, sample_frames=4, caption_channels=16,
            ),
            lambda b: video(b, 4, 2, 8, 8, encoder_attention_mask=torch.ones(b, 6)),
        ),
        {"transformer_blocks": ONE},
    ),
    "MochiTransformer3DModel": Foreign(
        Tiny(
            build(
                "MochiTransformer3DModel",
                **HEADS, patch_size=2, pooled_projection_dim=16, text_embed_dim=16, time_embed_dim=4,
                max_sequence_length=6,
            ),
            lambda b: video(b, 4, 2, 8, 8, encoder_attention_mask=torch.ones(b, 6, dtype=torch.bool)),
        ),
        {"transformer_blocks": TWO},
    ),
    "ConsisIDTransformer3DModel": Foreign(
        Tiny(
            build(
                "ConsisIDTransformer3DModel",
                **HEADS, time_embed_dim=4, text_embed_dim=16, sample_width=8, sample_height=8, sample_frames=8,
                patch_size=2, temporal_compression_ratio=4, max_text_seq_length=6,
            ),
            lambda b: video(b, 2, 4, 8, 8),
        ),
        {"transformer_blocks": TWO},
    ),
    "OmniGenTransformer2DModel": Foreign(  # text, time and image in one sequence from the start
        Tiny(
            build(
                "OmniGenTransformer2DModel",
                hidden_size=16, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32, num_layers=3,
                in_channels=4, time_step_dim=4, rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]},
            ),
            lambda b: {
                "hidden_states": latents(b, 4, 8, 8),
                "timestep": torch.full((b,), 0.5),
                "input_ids": torch.arange(6).expand(b, 6),
                "input_img_latents": [],
                "input_image_sizes": {},
                "attention_mask": torch.ones(b, 23, 23),
                "position_ids": torch.arange(23).expand(b, 23),
            },
            clock=FLUX_CLOCK,
        ),
        {"layers": ONE},
    ),
    "Kandinsky5Transformer3DModel": Foreign(  # a list of text blocks comes first, and is left alone
        Tiny(
            build(
                "Kandinsky5Transformer3DModel",
                in_visual_dim=4, in_text_dim=16, in_text_dim2=10, time_dim=8, out_visual_dim=4, model_dim=16,
                ff_dim=32, num_text_blocks=2, num_visual_blocks=3, axes_dims=(4, 2, 2),
            ),
            lambda b: video(
                b, 1, 8, 8, 4,
                timestep=torch.full((b,), 500.0),
                pooled_projections=latents(b, 10),
                visual_rope_pos=[torch.arange(1), torch.arange(4), torch.arange(4)],
                text_rope_pos=torch.arange(6),
            ),
        ),
        {"visual_transformer_blocks": ("visual_embed",)},
    ),
    "BriaTransformer2DModel": Foreign(
        Tiny(build("BriaTransformer2DModel", **FLUX), flux_inputs, clock=FLUX_CLOCK),
        {"transformer_blocks": TWO[::-1], "single_transformer_blocks": TWO[::-1]},
    ),
    "HiDreamImageTransformer2DModel": Foreign(  # the second list gets image and text in one sequence
        Tiny(
            build(
                "HiDreamImageTransformer2DModel",
                patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8,
                num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64, axes_dims_rope=(4, 2, 2),
                max_resolution=(32, 32), llama_layers=(0, 1, 2, 3), force_inference_output=True,
            ),
            lambda b: {
                "hidden_states": latents(b, 4, 8, 8),
                "encoder_hidden_states_t5": latents(b, 6, 32),
                "encoder_hidden_states_llama3": torch.stack([latents(b, 6, 16)] * 4),
                "pooled_embeds": latents(b, 64),
                "timesteps": torch.full((b,), 500),
            },
            clock=("timesteps", 1000.0, 0.0),
        ),
        {"double_stream_blocks": TWO, "single_stream_blocks": ONE},
    ),
    "CosmosTransformer3DModel": Foreign(
        Tiny(
            build(
                "CosmosTransformer3DModel",
                **{**HEADS, "attention_head_dim": 12}, mlp_ratio=2, text_embed_dim=16, adaln_lora_dim=4,
                max_size=(4, 32, 32),
            ),
            lambda b: video(
                b, 4, 1, 8, 8, attention_mask=torch.ones(b, 6), fps=30, padding_mask=torch.zeros(1, 1, 8, 8)
            ),
        ),
        {"transformer_blocks": ONE},
    ),
    "EasyAnimateTransformer3DModel": Foreign(
        Tiny(
            build(
                "EasyAnimateTransformer3DModel",
                **{**HEADS, "attention_head_dim": 16}, patch_size=2, sample_width=8, sample_height=8, mmdit_layers=2,
                time_embed_dim=4, text_embed_dim=16,
            ),
            lambda b: video(b, 4, 2, 8, 8),
        ),
        {"transformer_blocks": TWO},
    ),
    "HunyuanImageTransformer2DModel": Foreign(
        Tiny(
            build(
                "HunyuanImageTransformer2DModel",
                in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
                num_single_layers=2, num_refiner_layers=2, text_embed_dim=16, rope_axes_dim=(8, 8),
            ),
            lambda b: tokens(
                b, timestep=torch.full((b,), 500.0), encoder_attention_mask=torch.ones(b, 6, dtype=torch.bool)
            ),
        ),
        {"transformer_blocks": TWO, "single_transformer_blocks": TWO},
    ),
    "PRXTransformer2DModel": Foreign(
        Tiny(
            build(
                "PRXTransformer2DModel",
                in_channels=4, context_in_dim=16, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=3, axes_dim=[4, 4],
            ),
            lambda b: tokens(b, timestep=torch.full((b,), 0.5)),
            clock=FLUX_CLOCK,
        ),
        {"blocks": ONE},
    ),
    "SanaVideoTransformer3DModel": Foreign(
        Tiny(
            build(
                "SanaVideoTransformer3DModel",
                **{**HEADS, "attention_head_dim": 16}, num_cross_attention_heads=2, cross_attention_head_dim=16,
                cross_attention_dim=32, caption_channels=16, sample_size=8,
            ),
            lambda b: video(
                b, 4, 2, 8, 8, timestep=torch.full((b,), 500.0), encoder_attention_mask=torch.ones(b, 6)
            ),
        ),
        {"transformer_blocks": ONE},
    ),
}  # fmt: skip

REFUSED = {
    "LatteTransformer3DModel": (  # tokens of a frame and tokens of a place in turn
        Tiny(
            build(
                "LatteTransformer3DModel",
                sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3,
                caption_channels=16, in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True,
                norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, video_length=2,
                activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
            ),
            lambda b: video(b, 4, 2, 8, 8),
        ),
        r"\b{b} samples\b",
    ),
    "ErnieImageTransformer2DModel": (  # the batch is the second axis
        Tiny(
            build(
                "ErnieImageTransformer2DModel",
                hidden_size=16, num_attention_heads=1, num_layers=3, ffn_hidden_size=32, in_channels=4, out_channels=4,
                text_in_dim=12, rope_axes_dim=(4, 4, 8),
            ),
            lambda b: {
                "hidden_states": latents(b, 4, 4, 5),
                "timestep": torch.full((b,), 500.0),
                "text_bth": latents(b, 6, 12),
                "text_lens": torch.full((b,), 6),
            },
        ),
        r"\b{b} samples\b",
    ),
}  # fmt: skip

UNFIT = {
    "SD3ControlNetModel": (
        Tiny(
            build(
                "SD3ControlNetModel",
                sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
                joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
            ),
            lambda b: {},
        ),
        "ControlNet",
    ),
}  # fmt: skip
