"""`benchmarks/official.py`, the other side of a speed comparison, computes what the package's model computes."""

from __future__ import annotations

import pytest
import torch

from benchmarks import official
from tokdyn import DCDiT


def model(**settings: object) -> DCDiT:
    torch.manual_seed(0)
    shape = {"sample_size": 16, "hidden_size": 64, "depth": 3, "num_heads": 2, "num_classes": 7, "patch_size": 1}
    made = DCDiT(**{**shape, **settings})
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("patch", [1, 2])
def test_outputs_agree(patch: int, planned: bool) -> None:
    made = model(patch_size=patch)
    x, time, labels = torch.randn(3, 4, 16, 16), torch.tensor([3.0, 500.0, 990.0]), torch.tensor([0, 3, 7])
    plan = torch.rand(3, (16 // patch) ** 2) < 0.25 if planned else None
    wanted = made(x, time, labels, plan=plan).sample
    torch.testing.assert_close(official.forward(made, x, time, labels, plan), wanted, rtol=1e-4, atol=1e-5)


def test_dense_blocks_agree() -> None:
    block = model().blocks[0]
    x, condition = torch.randn(3, 40, 64), torch.randn(3, 64)
    torch.testing.assert_close(official.dense_block(block, x, condition), block(x, condition), rtol=1e-4, atol=1e-5)


def test_gradients_agree() -> None:
    made = model()
    x, time, labels = torch.randn(2, 4, 16, 16), torch.tensor([3.0, 500.0]), torch.tensor([0, 3])
    found = []
    for run in (lambda: made(x, time, labels).sample, lambda: official.forward(made, x, time, labels)):
        made.zero_grad()
        run().square().mean().backward()
        found.append({name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None})
    assert set(found[0]) == set(found[1])
    largest = max(float(gradient.abs().max()) for gradient in found[0].values())
    for name, gradient in found[0].items():  # the gradient of a bias before a norm is rounding error alone
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=name)
