"""Weights of wrapped models: averaged, saved, loaded, cast, frozen and trained in other number types.

Round trips and casts to bf16 run on all adapters, with a stack that has trained parts where it fits; averages, training
and the other number types on a few.
"""

from __future__ import annotations

import copy
import io
import pickle
from itertools import product
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tokdyn
from tests.contract.ecosystem import (
    FEW,
    MODELS,
    SAMPLING,
    TRAINING,
    equip,
    fits,
    predict,
    stack_of,
    step_loss,
    trajectory,
)
from tests.contract.models import CLOCKED, TINY, sample
from tokdyn.methods import Chunking, DepthSkip, TokenMerge

FLUX = "FluxTransformer2DModel"
TRAINED = [Chunking(target=2), TokenMerge(ratio=0.3), DepthSkip(learned=True)]
GATES = [DepthSkip(learned=True)]


def trained(name: str) -> list[Any]:
    """Methods with trained parts that fit a model."""
    return TRAINED if fits(name, "stack") else GATES


def step(model: Any, name: str, seed: int = 0) -> None:
    """One step of training."""
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.05)
    step_loss(model, name, TINY[name].inputs(2)).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")  # diffusers, of Chroma as it is
@pytest.mark.parametrize(("name", "dtype"), [*product(CLOCKED, [torch.bfloat16]), *product(FEW, [torch.float32])])
def test_a_round_trip_is_bit_exact(name: str, dtype: torch.dtype, tmp_path: Any) -> None:
    """The base by its own files or state dict, the methods by theirs; parts in bf16 come back with the same values."""
    model = equip(TINY[name].build(), trained(name))
    step(model, name)
    model.eval().to(dtype)
    expected = trajectory_in(model, name, dtype)
    tokdyn.save(model, tmp_path / "methods")
    fresh = TINY[name].build()
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(tmp_path / "base")
        fresh = type(fresh).from_pretrained(tmp_path / "base", torch_dtype=dtype).eval()
        fresh.to(dtype)  # some keep parts in fp32
        assert [key for key in fresh.state_dict() if key.startswith("tokdyn.")] == []
    again = tokdyn.load(fresh, tmp_path / "methods")
    assert torch.equal(trajectory_in(again, name, dtype), expected)
    strict = equip(TINY[name].build(), trained(name)).to(dtype)
    with torch.no_grad():
        for value in strict.parameters():
            value.zero_()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    found = strict.load_state_dict(torch.load(file), strict=True)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    assert torch.equal(trajectory_in(strict, name, dtype), expected)


def inputs_in(name: str, dtype: torch.dtype, level: float) -> dict[str, Any]:
    """Arguments of a call with tensors of a number type; timesteps, position ids and guidance stay as they are."""
    kept = {"img_ids", "txt_ids", "guidance", TINY[name].clock[0], "image_rotary_emb"}

    def cast(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [cast(key, each) for each in value]
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if floating and key not in kept else value

    given = {**TINY[name].inputs(2), **TINY[name].at(2, level)}
    return {key: cast(key, value) for key, value in given.items()}


@torch.no_grad()
def trajectory_in(model: Any, name: str, dtype: torch.dtype) -> Any:
    """What a model of a number type predicts at two noise levels."""
    return torch.stack([sample(model(**inputs_in(name, dtype, level))) for level in (0.9, 0.4)])


@pytest.mark.parametrize(
    ("name", "stack"),
    [*((name, stack_of(name)) for name in CLOCKED), *product(["DiT", FLUX], SAMPLING)],
)
def test_low_precision_changes_types_and_not_the_way(name: str, stack: str) -> None:
    """In bf16 and fp16 every method runs; nothing becomes fp32 on the way, and disabled is the plain model."""
    for dtype in (torch.bfloat16, torch.float16) if name == FLUX else (torch.bfloat16,):
        plain = trajectory_in(TINY[name].build().to(dtype), name, dtype)
        model = equip(TINY[name].build().to(dtype), stack)
        found = trajectory_in(model, name, dtype)
        assert found.dtype == plain.dtype
        assert found.isfinite().all()
        assert {value.dtype for value in model.tokdyn.parameters()} <= {torch.float32}
        with tokdyn.disabled(model):
            assert torch.equal(trajectory_in(model, name, dtype), plain)
        model.to(torch.float32).to(dtype)  # casts the parts too
        assert {value.dtype for value in model.parameters()} == {dtype}
        tokdyn.reset(model)
        assert trajectory_in(model, name, dtype).isfinite().all()
        assert torch.equal(trajectory_in(tokdyn.unwrap(model), name, dtype), plain)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch, of Flux as it is
@pytest.mark.parametrize("name", [*FEW, "DCDiT"])
def test_autocast_trains_an_fp32_model(name: str) -> None:
    """bf16 inside, fp32 weights and gradients; routing losses are those of fp32 up to what bf16 tokens lose (5%)."""
    found = []
    for enabled in (False, True):
        model = equip(TINY[name].build(), TRAINING if fits(name, "stack") else GATES).train()
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = step_loss(model, name, TINY[name].inputs(2))
        loss.backward()
        gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in gradients.values())
        assert {key for key, _ in model.tokdyn.named_parameters(prefix="tokdyn")} <= set(gradients)
        found.append({key: value.item() for key, value in tokdyn.losses(model).items()})
    for key, value in found[0].items():
        assert found[1][key] == pytest.approx(value, rel=0.05)


@pytest.mark.parametrize("name", FEW)
def test_only_the_methods_are_trained_where_the_base_is_frozen(name: str) -> None:
    model = equip(TINY[name].build(), TRAINING)
    model.requires_grad_(False)
    model.tokdyn.requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    step(model, name)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all(key.startswith("tokdyn.") for key in changed)
    assert [key for key, value in model.named_parameters() if value.requires_grad] == [
        f"tokdyn.{key}" for key, _ in model.tokdyn.named_parameters()
    ]
    assert list(dict(model.named_parameters()))[-1].startswith("tokdyn.parts.")
    assert model.dtype == torch.float32 if hasattr(model, "dtype") else True


@pytest.mark.parametrize("name", FEW)
def test_training_and_evaluation_are_told_apart(name: str) -> None:
    model = equip(TINY[name].build(), TRAINING)
    still = predict(model, name).detach()
    assert torch.equal(predict(model, name), still)  # evaluation, with gradients
    model.train()
    assert model.tokdyn.training
    torch.manual_seed(0)
    drawn = predict(model, name).detach()
    assert not torch.equal(drawn, still)
    with torch.no_grad():
        assert tokdyn.losses(model)
        assert torch.equal(predict(model, name), predict(model, name))  # no gradients: nothing is drawn
    model.eval()
    assert torch.equal(predict(model, name), still)
    assert tokdyn.losses(model) == {}


@pytest.mark.parametrize("name", FEW)
def test_averages_compute_with_their_own_weights(name: str) -> None:
    model = equip(TINY[name].build(), trained(name))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    start = [value.detach().clone() for value in model.parameters()]
    step(model, name)
    averaged.update_parameters(model)  # the first update copies
    step(model, name, seed=1)
    averaged.update_parameters(model)
    assert any(not torch.equal(value, old) for value, old in zip(model.parameters(), start, strict=True))
    twin = equip(TINY[name].build(), trained(name))
    twin.load_state_dict(averaged.module.state_dict(), strict=True)
    averaged.eval()
    assert torch.equal(trajectory(averaged, name), trajectory(twin, name))
    assert not torch.equal(trajectory(averaged, name), trajectory(model.eval(), name))
    assert len(tokdyn.stats(averaged).calls) == 2


def test_the_average_of_diffusers_keeps_all_weights(tmp_path: Any) -> None:
    name = "PixArtTransformer2DModel"
    model = equip(TINY[name].build(), TRAINED)
    ema = EMAModel(model.parameters(), decay=0.5, min_decay=0.5)
    step(model, name)
    ema.step(model.parameters())
    trained_now = [value.detach().clone() for value in model.parameters()]
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ema.shadow_params, strict=True))
    assert predict(model.eval(), name).isfinite().all()
    ema.restore(model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained_now, strict=True))
    ema.load_state_dict(copy.deepcopy(ema.state_dict()))


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_is_pickled(name: str) -> None:
    """As processes that are spawned get it. The copy has weights and methods of its own, and the same outputs."""
    model = equip(TINY[name].build(), stack_of(name))
    expected = trajectory(model, name)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(trajectory(again, name), expected)
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    tokdyn.reset(again)
    assert torch.equal(trajectory(again, name), expected)
    assert type(tokdyn.unwrap(again)) is type(TINY[name].build())
