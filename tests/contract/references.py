"""Calls of tiny models with reference images, and pipelines that make such calls."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from PIL import Image
from torch import Tensor, nn

from tests.contract.kit import Tiny, ids, latents, of_diffusers
from tests.contract.pipelines import ltx as ltx_of_text
from tests.contract.pipelines import prompts, vae
from tests.contract.pipelines import wan as wan_of_text
from tests.contract.stacks import KNOWN

ROWS, COLUMNS = 4, 5
"""The grid of the image tokens that Flux, Flux 2 and Qwen generate here."""


def numbered(*images: tuple[float, int, int]) -> Tensor:
    """(N, 3) position ids of several images, each given by its number, rows and columns."""
    found = []
    for number, rows, columns in images:
        found.append(ids(rows, columns))
        found[-1][:, 0] = number
    return torch.cat(found)


def kontext(batch: int) -> dict[str, Any]:
    """Two references, one of another size than the picture."""
    places = numbered((0, ROWS, COLUMNS), (1, ROWS, COLUMNS), (2, 2, 3))
    return {
        **KNOWN["FluxTransformer2DModel"].inputs(batch),
        "hidden_states": latents(batch, len(places), 4),
        "img_ids": places,
    }


def flux2(batch: int) -> dict[str, Any]:
    places = numbered((0, ROWS, COLUMNS), (10, 3, 4), (20, 2, 2))
    return {
        **KNOWN["Flux2Transformer2DModel"].inputs(batch),
        "hidden_states": latents(batch, len(places), 4),
        "img_ids": torch.cat([places, torch.zeros(len(places), 1)], dim=1).expand(batch, -1, -1),
    }


def qwen(batch: int, *references: tuple[int, int, int]) -> dict[str, Any]:
    shapes = [(1, ROWS, COLUMNS), *(references or ((1, 3, 4), (1, 2, 2)))]
    return {
        **KNOWN["QwenImageTransformer2DModel"].inputs(batch),
        "hidden_states": latents(batch, sum(rows * columns for _, rows, columns in shapes), 16),
        "img_shapes": [shapes] * batch,
    }


def qwen_model(**config: Any) -> nn.Module:
    return of_diffusers(
        "QwenImageTransformer2DModel",
        patch_size=2, in_channels=16, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 6, 6), **config,
    )  # fmt: skip


def wan(batch: int) -> dict[str, Any]:
    """Image to video of Wan 2.2 5B: the first of three frames is clean, with timestep 0."""
    timestep = torch.full((batch, 3 * 12), 500.0)
    timestep[:, :12] = 0.0
    return {
        **KNOWN["WanTransformer3DModel"].inputs(batch),
        "hidden_states": latents(batch, 4, 3, 8, 6),
        "timestep": timestep,
    }


def places_of(frames: int, first: float) -> Tensor:
    """(3, N) coordinates of frames of 3 x 4 tokens, as LTXConditionPipeline makes them."""
    places = torch.cartesian_prod(torch.arange(float(frames)), torch.arange(3.0), torch.arange(4.0)).T.clone()
    places[0] = (8 * places[0] - 7).clamp(min=0) + first
    places[1:] *= 32
    return places


def ltx(batch: int) -> dict[str, Any]:
    """A condition frame ahead of a video of two frames, of which the first is clean too."""
    places = torch.cat([places_of(1, 9), places_of(2, 0)], dim=1)
    timestep = torch.full((batch, 36), 500.0)
    timestep[:, :24] = 0.0
    call = {
        **KNOWN["LTXVideoTransformer3DModel"].inputs(batch),
        "hidden_states": latents(batch, 36, 4),
        "timestep": timestep,
        "video_coords": places.expand(batch, -1, -1),
    }
    return {name: value for name, value in call.items() if name not in ("num_frames", "height", "width")}


def spans(frames: int, rows: int, columns: int, first: float, last: float = 8.0) -> Tensor:
    """(3, N, 2) spans of patches of LTX-2 in time and in the frame: each frame lasts `last`, from `first` on."""
    places = torch.cartesian_prod(
        torch.arange(float(frames)), torch.arange(float(rows)), torch.arange(float(columns))
    ).T
    begins = torch.cat([8 * places[:1] + first, 32 * places[1:]])
    return torch.stack([begins, begins + torch.tensor([last, 32.0, 32.0])[:, None]], dim=2)


def ltx2(batch: int) -> dict[str, Any]:
    """A first frame that is given, two later ones after the video, of which one is noisier, and a smaller video."""
    places = [spans(3, 3, 4, 0), spans(1, 3, 4, 9, 1), spans(1, 3, 4, 9, 1), spans(2, 2, 2, 0)]
    level = torch.tensor([0.0, 1, 1, 0, 0.2]).repeat_interleave(12)
    return {
        **KNOWN["LTX2VideoTransformer3DModel"].inputs(batch),
        "hidden_states": latents(batch, 68, 4),
        "timestep": 500.0 * torch.cat([level, torch.zeros(8)]).expand(batch, -1),
        "audio_timestep": torch.full((batch,), 500.0),
        "video_coords": torch.cat(places, dim=1).expand(batch, -1, -1, -1),
        "num_frames": 3,
    }


def first_frame(name: str, batch: int, **more: Any) -> dict[str, Any]:
    """Latents of three frames, and what tells that the first is given."""
    return {**KNOWN[name].inputs(batch), "hidden_states": latents(batch, 4, 3, 8, 6), **more}


def timesteps(batch: int, *shape: int) -> Tensor:
    """(B, *shape) timesteps of 500, of which the first on the last axis but those of rows and columns is 0."""
    found = torch.full((batch, 3, *shape), 500.0)
    found[:, 0] = 0.0
    return found


def cosmos(batch: int) -> dict[str, Any]:
    mask = torch.zeros(batch, 1, 3, 8, 6)
    mask[:, :, 0] = 1.0
    level = (timesteps(batch) / 1000 + 1e-4).view(batch, 1, 3, 1, 1)
    return first_frame("Cosmos 2", batch, timestep=level, condition_mask=mask)


def anyflow(batch: int) -> dict[str, Any]:
    times = {"timestep": timesteps(batch), "r_timestep": torch.full((batch, 3), 300.0)}
    return {**KNOWN["AnyFlowTransformer3DModel"].inputs(batch), "hidden_states": latents(batch, 3, 4, 8, 6), **times}


def joyimage(batch: int) -> dict[str, Any]:
    return {**KNOWN["JoyImageEditTransformer3DModel"].inputs(batch), "hidden_states": latents(batch, 3, 4, 1, 8, 10)}


def joyimage_plus(batch: int) -> dict[str, Any]:
    return {
        **KNOWN["JoyImageEditPlusTransformer3DModel"].inputs(batch),
        "hidden_states": latents(batch, 36, 4, 1, 2, 2),
        "shape_list": [[(1, ROWS, COLUMNS), (1, 3, 4), (1, 2, 2)]] * batch,
    }


def fibo2(batch: int) -> dict[str, Any]:
    references = latents(batch, 4, 6, 8), latents(batch, 4, 4, 4)
    return {**KNOWN["BriaFibo2Transformer2DModel"].inputs(batch), "context_latents": references}


def zimage(batch: int) -> dict[str, Any]:
    """Two references of other sizes before the picture, and texts of different lengths between."""
    small = [[latents(batch, 4, 1, rows, columns)[i] for rows, columns in ((8, 8), (4, 12))] for i in range(batch)]
    lengths = [(5, 40, 6, 3) if i % 2 else (7, 8, 9, 4) for i in range(batch)]
    return {
        "x": [[*images, one] for images, one in zip(small, latents(batch, 4, 1, 8, 12), strict=True)],
        "t": torch.full((batch,), 0.5),
        "cap_feats": [list(latents(1, sum(each), 12)[0].split(each)) for each in lengths],
        "siglip_feats": [None] * batch,
        "image_noise_mask": [[0, 0, 1]] * batch,
    }


def lumina(batch: int) -> dict[str, Any]:
    """Texts of different lengths, and no references."""
    mask = torch.arange(6) < torch.tensor([4, 6, 3] * batch)[:batch, None]
    return {**KNOWN["Lumina2Transformer2DModel"].inputs(batch), "encoder_attention_mask": mask}


def token_replace() -> nn.Module:
    """HunyuanVideo from an image: the first frame is given, and blocks modulate it by a timestep of zero."""
    return of_diffusers(
        "HunyuanVideoTransformer3DModel",
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_single_layers=2, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=12, pooled_projection_dim=10, rope_axes_dim=(4, 4, 8), image_condition_type="token_replace",
    )  # fmt: skip


def _tiny(name: str, inputs: Any = None, build: Any = None) -> Tiny:
    return Tiny(build or KNOWN[name].build, inputs or KNOWN[name].inputs, KNOWN[name].clock)


CALLS = {
    "Kontext": _tiny("FluxTransformer2DModel", kontext),
    "Flux 2": _tiny("Flux2Transformer2DModel", flux2),
    "Qwen": _tiny("QwenImageTransformer2DModel", qwen),
    "Qwen with timesteps": _tiny("QwenImageTransformer2DModel", qwen, lambda: qwen_model(zero_cond_t=True)),
    "Qwen in layers": _tiny(
        "QwenImageTransformer2DModel",
        lambda batch: qwen(batch, (1, ROWS, COLUMNS), (1, 2, 2)),
        lambda: qwen_model(use_layer3d_rope=True),
    ),
    "Wan": _tiny("WanTransformer3DModel", wan),
    "LTX": _tiny("LTXVideoTransformer3DModel", ltx),
    "Z-Image": _tiny("ZImageTransformer2DModel", zimage),
    "Lumina": _tiny("Lumina2Transformer2DModel", lumina),
    "LTX-2": _tiny("LTX2VideoTransformer3DModel", ltx2),
    "AnyFlow": _tiny("AnyFlowTransformer3DModel", anyflow),
    "Cosmos": _tiny("Cosmos 2", cosmos),
    "Sana Video": _tiny(
        "SanaVideoTransformer3DModel",
        lambda batch: first_frame(
            "SanaVideoTransformer3DModel", batch, timestep=timesteps(batch, 4, 3).view(batch, 1, 3, 4, 3)
        ),
    ),
    "HunyuanVideo": _tiny(
        "HunyuanVideoTransformer3DModel",
        lambda batch: first_frame("HunyuanVideoTransformer3DModel", batch),
        token_replace,
    ),
    "Framepack": _tiny("HunyuanVideoFramepackTransformer3DModel"),
    "JoyImage": _tiny("JoyImageEditTransformer3DModel", joyimage),
    "JoyImage Plus": _tiny("JoyImageEditPlusTransformer3DModel", joyimage_plus),
    "Fibo 2": _tiny("BriaFibo2Transformer2DModel", fibo2),
}
LATER = {
    "LTX-2", "AnyFlow", "Cosmos", "Sana Video", "HunyuanVideo", "Framepack", "JoyImage", "JoyImage Plus", "Fibo 2"
}  # fmt: skip
"""Those on which fewer laws are checked, as they are on these models without references."""
BESIDE = {
    "Kontext": (0, 26),
    "Flux 2": (0, 16),
    "Qwen": (0, 16),
    "Qwen with timesteps": (0, 16),
    "Qwen in layers": (0, 4),
    "Wan": (12, 0),
    "LTX": (24, 0),
    "Z-Image": (64, 0),
    "LTX-2": (12, 32),
    "AnyFlow": (12, 0),
    "Cosmos": (12, 0),
    "Sana Video": (12, 0),
    "HunyuanVideo": (12, 0),
    "Framepack": (29, 0),
    "JoyImage": (0, 40),
    "JoyImage Plus": (0, 16),
    "Fibo 2": (0, 16),
}
"""How many reference tokens come before and after the generated ones."""


def picture(width: int = 16, height: int = 16) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def kontext_pipe() -> Any:
    model = of_diffusers(
        "FluxTransformer2DModel",
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=False,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxKontextPipeline(scheduler, vae(), None, None, None, None, model)


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


def ltx_pipe() -> Any:
    return diffusers.LTXConditionPipeline(**ltx_of_text().components)


def ltx_arguments() -> dict[str, Any]:
    """The first frame is given in its place, and a later one ahead of the video."""
    given = [LTXVideoCondition(image=picture(32, 32), frame_index=frame) for frame in (0, 8)]
    return {**prompts(masks=True), "conditions": given, "height": 32, "width": 32, "num_frames": 9}


EDITS = {
    "Kontext": (kontext_pipe, kontext_arguments),
    "Qwen-Image-Edit-Plus": (qwen_pipe, qwen_arguments),
    "Flux 2": (flux2_pipe, flux2_arguments),
    "Wan": (wan_pipe, lambda: {**prompts(), "image": picture(48, 32), "height": 32, "width": 48, "num_frames": 5}),
    "LTX": (ltx_pipe, ltx_arguments),
}
"""Pipelines that give references to the model, and arguments of a call."""
