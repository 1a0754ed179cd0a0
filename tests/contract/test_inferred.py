"""Models that no adapter knows: skipping and caching by inference, all else and every misfit refused in words."""

import copy
import inspect

import pytest
import torch

import tokdyn
from tests.contract.foreign import INFERRED, REFUSED, UNFIT, undeclared
from tests.contract.kit import sample
from tests.contract.undeclared import TINY_UNDECLARED
from tokdyn import Chunking, DepthSkip, DynamicWidth, FeatureCache, TokenDrop, TokenMerge, UnsupportedModelError
from tokdyn.attach import wrap

pytestmark = [  # diffusers' own: of names that it is giving up, and of Mochi, which asks for fp32 autocast on the CPU
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    pytest.mark.usefixtures("nothing_declared"),
]
every = pytest.mark.parametrize("name", sorted(INFERRED))


@pytest.fixture(autouse=True)
def _without_their_adapters(monkeypatch):
    undeclared(monkeypatch)


def call(model, foreign, batch=2, **changes):
    return sample(model(**{**foreign.tiny.inputs(batch), **changes}))


def blocks_of(model, foreign):
    return [(block, gives) for path, gives in foreign.blocks.items() for block in model.get_submodule(path)]


def gives_back(block, names, add=None):
    """The block, made to return what it is given; `add` goes to its first argument."""
    signature = inspect.signature(type(block).forward)

    def forward(*args, **kwargs):
        given = dict(signature.bind(block, *args, **kwargs).arguments)
        if add is not None:
            first = list(signature.parameters)[1]
            given[first] = given[first] + add
        found = tuple(given[name] for name in names)
        return found if len(found) > 1 else found[0]

    block.forward = forward


def left_out(foreign, numbers):
    """A model without some of its blocks."""
    model = foreign.tiny.build()
    blocks = blocks_of(model, foreign)
    for number in numbers:
        gives_back(*blocks[number])
    return model


@every
@torch.no_grad()
def test_skipping_is_leaving_blocks_out(name):
    foreign = INFERRED[name]
    model = foreign.tiny.build()
    kind, plain, attributes = type(model), call(model, foreign), set(vars(model))
    for numbers in ((0,), (1,), (-1,), (0, 1, -1)):
        wrap(model, [DepthSkip(blocks=numbers)])
        assert torch.equal(call(model, foreign), call(left_out(foreign, numbers), foreign))
        assert torch.equal(call(model, foreign, 3), call(left_out(foreign, numbers), foreign, 3))
        with tokdyn.disabled(model):
            assert torch.equal(call(model, foreign), plain)
        tokdyn.unwrap(model)
        assert type(model) is kind
        assert set(vars(model)) == attributes
    assert torch.equal(call(wrap(model, [DepthSkip(), FeatureCache(threshold=0.0)]), foreign), plain)


@every
@torch.no_grad()
def test_a_cache_repeats_the_effect_of_all_blocks(name):
    foreign = INFERRED[name]
    model = wrap(foreign.tiny.build(), [FeatureCache(threshold=float("inf"), num_steps=4)])
    plain, empty = foreign.tiny.build(), left_out(foreign, range(-len(blocks_of(foreign.tiny.build(), foreign)), 0))
    seen = []
    for each in (plain, empty):
        block, gives = blocks_of(each, foreign)[-1]
        place = gives.index(list(inspect.signature(type(block).forward).parameters)[1])
        block.register_forward_hook(
            lambda _, __, out, place=place: seen.append(out[place] if isinstance(out, tuple) else out)
        )
        call(each, foreign, **foreign.tiny.at(2, 0.9))
    repeating = left_out(foreign, range(-len(blocks_of(plain, foreign)), 0))
    gives_back(*blocks_of(repeating, foreign)[-1], add=seen[0] - seen[1])
    for step, level in enumerate((0.9, 0.6, 0.3, 0.1)):
        clock = foreign.tiny.at(2, level)
        found = call(model, foreign, **clock)
        assert tokdyn.stats(model).calls[-1].cached == (step in (1, 2))
        reference = call(repeating if step in (1, 2) else foreign.tiny.build(), foreign, **clock)
        torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-5)


@every
@torch.no_grad()
def test_samples_at_different_noise_levels_are_each_skipped_as_their_own_says(name):
    foreign = INFERRED[name]
    model = wrap(foreign.tiny.build(), [DepthSkip(table=((0.0, 0.5, (1,)), (0.5, 1.0, (0, -1))))])
    low, high = (foreign.tiny.at(1, level) for level in (0.3, 0.7))
    mixed = call(model, foreign, **{key: torch.cat([low[key], high[key]]) for key in low})
    for i, level in enumerate((0.3, 0.7)):
        torch.testing.assert_close(mixed[i], call(model, foreign, **foreign.tiny.at(2, level))[i], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["BriaTransformer2DModel", "CosmosTransformer3DModel", "HunyuanDiT2DModel"])
def test_gradients_are_the_same_with_checkpointing(name):
    foreign, found = INFERRED[name], []
    for checkpointing in (False, True):
        model = wrap(foreign.tiny.build().train(), [DepthSkip(blocks=(1,))])
        if checkpointing and model._supports_gradient_checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(0)
        call(model, foreign).square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@every
def test_what_leaves_out_or_merges_tokens_is_refused(name):
    model = INFERRED[name].tiny.build()
    for method in (TokenMerge(), TokenDrop(), Chunking(), DynamicWidth()):
        words = f"{type(method).__name__} .*{name}: .*docs/adapters.md .*tokdyn.register_adapter"
        with pytest.raises(UnsupportedModelError, match=words):
            wrap(model, [method])


@torch.no_grad()
def test_a_copy_learns_for_itself_and_files_bring_the_methods_back(tmp_path):
    foreign = INFERRED["HiDreamImageTransformer2DModel"]
    model = wrap(foreign.tiny.build(), [DepthSkip(blocks=(0, -1))])
    expected = call(model, foreign)
    assert torch.equal(call(copy.deepcopy(model), foreign), expected)
    tokdyn.save(model, tmp_path)
    assert torch.equal(call(tokdyn.load(foreign.tiny.build(), tmp_path), foreign), expected)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_does_not_hold_is_refused_in_the_first_call(name, batch):
    tiny, words = REFUSED[name]
    model = tiny.build()
    plain = sample(model(**tiny.inputs(batch)))
    for method in (DepthSkip(blocks=(0,)), FeatureCache()):
        wrap(model, [method])
        with pytest.raises(UnsupportedModelError, match=words.format(b=batch)):
            model(**tiny.inputs(batch))
        assert torch.equal(sample(tokdyn.unwrap(model)(**tiny.inputs(batch))), plain)


def test_a_class_that_would_be_refused_in_the_first_call_is_refused_before(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(UnsupportedModelError, match=r"SanaWMLTX2RefinerTransformer3DModel .* keys and values"):
        wrap(TINY_UNDECLARED["SanaWMLTX2RefinerTransformer3DModel"].build(), [])


@pytest.mark.parametrize("name", sorted(UNFIT))
def test_what_would_be_misread_is_refused_at_once(name):
    tiny, words = UNFIT[name]
    with pytest.raises(UnsupportedModelError, match=f"{name} .*{words}"):
        wrap(tiny.build(), [DepthSkip(blocks=(0,))])
