"""tokdyn.keeping: tokens of a mask are neither merged nor dropped, whatever the batch, branches and references are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokdyn
from tests.contract.coverage_arranged import ARRANGED
from tests.contract.models import TINY, one_of, sample
from tests.contract.pipelines import build, images
from tests.contract.references import BESIDE, CALLS, tokens_of_blocks
from tests.contract.test_merge import NAME, inputs_of_attention
from tokdyn import Chunking, FeatureCache, InputError, TokenDrop, TokenMerge

SIDE = torch.zeros(4, 4, dtype=torch.bool)
SIDE[:2, :3] = True


def rows_in(tokens, among):
    """For each token (N, D), whether it is one of (M, D)."""
    return (tokens[:, None] == among).all(-1).any(1)


@given(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1), st.sampled_from([0.3, 0.6]), st.sampled_from([None, 2]))
@settings(max_examples=15)
@torch.no_grad()
def test_attention_gets_kept_tokens_as_they_are_and_samples_do_not_depend_on_each_other(one, two, ratio, window):
    masks = torch.tensor([[bits >> cell & 1 for cell in range(16)] for bits in (one, two)]).bool()
    method = TokenMerge(ratio=ratio, blocks=(0, 0), window=window, seed=1)
    model, inputs = tokdyn.wrap(TINY[NAME].build(), [method]), TINY[NAME].inputs(2)
    with tokdyn.keeping(model, masks):
        (normed, *_), given_tokens = inputs_of_attention(model, inputs)
        together = sample(model(**inputs))
    seen = given_tokens[: len(given_tokens) - 3]  # groups of samples that merge equally many; then three blocks
    for mask, tokens in zip(masks, normed, strict=True):
        assert any(rows_in(tokens[mask], group).all() for groups in seen for group in groups)
    for place, mask in enumerate(masks):
        alone = tokdyn.wrap(TINY[NAME].build(), [method])
        with tokdyn.keeping(alone, mask):
            out = sample(alone(**one_of(inputs, place)))
        torch.testing.assert_close(together[place : place + 1], out, rtol=0, atol=2e-6)


@torch.no_grad()
def test_as_many_tokens_are_merged_as_without_a_mask_while_there_are_enough():
    model, inputs = tokdyn.wrap(TINY[NAME].build(), [TokenMerge(ratio=0.25)]), TINY[NAME].inputs(2)
    row = torch.ones(4, 4, dtype=torch.bool)
    row[0, :3] = False  # two buckets, of two tokens and one
    for mask, left in ((None, 12), (SIDE, 12), (~SIDE, 12), (row, 15), (torch.ones(4, 4) > 0, 16)):
        if mask is None:
            model(**inputs)
        else:
            with tokdyn.keeping(model, mask):
                model(**inputs)
        assert all(block.groups(block.attention) == [(2, left)] for block in tokdyn.traces(model)[-1].blocks)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rate", [0.5, 0.9])
@torch.no_grad()
def test_kept_tokens_are_not_dropped(rate, training):
    masks = torch.stack([SIDE, torch.zeros(4, 4) > 0])
    model = tokdyn.wrap(TINY[NAME].build(), [TokenDrop(rate=rate, blocks=(1, 2))])
    whole = tokens_of_blocks(tokdyn.wrap(TINY[NAME].build(), []), TINY[NAME].inputs(2))[1]
    model.train(training)
    with torch.enable_grad() if training else tokdyn.dropping(model, rate), tokdyn.keeping(model, masks):
        tokens = tokens_of_blocks(model, TINY[NAME].inputs(2))
    groups = tokens[1 : len(tokens) - 1]
    assert any(rows_in(whole[0][SIDE.flatten()], group).all() for each in groups for group in each)
    wanted = max(16 - int(16 * rate), 6), 16 - int(16 * rate)
    assert {block.tokens_of(0) for block in tokdyn.traces(model)[-1].blocks if block.block in (1, 2)} - {None} == {
        wanted[0]
    }
    assert {block.tokens_of(1) for block in tokdyn.traces(model)[-1].blocks if block.block in (1, 2)} - {None} == {
        wanted[1]
    }


@pytest.mark.parametrize("references", ["keep", "merge"])
@pytest.mark.parametrize("name", ["Qwen", "Wan"])
@torch.no_grad()
def test_beside_references_the_mask_is_about_the_generated_image(name, references):
    sublayer = "attn" if name == "Qwen" else "attn1"
    call = CALLS[name].inputs(2)
    whole = tokens_of_blocks(CALLS[name].build(), call, sublayer)[0]
    first, last = BESIDE[name]
    own = whole[:, first : whole.shape[1] - last]
    mask = torch.rand(own.shape[1], generator=torch.Generator().manual_seed(0)) < 0.3
    model = tokdyn.wrap(CALLS[name].build(), [TokenMerge(ratio=0.5, references=references)])
    with tokdyn.keeping(model, mask):
        found = tokens_of_blocks(model, call, sublayer)[0]
    assert found.shape[1] < whole.shape[1]
    for sample_, tokens in zip(found, own, strict=True):
        assert rows_in(tokens[mask], sample_).all()


@pytest.mark.parametrize("name", ["DiT", "FluxTransformer2DModel"])
@torch.no_grad()
def test_a_mask_of_everything_computes_as_without_methods(name):
    stack = [FeatureCache(threshold=-1.0), TokenMerge(ratio=0.5, where="attention", reuse=2, reuse_steps=2)]
    model, inputs = tokdyn.wrap(TINY[name].build(), stack), TINY[name].inputs(2)
    with tokdyn.keeping(model, torch.ones(3, 3, dtype=torch.bool)):
        kept = sample(model(**inputs))
    with tokdyn.disabled(model):
        assert torch.equal(sample(model(**inputs)), kept)
    assert not torch.equal(sample(model(**inputs)), kept)  # the matching of the mask is not that of none


@torch.no_grad()
def test_the_parts_of_a_sample_have_their_parts_of_the_mask():
    """Latte attends within frames, and then across them."""
    tiny = ARRANGED["LatteTransformer3DModel"]
    whole = tokens_of_blocks(tiny.build(), tiny.inputs(1), "attn1")[0]
    mask = torch.rand(whole.shape[0], whole.shape[1], generator=torch.Generator().manual_seed(1)) < 0.2
    model = tokdyn.wrap(tiny.build(), [TokenMerge(ratio=0.25)])
    with tokdyn.keeping(model, mask.flatten()):
        found = tokens_of_blocks(model, tiny.inputs(1), "attn1")
    assert any(each.shape[1] < whole.shape[1] for each in found)
    for part, tokens in zip(mask, whole, strict=True):
        assert any(rows_in(tokens[part], group).all() for groups in found for group in groups)


@pytest.mark.parametrize("name", ["DiT", pytest.param("Wan", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_pipeline_keeps_a_mask_in_both_branches(name):
    """Of the first of two images everything is kept; its branches are in one batch with those of the second."""
    pipe = build(name)
    dense = images(pipe, name)
    merged = images(tokdyn.wrap(pipe, [TokenMerge(ratio=0.7)]), name)
    masks = torch.tensor([True, False]).view(2, 1, 1)[: len(dense)]
    with tokdyn.keeping(pipe, masks if name == "DiT" else masks[:1, None]):
        found = images(pipe, name)
    torch.testing.assert_close(found[0], dense[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1:], merged[1:], rtol=0, atol=1e-5)
    assert not torch.allclose(merged[0], dense[0], rtol=0, atol=1e-4)


def test_wrong_masks_and_models_are_refused_by_name():
    model = tokdyn.wrap(TINY["DiT"].build(), [TokenMerge()])
    with pytest.raises(InputError, match=r"torch\.float32.*boolean"), tokdyn.keeping(model, torch.ones(4, 4)):
        pass
    meta = torch.ones(4, 4, dtype=torch.bool, device="meta")
    with pytest.raises(InputError, match=r"torch\.bool on meta.*values"), tokdyn.keeping(model, meta):
        pass
    with tokdyn.keeping(model, torch.ones(3, 4, 4, dtype=torch.bool)), pytest.raises(InputError, match="3 samples"):
        model(**TINY["DiT"].inputs(2))
    model(**TINY["DiT"].inputs(2))
    other = tokdyn.wrap(TINY["DiT"].build(), [Chunking(target=2)])
    with pytest.raises(InputError, match=r"tokdyn\.TokenMerge or tokdyn\.TokenDrop"), tokdyn.keeping(other, SIDE):
        pass


@pytest.mark.parametrize("method", [TokenMerge(ratio=0.5), TokenDrop(rate=0.5)], ids=["merge", "drop"])
def test_a_compiled_model_says_how_to_keep_tokens(method):
    """What the sentence says works. TokenDrop draws at random in training."""
    model, inputs = tokdyn.wrap(TINY[NAME].build(), [method]), TINY[NAME].inputs(2)
    model.train(isinstance(method, TokenDrop))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with tokdyn.keeping(model, SIDE):
        with pytest.raises(Exception, match=r"set_stance\('force_eager'\)"):
            compiled(**inputs)
        kept = sample(model(**inputs))
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(sample(compiled(**inputs)), kept) != model.training


@torch.no_grad()
def test_inside_chunking_kept_tokens_that_are_left_are_not_merged():
    model = tokdyn.wrap(TINY[NAME].build(), [Chunking(target=2, router="random"), TokenMerge(ratio=0.4, blocks=(0, 0))])
    tokdyn.attach.accept_methods(model)
    with tokdyn.keeping(model, SIDE):
        normed, given_tokens = inputs_of_attention(model, TINY[NAME].inputs(1))
    left = tokdyn.traces(model)[-1].blocks[0].tokens
    assert len(normed[0][0]) == left < 16
    assert int(rows_in(normed[0][0], given_tokens[0][0]).sum()) >= len(given_tokens[0][0]) - 4
