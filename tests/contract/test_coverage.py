"""Classes that are checked less often than others: laws that depend on their declarations, and that methods act.

The whole contract is checked on the models in `tests/contract/models.py`.
"""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch

import tokdyn
from tests.contract.coverage_images import IMAGES
from tests.contract.kit import SHARED, assert_a_cache_compares_what_attention_gets, moved, of_diffusers, sample, works
from tests.contract.stacks import ACTIVE, acting, at_levels
from tokdyn import Chunking, DepthSkip, DynamicWidth, FeatureCache, InputError, TokenDrop, TokenMerge
from tokdyn.adapters import ADAPTERS, adapter_for
from tokdyn.testing import LAWS, Case, check_adapter

NAMES = sorted(IMAGES)
every = pytest.mark.parametrize("name", NAMES)
STACKS = ("merge-weighted", "drop-nested", "cache-first", "chunk-ragged", "width", "width-heads", "width-tokens")
PAIRS = [(name, stack) for name, stack in product(NAMES, STACKS) if works(name, ACTIVE[stack])]
PAIRS = [pair for pair in PAIRS if not pair[1].startswith("width-") or (pair[0], "width") not in PAIRS]
BY_NAME = {
    law.__name__: law
    for law in LAWS
    if law.__name__
    in {
        "disabled_is_the_original",
        "samples_do_not_depend_on_each_other",
        "computed_flops_are_the_counted_ones",
        "gradients_are_the_same_with_checkpointing",
    }
}


@pytest.mark.pairwise("coverage")
@pytest.mark.parametrize(("name", "stack"), PAIRS)
@pytest.mark.parametrize("law", BY_NAME)
def test_laws_hold(law, name, stack):
    """Samples of one call stand at different noise levels, and some prompts are padded."""
    model = IMAGES[name].build()
    BY_NAME[law](
        Case(
            build=lambda: copy.deepcopy(model),
            call=at_levels(name),
            methods=tuple(ACTIVE[stack]),
            shared=SHARED | IMAGES[name].shared,
            tolerance=1e-5,
            prepare=acting,
        )
    )


@pytest.mark.slow
@every
def test_every_method_obeys_every_law(name):
    tiny = IMAGES[name]
    checked = check_adapter(tiny.build(), tiny.inputs(3), shared=SHARED | tiny.shared, tolerance=1e-5)
    assert len(checked) >= 8


@pytest.mark.parametrize(
    ("name", "argument", "methods"),
    [
        (name, argument, methods)
        for name in NAMES
        for adapter in [next(adapter for adapter in ADAPTERS if name in adapter.classes)]
        for arguments, methods in ((adapter.refuse, TokenMerge()), (adapter.refuse_always, FeatureCache()))
        for argument in arguments
    ],
)
def test_arguments_that_do_not_go_with_methods_are_refused(name, argument, methods):
    model, ran = IMAGES[name].build(), []
    model.get_submodule(adapter_for(model).blocks[0].path)[0].register_forward_hook(lambda *_: ran.append(1))
    value = {"ip_hidden_states": []} if argument.endswith("kwargs") else [torch.zeros(1, 1, 4)]
    with pytest.raises(InputError, match=rf"\b{argument}\b.*\b{name}\b.+\.$"):
        tokdyn.wrap(model, [methods])(**{**IMAGES[name].inputs(2), argument: value})
    assert not ran


@pytest.mark.slow
@every
@torch.no_grad()
def test_caches_compare_what_attention_gets(name):
    tiny = IMAGES[name]
    blocks = adapter_for(tiny.build()).blocks[0]
    if blocks.modulated is None:
        pytest.skip("the tokens that the first block gets are compared")
    before = {**tiny.inputs(2), **tiny.at(2, 0.5)}
    after = {**moved(tiny.inputs(2)), **tiny.at(2, 0.45)}
    assert_a_cache_compares_what_attention_gets(tiny.build, before, after)


@every
@torch.no_grad()
def test_methods_act(name):
    """Fewer tokens, skipped blocks, reused effects, narrower blocks; or bit for bit the same, with nothing to do."""
    build, call = IMAGES[name].build, IMAGES[name].inputs(2)
    plain = sample(build()(**call))

    def run(*methods, prepare=lambda model: model, training=False):
        model = prepare(tokdyn.wrap(build(), methods)).train(training)
        with torch.set_grad_enabled(training):
            out = sample(model(**call))
        return model, out, tokdyn.traces(model)[-1]

    for methods in ([TokenMerge(ratio=0.0)], [DepthSkip()], [Chunking(target=1.0)], [DynamicWidth(target=1.0)]):
        if works(name, methods):
            assert torch.equal(run(*methods)[1], plain)
    for kept in ([TokenMerge(ratio=0.5)], [TokenMerge(ratio=0.5, where="mlp")]):
        if works(name, kept):
            _, out, trace = run(*kept)
            assert any(tokens < trace.cells for block in trace.blocks for _, tokens in [*block.attention, *block.mlp])
            assert not torch.equal(out, plain)
    if works(name, [Chunking(target=2)]):
        _, out, trace = run(Chunking(target=2), prepare=acting)
        assert all(block.tokens < trace.cells for block in trace.blocks)
        assert not torch.equal(out, plain)
    if works(name, [TokenDrop()]):
        _, _, trace = run(TokenDrop(rate=0.5, blocks=(1, 2)), training=True)
        assert [block.tokens < trace.cells for block in trace.blocks] == [False, True, True, False]
    _, out, trace = run(DepthSkip(blocks=(1,)))
    assert [block.block for block in trace.blocks] == [0, 2, 3]
    assert not torch.equal(out, plain)
    if works(name, [DynamicWidth(tokens=False)]):
        _, out, trace = run(DynamicWidth(tokens=False), prepare=acting)
        assert min(min(block.heads, block.channels) for block in trace.blocks) < 1
        assert not torch.equal(out, plain)
    model, *_ = run(FeatureCache(threshold=1e9))
    model(**{**moved(call), **IMAGES[name].at(2, 0.45)})
    assert tokdyn.stats(model).calls[-1].reused == 2


@torch.no_grad()
def test_the_timestep_that_a_step_leads_to_does_not_make_another_prompt():
    """The distilled Flux 3 is told it in every step."""
    model = of_diffusers(
        "Flux3Transformer2DModel", **{**IMAGES["Flux3Transformer2DModel"].build().config, "flow_map": True}
    )
    tokdyn.wrap(model, [FeatureCache(threshold=1e9)])
    call = IMAGES["Flux3Transformer2DModel"].inputs(2)
    for level in (0.5, 0.45):
        model(**{**moved(call), "timestep": torch.full((2,), level), "target_timestep": torch.full((2,), level - 0.05)})
    assert tokdyn.stats(model).calls[-1].reused == 2


def halved(value: Any) -> Any:
    """Floating-point tensors in bf16, also those in a list."""
    if isinstance(value, list):
        return [halved(each) for each in value]
    return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@every
@torch.no_grad()
def test_other_shapes_and_half_precision(name):
    """One sample, and weights and latents in bf16: the adapter reads the same grid, and every method runs."""
    tiny = IMAGES[name]
    call = {key: halved(value) for key, value in tiny.inputs(1).items()}
    model = tiny.build().bfloat16()
    for path, module in model.named_modules():  # as from_pretrained leaves them
        if path.rpartition(".")[2] in (model._keep_in_fp32_modules or ()):
            module.float()
    adapter = adapter_for(model)
    assert adapter.grid(model, call) == adapter.grid(model, tiny.inputs(3))
    methods = [FeatureCache(threshold=0.1), TokenMerge(ratio=0.5), DepthSkip(blocks=(2,)), DynamicWidth(tokens=False)]
    out = sample(acting(tokdyn.wrap(model, [each for each in methods if works(name, [each])]))(**call))
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
