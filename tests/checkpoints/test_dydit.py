"""DyDiT is read with its gates and computes its formulas (arXiv 2410.03456, in the order of the public code)."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tokdyn
from tokdyn.checkpoints import read, to_facebook
from tokdyn.errors import CheckpointError
from tokdyn.models import DiT

HEADS, DEPTH, WIDTH, HIDDEN = 4, 2, 32, 128


def weights_of(model: DiT) -> dict[str, Tensor]:
    """Return the tensors of a DiT with random gates, some of which are off."""
    draw = torch.Generator().manual_seed(7)
    found = to_facebook(model)
    shapes = {
        "attn_rate.router": (HEADS - 1, WIDTH),
        "mlp_rate.router": (HEADS - 1, WIDTH),
        "token_selection.mlp_head.0": (WIDTH // 16, WIDTH),
        "token_selection.mlp_head.2": (1, WIDTH // 16),
    }
    for block in range(DEPTH):
        for name, shape in shapes.items():
            found[f"blocks.{block}.{name}.weight"] = torch.randn(shape, generator=draw)
            found[f"blocks.{block}.{name}.bias"] = 0.1 * torch.randn(shape[0], generator=draw)
    return found


def dydit(w: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, dict[str, list[float]]]:
    """Compute an evaluation step with masks; also return the share of gates and tokens that are on."""
    shares: dict[str, list[float]] = {"heads": [], "channels": [], "tokens": []}

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def modulated(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(value, value.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def groups(name: str) -> Tensor:
        on = (linear(name, step).sigmoid() > 0.5).float()
        return torch.cat([torch.ones(len(on), 1), on], dim=1)

    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2)
    h = h.flatten(2).transpose(1, 2) + w["pos_embed"]
    angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    step = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], dim=1))))
    c = F.silu(step + w["y_embedder.embedding_table.weight"][y])
    for block in range(DEPTH):
        of = f"blocks.{block}"
        s1, r1, g1, s2, r2, g2 = linear(f"{of}.adaLN_modulation.1", c).chunk(6, dim=1)
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in linear(f"{of}.attn.qkv", modulated(h, s1, r1)).chunk(3, dim=-1)
        )
        mix = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(dim=-1) @ v
        heads = groups(f"{of}.attn_rate.router")
        h = h + g1[:, None] * linear(f"{of}.attn.proj", (mix * heads[:, :, None, None]).transpose(1, 2).flatten(2))
        first = F.relu(linear(f"{of}.token_selection.mlp_head.0", h))
        tokens = (linear(f"{of}.token_selection.mlp_head.2", first).sigmoid() > 0.5).float()
        channels = groups(f"{of}.mlp_rate.router")
        hidden = linear(f"{of}.mlp.fc1", modulated(h, s2, r2))
        hidden = hidden * channels.repeat_interleave(HIDDEN // HEADS, dim=1)[:, None]
        h = h + tokens * (g2[:, None] * linear(f"{of}.mlp.fc2", F.gelu(hidden, approximate="tanh")))
        for name, on in (("heads", heads), ("channels", channels), ("tokens", tokens)):
            shares[name].append(float(on.mean()))
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=1)
    out = linear("final_layer.linear", modulated(h, shift, scale)).unflatten(1, (4, 4)).unflatten(-1, (2, 2, -1))
    return torch.einsum("brcpqk->bkrpcq", out).flatten(4, 5).flatten(2, 3), shares


@pytest.fixture
def weights(dit: Callable[..., DiT]) -> dict[str, Tensor]:
    return weights_of(dit())


@pytest.mark.parametrize("steps", [(900, 900, 900), (0, 437, 999)], ids=["one level", "three levels"])
def test_evaluation_agrees_with_the_formulas(weights: dict[str, Tensor], steps: tuple[int, ...]) -> None:
    """fp32 sums in another order: tolerance 2e-5 for outputs around 1."""
    torch.manual_seed(0)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor(steps), torch.tensor([0, 3, 5])
    expected, shares = dydit(weights, x, t, y)
    assert all(0.0 < sum(kind) / DEPTH < 1.0 for kind in shares.values()), shares  # some gates of each kind are off
    model = read(weights, num_heads=HEADS)
    with torch.no_grad():
        found = model(x, timestep=t, class_labels=y).sample
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
        call = tokdyn.stats(model).calls[-1]
        assert call.share < 0.95  # gated parts are skipped, not multiplied by 0
        with tokdyn.disabled(model):
            whole = model(x, timestep=t, class_labels=y).sample
    assert not torch.allclose(whole, expected, atol=1e-2)


def test_token_gates_read_the_tokens_before_norm_and_modulation(weights: dict[str, Tensor]) -> None:
    """Gates that read the input of the MLP select other tokens, so the reader needs this setting to be exact."""
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([100, 100]), torch.tensor([0, 3])
    model = read(weights, num_heads=HEADS)
    ((method, gates),) = tokdyn.parts(model)
    expected = model(x, timestep=t, class_labels=y).sample
    tokdyn.unwrap(model)
    tokdyn.wrap(model, [method.model_copy(update={"token_input": "mlp"})])
    ((_, others),) = tokdyn.parts(model)
    others.load_state_dict(gates.state_dict())
    assert not torch.allclose(model(x, timestep=t, class_labels=y).sample, expected, atol=1e-3)


def test_training_file_records_the_target(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "new_dydit0.5.pt"
    wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"model": wrapped, "ema": weights, "args": Namespace(token_ratio=0.5, lr=1e-4)}, path)
    model = read(path, num_heads=HEADS)
    ((method, _),) = tokdyn.parts(model)
    assert isinstance(method, tokdyn.DynamicWidth)
    assert (method.target, method.token_input) == (0.5, "stream")


def test_gates_get_gradients(weights: dict[str, Tensor]) -> None:
    model = read(weights, num_heads=HEADS).train()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([100, 900]), torch.tensor([0, 3])
    model(x, timestep=t, class_labels=y).sample.square().mean().backward()
    for name, parameter in model.tokdyn.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all()


def test_incomplete_gates_are_refused(weights: dict[str, Tensor]) -> None:
    del weights["blocks.1.mlp_rate.router.bias"]
    weights["blocks.2.attn_rate.router.bias"] = torch.zeros(3)
    weights["blocks.0.token_selection.mlp_head.2.bias"] = torch.zeros(2)
    message = (
        r"1 .*: blocks.1.mlp_rate.router.bias; 1 .*: blocks.2.attn_rate.router.bias; "
        r"1 .*: blocks.0.token_selection.mlp_head.2.bias \(2,\) for \(1,\)"
    )
    with pytest.raises(CheckpointError, match=message):
        read(weights, num_heads=HEADS)


def test_unknown_targets_and_uneven_groups_are_refused(dit: Callable[..., DiT]) -> None:
    with pytest.raises(CheckpointError, match=r"target=1\.0"):
        read(weights_of(dit()), num_heads=HEADS, target=1.0)
    uneven = {"mlp_ratio": 4.25}  # 136 channels: tokdyn's groups are multiples of 8, DyDiT's are equal
    with pytest.raises(CheckpointError, match=r"136 .* 4 "):
        read(weights_of(dit(**uneven)), num_heads=HEADS)
