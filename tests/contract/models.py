"""Tiny models with random weights, one for each adapter, built without a download."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from tests.contract.kit import Tiny, classes, ids, latents, of_diffusers, one_of, randomized, sample, works
from tests.contract.siblings import SIBLINGS

__all__ = ["CLOCKED", "TINY", "one_of", "sample", "works"]


def dit() -> nn.Module:
    return of_diffusers(
        "DiTTransformer2DModel",
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=4, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
    )  # fmt: skip


def pixart() -> nn.Module:
    return of_diffusers(
        "PixArtTransformer2DModel",
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=4, sample_size=8,
        patch_size=2, norm_type="ada_norm_single", cross_attention_dim=16, caption_channels=12,
        use_additional_conditions=False, interpolation_scale=1,
    )  # fmt: skip


def sd3() -> nn.Module:
    return of_diffusers(
        "SD3Transformer2DModel",
        sample_size=8, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=12, qk_norm="rms_norm", dual_attention_layers=(0, 1),
    )  # fmt: skip


def flux() -> nn.Module:
    return of_diffusers(
        "FluxTransformer2DModel",
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def wan() -> nn.Module:
    return of_diffusers(
        "WanTransformer3DModel",
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        text_dim=12, freq_dim=32, ffn_dim=48, num_layers=4, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip


def ltx() -> nn.Module:
    return of_diffusers(
        "LTXVideoTransformer3DModel",
        in_channels=4, out_channels=4, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, num_layers=4, caption_channels=12,
    )  # fmt: skip


def sana() -> nn.Module:
    return of_diffusers(
        "SanaTransformer2DModel",
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=4,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=12,
        sample_size=4, patch_size=1, mlp_ratio=2.5,
    )  # fmt: skip


def zimage() -> nn.Module:
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=4, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, norm_eps=1e-5, qk_norm=True, cap_feat_dim=12, rope_theta=256.0, t_scale=1000.0,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    with torch.no_grad():  # these two are left empty
        model.x_pad_token.fill_(0.1)
        model.cap_pad_token.fill_(0.2)
    return randomized(model)


def qwen() -> nn.Module:
    return of_diffusers(
        "QwenImageTransformer2DModel",
        patch_size=2, in_channels=16, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def flux2() -> nn.Module:
    return of_diffusers(
        "Flux2Transformer2DModel",
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip


def hunyuan() -> nn.Module:
    return of_diffusers(
        "HunyuanVideoTransformer3DModel",
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_single_layers=2, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=12, pooled_projection_dim=10, rope_axes_dim=(4, 4, 8),
    )  # fmt: skip


def cogvideox() -> nn.Module:
    return of_diffusers(
        "CogVideoXTransformer3DModel",
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=12, num_layers=4, sample_width=6, sample_height=8, sample_frames=5, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=6, use_rotary_positional_embeddings=True,
    )  # fmt: skip


def lumina2() -> nn.Module:
    return of_diffusers(
        "Lumina2Transformer2DModel",
        sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=4, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(8, 4, 4), axes_lens=(64, 32, 32),
        cap_feat_dim=12,
    )  # fmt: skip


def auraflow() -> nn.Module:
    return of_diffusers(
        "AuraFlowTransformer2DModel",
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=32,
        out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip


def timm_vit(**config: Any) -> nn.Module:
    """A classifier of timm on images of 32x48 with a class token, two register tokens and 96 patches."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    settings = {"img_size": (32, 48), "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 8}
    model = VisionTransformer(**{**settings, "reg_tokens": 2, **config})
    with torch.no_grad():  # a class token near zero would make layer norm of no use for comparisons
        model.head.weight.mul_(50)
    return randomized(model)


def own() -> nn.Module:
    from tokdyn import DiT

    torch.manual_seed(0)
    return randomized(
        DiT(sample_size=(8, 12), patch_size=2, in_channels=4, hidden_size=16, depth=4, num_heads=2, num_classes=10)
    )


def own_chunked() -> nn.Module:
    from tokdyn import DCDiT

    torch.manual_seed(0)
    model = DCDiT(sample_size=(6, 8), in_channels=4, hidden_size=32, depth=4, num_heads=2, num_classes=10, target=2.0)
    randomized(model)
    model.calibrate_router(latents(4, 4, 6, 8), 500, classes(4))
    return model


def text_lengths(batch: int, length: int) -> dict[str, Any]:
    """The lengths of texts, which Qwen-Image wants besides their mask before diffusers 0.37."""
    from diffusers import QwenImageTransformer2DModel

    wanted = "txt_seq_lens" in inspect.signature(QwenImageTransformer2DModel.forward).parameters
    return {"txt_seq_lens": [length] * batch} if wanted else {}


TINY = {
    "DiTTransformer2DModel": Tiny(
        dit,
        lambda b: {
            "hidden_states": latents(b, 4, 8, 8),
            "timestep": torch.full((b,), 500),
            "class_labels": classes(b),
        },
    ),
    "PixArtTransformer2DModel": Tiny(
        pixart,
        lambda b: {
            "hidden_states": latents(b, 4, 8, 12),
            "encoder_hidden_states": latents(b, 6, 12),
            "timestep": torch.full((b,), 500),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "SD3Transformer2DModel": Tiny(
        sd3,
        lambda b: {
            "hidden_states": latents(b, 4, 8, 12),
            "encoder_hidden_states": latents(b, 6, 12),
            "pooled_projections": latents(b, 10),
            "timestep": torch.full((b,), 500.0),
        },
    ),
    "FluxTransformer2DModel": Tiny(
        flux,
        lambda b: {
            "hidden_states": latents(b, 20, 4),
            "encoder_hidden_states": latents(b, 6, 12),
            "pooled_projections": latents(b, 10),
            "timestep": torch.full((b,), 0.5),
            "img_ids": ids(4, 5),
            "txt_ids": torch.zeros(6, 3),
            "guidance": torch.full((b,), 3.5),
        },
        clock=("timestep", 1.0, 0.0),
    ),
    "ZImageTransformer2DModel": Tiny(
        zimage,
        lambda b: {
            "x": list(latents(b, 4, 1, 8, 12)),
            "t": torch.full((b,), 0.5),
            "cap_feats": list(latents(b, 6, 12)),
        },
        clock=("t", 0.0, 1.0),
    ),
    "QwenImageTransformer2DModel": Tiny(
        qwen,
        lambda b: {
            "hidden_states": latents(b, 20, 16),
            "encoder_hidden_states": latents(b, 6, 12),
            "encoder_hidden_states_mask": torch.ones(b, 6, dtype=torch.bool),
            "timestep": torch.full((b,), 0.5),
            "img_shapes": [[(1, 4, 5)]] * b,
            **text_lengths(b, 6),
        },
        clock=("timestep", 1.0, 0.0),
    ),
    "Flux2Transformer2DModel": Tiny(
        flux2,
        lambda b: {
            "hidden_states": latents(b, 20, 4),
            "encoder_hidden_states": latents(b, 6, 12),
            "timestep": torch.full((b,), 0.5),
            "img_ids": torch.cat([ids(4, 5), torch.zeros(20, 1)], dim=1),
            "txt_ids": torch.zeros(6, 4),
            "guidance": torch.full((b,), 3.5),
        },
        clock=("timestep", 1.0, 0.0),
    ),
    "HunyuanVideoTransformer3DModel": Tiny(
        hunyuan,
        lambda b: {
            "hidden_states": latents(b, 4, 2, 8, 6),
            "encoder_hidden_states": latents(b, 6, 12),
            "encoder_attention_mask": torch.ones(b, 6, dtype=torch.long),
            "pooled_projections": latents(b, 10),
            "timestep": torch.full((b,), 500),
            "guidance": torch.full((b,), 6000.0),
        },
    ),
    "CogVideoXTransformer3DModel": Tiny(
        cogvideox,
        lambda b: {
            "hidden_states": latents(b, 2, 4, 8, 6),
            "encoder_hidden_states": latents(b, 6, 12),
            "timestep": torch.full((b,), 500),
            "image_rotary_emb": (latents(24, 16), latents(24, 16)),
        },
    ),
    "Lumina2Transformer2DModel": Tiny(
        lumina2,
        lambda b: {
            "hidden_states": latents(b, 4, 8, 12),
            "encoder_hidden_states": latents(b, 6, 12),
            "encoder_attention_mask": torch.ones(b, 6, dtype=torch.bool),
            "timestep": torch.full((b,), 0.5),
        },
        clock=("timestep", 0.0, 1.0),
    ),
    "AuraFlowTransformer2DModel": Tiny(
        auraflow,
        lambda b: {
            "hidden_states": latents(b, 4, 8, 12),
            "encoder_hidden_states": latents(b, 6, 12),
            "timestep": torch.full((b,), 0.5),
        },
        clock=("timestep", 1.0, 0.0),
    ),
    "WanTransformer3DModel": Tiny(
        wan,
        lambda b: {
            "hidden_states": latents(b, 4, 2, 8, 6),
            "encoder_hidden_states": latents(b, 6, 12),
            "timestep": torch.full((b,), 500),
        },
    ),
    "LTXVideoTransformer3DModel": Tiny(
        ltx,
        lambda b: {
            "hidden_states": latents(b, 24, 4),
            "encoder_hidden_states": latents(b, 6, 12),
            "encoder_attention_mask": torch.ones(b, 6),
            "timestep": torch.full((b,), 500.0),
            "num_frames": 2,
            "height": 3,
            "width": 4,
        },
    ),
    "SanaTransformer2DModel": Tiny(
        sana,
        lambda b: {
            "hidden_states": latents(b, 4, 4, 6),
            "encoder_hidden_states": latents(b, 6, 12),
            "encoder_attention_mask": torch.ones(b, 6),
            "timestep": torch.full((b,), 500.0),
        },
    ),
    "VisionTransformer": Tiny(timm_vit, lambda b: {"x": latents(b, 3, 32, 48)}, clock=None),
    **SIBLINGS,
    "DCDiT": Tiny(
        own_chunked,
        lambda b: {
            "hidden_states": latents(b, 4, 6, 8),
            "timestep": torch.full((b,), 500),
            "class_labels": classes(b),
        },
    ),
    "DiT": Tiny(
        own,
        lambda b: {
            "hidden_states": latents(b, 4, 8, 12),
            "timestep": torch.full((b,), 500),
            "class_labels": classes(b),
        },
    ),
}

CLOCKED = sorted(name for name, tiny in TINY.items() if tiny.clock is not None)
"""Those with a noise level."""


def sit() -> nn.Module:
    """The public DiT by the name of SiT, whose time is 1 at the image, or of REPA's, where it is 1 at noise."""
    model = TINY["DiT"].build()
    model.__class__ = type("SiT", (type(model),), {})
    return model
