"""Pipelines whose calls hold more than two branches, and what tests read from their statistics."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

import tokdyn
from tests.contract.models import TINY
from tests.contract.pipelines import PIPES, vae


def quiet(pipe: Any) -> Any:
    """The pipeline, which prints nothing from now on."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixart_pag() -> Any:
    model = TINY["PixArtTransformer2DModel"].build()
    parts = None, None, vae(), model, diffusers.DDIMScheduler()
    return quiet(diffusers.PixArtSigmaPAGPipeline(*parts, pag_applied_layers="blocks.1"))


def sd3_pag() -> Any:
    model, scheduler = TINY["SD3Transformer2DModel"].build(), diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.StableDiffusion3PAGPipeline(model, scheduler, vae(), *(None,) * 6, pag_applied_layers="blocks.2")
    return quiet(pipe)


PAG = {"PixArt": pixart_pag, "SD3": sd3_pag}
"""Pipelines with perturbed-attention guidance, by the name of those without."""


def two_images(pipe: Any, name: str, images: list[int], **changes: Any) -> Tensor:
    """What a pipeline makes of some of two different noises and prompts, in one batch."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, 4, 8, 16, generator=generator) * torch.tensor([1.0, 0.3])[:, None, None, None]
    arguments: dict[str, Any] = {}
    for key, value in PIPES[name].arguments().items():
        if isinstance(value, Tensor):
            value = torch.cat([value, 3.0 * value if value.dim() == 3 else value])[images]
        arguments[key] = value
    arguments |= {"latents": noise[images].clone(), "num_inference_steps": 8, "output_type": "np", **changes}
    return torch.as_tensor(pipe(**arguments)[0]).clone()


def seen(pipe: Any) -> list[tuple[int, str | int, int]]:
    """Step, branch and reused samples of each entry of the statistics."""
    return [(call.step, call.branch, call.reused) for call in tokdyn.stats(pipe).calls]


def branches(pipe: Any) -> dict[int, tuple[str | int, ...]]:
    """The branches of each step."""
    found: dict[int, tuple[str | int, ...]] = {}
    for step, branch, _ in seen(pipe):
        found[step] = (*found.get(step, ()), branch)
    return found


def kept(pipe: Any) -> dict[str | int, tuple[int, ...]]:
    """The tokens that Chunking kept of each sample of a branch, in the last step that has it."""
    return {call.branch: tuple(int(each or 0) for each in call.kept) for call in tokdyn.stats(pipe).calls}
