"""Methods on quantised weights: wrapped before and after, the laws hold, and results are those on the rounded weights.

Casting in storage runs everywhere; the other ways need libraries that are optional (`quantised.py`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokdyn
from tests.contract.ecosystem import SAMPLING, TRAINING, equip, predict, trajectory
from tests.contract.models import TINY
from tests.contract.quantised import WAYS, build, linears, rounded
from tests.contract.test_integration_lora import configuration
from tokdyn import Chunking, DepthSkip, DynamicWidth, FeatureCache, TokenMerge

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated:UserWarning"),
]
FLUX = "FluxTransformer2DModel"
NAMES = (FLUX, "DiTTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel")
NEVER = [FeatureCache(threshold=0.0), TokenMerge(ratio=0.0), DepthSkip()]
STACKS: dict[str, Any] = {"empty": [], "never": NEVER, **SAMPLING}
QUICK = ("chunk-cosine", "width-stack", "never")
DYNAMIC = {"torchao-int8-dynamic", "bitsandbytes-8"}  # they round the activations too
COUNTED = ("torchao-int8-dynamic", "bitsandbytes-4", "quanto", "cast")


def default(name: str, way: str, stack: str) -> bool:
    return name == FLUX and (stack in QUICK if way.startswith("cast") else stack == "width-stack")


def cases() -> list[Any]:
    return [
        pytest.param(name, way, stack, marks=[] if default(name, way, stack) else pytest.mark.slow)
        for name in NAMES
        for way in WAYS
        for stack in STACKS
    ]


def parts(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.tokdyn.named_parameters()}


@torch.no_grad()
@pytest.mark.parametrize(("name", "way", "stack"), cases())
def test_the_laws_hold_whichever_comes_first(name: str, way: str, stack: str, tmp_path: Any) -> None:
    quantise, methods = WAYS[way], STACKS[stack]
    plain = trajectory(quantise(build(name)), name)
    assert not torch.equal(plain, trajectory(build(name), name))
    early, late = equip(quantise(build(name)), methods), equip(build(name), methods)
    before = parts(late)
    quantise(late)
    assert {key: type(value) for key, value in late.tokdyn.named_parameters()} == dict.fromkeys(before, nn.Parameter)
    assert all(torch.equal(value, before[key]) for key, value in late.tokdyn.named_parameters())
    found = trajectory(early, name)
    assert torch.equal(trajectory(late, name), found)
    assert torch.equal(found, plain) == (stack in ("empty", "never"))
    for model in (early, late):
        with tokdyn.disabled(model):
            assert torch.equal(trajectory(model, name), plain)
    tokdyn.save(late, tmp_path)
    for model in (early, late):
        assert torch.equal(trajectory(tokdyn.unwrap(model), name), plain)
    assert torch.equal(trajectory(tokdyn.load(early, tmp_path), name), found)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "way", "stack"),
    [
        pytest.param(
            name, way, stack, marks=[] if (name, stack) in ((FLUX, "width"), (FLUX, "stack")) else pytest.mark.slow
        )
        for name in NAMES
        for way in WAYS
        for stack in ("merge", "skip", "chunk", "width", "stack")
        if way not in DYNAMIC
    ],
)
def test_results_are_those_of_the_rounded_weights(name: str, way: str, stack: str) -> None:
    """Sums are added in another order, which changes fp32 by 1e-6 or so; no decision may change by it."""
    atol = 3e-2 if way == "bitsandbytes-4" else 2e-5  # its kernel computes in bf16 where the processor can
    model = WAYS[way](build(name))
    twin = rounded(name, model)
    torch.testing.assert_close(trajectory(model, name), trajectory(twin, name), rtol=0, atol=atol)
    for each in (model, twin):
        equip(each, SAMPLING[stack])
    found = trajectory(model, name)
    torch.testing.assert_close(found, trajectory(twin, name), rtol=0, atol=atol)
    assert [call.blocks for call in tokdyn.stats(model).calls] == [call.blocks for call in tokdyn.stats(twin).calls]


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_heads_and_channels_that_are_off_count_as_computed(way: str) -> None:
    """Quantised weights cannot be sliced: all is computed and multiplied by 0, but the MLP runs on few tokens."""
    models = [equip(build(FLUX), [DynamicWidth()]) for _ in range(2)]
    WAYS[way](models[1])
    for model in models:
        predict(model, FLUX)
    plain, found = (tokdyn.stats(model).calls[-1] for model in models)
    assert plain.heads < 1.0
    assert plain.channels < 1.0
    assert (found.heads, found.channels) == (1.0, 1.0)
    assert 0 < found.mlp_tokens < 20


@torch.no_grad()
@pytest.mark.parametrize("way", COUNTED)
def test_products_with_quantised_weights_are_counted(way: str) -> None:
    methods, inputs = [TokenMerge(ratio=0.5)], TINY[FLUX].inputs(2)
    plain = tokdyn.flops(equip(build(FLUX), methods), **inputs)
    found = tokdyn.flops(equip(WAYS[way](build(FLUX)), methods), **inputs)
    assert (found.parts, found.total, found.counted) == (plain.parts, plain.total, plain.counted)
    assert found.dense == plain.dense


@pytest.mark.parametrize("way", ["torchao-int8", "bitsandbytes-8", "gguf"])
def test_adapters_and_methods_learn_on_quantised_weights(way: str) -> None:
    """As LoRA on a quantised base: before and after wrapping, with equal gradients."""
    gradients = []
    for first in (True, False):
        model: Any = WAYS[way](build(FLUX)).requires_grad_(False)
        if first:
            torch.manual_seed(5)
            model.add_adapter(configuration(FLUX), "style")
        equip(model, TRAINING)
        if not first:
            torch.manual_seed(5)
            model.add_adapter(configuration(FLUX), "style")
            model.tokdyn.requires_grad_()
        model.train()
        torch.manual_seed(1)
        (predict(model, FLUX).square().mean() + sum(tokdyn.losses(model).values())).backward()
        trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
        assert all("lora" in key or key.startswith("tokdyn.") for key in trained)
        assert all(value.grad is not None and value.grad.isfinite().all() for value in trained.values())
        assert any("lora_B" in key and value.grad.abs().sum() > 0 for key, value in trained.items())
        gradients.append({key: value.grad for key, value in trained.items() if "score" not in key})
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-4, atol=1e-6, msg=key)


@torch.no_grad()
def test_a_model_is_quantised_beside_its_methods_and_saved_without_them(tmp_path: Any) -> None:
    """What `save_pretrained` writes are the model's own weights, in eight bits, and nothing of its methods."""
    from safetensors import safe_open

    model: Any = WAYS["cast-by-function"](equip(build(FLUX), [Chunking(target=2, router="cosine")]))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as file:
        kinds = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert not any(name.startswith("tokdyn.") for name in kinds)
    assert {kinds[f"{name}.weight"] for name, _ in linears(model) if "norm" not in name} >= {torch.float8_e4m3fn}
