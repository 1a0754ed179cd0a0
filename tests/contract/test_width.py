"""Dynamic width: what is off is really not computed, and equals masks exactly, in every family."""

from itertools import product

import pytest
import torch

import tokdyn
from tests.contract.models import TINY, one_of, sample
from tests.contract.widths import (
    ALL,
    NAMES,
    WITH_CHANNELS,
    WITH_HEADS,
    WITH_TOKENS,
    blocks_of,
    calls,
    clock,
    decided_flops,
    hold,
    in_double,
    layouts_on,
    random_gates,
    widths_of,
    wrapped,
)
from tokdyn import DynamicWidth, FeatureCache, InputError, UnsupportedModelError
from tokdyn.adapters import adapter_for
from tokdyn.ops.width import spread


def what_is_on(model, level=0.5):
    """(depth, H) for heads and for groups of channels."""
    logits = widths_of(model)[0](torch.tensor([level]))
    layouts = layouts_on(model)
    open_ = torch.ones(len(layouts), len(layouts[0].sizes["heads"]), dtype=torch.bool)
    return [open_ if each is None else torch.cat([open_[:, :1], each[0] > 0], dim=1) for each in logits]


def zeroed(model, heads, channels, layouts):
    """The model with the weights that lead out of heads and channels that are off set to zero."""
    for number, (block, layout) in enumerate(zip(blocks_of(model), layouts, strict=True)):
        on = {"heads": heads[number : number + 1], "channels": channels[number : number + 1]}
        for layer in layout.layers:
            if layer.into:
                mask = torch.cat([spread(on[kind], layout.sizes[kind]) for kind in layer.into], dim=1)
                block.get_submodule(".".join(layer.names)).weight.mul_(mask)
    return model


@pytest.mark.parametrize("name", WITH_HEADS)
@torch.no_grad()
def test_slices_equal_masks_and_weights_set_to_zero(name):
    inputs = in_double(ALL[name].inputs(2))
    model = wrapped(name, ALL[name].build().double(), tokens=False)
    sliced = sample(model(**inputs))
    assert any(call.heads < 1 for call in calls(model))
    assert name not in WITH_CHANNELS or any(call.channels < 1 for call in calls(model))
    masked = sample(hold(wrapped(name, ALL[name].build().double(), tokens=False))(**inputs))
    zero = sample(zeroed(ALL[name].build().double(), *what_is_on(model), layouts_on(model))(**inputs))
    torch.testing.assert_close(sliced, masked, rtol=0, atol=1e-12)
    torch.testing.assert_close(sliced, zero, rtol=0, atol=1e-12)
    assert not torch.equal(sliced, sample(ALL[name].build().double()(**inputs)))


def choosing_by_hand(model, gates, adapter, cells):
    """The model with hooks that set the results of MLPs to zero for tokens that are off."""
    number = 0
    for stack in adapter.blocks:
        place = stack.inside_mlp or stack.image
        for block in getattr(model, stack.path):
            part = next((getattr(block, name) for name in stack.mlp if hasattr(block, name)), None)
            entry = part or getattr(block, "proj_mlp", None) or block.attn.to_qkv_mlp_proj
            first = 3 * block.attn.inner_dim if type(block).__name__ == "Flux2SingleTransformerBlock" else 0

            def hook(module, args, out, number=number, place=place, first=first):
                x = args[0]
                off = gates.token_logits(number, x) <= 0
                words = x.shape[1] - cells if place != "all" else 0
                if place == "first":
                    off[:, x.shape[1] - words :] = False
                else:
                    off[:, :words] = False
                out = out.clone()
                out[..., first:][off] = 0
                return out

            entry.register_forward_hook(hook)
            number += 1
    return model


@pytest.mark.parametrize("name", [name for name in WITH_TOKENS if name != "DCDiT"])
@torch.no_grad()
def test_tokens_that_are_off_get_nothing_from_the_mlp(name):
    inputs = in_double(ALL[name].inputs(3))
    model = wrapped(name, ALL[name].build().double(), heads=False, channels=False)
    found = sample(model(**inputs))
    rows = [call.mlp_rows for call in calls(model)]
    assert any(0 < each < call.samples * call.tokens for each, call in zip(rows, calls(model), strict=True))
    by_hand = choosing_by_hand(
        ALL[name].build().double(), widths_of(model)[0], adapter_for(model), tokdyn.traces(model)[-1].cells
    )
    torch.testing.assert_close(found, sample(by_hand(**inputs)), rtol=0, atol=1e-12)
    masked = sample(hold(wrapped(name, ALL[name].build().double()))(**inputs))
    sliced = sample(wrapped(name, ALL[name].build().double())(**inputs))
    torch.testing.assert_close(sliced, masked, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", WITH_HEADS)
@torch.no_grad()
def test_samples_at_different_levels_do_not_depend_on_each_other(name):
    model, inputs, levels = wrapped(name), ALL[name].inputs(3), (0.25, 0.75, 0.25)
    together = sample(model(**{**inputs, **clock(name, *levels)}))
    assert {call.samples for call in calls(model)} > {3} or {1, 2} <= {call.samples for call in calls(model)}
    for i, level in enumerate(levels):
        alone = sample(model(**{**one_of(inputs, i), **clock(name, level)}))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("name", "tokens"), [*product(NAMES, [True]), *product(WITH_CHANNELS, [False])])
@torch.no_grad()
def test_flops_that_are_counted_fall_and_are_those_that_are_computed(name, tokens):
    model, inputs = wrapped(name, tokens=tokens), ALL[name].inputs(2)
    with tokdyn.disabled(model):
        whole = tokdyn.flops(model, **inputs)
    spent = tokdyn.flops(model, **inputs)
    gates = spent.parts["DynamicWidth gates"]
    assert whole.counted == whole.total
    if name != "DCDiT":  # its attention pads rows for a kernel, more of them the fewer heads there are
        assert spent.counted == spent.total
    assert spent.counted - gates < 0.95 * whole.counted
    model(**inputs)
    call = tokdyn.stats(model).calls[-1]
    assert (call.heads < 1) == (name in WITH_HEADS)
    assert (call.channels < 1) == (name in WITH_CHANNELS)


@pytest.mark.parametrize("name", [name for name in WITH_CHANNELS if name != "DCDiT"])
@torch.no_grad()
def test_the_loss_charges_what_is_saved(name):
    """A share of heads or channels saves that share of the FLOPs that training charges for them."""
    model, inputs = wrapped(name, tokens=False), ALL[name].inputs(2)
    with tokdyn.disabled(model):
        whole = tokdyn.flops(model, **inputs).counted
    found = tokdyn.flops(model, **inputs)
    model(**inputs)
    saved = 0.0
    for call in calls(model):
        attention, mlp = decided_flops(model, call)
        saved += call.samples * ((1 - call.heads) * attention + (1 - call.channels) * mlp)
    really = whole - found.counted + found.parts["DynamicWidth gates"]
    if name in ("shared-keys", "Lumina2Transformer2DModel"):  # keys and values are needed if one of two heads is on
        assert 0.8 * saved < really <= saved
    else:
        assert really == saved


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("SanaTransformer2DModel", {}, r"SanaTransformer2DModel: .*DynamicWidth\(channels=False, tokens=False\)"),
        ("SanaTransformer2DModel", {"tokens": False}, r"DynamicWidth\(channels=False, tokens=False\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_attached(name, settings, sentence):
    model = TINY[name].build()
    with pytest.raises(UnsupportedModelError, match=sentence):
        tokdyn.wrap(model, [DynamicWidth(**settings)])
    assert not hasattr(model, "tokdyn")


def test_a_model_with_one_head_has_nothing_to_choose():
    model = tokdyn.DiT(sample_size=8, hidden_size=16, depth=2, num_heads=1)
    with pytest.raises(InputError, match="tokens=True"):
        tokdyn.wrap(model, [DynamicWidth(tokens=False)])
    with pytest.warns(UserWarning, match="single attention head"):
        tokdyn.wrap(model, [DynamicWidth()])


@torch.no_grad()
def test_samples_that_a_cache_leaves_over_keep_their_own_gates():
    """In DC-DiT the cache lies around the gates: they see the samples that are computed, and no others."""
    tiny = TINY["DCDiT"]

    def called(levels, seed):
        clocks = [tiny.at(1, level) for level in levels]
        noise = torch.randn(3, 4, 6, 8, generator=torch.Generator().manual_seed(seed))
        moved = tiny.inputs(3)["hidden_states"].clone()
        moved[1:] = noise[1:] if seed else moved[1:]
        return {**tiny.inputs(3), "hidden_states": moved, "timestep": torch.cat([each["timestep"] for each in clocks])}

    model = random_gates(tokdyn.wrap(tiny.build(), [FeatureCache(threshold=10.0), DynamicWidth(tokens=False)]))
    model(**called((0.9, 0.2, 0.3), 0))
    second = called((0.85, 0.9, 0.5), 1)
    together = sample(model(**second))
    for place in range(3):
        fresh = random_gates(tokdyn.wrap(tiny.build(), [DynamicWidth(tokens=False)]))
        distance = (together[place] - sample(fresh(**one_of(second, place)))[0]).abs().max()
        assert distance > 1e-4 if place == 0 else distance < 2e-6  # the first goes on and is reused
