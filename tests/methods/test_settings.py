"""Settings of every method: their defaults and the values they take."""

import math

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
    TokenDrop,
    TokenMerge,
)
from tokdyn.methods.base import resolve

DEPTH = 12


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
                "reuse_steps": 1,
                "window": None,
                "metric_width": None,
                "references": "keep",
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
                "rule": "teacache",
                "indicator": "input",
                "coefficients": (1.0, 0.0),
                "ratios": None,
                "steps": None,
                "num_steps": None,
                "warmup": 0,
                "start": 0,
                "end": 1.0,
                "max_reused": None,
                "forecast": 0,
                "residual_dtype": None,
                "residual_device": None,
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
    (TokenMerge, "window", [None, 1, 8, (4, 8, 8)], [0, (4, 0), "all"]),
    (TokenMerge, "metric_width", [None, 1, 64], [0]),
    (TokenMerge, "reuse_steps", [1, 9], [0]),
    (TokenMerge, "reuse", [1, 4], [0]),
    (TokenMerge, "seed", [None, 0, -1, 2**32], [2**63, -(2**63), 0.5]),
    (TokenDrop, "seed", [0, -1, 2**32], [2**63, -(2**63), None]),
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
    (FeatureCache, "warmup", [0, 7, 0.0, 0.3, 0.99], [-1, -0.1, 1.1, 1.0]),
    (FeatureCache, "start", [0, 7, 0.99], [-1, -0.1, 1.1, 1.0]),
    (FeatureCache, "end", [2, 7, 0.01, 1.0], [1, 0, 0.0, -0.1, 1.1]),
    (FeatureCache, "max_reused", [None, 1, 9], [0, -1]),
    (FeatureCache, "rule", ["teacache", "easycache", "seacache"], ["magcache", "mag", None]),
    (FeatureCache, "indicator", ["input", "first_block", "time", "projected_time"], ["output"]),
    (FeatureCache, "forecast", [0, 1, 2, "chebyshev"], [3, -1, "taylor"]),
    (FeatureCache, "threshold", [-1.0, 0.0, 2.0, math.inf], ["much", math.nan]),
    (FeatureCache, "coefficients", [(1.0,), TEACACHE_FLUX], [(), (math.nan,), (math.inf, 0.0)]),
    (FeatureCache, "steps", [None, (0,), (0, 3, 4)], [(1, 2), (0, 3, 3), (0, 4, 3), (-1, 0), ()]),
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


@pytest.mark.parametrize(
    "settings",
    [{"warmup": 8, "end": 5}, {"warmup": 0.9, "end": 0.5}, {"start": 1, "warmup": 5, "end": 5}],
)
def test_a_warmup_leaves_steps_to_cache(settings):
    with pytest.raises(InputError, match=r"warmup=.* is not before end="):
        FeatureCache(**settings)


@pytest.mark.parametrize("settings", [{"warmup": 20}, {"start": 0.9}, {"start": 5, "end": 0.1}, {"end": 0.1}])
def test_a_window_leaves_steps_to_cache(settings):
    assert FeatureCache(**settings).window(200)
    with pytest.raises(InputError, match="none of num_steps=10 "):
        FeatureCache(**settings, num_steps=10)


def test_listed_steps_are_steps_of_the_sampler():
    assert FeatureCache(steps=(0, 3), num_steps=4).steps == (0, 3)
    with pytest.raises(InputError, match="steps lists 50, but num_steps=4"):
        FeatureCache(steps=(0, 50), num_steps=4)


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
