"""Dynamic width follows a model that changes after wrapping: adapters, weights, types, parts, offloading, copies."""

import copy

import pytest
import torch
from torch import nn

import tokdyn
from tests.contract.kit import count_from_now, elements_in_memory
from tests.contract.models import TINY, sample
from tests.contract.widths import (
    ALL,
    calls,
    in_double,
    method,
    random_gates,
    wrapped,
)
from tokdyn.adapters import adapter_for
from tokdyn.attach.width.layout import reach


class LowRank(nn.Module):
    """An adapter layer in the place of a linear one."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(torch.randn(2, self.in_features, generator=generator).to(base_layer.weight) * 0.3)
        self.up = nn.Parameter(torch.randn(self.out_features, 2, generator=generator).to(base_layer.weight) * 0.3)

    def forward(self, x):
        return self.base_layer(x) + x @ self.down.T @ self.up.T


def adapt(model):
    """Put adapters in the place of all layers that can be cut."""
    for stack in adapter_for(model).blocks:
        for block in model.get_submodule(stack.path):
            for path in {cut.path for cut in stack.width.layers}:
                layer = reach(block, tuple(path.split(".")))
                if layer is not None:
                    block.set_submodule(path, LowRank(layer))
    return model


def fused(model):
    """Merge the adapters into their layers, through .data as peft does, and take them away."""
    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, LowRank):
                part.base_layer.weight.data += part.up.data @ part.down.data
                module.set_submodule(name, part.base_layer)
    return model


@pytest.mark.parametrize("name", ["DiT", "FluxTransformer2DModel", "Flux2Transformer2DModel", "SD3Transformer2DModel"])
@torch.no_grad()
def test_adapters_before_and_after_wrapping(name):
    inputs = in_double(ALL[name].inputs(2))
    expected = sample(wrapped(name, fused(adapt(ALL[name].build().double())))(**inputs))
    before = wrapped(name, adapt(ALL[name].build().double()))
    after = wrapped(name, ALL[name].build().double())
    plain = sample(after(**inputs))
    adapt(after)
    for model in (before, after):
        torch.testing.assert_close(sample(model(**inputs)), expected, rtol=0, atol=1e-12)
        assert all(call.heads == 1.0 for call in calls(model))
        fused(model)
        torch.testing.assert_close(sample(model(**inputs)), expected, rtol=0, atol=1e-12)
        assert any(call.heads < 1.0 for call in calls(model))
    assert not torch.equal(plain, expected)
    assert type(tokdyn.unwrap(after)) is type(ALL[name].build())
    assert [type(part) for part in after.modules()] == [type(part) for part in ALL[name].build().modules()]


def test_adapters_learn_in_a_wrapped_model():
    name = "FluxTransformer2DModel"
    model = adapt(wrapped(name).requires_grad_(False)).train()
    for part in model.modules():
        if isinstance(part, LowRank):
            part.down.requires_grad_()
            part.up.requires_grad_()
    torch.manual_seed(0)
    sample(model(**ALL[name].inputs(2))).square().mean().backward()
    grads = [part.up.grad for part in model.modules() if isinstance(part, LowRank)]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


def scale(weight):
    weight.mul_(1.5)


def scale_data(weight):
    weight.data.mul_(1.5)


def replace_data(weight):
    weight.data = weight.data * 1.5


CHANGES = {"in place": scale, "through .data": scale_data, "new .data": replace_data}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_slices_follow_the_weights(change):
    model, inputs = wrapped("DiT"), TINY["DiT"].inputs(2)
    before, gates = sample(model(**inputs)), set(map(id, model.tokdyn.parameters()))
    base = TINY["DiT"].build()
    for each in (model, base):
        for parameter in each.parameters():
            if id(parameter) not in gates:
                CHANGES[change](parameter)
    fresh = wrapped("DiT", base)
    assert torch.equal(sample(model(**inputs)), sample(fresh(**inputs)))
    assert not torch.equal(sample(model(**inputs)), before)


@torch.no_grad()
def test_slices_follow_the_type_and_are_not_copied():
    """They are kept from call to call, not in a copy of the model, and not when their weights have another type."""
    count_from_now()
    model, inputs = wrapped("DiT"), TINY["DiT"].inputs(2)
    size, before = sum(p.numel() for p in model.blocks.parameters()), elements_in_memory()
    sample(model(**inputs))
    called = elements_in_memory()
    assert 0.2 * size < called - before < size
    twin = copy.deepcopy(model)
    whole = sum(p.numel() for p in model.parameters())
    assert elements_in_memory() - called < whole + 0.1 * size
    assert torch.equal(sample(twin(**inputs)), sample(model(**inputs)))
    called = elements_in_memory()
    model.double()
    assert called - elements_in_memory() > 0.2 * size
    exact = sample(model(**in_double(inputs)))
    torch.testing.assert_close(exact.float(), sample(twin(**inputs)), rtol=0, atol=2e-6)


@torch.no_grad()
def test_what_happens_to_the_parts_of_a_block_is_seen():
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Doubled(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, **kwargs):
            return super().__call__(attn, 2 * hidden_states, **kwargs)

    name = "PixArtTransformer2DModel"
    model, inputs = wrapped(name), TINY[name].inputs(2)
    before = sample(model(**inputs))
    model.set_attn_processor(Doubled())
    base = TINY[name].build()
    base.set_attn_processor(Doubled())
    expected = sample(wrapped(name, base)(**inputs))
    assert torch.equal(sample(model(**inputs)), expected)
    assert all(call.heads == 1.0 for call in calls(model))  # a processor that is not known
    assert not torch.equal(before, expected)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["DiT", "FluxTransformer2DModel"])
@torch.no_grad()
def test_offloading_hooks(name, when):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    inputs = ALL[name].inputs(2)
    expected = sample(wrapped(name)(**inputs))
    model = ALL[name].build()
    if when == "before":
        cpu_offload(model, execution_device="cpu")
        model = tokdyn.wrap(model, [method(name)])
        random_gates(model)
    else:
        model = wrapped(name, model)
        sample(model(**inputs))
        cpu_offload(model, execution_device="cpu")
    torch.testing.assert_close(sample(model(**inputs)), expected, rtol=0, atol=2e-6)
    assert all(call.heads == 1.0 for call in calls(model))
    remove_hook_from_submodules(model)
    torch.testing.assert_close(sample(model(**inputs)), expected, rtol=0, atol=2e-6)
    assert any(call.heads < 1.0 for call in calls(model))


def test_gradients_of_inputs_and_of_weights_in_evaluation():
    """Weights that want gradients are not sliced; the inputs get theirs either way."""
    found = []
    for frozen in (True, False):
        model = wrapped("DiT").requires_grad_(not frozen)
        inputs = TINY["DiT"].inputs(2)
        inputs["hidden_states"].requires_grad_()
        sample(model(**inputs)).square().sum().backward()
        assert (calls(model)[0].heads < 1) == frozen
        found.append(inputs["hidden_states"].grad)
        assert frozen or model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["DiT", "FluxTransformer2DModel"])
@torch.no_grad()
def test_gates_come_back_from_files(name, tmp_path):
    model, inputs = wrapped(name), ALL[name].inputs(2)
    tokdyn.save(model, tmp_path)
    assert torch.equal(sample(tokdyn.load(ALL[name].build(), tmp_path)(**inputs)), sample(model(**inputs)))


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "PixArtTransformer2DModel", "WanTransformer3DModel"])
@torch.no_grad()
def test_fused_projections(name):
    """They take the place of layers that stay where they are, so masks take over, and slices when they are gone."""
    inputs = in_double(ALL[name].inputs(2))
    model = wrapped(name, ALL[name].build().double())
    expected = sample(model(**inputs))
    for part in model.modules():
        if hasattr(part, "fuse_projections"):
            part.fuse_projections()
    torch.testing.assert_close(sample(model(**inputs)), expected, rtol=0, atol=1e-12)
    assert all(call.heads == 1.0 for call in calls(model))


@pytest.mark.parametrize("name", ["DiT", "SD3Transformer2DModel", "CogVideoXTransformer3DModel"])
@torch.no_grad()
def test_bf16_and_autocast(name):
    inputs = ALL[name].inputs(2)
    expected = sample(wrapped(name)(**inputs))
    close = {"rtol": 0, "atol": 0.1 * expected.abs().max().item()}  # a token near 0 may go the other way
    with torch.autocast("cpu", torch.bfloat16):
        mixed = sample(wrapped(name)(**inputs))
    torch.testing.assert_close(mixed.float(), expected, **close)
    half = {key: value.bfloat16() if is_float(value) else value for key, value in inputs.items()}
    model = wrapped(name, ALL[name].build().bfloat16())
    assert all(parameter.dtype == torch.float32 for parameter in model.tokdyn.parameters())
    torch.testing.assert_close(sample(model(**half)).float(), expected, **close)
    assert any(call.heads < 1 for call in calls(model))


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()
