"""A forward synchronises with an accelerator once, when it packs. Emulated on the CPU; counted where there is CUDA."""

import sys
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tokdyn.models import DCDiT

# Operators whose result has a size that depends on the data, or that return a value to the host.
SYNCHRONISING = (
    "nonzero.",
    "_local_scalar_dense",
    "masked_select",
    "unique",
    "repeat_interleave.Tensor",
    "bincount",
    "item",
)


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        boolean_index = "aten.index." in name and any(
            x is not None and x.dtype == torch.bool for x in args[1] if isinstance(x, torch.Tensor)
        )
        if any(word in name for word in SYNCHRONISING) or boolean_index:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def emulate(monkeypatch):
    for name, module in list(sys.modules.items()):
        if name.startswith("tokdyn.") and "synchronises" in vars(module):
            monkeypatch.setattr(module, "synchronises", lambda x: True)


@pytest.fixture
def emulated(monkeypatch):
    emulate(monkeypatch)
    lists = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: lists.append(1) or original(self))
    return lists


def run(model, device="cpu"):
    x = torch.randn(3, 4, 8, 8, device=device)
    drop = torch.tensor([0.0, 0.3, 0.6], device=device)
    out = model(x, timestep=torch.tensor([1, 500, 900], device=device), tail_drop=drop)
    return out.sample


@pytest.mark.parametrize("train", [True, False])
def test_one_synchronisation_per_forward(emulated, train):
    model = DCDiT.named("tiny", sample_size=8)
    expected = model(torch.zeros(1, 4, 8, 8), 1).sample
    emulated.clear()
    with Watch() as watch, torch.set_grad_enabled(train):
        sample = run(model)
    assert watch.found == []
    assert len(emulated) == 1
    assert sample.isfinite().all()
    assert expected.isfinite().all()


def test_the_emulated_path_gives_the_same_result(monkeypatch):
    torch.manual_seed(0)
    model = DCDiT.named("tiny", sample_size=8).double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    x, t = torch.randn(3, 4, 8, 8).double(), torch.tensor([1, 500, 900])
    expected = model(x, t).sample
    emulate(monkeypatch)
    torch.testing.assert_close(model(x, t).sample, expected, rtol=0, atol=1e-12)


@pytest.mark.gpu
def test_synchronisations_counted_by_cuda():
    model = DCDiT.named("tiny", sample_size=8).cuda()
    run(model, "cuda")
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(model, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 1 <= sum("synchroniz" in str(w.message) for w in caught) <= 2
