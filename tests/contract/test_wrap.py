"""The laws of wrapping, for every method on every adapter."""

import copy
from itertools import product

import pytest
import torch

from tests.contract.models import CLOCKED, TINY, one_of, sample, works
from tests.contract.widths import random_gates
from tokdyn.adapters import ADAPTERS
from tokdyn.attach import calibrate_router, disabled, set_tail_drop, unwrap, wrap
from tokdyn.cost import stats
from tokdyn.errors import CompositionError, InputError, UnsupportedModelError
from tokdyn.methods import Chunking, DepthSkip, DynamicWidth, FeatureCache, TokenDrop, TokenMerge

ACTIVE = {
    "merge": [TokenMerge(ratio=0.5)],
    "merge-both": [TokenMerge(ratio=0.4, where="both", seed=3)],
    "merge-weighted": [TokenMerge(ratio=0.5, seed=1, weighted=True, reuse=2)],
    "merge-important": [TokenMerge(ratio=0.3, where="mlp", important=True)],
    "drop": [TokenDrop(rate=0.5)],
    "drop-nested": [TokenDrop(rate=0.5, blocks=(0, 3)), TokenDrop(rate=0.5, blocks=(1, 2))],
    "skip": [DepthSkip(blocks=(1, -1))],
    "cache": [FeatureCache(threshold=0.5)],
    "cache-first": [FeatureCache(threshold=0.5, indicator="first_block", extrapolate=True)],
    "stack": [FeatureCache(threshold=0.5), TokenMerge(ratio=0.5), DepthSkip(blocks=(2,))],
    "curves": [TokenMerge(ratio=((0.0, 0.2), (1.0, 0.6))), DepthSkip(table=((0.0, 0.5, (1,)), (0.5, 1.0, (2,))))],
    "chunk": [Chunking(target=3)],
    "chunk-ragged": [Chunking(target=2, ragged=True, tail_drop=((0.0, 0.3), (1.0, 0.1)), router="cosine")],
    "chunk-stack": [FeatureCache(threshold=0.5), Chunking(target=2), TokenMerge(ratio=0.3), DepthSkip(blocks=(2,))],
    "chunk-ragged-train": [Chunking(target=2, ragged=True), TokenDrop(rate=0.5), TokenMerge(ratio=0.3)],
    "gates": [DepthSkip(learned=True)],
    "width": [DynamicWidth()],
    "width-heads": [DynamicWidth(channels=False, tokens=False)],
    "width-tokens": [DynamicWidth(heads=False, channels=False)],
    "width-stack": [FeatureCache(threshold=0.5), TokenMerge(ratio=0.5), DepthSkip(blocks=(2,)), DynamicWidth()],
    "chunk-width": [Chunking(target=2), DynamicWidth()],
    "stack-train": [TokenDrop(rate=0.5), TokenMerge(ratio=0.5), DepthSkip(blocks=(3,))],
}
NEUTRAL = {
    "nothing": [],
    "merge": [TokenMerge(ratio=0.0)],
    "drop": [TokenDrop(rate=0.0)],
    "skip": [DepthSkip()],
    "skip-elsewhere": [DepthSkip(blocks=(1,), levels=(0.8, 1.0))],
    "cache": [FeatureCache(threshold=0.0)],
    "chunk": [Chunking(target=1.0)],
    "gates": [DepthSkip(learned=True)],
    "width": [DynamicWidth()],
    "width-heads": [DynamicWidth(channels=False, tokens=False)],
    "width-tokens": [DynamicWidth(heads=False, channels=False)],
    "width-none": [DynamicWidth(target=1.0)],
    "all": [FeatureCache(threshold=-1.0), TokenMerge(ratio=0.0), DepthSkip()],
}
MODELS = sorted(TINY)
PAIRS = [(name, methods) for name, methods in product(MODELS, ACTIVE) if works(name, ACTIVE[methods])]
REFUSED = sorted({*product(MODELS, ACTIVE)} - {*PAIRS})
every = pytest.mark.parametrize(("name", "methods"), PAIRS)
neutral = pytest.mark.parametrize(
    ("name", "methods"), [pair for pair in product(MODELS, NEUTRAL) if works(pair[0], NEUTRAL[pair[1]])]
)


def attach(model, methods):
    """Wrap with methods of the table; a router that decides how many tokens are kept is calibrated."""
    wrap(model, ACTIVE[methods])
    if "ragged" in methods:
        calibrate_router(model, **tiny_of(model).inputs(4))
    return random_gates(model) if "width" in methods else model


def tiny_of(model):
    return TINY[type(model).__name__]


def call(model, batch=2, **changes):
    return sample(model(**{**tiny_of(model).inputs(batch), **changes}))


def test_every_adapter_has_a_tiny_model():
    assert {type(tiny.build()).__name__ for tiny in TINY.values()} <= {c for a in ADAPTERS for c in a.classes}


@neutral
@torch.no_grad()
def test_rate_zero_is_bit_exact(name, methods):
    model = TINY[name].build()
    plain = call(model)
    assert torch.equal(call(wrap(model, NEUTRAL[methods])), plain)
    assert torch.equal(call(model), plain)


@every
def test_disabled_and_unwrapped_are_bit_exact_and_nothing_is_left(name, methods):
    model = TINY[name].build()
    kind, keys, attributes = type(model), list(model.state_dict()), set(vars(model))
    with torch.no_grad():
        plain = call(model)
        assert attach(model, methods) is model
        assert isinstance(model, kind)
        assert type(model).__name__ == kind.__name__
        assert [key for key in model.state_dict() if not key.startswith("tokdyn.")] == keys
        call(model)
        with disabled(model):
            assert torch.equal(call(model), plain)
        assert unwrap(model) is model
        assert torch.equal(call(model), plain)
        assert list(model.state_dict()) == keys
    assert type(model) is kind
    assert set(vars(model)) == attributes
    assert all(not hasattr(type(part), "_tokdyn_base") for part in model.modules())


@every
def test_methods_act_and_do_not_depend_on_batch_mates(name, methods):
    model = attach(TINY[name].build(), methods)
    if "drop" in methods or "train" in methods:
        model.train()
        assert not torch.equal(call(model), call(model))  # random subsets
        return
    with torch.no_grad():
        together = call(model, 3)
        for i in range(3):
            one = one_of(TINY[name].inputs(3), i)
            fresh = attach(TINY[name].build(), methods)
            torch.testing.assert_close(sample(fresh(**one)), together[i : i + 1], rtol=0, atol=2e-6)
        changed = not torch.equal(together, call(TINY[name].build(), 3))
    assert changed == (methods not in ("cache", "cache-first", "gates"))  # a first step is computed, gates start open


@every
@torch.no_grad()
def test_instances_and_copies_are_independent(name, methods):
    first, second = TINY[name].build(), TINY[name].build()
    plain = call(second)
    attach(first, methods)
    before = call(first)
    assert torch.equal(call(second), plain)
    twin = copy.deepcopy(first)
    for parameter in twin.parameters():
        parameter.mul_(1.1)
    call(twin)
    unwrap(first)
    assert torch.equal(call(first), plain)
    scaled = copy.deepcopy(second)
    for parameter in scaled.parameters():
        parameter.mul_(1.1)
    with disabled(twin):
        assert torch.equal(call(twin), call(scaled))
    assert before.isfinite().all()


@pytest.mark.parametrize("name", CLOCKED)
@torch.no_grad()
def test_samples_at_different_noise_levels_do_not_depend_on_each_other(name):
    methods = [TokenMerge(ratio=((0.2, 0.2), (0.8, 0.6))), DepthSkip(table=((0.0, 0.5, (1,)), (0.5, 1.0, (2, 3))))]
    model, tiny = wrap(TINY[name].build(), methods), TINY[name]
    levels = (0.3, 0.7, 0.3)
    clock = {key: torch.cat([tiny.at(1, level)[key] for level in levels]) for key in tiny.at(1, 0.5)}
    together = call(model, 3, **clock)
    for i, level in enumerate(levels):
        alone = sample(model(**{**one_of(tiny.inputs(3), i), **tiny.at(1, level)}))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=2e-6)


def gradients(model, seeds, checkpointing):
    """One backward after as many forwards as there are seeds; losses that differ between them."""
    model.train()
    if checkpointing:
        getattr(model, "enable_gradient_checkpointing", getattr(model, "set_grad_checkpointing", None))()
    outputs = []
    for seed in seeds:
        torch.manual_seed(seed)
        low, high = (tiny_of(model).at(1, level + seed / 1000) for level in (0.1, 0.6))
        clock = {key: torch.cat([low[key], high[key]]) for key in low}
        outputs.append(call(model, **clock).square().mean() * (seed + 1))
    sum(outputs).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@every
@pytest.mark.parametrize("seeds", [(5,), (5, 6)])
def test_gradients_are_the_same_with_checkpointing(name, methods, seeds):
    plain = gradients(attach(TINY[name].build(), methods), seeds, False)
    saved = gradients(attach(TINY[name].build(), methods), seeds, True)
    assert len(plain) == len(saved)
    for one, other in zip(plain, saved, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CLOCKED)
@torch.no_grad()
def test_a_cache_that_always_reuses_computes_the_first_step_and_repeats_its_effect(name):
    model = wrap(TINY[name].build(), [FeatureCache(threshold=float("inf"), num_steps=4)])
    for step, t in enumerate((900, 600, 300, 10)):
        call(model, **tiny_of(model).at(2, t / 1000))
        assert stats(model).calls[-1].cached == (step in (1, 2))
    call(model, **tiny_of(model).at(2, 0.9))
    assert not stats(model).calls[-1].cached  # a new trajectory


MODULATED = [name for name in MODELS if any(name in a.classes and a.blocks[0].modulated for a in ADAPTERS)]


@pytest.mark.parametrize("name", MODULATED)
@torch.no_grad()
def test_the_indicator_of_a_cache_is_what_attention_gets(name):
    model, seen = TINY[name].build(), []
    stack = next(a for a in ADAPTERS if name in a.classes).blocks[0]
    attention = getattr(getattr(model, stack.path)[0], stack.attention[0])
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append([*args, *kwargs.values()][0]), with_kwargs=True
    )
    wrap(model, [FeatureCache(threshold=0.5)])
    call(model)
    (branch,) = model.tokdyn.caches[0].memory.branches.values()
    torch.testing.assert_close(branch.indicator, seen[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_statistics_say_what_ran(name):
    model = wrap(TINY[name].build(), [DepthSkip(blocks=(1,)), TokenMerge()])
    call(model)
    (record,) = stats(model).calls
    assert record.blocks == (0, 2, 3)
    assert record.level == (pytest.approx(0.5) if name in CLOCKED else None)
    assert len(set(record.tokens)) == 1


def test_a_model_that_chunks_itself_keeps_its_rules():
    for methods, words in (
        ([Chunking(target=2)], "two Chunking .*token grid"),
        ([TokenMerge(partition="grid")], "TokenMerge .*Chunking .*partition='bucket'"),
        ([FeatureCache(indicator="first_block")], "FeatureCache .*Chunking .*indicator='input'"),
    ):
        with pytest.raises(CompositionError, match=words):
            wrap(TINY["DCDiT"].build(), methods)


@torch.no_grad()
def test_budgets_and_caches_around_the_chunking_of_dc_dit():
    """Some samples of a batch repeat their change while others are computed: each as if it were alone."""
    tiny = TINY["DCDiT"]
    model, inputs = wrap(tiny.build(), [FeatureCache(threshold=0.5), DepthSkip(blocks=(1,))]), tiny.inputs(3)
    alone = [wrap(tiny.build(), [FeatureCache(threshold=0.5), DepthSkip(blocks=(1,))]) for _ in range(3)]
    inputs["hidden_states"][1] *= 3
    seen = set()
    for level in (0.9, 0.7, 0.6, 0.55, 0.2):
        inputs["hidden_states"] = inputs["hidden_states"] * torch.tensor([1.0, -1.0, 1.02]).view(3, 1, 1, 1)
        output = model(**{**inputs, **tiny.at(3, level)})
        seen.add(len(model.tokdyn.records[-1].cached))
        for i in range(3):
            one = alone[i](**{**one_of(inputs, i), **tiny.at(1, level)})
            torch.testing.assert_close(one.sample, output.sample[i : i + 1], rtol=0, atol=2e-6)
            assert torch.equal(one.routing.keep[0], output.routing.keep[i])
    assert seen & {1, 2}
    budgets = wrap(tiny.build(), [DepthSkip(blocks=(1,))])
    set_tail_drop(budgets, {"cond": 0.0, "uncond": 0.5})
    twin = {name: torch.cat([value, value]) for name, value in tiny.inputs(1).items()}
    full, lean = budgets(**twin).routing.kept.tolist()
    assert lean == full - int(full * 0.5)


@pytest.mark.parametrize(("name", "methods"), REFUSED)
def test_what_the_matrix_refuses_is_refused_before_anything_changes(name, methods):
    model = TINY[name].build()
    kind, attributes = type(model), set(vars(model))
    with pytest.raises((UnsupportedModelError, CompositionError), match=rf"{name}: |Chunking.*\.$"):
        wrap(model, ACTIVE[methods])
    assert type(model) is kind
    assert set(vars(model)) == attributes


def test_what_cannot_be_wrapped_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"Linear.*docs/adapters\.md"):
        wrap(torch.nn.Linear(2, 2), [])
    model = wrap(TINY["DiT"].build(), [])
    with pytest.raises(InputError, match=r"tokdyn\.unwrap"):
        wrap(model, [])
    with pytest.raises(InputError, match=r"tokdyn\.wrap"):
        unwrap(unwrap(model))
