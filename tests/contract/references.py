"""Calls of tiny models with reference images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.contract.kit import Tiny, ids, latents, of_diffusers
from tests.contract.stacks import KNOWN
from tokdyn.adapters import adapter_for

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


def kandinsky(batch: int) -> dict[str, Any]:
    """Latents of three frames beside those that are given, of which the last channel marks the first."""
    call = KNOWN["Kandinsky5Transformer3DModel"].inputs(batch)
    places = [torch.arange(3), *call["visual_rope_pos"][1:]]
    noise = latents(batch, 3, 8, 6, 9)
    noise[..., -1] = 0.0
    noise[:, 0, ..., -1] = 1.0
    return {**call, "hidden_states": noise, "visual_rope_pos": places}


def kandinsky_model() -> nn.Module:
    return of_diffusers(
        "Kandinsky5Transformer3DModel",
        in_visual_dim=4, in_text_dim=12, in_text_dim2=10, time_dim=8, out_visual_dim=4, model_dim=32, ff_dim=48,
        num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 6, 6), visual_cond=True,
    )  # fmt: skip


def skyreels(batch: int, *given: float) -> dict[str, Any]:
    """Diffusion forcing: every frame has a timestep of its own, and frames that are done have 0."""
    timestep = torch.tensor(given or (0.0, 300.0, 700.0)).expand(batch, -1)
    return first_frame("SkyReelsV2Transformer3DModel", batch, timestep=timestep, enable_diffusion_forcing=True)


def anyflow(batch: int) -> dict[str, Any]:
    times = {"timestep": timesteps(batch), "r_timestep": torch.full((batch, 3), 300.0)}
    return {**KNOWN["AnyFlowTransformer3DModel"].inputs(batch), "hidden_states": latents(batch, 3, 4, 8, 6), **times}


def flux3(batch: int) -> dict[str, Any]:
    """Two references, which join the image after the first blocks."""
    places = torch.cat([numbered((10, 3, 4), (20, 2, 2)), torch.zeros(16, 1)], dim=1)
    return {
        **KNOWN["Flux3Transformer2DModel"].inputs(batch),
        "image_cond_hidden_states": latents(batch, 16, 4),
        "image_cond_ids": places,
    }


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
    "SkyReels": _tiny("SkyReelsV2Transformer3DModel", skyreels),
    "Kandinsky": _tiny("Kandinsky5Transformer3DModel", kandinsky, kandinsky_model),
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
    "Flux 3": _tiny("Flux3Transformer2DModel", flux3),
}
LATER = {
    "LTX-2", "AnyFlow", "Cosmos", "Sana Video", "HunyuanVideo", "Framepack", "JoyImage", "JoyImage Plus", "Fibo 2",
    "Flux 3", "SkyReels", "Kandinsky",
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
    "SkyReels": (12, 0),
    "Kandinsky": (12, 0),
    "Sana Video": (12, 0),
    "HunyuanVideo": (12, 0),
    "Framepack": (29, 0),
    "JoyImage": (0, 40),
    "JoyImage Plus": (0, 16),
    "Fibo 2": (0, 16),
}
"""How many reference tokens come before and after the generated ones."""

DENSE = {"Sana Video"}
"""Models whose blocks need all tokens."""


def tokens_of_blocks(model: nn.Module, call: dict[str, Any], sublayer: str | None = None) -> list[Tensor]:
    """The tokens that every block, or its attention, is called with."""
    seen: list[Tensor] = []
    for blocks in adapter_for(model).blocks[:1]:
        for block in model.get_submodule(blocks.path):  # type: ignore[attr-defined]
            module = block if sublayer is None else getattr(block, sublayer)
            name = blocks.tokens if sublayer is None else "hidden_states"
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: seen.append(kwargs[name] if name in kwargs else args[0]),
                with_kwargs=True,
            )
    model(**call)
    return seen
