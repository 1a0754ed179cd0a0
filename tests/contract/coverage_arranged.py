"""Tiny models whose blocks do not take samples on the first axis and tokens on the second, one for each adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.contract.kit import Tiny, latents, of_diffusers

FRAMES, ROWS, COLUMNS = 3, 4, 3


def latte(**config: Any) -> nn.Module:
    return of_diffusers(
        "LatteTransformer3DModel",
        **{
            "sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 4,
            "caption_channels": 12, "in_channels": 4, "cross_attention_dim": 32, "out_channels": 4,
            "attention_bias": True, "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6,
            "video_length": FRAMES, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, **config,
        },
    )  # fmt: skip


def latte_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": latents(batch, 4, FRAMES, 2 * ROWS, 2 * COLUMNS),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": latents(batch, 6, 12),
    }


def cosmos3(**config: Any) -> nn.Module:
    return of_diffusers(
        "Cosmos3OmniTransformer",
        **{
            "head_dim": 8, "hidden_size": 32, "intermediate_size": 48, "latent_channel": 4, "patch_latent_dim": 16,
            "num_attention_heads": 4, "num_hidden_layers": 4, "num_key_value_heads": 2, "vocab_size": 20,
            "rope_axes_dim": [2, 1, 1], "sound_gen": True, "sound_dim": 5, "action_gen": True, "action_dim": 3,
            "num_embodiment_domains": 2, **config,
        },
    )  # fmt: skip


def cosmos3_inputs(batch: int = 1, first: int = 1, sound: int = 7, action: int = 0, level: float = 0.5) -> Any:
    """One sample: five text tokens, a video whose first frames are a condition, and tokens of sound and action."""
    text, cells = 5, FRAMES * ROWS * COLUMNS
    length = text + cells + sound + action
    video = torch.arange(text, text + cells)
    call: dict[str, Any] = {
        "input_ids": torch.arange(text),
        "text_indexes": torch.arange(text),
        "position_ids": torch.arange(float(length)).expand(3, -1),
        "und_len": text,
        "sequence_length": length,
        "vision_tokens": [latents(1, 4, FRAMES, 2 * ROWS, 2 * COLUMNS)],
        "vision_token_shapes": [(FRAMES, ROWS, COLUMNS)],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video[first * ROWS * COLUMNS :],
        "vision_timesteps": torch.full(((FRAMES - first) * ROWS * COLUMNS,), 1000 * level),
        "vision_noisy_frame_indexes": [torch.arange(first, FRAMES)],
    }
    start = text + cells
    for kind, count, tokens in (
        ("sound", sound, latents(1, 5, sound)[0]),
        ("action", action, latents(1, action, 3)[0]),
    ):
        if count:
            places = torch.arange(start, start + count)
            call |= {
                f"{kind}_tokens": [tokens],
                f"{kind}_token_shapes": [(count, 1, 1)],
                f"{kind}_sequence_indexes": places,
                f"{kind}_mse_loss_indexes": places,
                f"{kind}_timesteps": torch.full((count,), 1000 * level),
                f"{kind}_noisy_frame_indexes": [torch.arange(count)],
            }
            start += count
    return {**call, "action_domain_ids": [torch.tensor(1)]} if action else call


STORED, PLACES = 2, 6  # frames of the driving video, and tokens of a frame


def _sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Tell which keys a query sees: all of the video, and those of the driving video at its frame."""
    video = (STORED + 1) * PLACES
    driving = key - 128
    same = (query // PLACES == driving // PLACES + 1) & (driving >= 0) & (driving < STORED * PLACES)
    return (query < video) & ((key < video) | same)


def wan_animate2(layers: int = 3) -> nn.Module:
    """A model with its mask for attention, which it would compile for minutes."""
    from torch.nn.attention.flex_attention import create_block_mask

    model: Any = of_diffusers(
        "WanAnimate2Transformer3DModel",
        text_len=6, in_dim=7, dim=32, ffn_dim=48, freq_dim=8, text_dim=12, out_dim=4, num_heads=2, num_layers=layers,
        use_img_emb=False,
    )  # fmt: skip
    model.block_masks[STORED, PLACES] = create_block_mask(_sees, None, None, 128, 256, device="cpu")
    return model


def wan_animate2_cache(batch: int, layers: int = 3) -> Any:
    """Keys and values of a driving video."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    cache = WanAnimate2KVCache(layers)
    for layer in range(layers):
        stored = latents(batch, 2, STORED * PLACES, 2, 16) * (layer + 1)
        cache.get(layer).store(stored[:, 0], stored[:, 1])
    return cache


def wan_animate2_inputs(batch: int, layers: int = 3) -> dict[str, Any]:
    return {
        "hidden_states": list(latents(batch, 4, STORED + 1, 4, 6)),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": list(latents(batch, 5, 12)),
        "condition_latents": list(latents(batch, 3, STORED + 1, 4, 6)),
        "kv_cache": wan_animate2_cache(batch, layers),
        "kv_cache_mode": "cached",
        "seq_len": (STORED + 1) * PLACES,
        "reference_grid_sizes": torch.tensor([[STORED, 2, 3]]).expand(batch, 3),
        "origin_len": 5,
        "origin_area": [32, 48],
    }


def anyflow_far() -> nn.Module:
    return of_diffusers(
        "AnyFlowFARTransformer3DModel",
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=12, freq_dim=16,
        ffn_dim=32, num_layers=3, rope_max_seq_len=32, chunk_partition=(1, 1),
    )  # fmt: skip


def anyflow_far_cache(batch: int, layers: int = 3) -> dict[int, dict[str, Tensor]]:
    """Keys and values of one frame of 4 x 4 tokens, for each layer."""
    return {
        layer: {
            "full_cache": latents(batch, 2, 2, 3 * 16, 16).transpose(0, 1) * (layer + 1),
            "compressed_cache": torch.zeros(2, batch, 2, 16, 16),
        }
        for layer in range(layers)
    }


def anyflow_far_inputs(batch: int) -> dict[str, Any]:
    """The second frame of a video."""
    return {
        "hidden_states": latents(batch, 1, 4, 8, 8),
        "timestep": torch.full((batch, 1), 500.0),
        "r_timestep": torch.full((batch, 1), 400.0),
        "encoder_hidden_states": latents(batch, 6, 12),
        "chunk_partition": [1, 1],
        "kv_cache": anyflow_far_cache(batch),
        "kv_cache_flag": {"num_cached_chunks": 1, "is_cache_step": False},
    }


ARRANGED: dict[str, Tiny] = {
    "LatteTransformer3DModel": Tiny(latte, latte_inputs),
    "Cosmos3OmniTransformer": Tiny(cosmos3, cosmos3_inputs, clock=("vision_timesteps", 1000.0, 0.0)),
    "WanAnimate2Transformer3DModel": Tiny(wan_animate2, wan_animate2_inputs),
    "AnyFlowFARTransformer3DModel": Tiny(anyflow_far, anyflow_far_inputs),
}
"""One for each class. Cosmos 3 takes one sample, whatever the batch."""
