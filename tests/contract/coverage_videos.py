"""Tiny models of diffusers' video and audio classes that were declared later, one for each adapter or class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.contract.kit import Tiny, latents, of_diffusers
from tests.contract.siblings import WAN

FLUX_CLOCK = ("timestep", 1.0, 0.0)
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "num_layers": 3}
WITHOUT_BATCH = {
    "visual_rope_pos", "text_rope_pos", "padding_mask", "fps", "rotary_embedding", "image_rotary_emb",
}  # fmt: skip
"""Arguments of these models that have no batch axis."""


def build(name: str, **config: Any) -> Callable[[], nn.Module]:
    return lambda: of_diffusers(name, **config)


def video(batch: int, *shape: int, **more: Any) -> dict[str, Any]:
    """Latents of two frames of 8 x 6, six text tokens of width 12, and a timestep up to 1000."""
    return {
        "hidden_states": latents(batch, *(shape or (4, 2, 8, 6))),
        "encoder_hidden_states": latents(batch, 6, 12),
        "timestep": torch.full((batch,), 500.0),
        **more,
    }


def allegro_positions(frames: int, rows: int, columns: int) -> Any:
    """Rotary tables and positions of all cells, as Allegro's pipeline prepares them."""
    sizes = (frames, rows, columns)
    tables = tuple((latents(size, 8), latents(size, 8) + 1) for size in sizes)
    cells = torch.cartesian_prod(*map(torch.arange, sizes)).T.reshape(3, 1, -1).contiguous()
    return tables, tuple(cells)


COSMOS = {
    **HEADS, "attention_head_dim": 12, "mlp_ratio": 2, "text_embed_dim": 12, "adaln_lora_dim": 4, "max_size": (4, 32, 32)
}  # fmt: skip
EASYANIMATE = {**HEADS, "patch_size": 2, "time_embed_dim": 4, "text_embed_dim": 12}

VIDEOS: dict[str, Tiny] = {
    "WanVACETransformer3DModel": Tiny(
        build("WanVACETransformer3DModel", **WAN, vace_layers=[0, 2], vace_in_channels=8),
        lambda b: video(b, control_hidden_states=latents(b, 8, 2, 8, 6)),
    ),
    "HunyuanVideo15Transformer3DModel": Tiny(
        build(
            "HunyuanVideo15Transformer3DModel",
            **HEADS, num_refiner_layers=1, patch_size=1, text_embed_dim=12, text_embed_2_dim=10, image_embed_dim=8,
            rope_axes_dim=(4, 4, 8),
        ),
        lambda b: video(
            b, 4, 2, 4, 3,
            encoder_attention_mask=torch.ones(b, 6),
            encoder_hidden_states_2=latents(b, 4, 10),
            encoder_attention_mask_2=torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(b, 4),
            image_embeds=latents(b, 3, 8),
        ),
    ),
    "MochiTransformer3DModel": Tiny(
        build(
            "MochiTransformer3DModel",
            **HEADS, patch_size=2, pooled_projection_dim=16, text_embed_dim=16, time_embed_dim=4, max_sequence_length=6,
        ),
        lambda b: video(b, encoder_hidden_states=latents(b, 6, 16), encoder_attention_mask=torch.ones(b, 6, dtype=torch.bool)),
        clock=("timestep", 0.0, 1000.0),
    ),
    "EasyAnimateTransformer3DModel": Tiny(build("EasyAnimateTransformer3DModel", **EASYANIMATE), video),
    "EasyAnimate with shared layers": Tiny(
        build("EasyAnimateTransformer3DModel", **EASYANIMATE, mmdit_layers=2), video
    ),
    "ConsisIDTransformer3DModel": Tiny(
        build(
            "ConsisIDTransformer3DModel",
            **{**HEADS, "num_layers": 4}, time_embed_dim=4, text_embed_dim=12, sample_width=6, sample_height=8, sample_frames=8,
            patch_size=2, temporal_compression_ratio=4, max_text_seq_length=6, use_rotary_positional_embeddings=True,
            is_train_face=True, LFE_id_dim=8, LFE_vit_dim=6, LFE_depth=5, LFE_dim_head=4, LFE_num_heads=2,
            LFE_num_id_token=2, LFE_num_querie=3, LFE_output_dim=21, LFE_ff_mult=1, LFE_num_scale=1,
            cross_attn_dim_head=8, cross_attn_num_heads=2,
        ),
        lambda b: video(
            b, 2, 4, 8, 6,
            image_rotary_emb=(latents(24, 16), latents(24, 16)),
            id_cond=latents(b, 8),
            id_vit_hidden=[latents(b, 4, 6)],
        ),
    ),
    "AllegroTransformer3DModel": Tiny(
        build(
            "AllegroTransformer3DModel",
            **{**HEADS, "attention_head_dim": 24}, patch_size=2, patch_size_t=1, cross_attention_dim=48,
            sample_height=8, sample_width=6, sample_frames=2, caption_channels=12,
        ),
        lambda b: video(b, encoder_attention_mask=torch.ones(b, 6), image_rotary_emb=allegro_positions(2, 4, 3)),
    ),
    "CosmosTransformer3DModel": Tiny(
        build("CosmosTransformer3DModel", **COSMOS),
        lambda b: video(
            b, timestep=torch.full((b,), 0.1), attention_mask=torch.ones(b, 6), fps=30,
            padding_mask=torch.zeros(1, 1, 8, 6),
        ),
        clock=None,
    ),
    "Cosmos 2": Tiny(
        build("CosmosTransformer3DModel", **{**COSMOS, "in_channels": 5}, extra_pos_embed_type=None),
        lambda b: video(
            b, timestep=torch.full((b, 1, 2, 1, 1), 0.5), condition_mask=torch.ones(b, 1, 2, 8, 6),
            padding_mask=torch.zeros(1, 1, 8, 6),
        ),
        clock=FLUX_CLOCK,
    ),
    "Cosmos 2.5": Tiny(
        build(
            "CosmosTransformer3DModel",
            **COSMOS, extra_pos_embed_type=None, img_context_dim_in=8, img_context_dim_out=24, img_context_num_tokens=3,
        ),
        lambda b: video(
            b, timestep=torch.full((b,), 0.5), encoder_hidden_states=(latents(b, 6, 12), latents(b, 3, 8)),
            padding_mask=torch.zeros(1, 1, 8, 6),
        ),
        clock=FLUX_CLOCK,
    ),
    "Kandinsky5Transformer3DModel": Tiny(
        build(
            "Kandinsky5Transformer3DModel",
            in_visual_dim=4, in_text_dim=12, in_text_dim2=10, time_dim=8, out_visual_dim=4, model_dim=32, ff_dim=48,
            num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 6, 6),
        ),
        lambda b: video(
            b, 2, 8, 6, 4,
            pooled_projections=latents(b, 10),
            visual_rope_pos=[torch.arange(2), torch.arange(4), torch.arange(3)],
            text_rope_pos=torch.arange(6),
        ),
    ),
    "StableAudioDiTModel": Tiny(
        build(
            "StableAudioDiTModel",
            sample_size=24, **HEADS, num_key_value_attention_heads=1, cross_attention_dim=16, time_proj_dim=8,
            global_states_input_dim=12, cross_attention_input_dim=12,
        ),
        lambda b: {
            "hidden_states": latents(b, 4, 23),
            "timestep": torch.full((b,), 0.5),
            "encoder_hidden_states": latents(b, 5, 12),
            "global_hidden_states": latents(b, 1, 12),
            "rotary_embedding": (latents(24, 8), latents(24, 8)),
        },
        clock=FLUX_CLOCK,
    ),
}  # fmt: skip
