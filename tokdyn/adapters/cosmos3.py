"""The adapter of Cosmos 3, which takes the tokens of one sample without a batch axis.

Text tokens are a stream of their own, which does not see the others. In the second stream come video, sound and action;
frames that the video is conditioned on, sound and action stay beside the generated tokens as references do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.adapters.arrangement import without_batch
from tokdyn.adapters.base import Arguments, Blocks, Follow, ModelAdapter, Products
from tokdyn.adapters.width import SlicedLayer, Width, mlp_layers, runs_processor
from tokdyn.errors import InputError
from tokdyn.tokens import Grid, ImageTokens


def _images(model: nn.Module, call: Arguments) -> ImageTokens:
    """Read the grid of the generated frames, and of what comes beside them, from the shapes and the noisy frames."""
    shapes: list[Grid] = [tuple(int(size) for size in shape) for shape in call["vision_token_shapes"]]
    noisy = [each.tolist() for each in call["vision_noisy_frame_indexes"]]
    if len(shapes) != 1 or not noisy[0] or noisy[0] != list(range(noisy[0][0], shapes[0][0])):
        raise InputError(
            f"this {type(model).__name__} is called with {len(shapes)} video(s) of which the frames {noisy} are "
            "generated; with methods that merge or leave out tokens, give it one video whose last frames are generated."
        )
    (frames, rows, columns), first = shapes[0], noisy[0][0]
    given = (call.get(f"{kind}_sequence_indexes") for kind in ("sound", "action") if call.get(f"{kind}_tokens"))
    others: list[Grid] = [(places.numel(),) for places in given if places is not None]
    condition: list[Grid] = [(first, rows, columns)] if first else []
    return ImageTokens((frames - first, rows, columns), (*condition, *others), leading=len(condition))


def _level(model: nn.Module, call: Arguments) -> Tensor:
    """Return the noise level of the noisiest token (1,), of the video or else of sound and action."""
    kinds = (call.get(f"{kind}_timesteps") for kind in ("vision", "sound", "action"))
    given = [value.float().flatten() for value in kinds if value is not None and value.numel()]
    return torch.cat(given).amax(dim=0, keepdim=True) / 1000.0


def _told(call: Arguments) -> dict[str, Any]:
    """Return the latents, and the text and the frames of the condition with a batch axis."""
    frames = torch.cat(list(call["vision_noisy_frame_indexes"]))
    return {"vision_tokens": call["vision_tokens"], "text": call["input_ids"][None], "frames": frames[None]}


def _modulated(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the input of attention (1, N, D), whose timestep was added to the tokens before the first block."""
    out: Tensor = block.input_layernorm_moe_gen(arguments["gen_seq"])  # type: ignore[operator]
    return out


COSMOS3 = ModelAdapter(
    name="Cosmos 3",
    classes=("Cosmos3OmniTransformer",),
    blocks=(
        Blocks(
            "layers",
            tokens="gen_seq",
            text="und_seq",
            returns=("text", "tokens"),
            arrangement=without_batch("und_seq", "gen_seq", "x"),
            follow=(
                Follow("rotary_emb", axis=0, batched=False, item=2),  # cosine and sine; those of the text come before
                Follow("rotary_emb", axis=0, batched=False, item=3),
            ),
            attention=("self_attn",),
            mlp=("mlp_moe_gen",),
            modulated=_modulated,
            products=Products(
                text=("self_attn.to_q", "self_attn.to_k", "self_attn.to_v", "self_attn.to_out", "mlp.*"),
                text_sees="text",
            ),
            width=Width(
                layers=(
                    SlicedLayer("self_attn.to_q", out=("heads",), norm="self_attn.norm_q"),
                    SlicedLayer("self_attn.to_k", out=("heads",), norm="self_attn.norm_k"),
                    SlicedLayer("self_attn.to_v", out=("heads",)),
                    SlicedLayer("self_attn.to_out", into=("heads",)),
                    SlicedLayer("self_attn.add_q_proj", out=("heads",), norm="self_attn.norm_added_q"),
                    SlicedLayer("self_attn.add_k_proj", out=("heads",), norm="self_attn.norm_added_k"),
                    SlicedLayer("self_attn.add_v_proj", out=("heads",)),
                    SlicedLayer("self_attn.to_add_out", into=("heads",)),
                    *mlp_layers("mlp_moe_gen.down_proj", "mlp_moe_gen.gate_proj", "mlp_moe_gen.up_proj"),
                ),
                inner="self_attn.to_q.out_features",
                hidden="mlp_moe_gen.down_proj.in_features",
                attention=("self_attn",),
                counts=("num_attention_heads", "num_key_value_heads"),
                sliceable=runs_processor("self_attn", "Cosmos3AttnProcessor"),
            ),
        ),
    ),
    grid=_images,
    read_ahead=("vision_noisy_frame_indexes",),
    level=_level,
    told=_told,
    width=lambda model: int(model.config["hidden_size"]),  # type: ignore[index]
    guidance="calls",
)
