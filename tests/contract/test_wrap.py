"""What holds for wrapped models beside the laws of test_laws.py, for every adapter."""

from itertools import product

import pytest
import torch

from tests.contract.kit import assert_a_cache_compares_what_attention_gets, moved
from tests.contract.models import CLOCKED, TINY, one_of, sample, works
from tests.contract.stacks import ACTIVE, NEUTRAL, PAIRS, REFUSED, acting
from tokdyn.adapters import ADAPTERS
from tokdyn.attach import set_tail_drop, traces, unwrap, wrap
from tokdyn.cost import stats
from tokdyn.errors import CompositionError, InputError, UnsupportedModelError
from tokdyn.methods import Chunking, DepthSkip, FeatureCache, TokenMerge

MODELS = sorted(TINY)
neutral = pytest.mark.parametrize(
    ("name", "methods"), [pair for pair in product(MODELS, NEUTRAL) if works(pair[0], NEUTRAL[pair[1]])]
)


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


@pytest.mark.pairwise("laws")
@pytest.mark.parametrize(("name", "methods"), PAIRS)
@torch.no_grad()
def test_methods_act(name, methods):
    model = acting(wrap(TINY[name].build(), ACTIVE[methods]))
    if "drop" in methods or "train" in methods:
        model.train()
        with torch.enable_grad():
            assert not torch.equal(call(model), call(model))  # random subsets
        return
    changed = not torch.equal(call(model), call(TINY[name].build()))
    assert changed == (methods not in ("cache", "cache-first"))  # a first step is computed


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
    tiny = TINY[name]
    before, after = ({**tiny.inputs(2), **tiny.at(2, level)} for level in (0.6, 0.5))
    assert_a_cache_compares_what_attention_gets(tiny.build, before, moved(after))


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
        seen.add(len(traces(model)[-1].cached))
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
