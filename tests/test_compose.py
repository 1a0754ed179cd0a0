"""The rules of composition: every pair that must work is ordered, every other is refused and both are named."""

import itertools
import re
from typing import Any

import pytest
from pydantic import Field

from tokdyn.compose import compose
from tokdyn.errors import CompositionError, InputError
from tokdyn.methods import (
    Chunking,
    DepthSkip,
    DynamicWidth,
    FeatureCache,
    Method,
    Stage,
    TokenDrop,
    TokenMerge,
    Traits,
)

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


class Probe(Method):
    """A method that says of itself what a test asks for."""

    label: str = "one"
    answers: dict[str, Any] = Field(default_factory=dict)

    def traits(self, depth):
        return Traits(**{"stage": Stage.SPAN, **self.answers})


class Other(Probe):
    """The same by another name."""


TRAIN, SAMPLE = frozenset({"train"}), frozenset({"sample"})
ALIGNED = {"stage": Stage.KERNEL, "aligned": "mlp"}
MERGES = {"stage": Stage.SUBLAYER, "owns": {"merging around mlp": None}}


def refusal(one, other, depth=DEPTH):
    """Return the words with which two methods are refused, None if they go together."""
    try:
        compose([Probe(answers=one), Other(answers=other)], depth)
    except CompositionError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ({"phases": TRAIN}, {"phases": SAMPLE}, r"Probe.* training.*Other.* sampling"),
        ({"phases": SAMPLE}, {"phases": TRAIN}, r"Other.* training.*Probe.* sampling"),
        ({"phases": TRAIN}, {}, None),
        ({"phases": TRAIN}, {"phases": TRAIN}, None),
        ({"phases": SAMPLE}, {"phases": SAMPLE}, None),
        ({"owns": {"x": None}}, {"owns": {"x": None}}, r"Probe.*Other.* x\b"),
        ({"owns": {"x": None}}, {"owns": {"y": None}}, None),
        ({"owns": {"y": None, "x": None}}, {"owns": {"z": None, "x": None}}, r"Probe.*Other.* x\b"),
        ({"owns": {"x": frozenset({1, 2})}}, {"owns": {"x": frozenset({3})}}, None),
        ({"owns": {"x": frozenset({1, 2})}}, {"owns": {"x": None}}, r"\bx\b.* 1, 2\b"),
        ({"owns": {"x": None}}, {"owns": {"x": frozenset({5})}}, r"\bx\b.* 5\b"),
        ({"owns": {"x": frozenset({9, 2, 4})}}, {"owns": {"x": frozenset({2, 9})}}, r"\bx\b.* 2, 9\b"),
        ({"owns": {"x": frozenset()}}, {"owns": {"x": None}}, None),
        ({"owns": {"y": frozenset({1}), "x": None}}, {"owns": {"y": frozenset({2}), "x": None}}, r"Probe.*Other.* x\b"),
        ({"tokens": "subset"}, {"needs_grid": True}, r"Other.* inside Probe.* subset"),
        ({"tokens": "merged"}, {"needs_grid": True}, r"Other.* inside Probe.* merged"),
        ({"tokens": "full"}, {"needs_grid": True}, None),
        ({"tokens": "subset"}, {"needs_grid": False}, None),
        ({"needs_grid": True}, {"tokens": "subset"}, None),  # what lies inside does not change what is outside
        ({"tokens": "subset", "span": (0, 3)}, {"needs_grid": True, "span": (4, 6)}, None),
        ({"tokens": "subset", "span": (0, 6)}, {"needs_grid": True, "span": (6, 6)}, r"Other.* inside Probe"),
        ({"moving": True}, {"remembers": True}, r"Other.* inside Probe.*Other before Probe"),
        (
            {"moving": True, "stage": Stage.BLOCKS},
            {"remembers": True, "stage": Stage.BLOCK},
            r"Other.* inside Probe.*Other without Probe",
        ),
        ({"remembers": True}, {"moving": True}, None),
        ({"moving": True}, {"moving": True}, None),
        ({"remembers": True}, {"remembers": True}, None),
        ({"stage": Stage.BLOCKS, "span": (1, 11)}, {"stage": Stage.BLOCKS}, r"Probe.*Other"),
        ({"stage": Stage.BLOCKS}, {"stage": Stage.BLOCKS, "span": (1, 11)}, None),
        ({"stage": Stage.BLOCKS, "span": (1, 11)}, {"stage": Stage.BLOCKS, "span": (1, 11)}, None),
        ({"stage": Stage.BLOCKS, "span": (1, 11)}, {"stage": Stage.SPAN, "span": (0, 3)}, None),
        ({"span": (0, 5)}, {"span": (5, 8)}, r"Probe.* 0 to 5\b.*Other.* 5 to 8\b"),
        ({"span": (5, 8)}, {"span": (0, 5)}, r"Probe.* 5 to 8\b.*Other.* 0 to 5\b"),
        ({"span": (0, 5)}, {"span": (6, 8)}, None),
        ({"span": (0, 5)}, {"span": (0, 5)}, None),
        ({"span": (0, 5)}, {"span": (2, 5)}, None),
        ({"span": (2, 5)}, {"span": (2, 6)}, r"Other.* 2 to 6\b.*Probe.* 2 to 5\b.*Other"),
        ({"span": (2, 5)}, {}, r"Other.* 0 to 11\b.*Probe.* 2 to 5\b"),
        ({"span": (2, 5)}, {"span": (3, 8), "stage": Stage.BLOCK}, None),
        ({"learns": "FLOPs"}, {"learns": "FLOPs"}, r"Probe.*Other.* FLOPs"),
        ({"learns": "FLOPs"}, {"learns": "tokens"}, None),
        ({}, {}, None),
        (MERGES, ALIGNED, r"Other.* mlp.*Probe.*where='attention'"),
        (ALIGNED, MERGES, r"Probe.* mlp.*Other.*where='attention'"),
        (MERGES | {"owns": {"merging around attention": None}}, ALIGNED, None),
        (ALIGNED | {"stage": Stage.SUBLAYER}, MERGES, r"Probe.* mlp.*Other"),
        (ALIGNED, {"stage": Stage.SUBLAYER}, None),
        ({"owns": {"merging around mlp": None}}, {"owns": {"merging around attention": None}}, None),
    ],
)
def test_each_rule_refuses_what_it_says_and_nothing_else(one, other, words):
    found = refusal(one, other)
    if words is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(words, found)


def test_spans_end_with_the_model():
    assert refusal({"span": (1, 3)}, {}, depth=4) is not None
    assert refusal({"span": (0, 3)}, {}, depth=4) is None


def test_every_pair_of_a_list_is_compared():
    a, b, c = ({"owns": {"x": None}}, {}, {"owns": {"x": None}})
    for order in itertools.permutations([a, b, c]):
        with pytest.raises(CompositionError, match=r"Probe.* x\b"):
            compose([Probe(label=str(i), answers=each) for i, each in enumerate(order)], DEPTH)


def test_methods_are_ordered_by_stage_and_then_as_they_were_listed():
    stages = [Stage.KERNEL, Stage.SPAN, Stage.BLOCKS, Stage.SPAN, Stage.SUBLAYER, Stage.BLOCK, Stage.BLOCKS]
    methods = [Probe(label=str(i), answers={"stage": stage}) for i, stage in enumerate(stages)]
    placed = compose(methods, DEPTH)
    assert [each.index for each in placed] == [2, 6, 1, 3, 5, 4, 0]
    assert [each.method.label for each in placed] == ["2", "6", "1", "3", "5", "4", "0"]
    assert [each.traits.stage for each in placed] == sorted(stages)
    assert {each.name for each in placed} == {"Probe"}


@pytest.mark.parametrize("where", ["attention", "mlp", "both"])
def test_tokens_chosen_by_the_stream_are_not_merged_on_their_way_to_the_mlp(where):
    methods = [TokenMerge(where=where), DynamicWidth(token_input="stream")]
    for order in (methods, methods[::-1]):
        if where == "attention":
            assert len(compose(order, DEPTH)) == 2
        else:
            with pytest.raises(CompositionError, match=r"DynamicWidth .* TokenMerge .* where='attention'"):
                compose(order, DEPTH)
    assert len(compose([TokenMerge(where=where), DynamicWidth()], DEPTH)) == 2
