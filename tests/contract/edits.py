"""Pipelines that give references to the model: pictures to edit, and frames that a video begins with."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from PIL import Image

from tests.contract.coverage_videos import COSMOS
from tests.contract.kit import latents, of_diffusers
from tests.contract.pipelines import flux, prompts
from tests.contract.pipelines import ltx as ltx_of_text
from tests.contract.pipelines import wan as wan_of_text
from tests.contract.references import qwen_model, token_replace
from tests.contract.stacks import KNOWN


def picture(width: int = 16, height: int = 16) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def kontext_pipe() -> Any:
    return diffusers.FluxKontextPipeline(**flux().components)


def qwen_pipe() -> Any:
    decoder = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    model, scheduler = qwen_model(), diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.QwenImageEditPlusPipeline(scheduler, decoder, None, None, None, model)


def flux2_pipe() -> Any:
    decoder = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8,) * 3, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    model = of_diffusers(
        "Flux2Transformer2DModel",
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return diffusers.Flux2Pipeline(diffusers.FlowMatchEulerDiscreteScheduler(), decoder, None, None, model)


def kontext_arguments() -> dict[str, Any]:
    return {
        **prompts(pooled=True),
        "image": picture(12, 16), "height": 16, "width": 16, "max_area": 256, "_auto_resize": False,
        "true_cfg_scale": 3.0,
    }  # fmt: skip


def qwen_arguments() -> dict[str, Any]:
    masks = {name: torch.ones(1, 6) for name in ("prompt_embeds_mask", "negative_prompt_embeds_mask")}
    images = [picture(32, 32), picture(64, 32)]
    return {**prompts(), **masks, "image": images, "height": 64, "width": 64, "true_cfg_scale": 3.0}


def flux2_arguments() -> dict[str, Any]:
    images = [picture(64, 64), picture(64, 96)]
    return {"prompt_embeds": latents(1, 6, 12), "image": images, "height": 32, "width": 32}


def wan_pipe() -> Any:
    parts = wan_of_text().components
    return diffusers.WanImageToVideoPipeline(**{**parts, "image_processor": None, "expand_timesteps": True})


def skyreels_pipe() -> Any:
    scheduler = diffusers.UniPCMultistepScheduler(flow_shift=8.0, use_flow_sigmas=True)
    model = KNOWN["SkyReelsV2Transformer3DModel"].build()
    return diffusers.SkyReelsV2DiffusionForcingImageToVideoPipeline(
        None, None, model, wan_of_text().components["vae"], scheduler
    )


def ltx_pipe() -> Any:
    return diffusers.LTXConditionPipeline(**ltx_of_text().components)


def ltx_arguments() -> dict[str, Any]:
    """The first frame is given in its place, and a later one ahead of the video."""
    given = [LTXVideoCondition(image=picture(32, 32), frame_index=frame) for frame in (0, 8)]
    return {**prompts(masks=True), "conditions": given, "height": 32, "width": 32, "num_frames": 9}


def wan_vae() -> Any:
    return wan_of_text().vae


def ltx2_pipe() -> Any:
    model = of_diffusers(
        "LTX2VideoTransformer3DModel",
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=3, caption_channels=32, rope_double_precision=False, rope_type="split",
    )  # fmt: skip
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder  # after models that older diffusers lack

    sizes = {
        f"{stream}_connector_{name}": value
        for stream in ("video", "audio")
        for name, value in (
            ("num_attention_heads", 4), ("attention_head_dim", 8), ("num_layers", 1), ("num_learnable_registers", None)
        )
    }  # fmt: skip
    connectors = LTX2TextConnectors(
        caption_channels=32, text_proj_in_factor=2, connector_rope_base_seq_len=32, rope_double_precision=False,
        causal_temporal_positioning=False, rope_type="split", **sizes,
    )  # fmt: skip
    decoder = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_residual=(False,),
        upsample_factor=(1,), timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True,
        decoder_causal=False,
    )  # fmt: skip
    decoder.use_framewise_encoding = decoder.use_framewise_decoding = False
    sound = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1, attn_resolutions=None, in_channels=2,
        resolution=32, latent_channels=2, norm_type="pixel", causality_axis="height", dropout=0.0,
        mid_block_add_attention=False, sample_rate=16000, mel_hop_length=160, is_causal=True, mel_bins=8,
    )  # fmt: skip
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=32, out_channels=2, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    parts = [decoder.eval(), sound.eval(), None, None, connectors.eval(), model, vocoder.eval()]
    return diffusers.LTX2ConditionPipeline(scheduler, *parts)


def ltx2_arguments() -> dict[str, Any]:
    """The first frame is given as it is, and a later one, behind the video, at four fifths of its strength."""
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    frame = latents(1, 3, 32, 32).sigmoid()
    given = [LTX2VideoCondition(frames=frame, index=i, strength=part, crf=0) for i, part in ((0, 1.0), (1, 0.8))]
    embeds = {name: latents(1, 6, 64) for name in ("prompt_embeds", "negative_prompt_embeds")}
    masks = {name: torch.ones(1, 6) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")}
    plain = {"stg_scale": 0.0, "modality_scale": 1.0, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0}
    return {**embeds, **masks, **plain, "conditions": given, "height": 32, "width": 32, "num_frames": 5}


def anyflow_pipe() -> Any:
    model = KNOWN["AnyFlowTransformer3DModel"].build()
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0)
    return diffusers.AnyFlowPipeline(None, None, model, wan_vae(), scheduler)


class Unchecked:
    """In the place of the checks of prompts and videos of Cosmos."""

    def to(self, *_: Any) -> Unchecked:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def cosmos_pipe() -> Any:
    model = of_diffusers("CosmosTransformer3DModel", **{**COSMOS, "in_channels": 5}, extra_pos_embed_type=None)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return diffusers.Cosmos2VideoToWorldPipeline(None, None, model, wan_vae(), scheduler, Unchecked())


def sana_pipe() -> Any:
    model, scheduler = KNOWN["SanaVideoTransformer3DModel"].build(), diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.SanaImageToVideoPipeline(None, None, wan_vae(), model, scheduler)


def hunyuan_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8,) * 4, layers_per_block=1,
        norm_num_groups=4,
    ).eval()  # fmt: skip


def hunyuan_pipe() -> Any:
    parts = [token_replace(), hunyuan_vae(), diffusers.FlowMatchEulerDiscreteScheduler()]
    return diffusers.HunyuanVideoImageToVideoPipeline(None, None, *parts, None, None, None)


def hunyuan_arguments() -> dict[str, Any]:
    embeds = {"prompt_embeds": latents(1, 6, 12), "pooled_prompt_embeds": latents(1, 10)}
    mask = torch.ones(1, 6, dtype=torch.long)
    return {**embeds, "prompt_attention_mask": mask, "image": picture(48, 32), "height": 32, "width": 48}


def framepack_pipe() -> Any:
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=8, patch_size=4)).eval()
    model = KNOWN["HunyuanVideoFramepackTransformer3DModel"].build()
    parts = [model, hunyuan_vae(), diffusers.FlowMatchEulerDiscreteScheduler()]
    reader = SiglipImageProcessor(size={"height": 8, "width": 8})
    return diffusers.HunyuanVideoFramepackPipeline(None, None, *parts, None, None, encoder, reader)


def fibo2_pipe() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    model = KNOWN["BriaFibo2Transformer2DModel"].build()
    return diffusers.BriaFibo2Pipeline(model, scheduler, flux2_pipe().vae, None, None)


def fibo2_arguments() -> dict[str, Any]:
    embeds = {name: latents(1, 3, 6, 12) for name in ("prompt_embeds", "negative_prompt_embeds")}
    return {**embeds, "image": [picture(32, 32)], "height": 32, "width": 48}


FRAMES = {"height": 32, "width": 48, "num_frames": 9}


EDITS = {
    "Kontext": (kontext_pipe, kontext_arguments),
    "Qwen-Image-Edit-Plus": (qwen_pipe, qwen_arguments),
    "Flux 2": (flux2_pipe, flux2_arguments),
    "Wan": (wan_pipe, lambda: {**prompts(), "image": picture(48, 32), "height": 32, "width": 48, "num_frames": 5}),
    "SkyReels": (skyreels_pipe, lambda: {**prompts(), **FRAMES, "image": picture(48, 32)}),
    "LTX": (ltx_pipe, ltx_arguments),
    "LTX-2": (ltx2_pipe, ltx2_arguments),
    "AnyFlow": (
        anyflow_pipe,
        lambda: {**prompts(), **FRAMES, "video": latents(1, 5, 3, 32, 48).sigmoid(), "guidance_scale": 3.0},
    ),
    "Cosmos 2": (cosmos_pipe, lambda: {**prompts(), **FRAMES, "image": picture(48, 32)}),
    "Sana Video": (
        sana_pipe,
        lambda: {
            **prompts(masks=True),
            "negative_prompt": None, "image": picture(64, 32), "height": 32, "width": 64, "frames": 9,
            "use_resolution_binning": False,
        },
    ),
    "HunyuanVideo": (hunyuan_pipe, lambda: {**hunyuan_arguments(), "num_frames": 9}),
    "Framepack": (framepack_pipe, lambda: {**hunyuan_arguments(), "num_frames": 9, "latent_window_size": 3}),
    "Fibo 2": (fibo2_pipe, fibo2_arguments),
}  # fmt: skip
"""Pipelines, and arguments of a call."""
