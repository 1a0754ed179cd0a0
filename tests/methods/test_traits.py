"""What methods answer to the questions that other code asks of them: their traits and their examples."""

import pytest

from tokdyn.methods import (
    METHODS,
    Chunking,
    DepthSkip,
    DynamicWidth,
    FeatureCache,
    Stage,
    TokenDrop,
    TokenMerge,
    Traits,
)

DEPTH = 12
BOTH, TRAIN, SAMPLE = frozenset({"train", "sample"}), frozenset({"train"}), frozenset({"sample"})

# What each method answers at 12 blocks; every other question gets the default of `Traits`.
SUBLAYERS = ("attention", "mlp")
ANSWERS = [
    (
        Chunking(),
        {
            "stage": Stage.BLOCKS,
            "tokens": "subset",
            "moving": True,
            "reads": "grid",
            "needs_level": True,
            "owns": {"token grid": None},
            "learns": "tokens",
            "target": 4.0,
            "needs_sizes": True,
            "short": "that is less than one token; raise the target",
            "controls": frozenset({"tail_drop", "calibrate_router"}),
        },
    ),
    (Chunking(ragged=True), {"diverges": True}),
    (Chunking(tail_drop=0.3), {"diverges": False}),
    (Chunking(tail_drop=((0.0, 0.1), (1.0, 0.2))), {"diverges": True}),
    (
        TokenMerge(),
        {
            "stage": Stage.SUBLAYER,
            "tokens": "merged",
            "reads": "grid",
            "controls": frozenset({"keep"}),
            "owns": {"merging around attention": None},
            "around": ("attention",),
            "short": "one token of every bucket stays, for others to be merged into; lower ratio or enlarge bucket",
        },
    ),
    (TokenMerge(partition="grid"), {"needs_grid": True}),
    (TokenMerge(ratio=((0.0, 0.1), (1.0, 0.2))), {"needs_level": True}),
    (
        TokenMerge(where="both", blocks=(-3, -2)),
        {"span": (9, 10), "owns": {f"merging around {s}": frozenset({9, 10}) for s in SUBLAYERS}, "around": SUBLAYERS},
    ),
    (TokenMerge(where="mlp"), {"owns": {"merging around mlp": None}, "around": ("mlp",)}),
    (
        TokenDrop(),
        {
            "stage": Stage.SPAN,
            "tokens": "subset",
            "moving": True,
            "reads": "count",
            "phases": TRAIN,
            "span": (2, 8),  # arXiv 2501.04765
            "controls": frozenset({"drop_rate", "keep"}),
            "short": "that is less than one token; raise the rate",
            "owns": {},
        },
    ),
    (TokenDrop(blocks=(1, -2)), {"span": (1, 10)}),
    (DepthSkip(blocks=(-1, 3)), {"stage": Stage.BLOCK, "owns": {"skipping": frozenset({3, 11})}, "learns": None}),
    (DepthSkip(blocks=(1,), levels=(0.0, 0.5)), {"needs_level": True, "diverges": True}),
    (DepthSkip(blocks=(1,), levels=(0.5, 1.0)), {"needs_level": True, "diverges": True}),
    (DepthSkip(levels=(0.5, 1.0)), {"needs_level": False, "diverges": False}),
    (DepthSkip(table=((0.0, 0.5, ()), (0.5, 1.0, (2,)))), {"needs_level": True, "owns": {"skipping": frozenset({2})}}),
    (DepthSkip(table=((0.0, 1.0, (2,)),)), {"needs_level": False, "diverges": False}),
    (
        DepthSkip(learned=True),
        {"needs_level": True, "diverges": True, "learns": "FLOPs", "owns": {"skipping": None}},
    ),
    (
        DynamicWidth(),
        {
            "stage": Stage.KERNEL,
            "needs_level": True,
            "owns": dict.fromkeys(["attention heads", "MLP channels", "tokens of the MLP"]),
            "learns": "FLOPs",
            "target": 0.7,
            "reads": "count",
            "needs_sizes": True,
            "diverges": True,
            "masks_in_training": True,
            "short": "the first head and the first group of channels of every block are always on, and so is all that "
            "has no gates; raise target, or give more of heads, channels and tokens gates",
        },
    ),
    (
        DynamicWidth(tokens=False, channels=False, token_input="stream"),
        {"reads": "nothing", "owns": {"attention heads": None}, "needs_level": True, "aligned": None},
    ),
    (DynamicWidth(heads=False, channels=False), {"needs_level": False, "owns": {"tokens of the MLP": None}}),
    (DynamicWidth(heads=False), {"needs_level": True}),
    (DynamicWidth(token_input="stream"), {"aligned": "mlp"}),
    (DynamicWidth(target=1.0), {"prunes": None}),
    (
        FeatureCache(),
        {
            "stage": Stage.BLOCKS,
            "remembers": True,
            "needs_level": True,
            "phases": SAMPLE,
            "reads": "split",
            "compares": True,
            "diverges": True,
            "owns": {"residual of all blocks": None},
            "span": None,
        },
    ),
    (
        FeatureCache(indicator="first_block"),
        {"span": (1, 11), "owns": {"residual of all blocks": None, "skipping": frozenset({0})}},
    ),
    (FeatureCache(threshold=0.0), {"compares": False, "diverges": False}),
    (FeatureCache(steps=(0, 2)), {"compares": False, "diverges": False}),
    (FeatureCache(rule="magcache", ratios=(1.0, 0.9)), {"compares": False, "diverges": False, "embedding": None}),
    (FeatureCache(rule="easycache"), {"compares": True, "diverges": True, "reads": "split", "needs_grid": False}),
    (FeatureCache(rule="seacache"), {"compares": True, "reads": "grid", "needs_grid": True}),
    (FeatureCache(indicator="time"), {"compares": False, "diverges": False, "embedding": "time"}),
    (FeatureCache(indicator="projected_time"), {"embedding": "projected_time"}),
    (FeatureCache(indicator="time", steps=(0, 2)), {"embedding": None}),
]


@pytest.mark.parametrize(("method", "answers"), ANSWERS, ids=lambda value: repr(value)[:60])
def test_methods_answer_what_others_ask_of_them(method, answers):
    traits = method.traits(DEPTH)
    for question, answer in answers.items():
        assert getattr(traits, question) == answer, question


USUAL = {type(method): answers for method, answers in reversed(ANSWERS) if method == type(method)()}


@pytest.mark.parametrize("kind", USUAL, ids=lambda kind: kind.__name__)
def test_a_question_that_does_not_concern_a_method_has_the_usual_answer(kind):
    traits = kind().traits(DEPTH)
    for question, usual in vars(Traits(traits.stage)).items():
        if question not in USUAL[kind] and question not in ("prunes", "idle_in"):
            assert getattr(traits, question) == usual, question


def test_a_method_that_says_nothing_acts_always_and_on_all_tokens():
    traits = Traits(Stage.BLOCK)
    assert (traits.tokens, traits.reads, traits.phases, traits.owns) == ("full", "nothing", BOTH, {})
    flags = ("needs_grid", "moving", "remembers", "needs_level", "weighs_keys", "needs_sizes", "compares", "diverges")
    assert [getattr(traits, flag) for flag in flags] == [False] * len(flags)
    assert (traits.span, traits.learns, traits.aligned, traits.prunes) == (None, None, None, None)
    assert (traits.around, traits.controls) == ((), frozenset())


@pytest.mark.parametrize(
    ("settings", "pruned"),
    [
        ({}, (True, True, True, False)),
        ({"token_input": "stream"}, (True, True, True, True)),
        ({"tokens": False, "token_input": "stream"}, (True, True, False, False)),
        ({"heads": False}, (False, True, True, False)),
        ({"channels": False}, (True, False, True, False)),
    ],
)
def test_dynamic_width_prunes_what_it_was_told_to(settings, pruned):
    prunes = DynamicWidth(**settings).traits(DEPTH).prunes
    assert (prunes.heads, prunes.channels, prunes.tokens, prunes.stream) == pruned


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 6, 12, 28, 57])
def test_the_span_of_token_drop_lies_within_models_of_any_depth(depth):
    first, last = TokenDrop().traits(depth).span
    assert 0 <= first <= last < max(depth, 1)
    if depth % 12 == 0:
        assert (first, last) == (depth // 6, 2 * depth // 3)


@pytest.mark.parametrize("kind", METHODS.values())
def test_examples_are_different_and_begin_with_the_usual_one(kind):
    examples = kind.examples()
    assert all(isinstance(each, kind) for each in examples)
    assert len(set(examples)) == len(examples)
    assert examples[0] == (DepthSkip(blocks=(1,)) if kind is DepthSkip else kind())


def test_examples_ask_for_everything_that_methods_can_ask_of_a_model():
    """They fill the support matrix: an example that is missing hides a model that does not support it."""
    traits = [each.traits(DEPTH) for kind in METHODS.values() for each in kind.examples()]
    assert {sublayer for each in traits for sublayer in each.around} == {"attention", "mlp"}
    assert any(len(each.around) == 2 for each in traits)
    assert {each.learns for each in traits} == {None, "tokens", "FLOPs"}
    for flag in ("needs_level", "weighs_keys", "needs_sizes", "compares"):
        assert {getattr(each, flag) for each in traits} == {True, False}
    merges = [each.traits(DEPTH) for each in TokenMerge.examples()]
    assert {each.around for each in merges} == {("attention",), ("mlp",), SUBLAYERS}
    assert any(each.needs_level for each in merges)
    assert any(each.weighs_keys for each in merges)
    widths = [each.traits(DEPTH).prunes for each in DynamicWidth.examples()]
    assert {(w.heads, w.channels, w.tokens) for w in widths} == {
        (True, True, True),
        (True, True, False),
        (True, False, False),
        (False, False, True),
    }
    caches = FeatureCache.examples()
    assert {each.traits(DEPTH).span for each in caches} == {None, (1, 11)}
    assert {each.traits(DEPTH).needs_grid for each in caches} == {True, False}
    assert {each.rule for each in caches} == {"teacache", "magcache", "easycache", "seacache"}
    assert {each.forecast for each in caches} == {0, 1, 2, "chebyshev"}
    skips = DepthSkip.examples()
    assert [each.traits(DEPTH).needs_level for each in skips] == [False, True, True]
    assert [each.learned for each in skips] == [False, False, True]
