"""Models of diffusers in which text and image attend to each other: SD3, AuraFlow, Qwen-Image, Flux and its kin."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from tokdyn.adapters import modulation
from tokdyn.adapters.base import Arguments, Follow, ModelAdapter, Products, Stack
from tokdyn.adapters.readers import CONTROL, IP_ADAPTER, patches, timestep
from tokdyn.adapters.width import Width, attention_and_mlp, mlp, processed, projections
from tokdyn.errors import InputError

_SD3_WIDTH = replace(
    attention_and_mlp("attn", "ff", "JointAttnProcessor2_0"),
    cuts=(*projections("attn"), *projections("attn2"), *mlp("ff.net.2", "ff.net.0.proj")),
    attention=("attn", "attn2"),  # where there is a second attention, it has the same heads
    known=processed(("attn", "attn2"), "JointAttnProcessor2_0"),
)

SD3 = ModelAdapter(
    name="SD3",
    classes=("SD3Transformer2DModel",),
    stacks=(
        Stack(
            "transformer_blocks",
            text="encoder_hidden_states",
            returns=("text", "tokens"),
            joint="first",
            attention=("attn",),
            mlp=("ff",),
            modulated=modulation.embedding,
            products=Products(beside=("attn2",)),
            width=_SD3_WIDTH,
        ),
    ),
    grid=patches,
    level=timestep(),
    refuse={"block_controlnet_hidden_states": CONTROL, "joint_attention_kwargs": IP_ADAPTER},
)

_AURAFLOW_WIDTH = Width(
    cuts=(*projections("attn"), *mlp("ff.out_projection", "ff.linear_1", "ff.linear_2")),
    inner="attn.to_out.0.in_features",
    hidden="ff.out_projection.in_features",
    attention=("attn",),
    known=processed("attn", "AuraFlowAttnProcessor2_0"),
)

AURAFLOW = ModelAdapter(
    name="AuraFlow",
    classes=("AuraFlowTransformer2DModel",),
    stacks=(
        Stack(
            "joint_transformer_blocks",
            text="encoder_hidden_states",
            returns=("text", "tokens"),
            attention=("attn",),
            mlp=("ff",),
            modulated=modulation.embedding,
            width=_AURAFLOW_WIDTH,
        ),
        Stack(
            "single_transformer_blocks",
            image="last",
            attention=("attn",),
            mlp=("ff",),
            width=_AURAFLOW_WIDTH,
        ),
    ),
    grid=patches,
    level=timestep(scale=1.0),
    refuse={"attention_kwargs": IP_ADAPTER},
)


def _qwen_grid(model: nn.Module, call: Arguments) -> tuple[int, ...]:
    shapes = call["img_shapes"]
    first = shapes[0]
    if isinstance(first, list):  # one list of images for each sample
        if len(first) > 1:
            raise InputError("a wrapped QwenImageTransformer2DModel takes one image a sample; leave the others out.")
        first = first[0]
    frames, rows, columns = first
    return (rows, columns) if frames == 1 else (frames, rows, columns)


QWEN = ModelAdapter(
    name="Qwen-Image",
    classes=("QwenImageTransformer2DModel",),
    stacks=(
        Stack(
            "transformer_blocks",
            text="encoder_hidden_states",
            returns=("text", "tokens"),
            follow=(Follow("image_rotary_emb", axis=0, batched=False, item=0), Follow("modulate_index")),
            attention=("attn",),
            mlp=("img_mlp",),
            modulated=modulation.of_the_image,
            width=attention_and_mlp("attn", "img_mlp", "QwenDoubleStreamAttnProcessor2_0"),
        ),
    ),
    grid=_qwen_grid,
    level=timestep(scale=1.0),
    refuse={"controlnet_block_samples": CONTROL, "attention_kwargs": IP_ADAPTER},
    guidance="calls",
)

COGVIEW4 = ModelAdapter(
    name="CogView4",
    classes=("CogView4Transformer2DModel",),
    stacks=(
        Stack(
            "transformer_blocks",
            text="encoder_hidden_states",
            returns=("tokens", "text"),
            follow=(Follow("image_rotary_emb", axis=0, batched=False),),
            attention=("attn1",),
            mlp=(),  # one MLP is called on image and text in turn
            products=Products(joint=("ff.*",)),
            width=attention_and_mlp("attn1", "ff", "CogView4AttnProcessor"),
        ),
    ),
    grid=patches,
    level=timestep(),
    refuse={
        "attention_mask": "it has an entry for every pair of tokens; leave it out",
        "attention_kwargs": IP_ADAPTER,
    },
    guidance="calls",
)

COGVIEW3 = ModelAdapter(
    name="CogView3 Plus",
    classes=("CogView3PlusTransformer2DModel",),
    stacks=(
        Stack(
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
    grid=patches,
    level=timestep(),
)
