"""Tiny pipelines of the five families that LoRA is trained on, and the calls that they make."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

import tokdyn
from tests.contract.models import TINY, latents
from tests.contract.pipelines import PIPES, build
from tokdyn.upcycling import DistilSettings

FAMILIES = ("Flux", "Qwen-Image", "Z-Image", "Wan", "SD3")
TWO = DistilSettings(steps=4, calls=2, trained="lora", rank=4, tail_drops=(0.0, 0.5), checkpoint_every=2, lr=3e-3)
"""The settings of a run that is made in one process and in two."""

COMMAND: dict[str, Any] = {
    "height": 16, "width": 16, "sampling_steps": 2, "steps": 2, "target": 2, "trained": "lora", "rank": 2, "calls": 2,
    "steps_per_image": 1,
}  # fmt: skip
"""Settings of the command in one process and in two."""


def qwen() -> Any:
    torch.manual_seed(0)
    decoder = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    model, scheduler = TINY["QwenImageTransformer2DModel"].build(), diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.QwenImagePipeline(scheduler, decoder, None, None, model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def opened(name: str) -> Any:
    """A pipeline of a family, always with the same weights."""
    return qwen() if name == "Qwen-Image" else build(name)


def drawn(pipe: Any, name: str, seed: int = 3, steps: int = 4) -> Tensor:
    """What a pipeline of a family draws."""
    if name == "Qwen-Image":
        words = {"prompt_embeds": latents(1, 6, 12), "prompt_embeds_mask": torch.ones(1, 6, dtype=torch.int64)}
        arguments: dict[str, Any] = {**words, "height": 32, "width": 48}
    else:
        arguments = PIPES[name].arguments()
    noise = torch.Generator().manual_seed(seed)
    return torch.as_tensor(pipe(**arguments, num_inference_steps=steps, output_type="np", generator=noise)[0]).clone()


def recorded(pipe: Any, name: str, seed: int = 3, steps: int = 4) -> list[dict[str, Any]]:
    """The calls that a pipeline makes while it draws."""
    with tokdyn.recording(pipe.transformer) as calls:
        drawn(pipe, name, seed, steps)
    return calls


def student_of(model: Any, target: float = 2.0) -> Any:
    """The same student of a model every time."""
    torch.manual_seed(3)
    return tokdyn.upcycle(model, "dc", target=target)


def trained_tensors(student: Any) -> dict[str, Tensor]:
    """Copy what was trained: parameters of the methods, and LoRA."""
    return {
        name: value.detach().clone()
        for name, value in student.named_parameters()
        if name.startswith("tokdyn.") or ".lora_" in name
    }
