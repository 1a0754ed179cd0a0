"""Adapters of diffusers models whose text and image streams meet in attention: SD3, AuraFlow, Qwen-Image, CogView."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from tokdyn.adapters import modulation
from tokdyn.adapters.base import Arguments, Blocks, Follow, ModelAdapter, Products
from tokdyn.adapters.readers import CONTROL_REASON, IMAGE_PROMPT_REASON, patch_grid, timestep_level
from tokdyn.adapters.width import Width, attention_and_mlp, attention_layers, mlp_layers, runs_processor
from tokdyn.errors import InputError
from tokdyn.tokens import Grid, ImageTokens

_SD3_WIDTH = replace(
    attention_and_mlp("attn", "ff", "JointAttnProcessor2_0"),
    layers=(*attention_layers("attn"), *attention_layers("attn2"), *mlp_layers("ff.net.2", "ff.net.0.proj")),
    attention=("attn", "attn2"),  # the second attention, where there is one, has the same heads
    sliceable=runs_processor(("attn", "attn2"), "JointAttnProcessor2_0"),
)

SD3 = ModelAdapter(
    name="SD3",
    classes=("SD3Transformer2DModel",),
    blocks=(
        Blocks(
            "transformer_blocks",
            text="encoder_hidden_states",
            returns=("text", "tokens"),
            joint="first",
            attention=("attn",),
            mlp=("ff",),
            modulated=modulation.from_embedding,
            products=Products(beside=("attn2",)),
            width=_SD3_WIDTH,
        ),
    ),
    grid=patch_grid,
    level=timestep_level(),
    refuse={"block_controlnet_hidden_states": CONTROL_REASON, "joint_attention_kwargs": IMAGE_PROMPT_REASON},
)

_AURAFLOW_WIDTH = Width(
    layers=(*attention_layers("attn"), *mlp_layers("ff.out_projection", "ff.linear_1", "ff.linear_2")),
    inner="attn.to_out.0.in_features",
    hidden="ff.out_projection.in_features",
    attention=("attn",),
    sliceable=runs_processor("attn", "AuraFlowAttnProcessor2_0"),
)

AURAFLOW = ModelAdapter(
    name="AuraFlow",
    classes=("AuraFlowTransformer2DModel",),
    blocks=(
        Blocks(
            "joint_transformer_blocks",
            text="encoder_hidden_states",
            returns=("text", "tokens"),
            attention=("attn",),
            mlp=("ff",),
            modulated=modulation.from_embedding,
            width=_AURAFLOW_WIDTH,
        ),
        Blocks(
            "single_transformer_blocks",
            image="last",
            attention=("attn",),
            mlp=("ff",),
            width=_AURAFLOW_WIDTH,
        ),
    ),
    grid=patch_grid,
    level=timestep_level(scale=1.0),
    refuse={"attention_kwargs": IMAGE_PROMPT_REASON},
)


def _qwen_grid(model: nn.Module, call: Arguments) -> Grid | ImageTokens:
    shapes = call["img_shapes"]
    if any(other != shapes[0] for other in shapes):
        raise InputError(
            f"img_shapes has different images for the samples of a batch, but a {type(model).__name__} places all "
            "samples as the first; call it with samples whose images have the same sizes."
        )
    images = shapes[0] if isinstance(shapes[0], list) else [shapes[0]]
    # the layers of a layered picture are generated together; the last image is the reference
    layers = max(1, len(images) - 1) if model.config.get("use_layer3d_rope") else 1  # type: ignore[operator, union-attr]
    if len({tuple(image) for image in images[:layers]}) > 1:
        raise InputError(f"the layers in img_shapes have different sizes: {images[:layers]}; give them one size.")
    frames, rows, columns = images[0]
    grid, references = (
        _image_grid(frames * layers, rows, columns),
        tuple(_image_grid(*each) for each in images[layers:]),
    )
    return ImageTokens(grid, references) if references else grid


def _image_grid(frames: int, rows: int, columns: int) -> Grid:
    return (rows, columns) if frames == 1 else (frames, rows, columns)


QWEN = ModelAdapter(
    name="Qwen-Image",
    classes=("QwenImageTransformer2DModel",),
    blocks=(
        Blocks(
            "transformer_blocks",
            text="encoder_hidden_states",
            returns=("text", "tokens"),
            follow=(Follow("image_rotary_emb", axis=0, batched=False, item=0), Follow("modulate_index")),
            rounds=("temb",),  # where reference images have a timestep of their own
            attention=("attn",),
            mlp=("img_mlp",),
            modulated=modulation.qwen,
            products=Products(rounds=("img_mod.*",)),
            width=attention_and_mlp("attn", "img_mlp", "QwenDoubleStreamAttnProcessor2_0"),
        ),
    ),
    grid=_qwen_grid,
    level=timestep_level(scale=1.0),
    refuse={"controlnet_block_samples": CONTROL_REASON, "attention_kwargs": IMAGE_PROMPT_REASON},
    guidance="calls",
)

COGVIEW4 = ModelAdapter(
    name="CogView4",
    classes=("CogView4Transformer2DModel",),
    blocks=(
        Blocks(
            "transformer_blocks",
            text="encoder_hidden_states",
            returns=("tokens", "text"),
            follow=(Follow("image_rotary_emb", axis=0, batched=False),),
            attention=("attn1",),
            mlp=(),  # one MLP is called on the image tokens and then on the text tokens
            products=Products(joint=("ff.*",)),
            width=attention_and_mlp("attn1", "ff", "CogView4AttnProcessor"),
        ),
    ),
    grid=patch_grid,
    level=timestep_level(),
    refuse={
        "attention_mask": "it has one entry per pair of tokens; leave it out",
        "attention_kwargs": IMAGE_PROMPT_REASON,
    },
    guidance="calls",
)

COGVIEW3 = ModelAdapter(
    name="CogView3 Plus",
    classes=("CogView3PlusTransformer2DModel",),
    blocks=(
        Blocks(
            "transformer_blocks",
            text="encoder_hidden_states",
            returns=("tokens", "text"),
            inside_mlp="last",
            attention=("attn1",),
            mlp=("ff",),
            products=Products(joint=("attn1.*",)),
            width=attention_and_mlp("attn1", "ff", "CogVideoXAttnProcessor2_0"),
        ),
    ),
    grid=patch_grid,
    level=timestep_level(),
)
