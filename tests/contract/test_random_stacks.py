"""Random lists of methods with random settings: refused with a way out, or every law holds."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tokdyn
from tests.contract.kit import SHARED
from tests.contract.models import TINY, one_of, sample
from tests.contract.stacks import acting
from tokdyn import CompositionError, FeatureCache, InputError, TokenDrop, UnsupportedModelError
from tokdyn.methods import METHODS, Method
from tokdyn.testing import LAWS, Case

MODELS = ("DiT", "FluxTransformer2DModel", "WanTransformer3DModel")
MORE = (
    *MODELS, "DCDiT", "SD3Transformer2DModel", "DiTTransformer2DModel", "PixArtTransformer2DModel",
    "LTXVideoTransformer3DModel",
)  # fmt: skip
DEPTH = 4
LEVELS = (0.9, 0.8, 0.3)
REFUSALS = (CompositionError, InputError, UnsupportedModelError)

level = st.sampled_from((0.0, 0.2, 0.5, 0.7, 0.8, 1.0))
block = st.integers(-DEPTH, DEPTH - 1)
weight = st.sampled_from((0.0, 0.5))
stretch = st.sampled_from(((0.0, 1.0), (0.0, 0.5), (0.25, 0.85), (0.8, 1.0), (0.7, 0.2)))
span = st.one_of(
    st.none(), st.tuples(st.integers(0, 1), st.integers(2, 3)), st.tuples(block, block), st.just((0, DEPTH))
)


def curve(most: float) -> st.SearchStrategy[Any]:
    value = st.floats(0.0, most).map(lambda share: round(share, 2))
    points = st.dictionaries(level, value, min_size=1, max_size=3).map(lambda found: tuple(sorted(found.items())))
    return st.one_of(value, points)


SETTINGS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "Chunking": {
        "target": st.sampled_from((1.0, 1.5, 2.0, 3.0, 8.0)),
        "router": st.sampled_from(("spatial_predictability", "cosine", "random")),
        "sigma": st.sampled_from((None, 0.5, 1.0, 2.0)),
        "tail_drop": curve(1.0),
        "ragged": st.booleans(),
        "force_ends": st.booleans(),
        "loss_weight": weight,
    },
    "TokenMerge": {
        "ratio": curve(0.9),
        "where": st.sampled_from(("attention", "mlp", "both")),
        "partition": st.sampled_from(("bucket", "bucket", "grid")),
        "bucket": st.integers(2, 3),
        "seed": st.sampled_from((None, 3)),
        "important": st.booleans(),
        "blocks": span,
        "weighted": st.booleans(),
        "references": st.sampled_from(("keep", "merge")),
        "reuse": st.integers(1, 3),
        "reuse_steps": st.sampled_from((1, 1, 2)),
        "window": st.sampled_from((None, 2, 4)),
        "metric_width": st.sampled_from((None, 4)),
    },
    "TokenDrop": {"rate": st.sampled_from((0.0, 0.3, 0.5, 0.9)), "blocks": span, "seed": st.integers(0, 3)},
    "DepthSkip": {
        "blocks": st.lists(st.one_of(block, st.integers(-DEPTH - 1, DEPTH)), max_size=2).map(tuple),
        "levels": stretch,
        "table": st.lists(st.tuples(level, level, st.tuples(block)), max_size=2).map(tuple),
        "learned": st.sampled_from((False, False, True)),
        "target": st.sampled_from((0.5, 1.0)),
        "loss_weight": weight,
    },
    "DynamicWidth": {
        "target": st.sampled_from((0.5, 1.0)),
        "heads": st.booleans(),
        "channels": st.booleans(),
        "tokens": st.booleans(),
        "token_input": st.sampled_from(("mlp", "stream")),
        "embedding": st.sampled_from((None, 8)),
        "temperature": st.sampled_from((1.0, 5.0)),
        "warmup": st.integers(0, 2),
        "loss_weight": weight,
    },
    "FeatureCache": {
        "threshold": st.sampled_from((-1.0, 0.0, 0.1, 0.5, 10.0)),
        "rule": st.sampled_from(("teacache", "easycache", "seacache")),
        "indicator": st.sampled_from(("input", "first_block", "time", "projected_time")),
        "coefficients": st.sampled_from(((1.0, 0.0), (3.0, -1.0, 0.1), (0.0,))),
        "steps": st.one_of(st.none(), st.sets(st.integers(0, 3), min_size=1).map(sorted).map(tuple)),
        "num_steps": st.sampled_from((None, 1, 4)),
        "ratios": st.none(),  # with them the number of steps must be known, which nobody tells here
        "warmup": st.integers(0, 2),
        "start": st.integers(0, 2),
        "end": st.sampled_from((1.0, 2, 3)),
        "max_reused": st.sampled_from((None, 1, 2)),
        "forecast": st.sampled_from((0, 1, 2, "chebyshev")),
        "residual_dtype": st.sampled_from((None, "float32")),  # fewer bits turn rounding errors into steps
        "residual_device": st.sampled_from((None, "host")),
    },
}
"""What is drawn of every setting; most of it goes together, and some of it no model takes."""
NEUTRAL: dict[str, dict[str, Any]] = {
    "Chunking": {"target": 1.0},
    "TokenMerge": {"ratio": 0.0},
    "TokenDrop": {"rate": 0.0},
    "DepthSkip": {"blocks": (), "table": ()},
    "DynamicWidth": {"target": 1.0},
    "FeatureCache": {"threshold": 0.0, "steps": None},
}
"""Settings with which a method changes nothing, whatever its others are; gates that are learned start open."""


def some(name: str) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    """A method by its name with some of its settings, of which it may refuse the combination."""
    return st.tuples(st.just(name), st.fixed_dictionaries({}, optional=SETTINGS[name]))


one = st.sampled_from(sorted(SETTINGS)).flatmap(some)
stacks = st.one_of(st.lists(one, min_size=least, max_size=4) for least in (1, 2, 3))


@cache
def built(name: str) -> nn.Module:
    return TINY[name].build()


def test_every_setting_of_every_method_is_drawn() -> None:
    assert set(SETTINGS) == set(NEUTRAL) == set(METHODS)
    for name, method in METHODS.items():
        assert set(SETTINGS[name]) == set(method.model_fields) - {"fingerprint"}, name


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=2, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(drawn=stacks)
def test_a_list_is_refused_with_a_way_out_or_obeys_the_laws(name: str, drawn: Any) -> None:
    hold(name, drawn)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
@settings(max_examples=12, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(drawn=stacks)
def test_many_lists_are_refused_with_a_way_out_or_obey_the_laws(name: str, drawn: Any) -> None:
    hold(name, drawn)


def hold(name: str, drawn: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Follow what refusals say until the model takes the list, and hold what it takes to the laws."""
    methods = tuple(method for each in drawn if (method := made(*each)) is not None)
    model = copy.deepcopy(built(name))
    while (error := refusal(model, methods)) is not None:
        event(type(error).__name__)
        unchanged(name, model)
        followed(name, methods, str(error))
        named = [place for place, method in enumerate(methods) if type(method).__name__ in str(error)]
        assert named, f"{error} names none of {methods}"
        methods = methods[: named[-1]] + methods[named[-1] + 1 :]
    event(f"accepted {len(methods)}")
    if methods:
        obey(name, methods)


def made(name: str, chosen: dict[str, Any]) -> Method | None:
    """A method, or None if it refuses its settings, and says so in its name."""
    try:
        return METHODS[name](**chosen)
    except InputError as error:
        text = str(error)
    event("settings refused")
    assert text.startswith(f"{name}: ")
    assert "\n" not in text
    return None


def refusal(model: nn.Module, methods: Sequence[Method]) -> Exception | None:
    try:
        tokdyn.unwrap(tokdyn.wrap(model, methods))
    except REFUSALS as error:
        return error
    return None


def unchanged(name: str, model: nn.Module) -> None:
    """A refused model is what it was."""
    original = built(name)
    assert type(model) is type(original)
    assert [type(part) for part in model.modules()] == [type(part) for part in original.modules()]
    assert set(vars(model)) == set(vars(original))
    assert not hasattr(model, "tokdyn")


def followed(name: str, methods: Sequence[Method], text: str) -> None:
    """A refusal is one sentence, and doing what its last part says leads out of it."""
    assert text.endswith(".")
    assert "\n" not in text
    cure = text.rpartition("; ")[2]
    order = re.search(r"put (\w+) (?:first|before)", cure)
    changed = [changed_by(method, cure) if type(method).__name__ in text else method for method in methods]
    if order:
        kinds = [type(method).__name__ for method in methods]
        changed.sort(key=lambda method: type(method).__name__ != order[1])
        if changed == list(methods) and kinds.count(order[1]) > 1:  # two of a kind: the other one first
            changed.reverse()
    says = bool(order) or any(hasattr(method, key) for method in methods for key in settings_in(cure))
    if says:
        event("cured by another setting or order")
        assert changed != list(methods), f"{text} says what is so already"
        assert str(refusal(copy.deepcopy(built(name)), changed)) != text


def settings_in(cure: str) -> dict[str, Any]:
    """The settings that a sentence gives."""
    return {key: ast.literal_eval(value) for key, value in re.findall(r"(\w+)=('\w+'|True|False|\d+)", cure)}


def changed_by(method: Method, cure: str) -> Method:
    """The method with the settings that a sentence gives."""
    known = {key: value for key, value in settings_in(cure).items() if hasattr(method, key)}
    return type(method)(**{**dict(method), **known})


def obey(name: str, methods: tuple[Method, ...]) -> None:
    case = Case(lambda: copy.deepcopy(built(name)), TINY[name].inputs(2), methods, SHARED, 1e-4, acting)
    for law in LAWS:
        law(case)
    neutral_settings_change_nothing(name, methods)
    a_trajectory_does_not_depend_on_batch_mates(name, case)
    training_costs_what_is_counted(case)


@torch.no_grad()
def neutral_settings_change_nothing(name: str, methods: Sequence[Method]) -> None:
    neutral = [type(method)(**{**dict(method), **NEUTRAL[type(method).__name__]}) for method in methods]
    model = copy.deepcopy(built(name))
    plain = sample(model(**TINY[name].inputs(2)))
    if refusal(model, neutral) is None:
        assert torch.equal(sample(tokdyn.wrap(model, neutral)(**TINY[name].inputs(2))), plain), neutral


@torch.no_grad()
def a_trajectory_does_not_depend_on_batch_mates(name: str, case: Case) -> None:
    """Along a trajectory whose samples are at other noise levels, as caches, curves and gates see it."""

    def run(places: Sequence[int]) -> list[Tensor]:
        model, found = case.wrapped(), []
        drops = any(isinstance(method, TokenDrop) for method in case.methods)
        with tokdyn.dropping(model, 0.4) if drops else nullcontext():
            for step in range(len(LEVELS)):
                inputs = called(name, step, places)
                if step == 1 and len(places) > 1:
                    cost = tokdyn.flops(model, **inputs)
                    assert cost.total == cost.counted, case.name
                found.append(sample(model(**inputs)))
        return found

    together, alone = run((0, 1)), [run((place,)) for place in (0, 1)]
    for step, prediction in enumerate(together):
        for place, predictions in enumerate(alone):
            torch.testing.assert_close(prediction[place], predictions[step][0], rtol=0, atol=case.tolerance)


def called(name: str, step: int, places: Sequence[int]) -> dict[str, Any]:
    """The arguments of a step for some samples: their latents move a little from one step to the next."""
    inputs, given = TINY[name].inputs(2), []
    main = next(iter(inputs))
    noise = torch.randn(inputs[main].shape, generator=torch.Generator().manual_seed(step))
    for place in places:
        clock = TINY[name].at(2, LEVELS[step] / (1 + place))
        given.append(one_of({**inputs, main: inputs[main] + 0.1 * step * noise, **clock}, place))
    return {key: given[0][key] if key in SHARED else torch.cat([each[key] for each in given]) for key in inputs}


def training_costs_what_is_counted(case: Case) -> None:
    if any(isinstance(method, FeatureCache) for method in case.methods):
        return
    cost = tokdyn.flops(case.wrapped().train(), **case.call)
    assert cost.total == cost.counted, case.name
