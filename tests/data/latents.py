"""Tiny random autoencoders, and the settings of a small folder of latents."""

from pathlib import Path

import diffusers
import torch

from tokdyn.data import FeaturesConfig, ShapesDataset

KL = {
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "latent_channels": 4,
}

TINY = {
    "encoder_block_out_channels": (4, 4),
    "decoder_block_out_channels": (4, 4),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}


def kl(**settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(**{**KL, **settings}).eval()


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.AutoencoderTiny(**TINY).eval()


def config(out: Path, **settings: object) -> FeaturesConfig:
    defaults = {"kind": "shapes", "size": (16, 24), "length": 10, "shard_size": 4, "batch_size": 3, "dtype": "fp32"}
    return FeaturesConfig(out=str(out), **{**defaults, **settings})


def shapes(length: int = 10) -> ShapesDataset:
    return ShapesDataset((16, 24), length=length)
