"""Tiny pipelines in the place of those on the hub that docs/pipelines.md names: the same classes, with random weights.

Prompts become random embeddings, since the text encoders of these pipelines cannot be made tiny.
"""

from __future__ import annotations

import zlib
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from tests.contract.edits import kontext_pipe, picture
from tests.contract.pipelines import build


def embeddings(prompt: str | list[str], *shape: int) -> Tensor:
    """(1, ...) noise that depends on the prompt."""
    text = prompt if isinstance(prompt, str) else prompt[0]
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())))


class TinyFlux(diffusers.FluxPipeline):
    def encode_prompt(self, prompt: Any, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self.transformer.dtype
        return embeddings(prompt, 6, 12).to(dtype), embeddings(prompt, 10).to(dtype), torch.zeros(6, 3, dtype=dtype)

    def to(self, *_: Any, **__: Any) -> TinyFlux:
        return self


class TinyKontext(diffusers.FluxKontextPipeline):
    encode_prompt, to = TinyFlux.encode_prompt, TinyFlux.to

    def __call__(self, image: Any = None, prompt: Any = None, **more: Any) -> Any:
        small = {"height": 16, "width": 16, "max_area": 256, "_auto_resize": False}
        return super().__call__(image.resize((16, 16)), prompt, num_inference_steps=4, **small)


class TinyWan(diffusers.WanPipeline):
    def encode_prompt(self, prompt: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        dtype = self.transformer.dtype
        return embeddings(prompt, 6, 12).to(dtype), embeddings("", 6, 12).to(dtype)

    def __call__(self, prompt: Any = None, num_frames: int = 5, num_inference_steps: int = 4, **more: Any) -> Any:
        return super().__call__(prompt, height=32, width=48, num_frames=5, num_inference_steps=4, **more)


def flux(name: str, torch_dtype: torch.dtype = torch.float32) -> Any:
    pipe = build("Flux").to(torch_dtype)
    pipe.__class__, pipe.default_sample_size = TinyFlux, 16
    return pipe


def kontext(name: str, torch_dtype: torch.dtype = torch.float32) -> Any:
    pipe = kontext_pipe().to(torch_dtype)
    pipe.__class__ = TinyKontext
    return pipe


def wan(name: str, torch_dtype: torch.dtype = torch.float32) -> Any:
    pipe, other = build("Wan").to(torch_dtype), build("Wan")
    if "2.2" in name:
        pipe.register_modules(transformer_2=other.transformer.to(torch_dtype))
        pipe.register_to_config(boundary_ratio=0.8)
    pipe.__class__ = TinyWan
    return pipe


def put_in_place_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `from_pretrained` give tiny pipelines, and compile without a compiler; put the photo of the page here."""
    picture(32, 32).save("street.png")
    monkeypatch.setattr(diffusers.FluxPipeline, "from_pretrained", flux)
    monkeypatch.setattr(diffusers.FluxKontextPipeline, "from_pretrained", kontext)
    monkeypatch.setattr(diffusers.WanPipeline, "from_pretrained", wan)
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: plain(self, **{**how, "backend": "eager"}))
