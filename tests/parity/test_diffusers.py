"""DiT computes what diffusers' DiTTransformer2DModel computes with the same weights, to 1e-5 in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel

from tokdyn import checkpoints
from tokdyn.checkpoints import to_diffusers
from tokdyn.models import DiT


def reference(layers: int, sample_size: int, patch_size: int, learn_sigma: bool, eps: float) -> DiTTransformer2DModel:
    """Build a diffusers model in which every weight is random, modulation and head included."""
    model = DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8 if learn_sigma else 4,
        num_layers=layers,
        sample_size=sample_size,
        patch_size=patch_size,
        num_embeds_ada_norm=10,
        norm_eps=eps,
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        embedders = [block.norm1.emb.state_dict() for block in model.transformer_blocks]
        for block in model.transformer_blocks:  # converted checkpoints repeat one set of embedders
            block.norm1.emb.load_state_dict(embedders[0])
    return model


@pytest.mark.parametrize(
    ("layers", "sample_size", "patch_size", "learn_sigma", "eps"),
    [(2, 8, 2, True, 1e-5), (1, 12, 4, True, 1e-5), (3, 6, 1, False, 1e-6)],
)
def test_forward(tmp_path: Path, layers: int, sample_size: int, patch_size: int, learn_sigma: bool, eps: float) -> None:
    stock = reference(layers, sample_size, patch_size, learn_sigma, eps)
    stock.save_pretrained(tmp_path)
    ours = checkpoints.read(tmp_path)
    assert isinstance(ours, DiT)
    x = torch.randn(3, 4, sample_size, sample_size)
    timestep, labels = torch.tensor([0, 437, 999]), torch.tensor([0, 9, 10])
    with torch.no_grad():
        expected = stock(x, timestep=timestep, class_labels=labels).sample
        found = ours(x, timestep=timestep, class_labels=labels).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0.0)  # same sums in another order
    for name, tensor in to_diffusers(ours).items():
        assert torch.equal(tensor, stock.state_dict()[name])
    assert set(to_diffusers(ours)) == set(stock.state_dict())
