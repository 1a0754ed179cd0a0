"""The rules of composition: every pair that must work is ordered, every other is refused and both are named."""

import pytest

from tokdyn.compose import compose
from tokdyn.errors import CompositionError, InputError
from tokdyn.methods import Chunking, DepthSkip, DynamicWidth, FeatureCache, TokenDrop, TokenMerge

DEPTH = 12
FREE = DepthSkip(blocks=(3, 4))


def names(methods):
    return [each.name for each in compose(methods, DEPTH)]


@pytest.mark.parametrize(
    "methods",
    [
        [Chunking(), TokenMerge()],
        [Chunking(), FREE],
        [TokenDrop(blocks=(2, 8)), TokenMerge(partition="grid", blocks=(9, 11))],
        [FeatureCache(indicator="first_block"), FREE],
        [Chunking(), DynamicWidth()],
        [FeatureCache(), Chunking()],
        [Chunking(), TokenDrop()],
        [TokenMerge(), FREE],
        [TokenMerge(), FeatureCache()],
        [TokenMerge(partition="grid"), FeatureCache()],
        [DynamicWidth(), FeatureCache()],
        [FREE, DynamicWidth()],
        [TokenMerge(blocks=(0, 5)), TokenMerge(blocks=(6, -1), ratio=0.3)],
        [TokenMerge(where="attention"), TokenMerge(where="mlp")],
        [DepthSkip(blocks=(3,)), DepthSkip(blocks=(-2,))],
        [TokenDrop(blocks=(2, 8)), TokenDrop(blocks=(4, 6))],
        [TokenDrop(blocks=(1, 3)), TokenDrop(blocks=(4, 6))],
        [FeatureCache(), Chunking(), TokenMerge(), FREE, DynamicWidth()],
        [],
    ],
    ids=lambda methods: "+".join(type(m).__name__ for m in methods),
)
def test_what_goes_together_is_ordered_by_stage(methods):
    stages = [each.traits.stage for each in compose(methods, DEPTH)]
    assert stages == sorted(stages)
    assert sorted(names(methods)) == sorted(type(m).__name__ for m in methods)
    same = [m for m in methods if type(m) is type(methods[0])]
    assert [each.method for each in compose(methods, DEPTH) if type(each.method) is type(methods[0])] == same


@pytest.mark.parametrize(
    ("methods", "sentence"),
    [
        ([Chunking(), Chunking(target=2)], r"two Chunking decide the token grid; keep one of them\."),
        (
            [Chunking(), FeatureCache()],
            r"FeatureCache remembers .* inside Chunking .*; put FeatureCache before Chunking",
        ),
        ([TokenMerge(), TokenMerge(ratio=0.2)], r"two TokenMerge decide the merging around attention; keep one"),
        (
            [TokenMerge(where="both"), TokenMerge(where="mlp", blocks=(0, 1))],
            r"two TokenMerge decide the merging around mlp of blocks 0, 1; give them different blocks",
        ),
        ([DepthSkip(blocks=(3, 4)), DepthSkip(blocks=(4, 5))], r"two DepthSkip decide the skipping of block 4; give"),
        (
            [FeatureCache(indicator="first_block"), DepthSkip(blocks=(0, 3))],
            r"FeatureCache and DepthSkip decide the skipping of block 0; give them different blocks",
        ),
        ([DepthSkip(learned=True), DepthSkip(blocks=(5,))], r"two DepthSkip decide the skipping of block 5"),
        (
            [FeatureCache(indicator="first_block"), Chunking()],
            r"FeatureCache begins behind the first block, but Chunking begins with it; use .* indicator='input'",
        ),
        (
            [TokenDrop(), FeatureCache()],
            r"TokenDrop acts only in training and FeatureCache only in sampling; wrap with",
        ),
        (
            [Chunking(), TokenMerge(partition="grid")],
            r"TokenMerge needs all cells .* inside Chunking .*partition='bucket'",
        ),
        ([TokenDrop(), TokenMerge(partition="grid")], r"TokenMerge needs all cells .* inside TokenDrop"),
        (
            [TokenDrop(blocks=(1, 5)), TokenDrop(blocks=(4, 8))],
            r"blocks 1 to 5 and TokenDrop over blocks 4 to 8 overlap",
        ),
        ([TokenDrop(blocks=(4, 6)), TokenDrop(blocks=(2, 8))], r"encloses .* put TokenDrop first in the list"),
        ([FeatureCache(), FeatureCache(threshold=0.3)], r"two FeatureCache decide the residual of the stack; keep one"),
        ([DynamicWidth(), DynamicWidth(target=0.5)], r"two DynamicWidth decide the attention heads; keep one"),
        ([DynamicWidth(), DepthSkip(learned=True)], r"DepthSkip and DynamicWidth each learn to hold the FLOPs"),
    ],
    ids=lambda value: "+".join(type(m).__name__ for m in value) if isinstance(value, list) else "",
)
def test_what_does_not_go_together_is_refused_in_words(methods, sentence):
    with pytest.raises(CompositionError, match=sentence) as caught:
        compose(methods, DEPTH)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: compose([TokenDrop(blocks=(2, 12))], DEPTH) or compose([TokenDrop(blocks=(2, 12))], DEPTH),
            "from 0 to 11",
        ),
        (lambda: compose([DepthSkip(blocks=(12,))], DEPTH), "no block 12 in a model of 12 blocks"),
        (lambda: DepthSkip(blocks=(1,), learned=True), "give one of blocks, table and learned"),
        (lambda: DepthSkip(blocks=(1,), levels=(0.8, 0.2)), "no stretch within 0 to 1"),
        (lambda: DynamicWidth(heads=False, channels=False, tokens=False), "has no effect"),
        (lambda: FeatureCache(steps=(1, 2)), "0 among them"),
        (lambda: FeatureCache(coefficients=()), r"\(1, 0\) takes the change"),
        (lambda: TokenMerge(ratio=((0.9, 0.2), (0.1, 0.4))), "should rise"),
    ],
)
def test_settings_that_cannot_be_are_named(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_depth_skip_counts_from_the_end_and_follows_the_noise():
    skip = DepthSkip(table=((0.0, 0.3, (5,)), (0.3, 1.0, (5, -1))))
    assert skip.skipped(0.1, 12) == {5}
    assert skip.skipped(0.8, 12) == {5, 11}
    assert DepthSkip(blocks=(2,), levels=(0.5, 1.0)).skipped(0.4, 12) == frozenset()


@pytest.mark.parametrize(
    "method",
    [TokenMerge(ratio=((0.0, 0.1), (1.0, 0.6))), TokenDrop(), FREE, DynamicWidth(), FeatureCache(), Chunking()],
)
def test_settings_survive_json(method):
    assert type(method).model_validate_json(method.model_dump_json()) == method
    assert hash(method) == hash(method.model_copy())
