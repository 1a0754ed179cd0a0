"""Settings of every method: their defaults, the values they take, and what they say of themselves."""

import pytest

from tokdyn.errors import InputError
from tokdyn.methods import (
    METHODS,
    TEACACHE_FLUX,
    Chunking,
    DepthSkip,
    DynamicWidth,
    FeatureCache,
    Method,
    Sizes,
    Stage,
    TokenDrop,
    TokenMerge,
    Traits,
)
from tokdyn.methods.base import resolve

DEPTH = 12
BOTH, TRAIN, SAMPLE = frozenset({"train", "sample"}), frozenset({"train"}), frozenset({"sample"})


def test_tables_list_the_methods_in_the_order_in_which_they_act_on_tokens():
    assert list(METHODS) == ["Chunking", "TokenMerge", "TokenDrop", "DepthSkip", "DynamicWidth", "FeatureCache"]


@pytest.mark.parametrize(
    ("method", "defaults"),
    [
        (
            Chunking(),
            {
                "target": 4.0,
                "router": "spatial_predictability",
                "sigma": 1.0,
                "tail_drop": 0.0,
                "ragged": False,
                "force_ends": False,
                "loss_weight": 0.03,
            },
        ),
        (
            TokenMerge(),
            {
                "ratio": 0.5,
                "where": "attention",
                "partition": "bucket",
                "bucket": 2,
                "seed": None,
                "important": False,
                "blocks": None,
                "weighted": False,
                "reuse": 1,
            },
        ),
        (TokenDrop(), {"rate": 0.5, "blocks": None, "seed": 0}),
        (
            DepthSkip(),
            {
                "blocks": (),
                "levels": (0.0, 1.0),
                "table": (),
                "learned": False,
                "target": 0.7,
                "loss_weight": 1.0,
                "fingerprint": None,
            },
        ),
        (
            DynamicWidth(),
            {
                "target": 0.7,
                "heads": True,
                "channels": True,
                "tokens": True,
                "token_input": "mlp",
                "embedding": None,
                "temperature": 5.0,
                "warmup": 0,
                "loss_weight": 1.0,
            },
        ),
        (
            FeatureCache(),
            {
                "threshold": 0.1,
                "indicator": "input",
                "coefficients": (1.0, 0.0),
                "steps": None,
                "num_steps": None,
                "extrapolate": False,
                "fingerprint": None,
            },
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_saved_methods_that_leave_a_setting_out_mean_its_default(method, defaults):
    """Files of methods hold only what was set, so a default that changes silently changes what they mean."""
    assert method.model_dump() == defaults


LIMITS = [
    (Chunking, "target", [1.0, 1.5, 64], [0.99, 0.0]),
    (Chunking, "sigma", [None, 0.01, 9.0], [0.0, -1.0]),
    (Chunking, "tail_drop", [0.0, 1.0, ((0.0, 0.0), (1.0, 1.0))], [-0.1, 1.1, ((0.5, 2.0),), ()]),
    (Chunking, "loss_weight", [0.0, 3.0], [-0.01]),
    (Chunking, "router", ["spatial_predictability", "cosine", "random"], ["Cosine", None]),
    (TokenMerge, "ratio", [0.0, 0.999, ((0.0, 0.1),)], [1.0, -0.1, ((0.0, 1.0),)]),
    (TokenMerge, "where", ["attention", "mlp", "both"], ["block"]),
    (TokenMerge, "partition", ["bucket", "grid"], ["none"]),
    (TokenMerge, "bucket", [2, 5], [1, 0]),
    (TokenMerge, "reuse", [1, 4], [0]),
    (TokenDrop, "rate", [0.0, 0.99], [1.0, -0.1]),
    (DepthSkip, "target", [0.01, 1.0], [0.0, 1.01]),
    (DepthSkip, "loss_weight", [0.0], [-0.01]),
    (DepthSkip, "levels", [(0.0, 1.0), (0.2, 0.3)], [(0.3, 0.3), (0.4, 0.3), (-0.1, 0.5), (0.5, 1.1)]),
    (DepthSkip, "table", [((0.0, 0.5, (1,)),)], [((0.5, 0.5, (1,)),), ((-0.5, 0.5, (1,)),)]),
    (DynamicWidth, "target", [0.01, 1.0], [0.0, 1.01]),
    (DynamicWidth, "token_input", ["mlp", "stream"], ["block"]),
    (DynamicWidth, "embedding", [None, 1], [0]),
    (DynamicWidth, "temperature", [0.01], [0.0]),
    (DynamicWidth, "warmup", [0, 1], [-1]),
    (DynamicWidth, "loss_weight", [0.0], [-0.01]),
    (FeatureCache, "threshold", [-1.0, 0.0, 2.0], ["much"]),
    (FeatureCache, "indicator", ["input", "first_block"], ["output"]),
    (FeatureCache, "coefficients", [(1.0,), TEACACHE_FLUX], [()]),
    (FeatureCache, "steps", [None, (0,), (0, 3, 4)], [(1, 2), (0, 3, 3), (0, 4, 3), ()]),
    (FeatureCache, "num_steps", [None, 1], [0]),
]


@pytest.mark.parametrize(("kind", "name", "good", "bad"), LIMITS, ids=lambda v: getattr(v, "__name__", None))
def test_settings_take_the_values_of_their_range_and_no_others(kind, name, good, bad):
    for value in good:
        assert getattr(kind(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(InputError, match=f"^{kind.__name__}: "):
            kind(**{name: value})


@pytest.mark.parametrize("kind", METHODS.values())
def test_unknown_settings_are_refused_and_the_known_ones_named(kind):
    with pytest.raises(InputError, match=f"^{kind.__name__} .*'colour'.*{', '.join(kind.model_fields)}"):
        kind(colour=1)


def test_a_value_that_does_not_fit_is_shown():
    with pytest.raises(InputError, match=r"^TokenDrop: rate: .*1\.5"):
        TokenDrop(rate=1.5)


def test_of_several_mistakes_the_first_is_named():
    with pytest.raises(InputError, match=r"^Chunking: target: .*0\.5"):
        Chunking(target=0.5, sigma=-1.0, colour=1)


def test_coefficients_are_those_published():
    """TeaCache4FLUX, ali-vilab/TeaCache (arXiv 2411.19108)."""
    assert TEACACHE_FLUX == (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01)


def test_weighted_keys_need_attention():
    for where in ("attention", "both"):
        assert TokenMerge(weighted=True, where=where).traits(DEPTH).weighs_keys
    with pytest.raises(InputError, match=r"weighted.*where='mlp'"):
        TokenMerge(weighted=True, where="mlp")


def test_skips_are_decided_in_one_way():
    for settings in ({"blocks": (1,), "learned": True}, {"blocks": (1,), "table": ((0, 1, (2,)),)}):
        with pytest.raises(InputError, match=r"blocks, table and learned"):
            DepthSkip(**settings)


@pytest.mark.parametrize(
    ("span", "expected"), [((0, 11), (0, 11)), ((-3, -1), (9, 11)), ((2, -1), (2, 11)), ((4, 4), (4, 4))]
)
def test_ends_of_a_span_count_from_either_side(span, expected):
    assert resolve(span, DEPTH, "Probe") == expected


@pytest.mark.parametrize("span", [(3, 2), (0, 12), (-13, 2), (-1, 0)])
def test_a_span_outside_of_the_model_is_named(span):
    with pytest.raises(InputError, match=rf"Probe.*\({span[0]}, {span[1]}\).*12 blocks.*0 to 11"):
        resolve(span, DEPTH, "Probe")


def test_sizes_know_the_depth():
    assert Sizes(8, 2, (5, 5, 5)).depth == 3


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
            "owns": {"merging around attention": None},
            "around": ("attention",),
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
            "controls": frozenset({"drop_rate"}),
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
        if question not in USUAL[kind] and question != "prunes":
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
    assert [each.traits(DEPTH).span for each in FeatureCache.examples()] == [None, (1, 11)]
    skips = DepthSkip.examples()
    assert [each.traits(DEPTH).needs_level for each in skips] == [False, True, True]
    assert [each.learned for each in skips] == [False, False, True]


def test_a_method_without_parts_builds_none():
    class Nothing(Method):
        pass

    sizes = Sizes(8, 2, (1, 1))
    assert Nothing().build(sizes) is None
    with pytest.raises(NotImplementedError):
        Nothing().traits(2)
    assert Nothing.examples() == (Nothing(),)
    for method in (TokenMerge(), TokenDrop(), DepthSkip(blocks=(1,)), FeatureCache(), Chunking(target=1.0)):
        assert method.build(sizes) is None


@pytest.mark.parametrize("kind", METHODS.values())
def test_methods_cannot_be_changed(kind):
    method = kind()
    for name in kind.model_fields:
        with pytest.raises(ValueError, match="frozen"):
            setattr(method, name, getattr(method, name))
