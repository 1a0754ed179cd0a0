"""Tiny image models of diffusers with random weights that are checked by `test_coverage.py` alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.contract.kit import Tiny, ids, latents, of_diffusers

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
FLUX = {**HEADS, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 12}
JOY = {
    "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 12, "num_layers": 4,
    "rope_dim_list": [4, 6, 6],
}  # fmt: skip
AXES = {"axes_dims_rope": (4, 4, 8)}


def bria(**config: Any) -> nn.Module:
    return of_diffusers("BriaTransformer2DModel", **{**FLUX, **AXES, **config})


def fibo() -> nn.Module:
    return of_diffusers("BriaFiboTransformer2DModel", **FLUX, **AXES, text_encoder_dim=12)


def hunyuan_image() -> nn.Module:
    return of_diffusers(
        "HunyuanImageTransformer2DModel",
        **HEADS, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, num_refiner_layers=1,
        patch_size=(1, 1), text_embed_dim=12, rope_axes_dim=(8, 8),
    )  # fmt: skip


def flux3() -> nn.Module:
    return of_diffusers("Flux3Transformer2DModel", **FLUX, cond_in_channels=4, axes_dims_rope=(4, 4, 4, 4))


def krea2() -> nn.Module:
    return of_diffusers(
        "Krea2Transformer2DModel",
        in_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, timestep_embed_dim=16, text_hidden_dim=12, num_text_layers=2, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def ideogram4() -> nn.Module:
    return of_diffusers(
        "Ideogram4Transformer2DModel",
        **HEADS, in_channels=4, num_layers=4, intermediate_size=48, adaln_dim=16, llm_features_dim=12,
        mrope_section=(4, 2, 2),
    )  # fmt: skip


def prx() -> nn.Module:
    return of_diffusers(
        "PRXTransformer2DModel",
        in_channels=4, context_in_dim=12, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=4, axes_dim=[8, 8],
    )  # fmt: skip


def glm_image() -> nn.Module:
    return of_diffusers(
        "GlmImageTransformer2DModel",
        **HEADS, in_channels=4, out_channels=4, num_layers=4, text_embed_dim=12, time_embed_dim=8, condition_dim=4,
        prior_vq_quantizer_codebook_size=10,
    )  # fmt: skip


def joyimage() -> nn.Module:
    return of_diffusers("JoyImageEditTransformer3DModel", **JOY)


def joyimage_plus() -> nn.Module:
    return of_diffusers("JoyImageEditPlusTransformer3DModel", **JOY)


def lumina_next() -> nn.Module:
    model = of_diffusers(
        "LuminaNextDiT2DModel",
        patch_size=2, in_channels=4, hidden_size=32, num_layers=4, num_attention_heads=4, num_kv_heads=2,
        multiple_of=16, qk_norm=False, cross_attention_dim=12,
    )  # fmt: skip
    with torch.no_grad():  # left empty
        model.pad_token.fill_(0.1)
    return model


def nucleus() -> nn.Module:
    model = of_diffusers(
        "NucleusMoEImageTransformer2DModel",
        **HEADS, in_channels=4, num_layers=4, num_key_value_heads=1, joint_attention_dim=12, mlp_ratio=6.0,
        dense_moe_strategy="leave_first_block_dense", num_experts=3, moe_intermediate_dim=16, capacity_factors=2.0,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    with torch.no_grad():  # left empty
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.copy_(0.1 * latents(1, *parameter.shape)[0])
    return model


def omnigen() -> nn.Module:
    return of_diffusers(
        "OmniGenTransformer2DModel",
        in_channels=4, hidden_size=32, num_attention_heads=4, num_key_value_heads=4, intermediate_size=48, num_layers=4,
        pad_token_id=0, vocab_size=30, max_position_embeddings=64, original_max_position_embeddings=64,
        pos_embed_max_size=16, time_step_dim=16, rope_scaling={"short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    )  # fmt: skip


def qwen21() -> nn.Module:
    return of_diffusers(
        "QwenImage21Transformer2DModel",
        **HEADS, in_channels=4, out_channels=4, num_layers=4, context_in_dim=12, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def ernie_image() -> nn.Module:
    return of_diffusers(
        "ErnieImageTransformer2DModel",
        hidden_size=32, num_attention_heads=2, num_layers=4, ffn_hidden_size=48, in_channels=4, out_channels=4,
        text_in_dim=12, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip


def fibo2() -> nn.Module:
    return of_diffusers(
        "BriaFibo2Transformer2DModel",
        in_channels=4, dim=64, n_layers=4, n_refiner_layers=1, n_heads=4, cap_feat_dim=12, injection_layer_ids=(1, 3),
        perceiver_num_layers=1, min_num_gist_tokens=2, max_num_gist_tokens=6, gist_step=2, gist_min_text_len=2,
        gist_max_text_len=8, axes_dims=(4, 6, 6), axes_lens=(16, 16, 16),
    )  # fmt: skip


def hidream() -> nn.Module:
    return of_diffusers(
        "HiDreamImageTransformer2DModel",
        **HEADS, patch_size=2, in_channels=4, num_layers=2, num_single_layers=2, caption_channels=[12, 10],
        text_emb_dim=8, num_routed_experts=3, num_activated_experts=2, axes_dims_rope=(4, 6, 6),
        max_resolution=(16, 16), llama_layers=[0, 1, 0, 1], force_inference_output=True,
    )  # fmt: skip


def hunyuan_dit() -> nn.Module:
    return of_diffusers(
        "HunyuanDiT2DModel",
        **HEADS, in_channels=4, patch_size=2, sample_size=8, hidden_size=32, num_layers=4, cross_attention_dim=12,
        cross_attention_dim_t5=16, pooled_projection_dim=8, text_len=4, text_len_t5=3,
        use_style_cond_and_image_meta_size=False,
    )  # fmt: skip


def packed(batch: int, **more: Any) -> dict[str, Any]:
    """Arguments of a model that gets a packed image of 4 x 5 cells and its position ids."""
    return {
        "hidden_states": latents(batch, 20, 4),
        "encoder_hidden_states": latents(batch, 6, 12),
        "timestep": torch.full((batch,), 500.0),
        "img_ids": ids(4, 5),
        "txt_ids": torch.zeros(6, 3),
        **more,
    }


def places(text: int, offset: int = 0) -> Tensor:
    """(text + 20, 3) position ids of text tokens and of an image of 4 x 5 cells."""
    return torch.cat([torch.zeros(text, 3), ids(4, 5) + torch.tensor([0, offset, offset])])


def masked(batch: int) -> Tensor:
    """(B, 6) which of the text tokens are no padding."""
    return torch.arange(6) < torch.tensor([4, *[6] * (batch - 1)])[:, None]


def ideogram4_inputs(batch: int) -> dict[str, Any]:
    """Prompts of different lengths, padded on the left."""
    role = torch.cat([torch.full((batch, 6), 3), torch.full((batch, 20), 2)], dim=1)
    role[0, :2] = 0
    return {
        "hidden_states": latents(batch, 26, 4),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": latents(batch, 26, 12),
        "position_ids": places(6, offset=65536).long().expand(batch, -1, -1),
        "segment_ids": torch.where(role == 0, -1, 1),
        "indicator": role,
    }


FLOW = ("timestep", 1.0, 0.0)
IMAGES: dict[str, Tiny] = {
    "BriaTransformer2DModel": Tiny(bria, packed),
    "BriaFiboTransformer2DModel": Tiny(
        fibo, lambda b: packed(b, text_encoder_layers=[latents(b, 6, 12) + layer for layer in range(4)])
    ),
    "HunyuanImageTransformer2DModel": Tiny(
        hunyuan_image,
        lambda b: {
            "hidden_states": latents(b, 4, 4, 6),
            "timestep": torch.full((b,), 500.0),
            "encoder_hidden_states": latents(b, 6, 12),
            "encoder_attention_mask": masked(b).long(),
        },
    ),
    "Flux3Transformer2DModel": Tiny(
        flux3,
        lambda b: packed(
            b,
            timestep=torch.full((b,), 0.5),
            img_ids=torch.cat([ids(4, 5), torch.zeros(20, 1)], 1),
            txt_ids=torch.zeros(6, 4),
        ),
        clock=FLOW,
    ),
    "Krea2Transformer2DModel": Tiny(
        krea2,
        lambda b: {
            "hidden_states": latents(b, 20, 4),
            "encoder_hidden_states": latents(b, 6, 2, 12),
            "timestep": torch.full((b,), 0.5),
            "position_ids": places(6),
            "encoder_attention_mask": masked(b),
        },
        clock=FLOW,
        shared=frozenset({"position_ids"}),
    ),
    "Ideogram4Transformer2DModel": Tiny(ideogram4, ideogram4_inputs, clock=("timestep", 0.0, 1.0)),
    "PRXTransformer2DModel": Tiny(
        prx,
        lambda b: {
            "hidden_states": latents(b, 4, 8, 12),
            "timestep": torch.full((b,), 0.5),
            "encoder_hidden_states": latents(b, 6, 12),
            "attention_mask": masked(b),
        },
        clock=FLOW,
    ),
    "GlmImageTransformer2DModel": Tiny(
        glm_image,
        lambda b: {
            "hidden_states": latents(b, 4, 8, 12),
            "encoder_hidden_states": latents(b, 6, 12),
            "prior_token_id": torch.arange(24).expand(b, -1) % 10,
            "prior_token_drop": torch.zeros(b, 24, dtype=torch.bool),
            "timestep": torch.full((b,), 499.0),
            "target_size": torch.full((b, 2), 20.0),
            "crop_coords": torch.zeros(b, 2),
        },
        clock=("timestep", 999.0, -1.0),
    ),
    "JoyImageEditTransformer3DModel": Tiny(
        joyimage,
        lambda b: {
            "hidden_states": latents(b, 1, 4, 1, 8, 12),
            "timestep": torch.full((b,), 500.0),
            "encoder_hidden_states": latents(b, 6, 12),
        },
    ),
    "JoyImageEditPlusTransformer3DModel": Tiny(
        joyimage_plus,
        lambda b: {
            "hidden_states": latents(b, 24, 4, 1, 2, 2),
            "timestep": torch.full((b,), 500.0),
            "encoder_hidden_states": latents(b, 6, 12),
            "encoder_hidden_states_mask": masked(b),
            "shape_list": [[(1, 4, 6)]] * b,
        },
    ),
    "LuminaNextDiT2DModel": Tiny(
        lumina_next,
        lambda b: {
            "hidden_states": latents(b, 4, 8, 12),
            "timestep": torch.full((b,), 0.5),
            "encoder_hidden_states": latents(b, 6, 12),
            "encoder_mask": masked(b),
            "image_rotary_emb": torch.polar(torch.ones(16, 16, 4), torch.linspace(0, 6, 1024).view(16, 16, 4)),
            "cross_attention_kwargs": {},
        },
        clock=("timestep", 0.0, 1.0),
    ),
    "NucleusMoEImageTransformer2DModel": Tiny(
        nucleus,
        lambda b: {
            "hidden_states": latents(b, 24, 4),
            "img_shapes": [(1, 4, 6)] * b,
            "encoder_hidden_states": latents(b, 6, 12),
            "encoder_hidden_states_mask": masked(b),
            "timestep": torch.full((b,), 0.5),
        },
        clock=FLOW,
    ),
    "OmniGenTransformer2DModel": Tiny(
        omnigen,
        lambda b: {
            "hidden_states": latents(b, 4, 8, 12),
            "timestep": torch.full((b,), 0.5),
            "input_ids": torch.arange(1, 6).expand(b, -1),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(30, 30).tril(24).expand(b, -1, -1),
            "position_ids": torch.arange(30).expand(b, -1),
        },
        clock=("timestep", 0.0, 1.0),
    ),
    "QwenImage21Transformer2DModel": Tiny(
        qwen21,
        lambda b: {
            "hidden_states": latents(b, 24, 4),
            "encoder_hidden_states": latents(b, 6, 12),
            "timestep": torch.full((b,), 0.5),
            "img_shapes": [[(1, 4, 6)]] * b,
            "img_mask": torch.cat([torch.zeros(b, 6), torch.ones(b, 6)], dim=1).bool(),
            "encoder_hidden_states_mask": masked(b),
        },
        clock=FLOW,
    ),
    "ErnieImageTransformer2DModel": Tiny(
        ernie_image,
        lambda b: {
            "hidden_states": latents(b, 4, 4, 6),
            "timestep": torch.full((b,), 500.0),
            "text_bth": latents(b, 6, 12),
            "text_lens": masked(b).sum(dim=1),
        },
    ),
    "BriaFibo2Transformer2DModel": Tiny(
        fibo2,
        lambda b: {
            "hidden_states": latents(b, 4, 8, 12),
            "timestep": torch.full((b,), 0.5),
            "encoder_hidden_states": latents(b, 3, 6, 12),
            "encoder_attention_mask": torch.ones(b, 6, dtype=torch.bool),
        },
        clock=FLOW,
    ),
    "HiDreamImageTransformer2DModel": Tiny(
        hidream,
        lambda b: {
            "hidden_states": latents(b, 4, 8, 12),
            "timesteps": torch.full((b,), 500.0),
            "encoder_hidden_states_t5": latents(b, 3, 12),
            "encoder_hidden_states_llama3": [latents(b, 4, 10), latents(b, 4, 10) + 1],
            "pooled_embeds": latents(b, 8),
        },
        clock=("timesteps", 1000.0, 0.0),
    ),
    "HunyuanDiT2DModel": Tiny(
        hunyuan_dit,
        lambda b: {
            "hidden_states": latents(b, 4, 8, 12),
            "timestep": torch.full((b,), 500.0),
            "encoder_hidden_states": latents(b, 4, 12),
            "text_embedding_mask": masked(b)[:, 2:],
            "encoder_hidden_states_t5": latents(b, 3, 16),
            "text_embedding_mask_t5": torch.ones(b, 3),
            "image_rotary_emb": (latents(24, 16), latents(24, 16)),
        },
    ),
}
"""One for each class."""
