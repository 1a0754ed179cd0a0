"""Tiny models of the transformer classes of diffusers for which no adapter is declared."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.contract.kit import Tiny, latents, of_diffusers

UNET = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 16, "num_layers": 3, "norm_num_groups": 4,
}  # fmt: skip


def unet_part(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": latents(batch, 16, 4, 6),
        "encoder_hidden_states": latents(batch, 6, 12),
        "timestep": torch.full((batch,), 500),
    }


def build(name: str, **config: Any) -> nn.Module:
    return of_diffusers(name, **config)


def sana_refiner() -> nn.Module:
    return build(
        "SanaWMLTX2RefinerTransformer3DModel",
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8,
        audio_cross_attention_dim=16, num_layers=3, caption_channels=12,
    )  # fmt: skip


def proteina() -> nn.Module:
    return build(
        "RFD4ProteinaTransformer",
        nlayers=3, token_dim=16, nheads=2, dim_cond=8, pair_repr_dim=8, latent_dim=4, token_type_emb_dim=4,
        cath_emb_dim=4, t_emb_dim=8, seq_sep_dim=8, xt_pair_dist_dim=6, tri_mult_c=8, num_sequence_classes=5,
        feats_seq=("xt_bb_ca",), feats_cond_seq=("time_emb_bb_ca",), feats_pair_repr=("xt_bb_ca_pair_dists",),
        feats_pair_cond=("time_emb_bb_ca",),
    )  # fmt: skip


TINY_UNDECLARED: dict[str, Tiny] = {
    "DreamLiteTransformer2DModel": Tiny(
        lambda: build("DreamLiteTransformer2DModel", **UNET, cross_attention_dim=12), unet_part
    ),
    "MiniMaxMusic3RVQDepthDecoder": Tiny(
        lambda: build(
            "MiniMaxMusic3RVQDepthDecoder",
            hidden_size=16, num_layers=3, num_attention_heads=2, intermediate_size=24, audio_vocab_size=8,
            num_codebooks=3,
        ),
        lambda b: {"inputs_embeds": latents(b, 4, 16)},
        clock=None,
    ),
    "PriorTransformer": Tiny(
        lambda: build(
            "PriorTransformer",
            num_attention_heads=2, attention_head_dim=8, num_layers=3, embedding_dim=12, num_embeddings=6,
            additional_embeddings=4,
        ),
        lambda b: {
            "hidden_states": latents(b, 12),
            "timestep": torch.full((b,), 500),
            "proj_embedding": latents(b, 12),
            "encoder_hidden_states": latents(b, 6, 12),
        },
    ),
    "RFD4ProteinaTransformer": Tiny(
        proteina,
        lambda b: {
            "bb_ca": latents(b, 6, 3),
            "local_latents": latents(b, 6, 4),
            "bb_ca_time": torch.full((b,), 0.5),
            "local_latents_time": torch.full((b,), 0.5),
            "padding_mask": torch.ones(b, 6),
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(b, 6),
                "supports_local_latent": torch.ones(b, 6),
            },
        },
        clock=None,
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Tiny(
        sana_refiner,
        lambda b: {
            "hidden_states": latents(b, 24, 4),
            "encoder_hidden_states": latents(b, 6, 12),
            "timestep": torch.full((b, 1), 500.0),
            "video_rotary_emb": (latents(b, 24, 32), latents(b, 24, 32)),
        },
    ),
    "T5FilmDecoder": Tiny(
        lambda: build(
            "T5FilmDecoder", input_dims=8, targets_length=10, d_model=16, num_layers=3, num_heads=2, d_kv=8, d_ff=24
        ),
        lambda b: {
            "encodings_and_masks": [(latents(b, 6, 16), torch.ones(b, 6))],
            "decoder_input_tokens": latents(b, 10, 8),
            "decoder_noise_time": torch.full((b,), 0.5),
        },
        clock=None,
    ),
    "Transformer2DModel": Tiny(lambda: build("Transformer2DModel", **UNET, cross_attention_dim=12), unet_part),
    "TransformerTemporalModel": Tiny(
        lambda: build("TransformerTemporalModel", **UNET),
        lambda b: {
            "hidden_states": latents(2 * b, 16, 4, 6),
            "timestep": torch.full((b,), 500),
            "num_frames": 2,
        },
    ),
}  # fmt: skip
"""One for each class."""
