"""SiT and REPA's SiT become flow models of tokdyn: the same velocity, with SiT's time and sign reversed.

SiT (arXiv 2401.08740) predicts image - noise at a time that is 1 at the image; REPA's (arXiv 2410.06940) predicts
noise - image at a time that is 1 at pure noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokdyn.checkpoints import read, to_diffusers, to_facebook
from tokdyn.diffusion.objective import Objective
from tokdyn.errors import CheckpointError, InputError
from tokdyn.models import DCDiT, DiT
from tokdyn.upcycling.conversion import to_dc


def sit(w: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor, heads: int = 4) -> Tensor:
    """Compute the paper's network from its tensors: image - noise at time t in [0, 1], where 1 is the image."""

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def modulated(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(value, value.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    patch = w["x_embedder.proj.weight"].shape[-1]
    width = w["x_embedder.proj.weight"].shape[0]
    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch)
    h = h.flatten(2).transpose(1, 2) + w["pos_embed"]
    angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    c = linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], dim=1))
    c = linear("t_embedder.mlp.2", F.silu(c)) + w["y_embedder.embedding_table.weight"][y]
    depth = len({name.split(".")[1] for name in w if name.startswith("blocks.")})
    for block in range(depth):
        of = f"blocks.{block}"
        s1, r1, g1, s2, r2, g2 = linear(f"{of}.adaLN_modulation.1", F.silu(c)).chunk(6, dim=1)
        qkv = linear(f"{of}.attn.qkv", modulated(h, s1, r1))
        q, k, v = (p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in qkv.chunk(3, dim=-1))
        mix = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).softmax(dim=-1) @ v
        h = h + g1[:, None] * linear(f"{of}.attn.proj", mix.transpose(1, 2).flatten(2))
        mlp = linear(f"{of}.mlp.fc1", modulated(h, s2, r2))
        h = h + g2[:, None] * linear(f"{of}.mlp.fc2", F.gelu(mlp, approximate="tanh"))
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, dim=1)
    out = linear("final_layer.linear", modulated(h, shift, scale))
    rows = x.shape[-2] // patch
    out = out.unflatten(1, (rows, -1)).unflatten(-1, (patch, patch, -1))
    image = torch.einsum("brcpqk->bkrpcq", out).flatten(4, 5).flatten(2, 3)
    return image[:, : x.shape[1]]  # SiT does not use the second half


@pytest.mark.parametrize("kind", ["sit", "repa"])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_velocity_agrees_at_several_times(dit: Callable[..., DiT], learn_sigma: bool, kind: Any) -> None:
    """fp32 on both sides, and 1 - s adds rounding of its own: tolerance 2e-5 for outputs around 1."""
    weights = to_facebook(dit(learn_sigma=learn_sigma))
    model = read(weights, kind=kind, num_heads=4)
    assert isinstance(model, DiT)
    objective = Objective(kind="flow")
    torch.manual_seed(1)
    x0, noise, y = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 4, 5])
    for time in (0.0, 0.003, 0.25, 0.5, 0.9, 1.0):
        noised = objective.mix(x0, noise, torch.full((3,), 1000.0 * (1.0 - time)))
        x_t = time * x0 + (1 - time) * noise
        torch.testing.assert_close(noised.x_t, x_t)
        expected = sit(weights, x_t, torch.full((3,), time if kind == "sit" else 1.0 - time), y)
        with torch.no_grad():
            output = model(noised.x_t, timestep=noised.timestep, class_labels=y).sample
        velocity, _ = objective.split(output, 4)
        torch.testing.assert_close(-velocity if kind == "sit" else velocity, expected, atol=2e-5, rtol=2e-5)
        assert expected.abs().mean() > 0.1


def test_projectors_tell_repa_and_are_left_out(dit: Callable[..., DiT], same: Callable[..., bool]) -> None:
    weights = to_facebook(dit())
    training = {**weights, "projectors.0.0.weight": torch.randn(8, 64), "projectors.0.0.bias": torch.randn(8)}
    assert same(read(training, num_heads=4), read(weights, kind="repa", num_heads=4))
    with pytest.raises(CheckpointError, match="projectors"):
        read(training, kind="sit", num_heads=4)


@pytest.mark.parametrize("name", ["SiT-XL.pt", "repa/last.pt"])
def test_a_path_that_may_be_either_asks_for_the_kind(dit: Callable[..., DiT], name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    torch.save(to_facebook(dit()), path)
    with pytest.raises(CheckpointError, match="'sit', 'repa' or 'dit'"):
        read(path, num_heads=4)


def test_timestep_map_survives_saving_and_upcycling(
    dit: Callable[..., DiT], same: Callable[..., bool], tmp_path: Path
) -> None:
    weights = to_facebook(dit())
    model = read(weights, kind="sit", num_heads=4)
    model.save_pretrained(tmp_path / "SiT-tiny")
    again = read(tmp_path / "SiT-tiny")  # config.json holds the map
    assert same(model, again)
    assert same(model, DiT.from_pretrained(tmp_path / "SiT-tiny").eval())
    assert tuple(again.config.timestep_map) == (-0.001, 1.0)
    with pytest.raises(CheckpointError, match=r"SiT-tiny.* kind"):
        read(tmp_path / "SiT-tiny", kind="sit")
    student = to_dc(DiT.from_pretrained(tmp_path / "SiT-tiny"))
    assert isinstance(student, DCDiT)
    steps = torch.tensor([10.0, 800.0])
    with torch.no_grad():
        assert torch.equal(student.t_embedder(steps, torch.float32), model.t_embedder(steps, torch.float32))


def test_default_timestep_map_changes_nothing(dit: Callable[..., DiT]) -> None:
    model: Any = dit()
    steps = torch.tensor([0, 3, 999])
    before = model.t_embedder(steps, torch.float32)
    model.t_embedder.scale = 1.0 + 1e-6
    assert not torch.equal(before, model.t_embedder(steps, torch.float32))
    with pytest.raises(InputError, match=r"timestep_map .*\(0.0, 1.0\)"):
        dit(timestep_map=(0.0, 1.0))


def test_other_layouts_cannot_hold_a_timestep_map(dit: Callable[..., DiT]) -> None:
    model = read(to_facebook(dit()), kind="sit", num_heads=4)
    with pytest.raises(CheckpointError, match="timestep_map"):
        to_facebook(model)
    with pytest.raises(CheckpointError, match="timestep_map"):
        to_diffusers(model, approximate=True)
