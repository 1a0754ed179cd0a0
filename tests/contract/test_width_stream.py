"""Gates of tokens that see the tokens before norm and modulation, and gates of levels behind an embedding."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tokdyn
from tests.contract.models import sample
from tests.contract.widths import ALL, calls, clock, hold, in_double, random_gates, widths_of
from tokdyn import Chunking, DynamicWidth, FeatureCache, TokenMerge
from tokdyn.errors import CompositionError, UnsupportedModelError

STREAM = {"token_input": "stream", "embedding": 24}
OWN = ["DiT", "DCDiT"]


def ready(name, others=(), **settings):
    return random_gates(tokdyn.wrap(ALL[name].build(), [*others, DynamicWidth(**STREAM, **settings)]))


@pytest.mark.parametrize("name", OWN)
def test_open_gates_change_nothing(name):
    model, inputs = ALL[name].build(), ALL[name].inputs(3)
    before = sample(model(**inputs))
    tokdyn.wrap(model, [DynamicWidth(**STREAM)])
    assert torch.equal(sample(model(**inputs)), before)
    tokdyn.unwrap(model)
    assert torch.equal(sample(model(**inputs)), before)


@pytest.mark.parametrize("name", OWN)
def test_slices_and_rows_equal_masks(name):
    """fp64: rows and masks differ in the order of sums alone."""
    model = ready(name).double()
    inputs = in_double({**ALL[name].inputs(3), **clock(name, 0.1, 0.6, 0.6)})
    with torch.no_grad():
        found = sample(model(**inputs))
        ran = [call.mlp_rows for call in calls(model)]
        masked = sample(hold(model)(**inputs))
    torch.testing.assert_close(found, masked, rtol=0, atol=1e-12)
    assert any(rows is not None for rows in ran)


@pytest.mark.parametrize("name", OWN)
def test_what_the_gates_see_is_the_input_of_the_identity(name):
    model = ready(name, heads=False, channels=False)
    (gates,) = widths_of(model)
    passed, asked = [], []
    for block in model.blocks:
        block.stream.register_forward_hook(lambda _, given, __: passed.append(given[0]))
    gates.tokens[0].register_forward_hook(lambda _, given, __: asked.append(given[0]))
    with torch.no_grad():
        model(**ALL[name].inputs(2))
    assert torch.equal(asked[0], passed[0])


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_with_checkpointing(name, reentrant):
    def gradients(saved):
        model = ready(name).train()
        if saved:
            model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=reentrant))
        torch.manual_seed(3)
        out = sample(model(**{**ALL[name].inputs(2), **clock(name, 0.1, 0.6)}))
        (out.square().mean() + 10 * tokdyn.losses(model)["DynamicWidth"]).backward()
        return {key: parameter.grad for key, parameter in widths_of(model)[0].named_parameters()}

    plain, saved = gradients(False), gradients(True)
    for key, grad in plain.items():
        assert grad.abs().sum() > 0 or key.startswith("embedding")
        torch.testing.assert_close(saved[key], grad, rtol=1e-4, atol=1e-7, msg=key)


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("DiT", [TokenMerge(ratio=0.5)]),
        ("DiT", [Chunking(target=2)]),
        ("DiT", [FeatureCache(threshold=0.5)]),
        ("DCDiT", [TokenMerge(ratio=0.5)]),
    ],
    ids=["merge", "chunk", "cache", "packed merge"],
)
def test_with_other_methods_a_sample_does_not_depend_on_its_batch(name, others):
    """fp64."""
    model, inputs = ready(name, others).double(), in_double({**ALL[name].inputs(3), **clock(name, 0.1, 0.6, 0.6)})
    with torch.no_grad():
        whole = sample(model(**inputs))
        tokdyn.reset(model)
        alone = sample(model(**{key: value[1:2] for key, value in inputs.items()}))
    torch.testing.assert_close(whole[1:2], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("where", ["mlp", "both"])
def test_tokens_must_not_be_merged_on_the_way_to_the_mlp(where):
    model = ALL["DiT"].build()
    with pytest.raises(CompositionError, match=r"DynamicWidth .*TokenMerge.*where='attention'"):
        tokdyn.wrap(model, [TokenMerge(where=where), DynamicWidth(**STREAM)])
    tokdyn.wrap(model, [TokenMerge(where=where), DynamicWidth(**STREAM, tokens=False)])


@pytest.mark.parametrize("name", ["public", "DiTTransformer2DModel", "FluxTransformer2DModel"])
def test_models_that_do_not_show_these_tokens_are_refused(name):
    model = ALL[name].build()
    with pytest.raises(UnsupportedModelError, match=r"DynamicWidth\(token_input='mlp'\)"):
        tokdyn.wrap(model, [DynamicWidth(**STREAM)])
    assert not hasattr(model, "tokdyn")
    tokdyn.wrap(model, [DynamicWidth(embedding=24)])  # an embedding goes with every model


def test_what_the_gates_of_levels_cost():
    """Two layers of the embedding and two of the gates for each of two levels; a multiply-add is 2 FLOPs."""
    model = ready("DiT", tokens=False)
    (gates,) = widths_of(model)
    with torch.no_grad():
        model(**{**ALL["DiT"].inputs(3), **clock("DiT", 0.1, 0.6, 0.6)})
    outputs = gates.depth * gates.gates
    expected = 2 * 2 * (256 * 24 + 24 * 24 + 2 * 24 * outputs)
    assert tokdyn.traces(model)[-1].method_flops["DynamicWidth gates"] == expected
