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
    "audio_num_frames", "timestep_indices", "token_tags", "position_ids", "video_indices", "audio_indices",
    "text_indices", "indices_latents", "indices_latents_clean", "indices_latents_history_2x",
    "indices_latents_history_4x",
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


def ltx2(**config: Any) -> Callable[[], nn.Module]:
    return build(
        "LTX2VideoTransformer3DModel",
        **{
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
            "cross_attention_dim": 32, "audio_in_channels": 5, "audio_out_channels": 5,
            "audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16,
            "num_layers": 3, "caption_channels": 12, **config,
        },
    )  # fmt: skip


def ltx2_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": latents(batch, 24, 4),
        "audio_hidden_states": latents(batch, 7, 5),
        "encoder_hidden_states": latents(batch, 6, 12),
        "audio_encoder_hidden_states": latents(batch, 6, 12),
        "timestep": torch.full((batch,), 500.0),
        **{name: torch.ones(batch, 6) for name in ("encoder_attention_mask", "audio_encoder_attention_mask")},
        **{"num_frames": 2, "height": 3, "width": 4, "audio_num_frames": 7},
    }


def h3_inputs(batch: int) -> dict[str, Any]:
    """Six text tokens, four of a first frame as a condition, five of sound, and 2 x 2 x 3 of the video."""
    text, condition, audio, frames, rows, columns = 6, 6, 5, 2, 2, 3
    place = torch.zeros(text + condition + audio + frames * rows * columns, 3)
    place[:text, 0] = torch.arange(text)
    frame = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    place[text : text + condition] = torch.cat([torch.full((condition, 1), 6.0), frame], dim=1)
    sound = slice(text + condition, text + condition + audio)
    place[sound, 0] = 6 + torch.arange(audio) / 2
    start = sound.stop
    place[start:, 0] = 6 + torch.arange(frames).repeat_interleave(rows * columns)
    place[start:, 1:] = frame.repeat(frames, 1)
    video_rows = torch.cat([torch.arange(text, text + condition), torch.arange(start, len(place))])
    tags = torch.zeros(len(place), dtype=torch.long)
    tags[video_rows], tags[sound] = 1, 2
    steps = torch.ones(len(place), dtype=torch.long)
    steps[text : text + condition] = 2
    steps[sound] = 0
    return {
        "hidden_states": latents(batch, condition + frames * rows * columns, 8),
        "audio_hidden_states": latents(batch, audio, 5),
        "encoder_hidden_states": latents(batch, text, 12),
        "timestep": torch.tensor([0.3, 0.5, 0.9]),
        "timestep_indices": steps,
        "token_tags": tags,
        "position_ids": place,
        "video_indices": video_rows,
        "audio_indices": torch.arange(sound.start, sound.stop),
        "text_indices": torch.arange(text),
    }


COSMOS = {
    **HEADS, "attention_head_dim": 12, "mlp_ratio": 2, "text_embed_dim": 12, "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
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
    "HunyuanVideoFramepackTransformer3DModel": Tiny(
        build(
            "HunyuanVideoFramepackTransformer3DModel",
            **{**HEADS, "num_layers": 2}, num_single_layers=2, num_refiner_layers=1, patch_size=2, text_embed_dim=12,
            pooled_projection_dim=10, rope_axes_dim=(4, 4, 8), has_image_proj=True, image_proj_dim=8,
            has_clean_x_embedder=True,
        ),
        lambda b: video(
            b,
            encoder_attention_mask=torch.ones(b, 6, dtype=torch.long),
            pooled_projections=latents(b, 10),
            image_embeds=latents(b, 3, 8),
            guidance=torch.full((b,), 6000.0),
            indices_latents=torch.arange(9, 11),
            latents_clean=latents(b, 4, 2, 8, 6), indices_latents_clean=torch.tensor([0, 8]),
            latents_history_2x=latents(b, 4, 2, 8, 6), indices_latents_history_2x=torch.arange(6, 8),
            latents_history_4x=latents(b, 4, 4, 8, 6), indices_latents_history_4x=torch.arange(2, 6),
        ),
    ),
    "MochiTransformer3DModel": Tiny(
        build(
            "MochiTransformer3DModel",
            **HEADS, patch_size=2, pooled_projection_dim=16, text_embed_dim=16, time_embed_dim=4, max_sequence_length=6,
        ),
        lambda b: video(
            b, encoder_hidden_states=latents(b, 6, 16), encoder_attention_mask=torch.ones(b, 6, dtype=torch.bool)
        ),
        clock=("timestep", 0.0, 1000.0),
    ),
    "EasyAnimateTransformer3DModel": Tiny(build("EasyAnimateTransformer3DModel", **EASYANIMATE), video),
    "EasyAnimate with shared layers": Tiny(
        build("EasyAnimateTransformer3DModel", **EASYANIMATE, mmdit_layers=2), video
    ),
    "ConsisIDTransformer3DModel": Tiny(
        build(
            "ConsisIDTransformer3DModel",
            **{**HEADS, "num_layers": 4}, time_embed_dim=4, text_embed_dim=12, sample_width=6, sample_height=8,
            sample_frames=8, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=6,
            use_rotary_positional_embeddings=True,
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
        clock=("timestep", 1.0, -1.0),  # falls with the noise level, though not in proportion
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
            pooled_projections=latents(b, 10), text_rope_pos=torch.arange(6),
            visual_rope_pos=[torch.arange(2), torch.arange(4), torch.arange(3)],
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
    "StableAudio3DiTModel": Tiny(
        build(
            "StableAudio3DiTModel",
            io_channels=4, embed_dim=32, depth=3, num_heads=2, cond_token_dim=12, global_cond_dim=10,
            local_add_cond_dim=5, timestep_features_dim=8, ff_mult=2.0, num_memory_tokens=3,
        ),
        lambda b: {
            "hidden_states": latents(b, 4, 23),
            "timestep": torch.full((b,), 0.5),
            "encoder_hidden_states": latents(b, 5, 12),
            "global_hidden_states": latents(b, 10),
            "local_add_cond": latents(b, 5, 23),
        },
        clock=FLUX_CLOCK,
    ),
    "AceStepTransformer1DModel": Tiny(
        build(
            "AceStepTransformer1DModel",
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
            head_dim=16, in_channels=12, audio_acoustic_hidden_dim=4, patch_size=2, sliding_window=5,
        ),
        lambda b: {
            "hidden_states": latents(b, 23, 4),
            "timestep": torch.full((b,), 0.5),
            "timestep_r": torch.full((b,), 0.5),
            "encoder_hidden_states": latents(b, 5, 32),
            "context_latents": latents(b, 23, 8),
        },
        clock=FLUX_CLOCK,
    ),
    "LongCatAudioDiTTransformer": Tiny(
        build(
            "LongCatAudioDiTTransformer",
            dit_dim=32, dit_depth=3, dit_heads=2, dit_text_dim=12, latent_dim=4, ff_mult=2.0,
        ),
        lambda b: {
            "hidden_states": latents(b, 23, 4),
            "encoder_hidden_states": latents(b, 5, 12),
            "encoder_attention_mask": torch.ones(b, 5, dtype=torch.bool),
            "timestep": torch.full((b,), 0.5),
            "attention_mask": torch.ones(b, 23, dtype=torch.bool),
            "latent_cond": latents(b, 23, 4),
        },
        clock=FLUX_CLOCK,
    ),
    "MiniMaxMusic3Transformer1DModel": Tiny(
        build(
            "MiniMaxMusic3Transformer1DModel",
            in_channels=4, condition_dim=12, num_layers=3, num_attention_heads=2, attention_head_dim=16,
            ff_inner_dim=48, rotary_dim=8, fourier_embedding_dim=8,
        ),
        lambda b: {
            "hidden_states": latents(b, 4, 23),
            "timestep": torch.full((b,), 0.5),
            "encoder_hidden_states": latents(b, 23, 12),
        },
        clock=("timestep", 0.0, 1.0),
    ),
    "LTX2VideoTransformer3DModel": Tiny(ltx2(), ltx2_inputs),
    "LTX-2.3": Tiny(
        ltx2(
            rope_type="split", gated_attn=True, audio_gated_attn=True, cross_attn_mod=True, audio_cross_attn_mod=True,
            perturbed_attn=True,
        ),
        lambda b: {**ltx2_inputs(b), "sigma": torch.full((b,), 500.0)},
    ),
    "Kandinsky6Transformer3DModel": Tiny(
        build(
            "Kandinsky6Transformer3DModel",
            in_visual_dim=4, out_visual_dim=4, in_text_dim=12, in_text_dim2=10, time_dim=8, model_dim=32, ff_dim=48,
            num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 6, 6), visual_cond=False, in_audio_dim=5,
            out_audio_dim=5, model_dim_a=16, ff_dim_a=24, axes_dims_a=(2, 4, 2), ca_rope=False,
        ),
        lambda b: video(b, 2, 8, 6, 4, pooled_projections=latents(b, 10), audio_hidden_states=latents(b, 7, 5)),
    ),
    "MiniMaxH3Transformer3DModel": Tiny(
        build(
            "MiniMaxH3Transformer3DModel",
            num_attention_heads=2, attention_head_dim=16, hidden_size=32, num_layers=3, num_refiner_layers=1,
            ffn_dim=48, in_channels=2, audio_in_channels=5, text_dim=12, freq_dim=8, time_embed_hidden_dim=16,
            time_embed_dim=8, rope_freq_dim=2,
        ),
        h3_inputs,
        clock=("timestep", 0.0, 1.0),
    ),
    "SanaVideoTransformer3DModel": Tiny(
        build(
            "SanaVideoTransformer3DModel",
            **HEADS, num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32,
            caption_channels=12, sample_size=8,
        ),
        lambda b: video(b, encoder_attention_mask=torch.ones(b, 6)),
    ),
    "Kandinsky6SRTransformer3DModel": Tiny(
        build(
            "Kandinsky6SRTransformer3DModel",
            in_visual_dim=4, out_visual_dim=4, time_dim=8, model_dim=32, ff_dim=48, num_visual_blocks=2,
            axes_dims=(4, 6, 6),
        ),
        lambda b: {"hidden_states": latents(b, 1, 8, 16, 9), "timestep": torch.full((b,), 500.0)},
    ),
    "SanaWMTransformer3DModel": Tiny(
        build(
            "SanaWMTransformer3DModel",
            in_channels=4, num_layers=3, hidden_size=32, num_attention_heads=2, softmax_every_n=2, linear_head_dim=16,
            chunk_plucker_channels=6, chunk_plucker_post_attn_blocks=2, caption_channels=12, mlp_ratio=2.0,
        ),
        lambda b: video(
            b, 4, 2, 4, 3, timestep=torch.full((b, 1, 2), 500.0), encoder_hidden_states=latents(b, 1, 6, 12),
            encoder_attention_mask=torch.ones(b, 6),
        ),
    ),
    "MotifVideoTransformer3DModel": Tiny(
        build(
            "MotifVideoTransformer3DModel",
            **{**HEADS, "num_layers": 2}, num_single_layers=2, mlp_ratio=2.0, text_embed_dim=12,
            rope_axes_dim=(4, 6, 6), enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True,
        ),
        lambda b: video(b, encoder_attention_mask=torch.ones(b, 6)),
    ),
    "WanAnimateTransformer3DModel": Tiny(
        build(
            "WanAnimateTransformer3DModel",
            **{**WAN, "in_channels": 12, "rope_max_seq_len": 32}, latent_channels=4, image_dim=8, added_kv_proj_dim=32,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16, motion_style_dim=8,
            motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        lambda b: video(
            b, 12, 3, 8, 6,
            encoder_hidden_states_image=latents(b, 3, 8),
            pose_hidden_states=latents(b, 4, 2, 8, 6),
            face_pixel_values=latents(b, 3, 5, 16, 16),
        ),
    ),
    "AnyFlowTransformer3DModel": Tiny(
        build(
            "AnyFlowTransformer3DModel",
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=12, freq_dim=8,
            ffn_dim=48, num_layers=3, rope_max_seq_len=32,
        ),
        lambda b: video(
            b, 2, 4, 8, 6, timestep=torch.full((b, 2), 500.0), r_timestep=torch.full((b, 2), 300.0)
        ),
    ),
    "HeliosTransformer3DModel": Tiny(
        build(
            "HeliosTransformer3DModel",
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=12, freq_dim=8,
            ffn_dim=48, num_layers=3, rope_dim=(4, 6, 6), is_amplify_history=True,
        ),
        lambda b: video(
            b,
            indices_hidden_states=torch.arange(7, 9).expand(b, 2),
            indices_latents_history_short=torch.arange(5, 7).expand(b, 2), latents_history_short=latents(b, 4, 2, 8, 6),
            indices_latents_history_mid=torch.arange(3, 5).expand(b, 2), latents_history_mid=latents(b, 4, 2, 8, 6),
            indices_latents_history_long=torch.arange(0, 4).expand(b, 4), latents_history_long=latents(b, 4, 4, 8, 6),
        ),
    ),
}  # fmt: skip
