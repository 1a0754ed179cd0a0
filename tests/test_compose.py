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
    ("methods", "named"),
    [
        ([Chunking(), Chunking(target=2)], "two Chunking .*token grid"),
        (
            [Chunking(), FeatureCache()],
            "FeatureCache .*Chunking .*FeatureCache before Chunking",
        ),
        ([TokenMerge(), TokenMerge(ratio=0.2)], "two TokenMerge .*merging around attention"),
        (
            [TokenMerge(where="both"), TokenMerge(where="mlp", blocks=(0, 1))],
            "two TokenMerge .*merging around mlp of blocks 0, 1;",
        ),
        ([DepthSkip(blocks=(3, 4)), DepthSkip(blocks=(4, 5))], "two DepthSkip .*skipping of block 4;"),
        (
            [FeatureCache(indicator="first_block"), DepthSkip(blocks=(0, 3))],
            "FeatureCache and DepthSkip .*skipping of block 0;",
        ),
        ([DepthSkip(learned=True), DepthSkip(blocks=(5,))], "two DepthSkip .*skipping of block 5;"),
        (
            [FeatureCache(indicator="first_block"), Chunking()],
            "FeatureCache .*Chunking .*FeatureCache .*indicator='input'",
        ),
        (
            [TokenDrop(), FeatureCache()],
            "TokenDrop .*training .*FeatureCache .*sampling",
        ),
        (
            [Chunking(), TokenMerge(partition="grid")],
            "TokenMerge .*Chunking .*partition='bucket'",
        ),
        ([TokenDrop(), TokenMerge(partition="grid")], "TokenMerge .*TokenDrop .*partition='bucket'"),
        (
            [TokenDrop(blocks=(1, 5)), TokenDrop(blocks=(4, 8))],
            "TokenDrop .*blocks 1 to 5 .*TokenDrop .*blocks 4 to 8",
        ),
        ([TokenDrop(blocks=(4, 6)), TokenDrop(blocks=(2, 8))], "TokenDrop .*blocks 2 to 8 .*TokenDrop .*blocks 4 to 6"),
        ([FeatureCache(), FeatureCache(threshold=0.3)], "two FeatureCache .*residual of all blocks"),
        ([DynamicWidth(), DynamicWidth(target=0.5)], "two DynamicWidth .*attention heads"),
        ([DynamicWidth(), DepthSkip(learned=True)], "DepthSkip and DynamicWidth .*FLOPs"),
    ],
    ids=lambda value: "+".join(type(m).__name__ for m in value) if isinstance(value, list) else "",
)
def test_methods_that_do_not_go_together_are_named(methods, named):
    with pytest.raises(CompositionError, match=named) as caught:
        compose(methods, DEPTH)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: compose([TokenDrop(blocks=(2, 12))], DEPTH), r"\(2, 12\).* 0 to 11"),
        (lambda: compose([DepthSkip(blocks=(12,))], DEPTH), r"block 12 .* 0 to 11"),
        (lambda: DepthSkip(blocks=(1,), learned=True), r"blocks, table .*learned=True"),
        (lambda: DepthSkip(blocks=(1,), levels=(0.8, 0.2)), r"0\.8 to 0\.2"),
        (lambda: DynamicWidth(heads=False, channels=False, tokens=False), "heads, channels and tokens"),
        (lambda: FeatureCache(steps=(1, 2)), r"steps .*\(1, 2\)"),
        (lambda: FeatureCache(coefficients=()), r"coefficients .*\(1, 0\)"),
        (lambda: TokenMerge(ratio=((0.9, 0.2), (0.1, 0.4))), r"\(0\.9, 0\.2\)"),
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
