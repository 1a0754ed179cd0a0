"""LoRA through peft on wrapped models: before and after wrapping, trained, scaled, shut off, fused and taken away.

Models of diffusers that take adapters do so through `add_adapter`; the others are put into a `PeftModel`.
"""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import tokdyn
from tests.contract.ecosystem import MODELS, TRAINING, equip, predict, stack_of, trajectory
from tests.contract.models import TINY
from tokdyn.errors import InputError, UnsupportedModelError
from tokdyn.methods import Chunking, DepthSkip, TokenMerge

TARGETS = {"ZImageTransformer2DModel": ["to_q", "to_v", "w1"], "DiT": ["qkv", "fc1"], "DCDiT": ["qkv", "fc1"]}
ADAPTERS = [name for name in MODELS if hasattr(getattr(diffusers, name, None), "add_adapter")]
THREE = ["FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel"]


def configuration(name: str) -> LoraConfig:
    targets = TARGETS.get(name, ["to_q", "to_v", "to_out.0"])
    return LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=targets)


def adapted(model: nn.Module, name: str) -> nn.Module:
    torch.manual_seed(5)
    model.add_adapter(configuration(name), "style")
    return model


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_may_come_before_or_after(name: str) -> None:
    stack = stack_of(name)
    base = trajectory(equip(TINY[name].build(), stack), name)
    early = equip(adapted(TINY[name].build(), name), stack)
    late = adapted(equip(TINY[name].build(), stack), name)
    assert not any("lora" in key for key, _ in late.tokdyn.named_parameters())
    with_it = trajectory(early, name)
    assert torch.equal(trajectory(late, name), with_it)
    assert not torch.equal(with_it, base)
    late.disable_adapters()
    assert torch.equal(trajectory(late, name), base)
    late.enable_adapters()
    late.set_adapters("style", 0.5)
    half = trajectory(late, name)
    assert not torch.equal(half, with_it)
    assert not torch.equal(half, base)
    late.set_adapters("style", 1.0)
    assert torch.equal(trajectory(late, name), with_it)
    late.delete_adapters("style")
    assert torch.equal(trajectory(late, name), base)
    tokdyn.unwrap(early)
    assert torch.equal(predict(early, name), predict(adapted(TINY[name].build(), name), name))


@pytest.mark.parametrize("name", THREE)
def test_an_adapter_is_fused_and_unloaded(name: str) -> None:
    """Fused weights are sums that were added before, so outputs agree as far as fp32 does (2e-5)."""
    base = trajectory(equip(TINY[name].build(), "stack"), name)
    model = adapted(equip(TINY[name].build(), "stack"), name)
    with_it = trajectory(model, name)
    model.fuse_lora()
    torch.testing.assert_close(trajectory(model, name), with_it, rtol=0, atol=2e-5)
    model.unfuse_lora()
    torch.testing.assert_close(trajectory(model, name), with_it, rtol=0, atol=2e-5)
    model.unload_lora()
    torch.testing.assert_close(trajectory(model, name), base, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_and_the_methods_learn_together(name: str, checkpointing: bool) -> None:
    gradients = []
    for first in (True, False):
        model = TINY[name].build()
        if first:
            adapted(model, name)
        equip(model, TRAINING)
        if not first:
            adapted(model, name)
            model.tokdyn.requires_grad_(True)  # add_adapter freezes what is there
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        torch.manual_seed(1)
        loss = predict(model, name).square().mean()
        (loss + sum(tokdyn.losses(model).values())).backward()
        trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
        assert all("lora" in key or key.startswith("tokdyn.") for key in trained)
        assert all(value.grad is not None and value.grad.isfinite().all() for value in trained.values())
        assert any("lora_B" in key and value.grad.abs().sum() > 0 for key, value in trained.items())
        gradients.append({key: value.grad for key, value in trained.items() if "score" not in key})
    for key, value in gradients[0].items():  # the gates' loss weighs blocks by their parameters, adapters included
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_a_scale_in_the_arguments_is_welcome_and_image_prompts_are_not() -> None:
    name = "FluxTransformer2DModel"
    model, inputs = adapted(equip(TINY[name].build(), "merge"), name), TINY[name].inputs(2)
    with torch.no_grad():
        full = predict(model, name)
        half = model(**inputs, joint_attention_kwargs={"scale": 0.5}).sample
        model.set_adapters("style", 0.5)
        expected = predict(model, name)
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, expected, rtol=0, atol=1e-6)
    for key in ("ip_adapter_image_embeds", "ip_hidden_states"):
        with pytest.raises(InputError, match="joint_attention_kwargs"):
            model(**inputs, joint_attention_kwargs={key: [torch.zeros(2, 1, 4, 16)]})


@pytest.mark.parametrize("name", ["DiT", "DiTTransformer2DModel", "PixArtTransformer2DModel"])
def test_a_model_inside_a_peft_model(name: str) -> None:
    base = trajectory(equip(TINY[name].build(), "stack"), name)
    torch.manual_seed(5)
    outside = get_peft_model(equip(TINY[name].build(), "stack"), configuration(name))
    with_it = trajectory(outside, name)
    assert not torch.equal(with_it, base)
    assert len(tokdyn.stats(outside).calls) == 2
    with outside.disable_adapter():
        assert torch.equal(trajectory(outside, name), base)
    torch.manual_seed(5)
    late = get_peft_model(TINY[name].build(), configuration(name))
    with pytest.raises(UnsupportedModelError, match=r"PeftModel .*tokdyn\.wrap.*get_base_model"):
        tokdyn.wrap(late, [TokenMerge()])
    equip(late.get_base_model(), "stack")
    assert torch.equal(trajectory(late, name), with_it)
    tokdyn.unwrap(late.get_base_model())
    assert not hasattr(late.get_base_model(), "tokdyn")


def test_adapters_on_all_linear_layers_leave_the_parts_of_methods_alone() -> None:
    """Routers and gates decide as they were trained, with or without the adapter; they learn if they are let to."""
    name = "DiT"
    model = equip(TINY[name].build(), [Chunking(target=2, router="cosine"), DepthSkip(learned=True)])
    parts = {key: value.detach().clone() for key, value in model.tokdyn.named_parameters()}
    before = predict(model.eval(), name).detach()
    torch.manual_seed(5)
    outside = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear"))
    model.tokdyn.requires_grad_()
    assert {key for key, _ in model.tokdyn.named_parameters()} == parts.keys()
    outside.train()
    assert not torch.equal(predict(outside, name), before)
    (predict(outside, name).square().mean() + sum(tokdyn.losses(outside).values())).backward()
    trained: dict[str, Any] = {key: value for key, value in model.named_parameters() if value.requires_grad}
    assert {key.split(".")[0] for key in trained} >= {"blocks", "tokdyn"}
    assert all(value.grad is not None and value.grad.isfinite().all() for value in trained.values())
