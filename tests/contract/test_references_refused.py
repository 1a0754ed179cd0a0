"""Inputs and methods that are refused beside reference images, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import tokdyn
from tests.contract.edits import flux2_arguments, flux2_pipe
from tests.contract.kit import sample
from tests.contract.references import (
    CALLS,
    COLUMNS,
    ROWS,
    kontext,
    numbered,
    qwen,
)
from tokdyn import DepthSkip, FeatureCache, TokenMerge
from tokdyn.methods import Method


@torch.no_grad()
def test_samples_with_other_references_are_refused_where_the_model_knows_one_set() -> None:
    call = qwen(2)
    call["img_shapes"] = [call["img_shapes"][0], [(1, ROWS, COLUMNS), (1, 2, 6), (1, 2, 2)]]
    with pytest.raises(tokdyn.InputError, match="img_shapes"):
        tokdyn.wrap(CALLS["Qwen"].build(), [TokenMerge()])(**call)
    ids = kontext(2)["img_ids"]
    other = numbered((0, ROWS, COLUMNS), (1, 2, 10), (2, 3, 2))
    call = {**kontext(2), "img_ids": torch.stack([ids, other])}
    with pytest.raises(tokdyn.InputError, match="position ids"):
        tokdyn.wrap(CALLS["Kontext"].build(), [TokenMerge()])(**call)
    call = CALLS["Wan"].inputs(2)
    call["timestep"] = call["timestep"].clone()
    call["timestep"][1] = 500.0
    with pytest.raises(tokdyn.InputError, match="timestep 0"):
        tokdyn.wrap(CALLS["Wan"].build(), [TokenMerge()])(**call)
    other = CALLS["JoyImage Plus"].inputs(2)
    other["shape_list"] = [other["shape_list"][0], [(1, ROWS, COLUMNS), (1, 2, 6), (1, 2, 2)]]
    with pytest.raises(tokdyn.InputError, match="shape_list"):
        tokdyn.wrap(CALLS["JoyImage Plus"].build(), [TokenMerge()])(**other)
    other = {**CALLS["HunyuanVideo"].inputs(1), "hidden_states": torch.randn(1, 4, 1, 8, 6)}
    with pytest.raises(tokdyn.InputError, match="one frame"):
        tokdyn.wrap(CALLS["HunyuanVideo"].build(), [TokenMerge()])(**other)
    for method in (FeatureCache(threshold=0.1), DepthSkip(blocks=(1,))):
        assert sample(tokdyn.wrap(CALLS["Wan"].build(), [method])(**call)).isfinite().all()


@torch.no_grad()
def test_a_reference_with_the_number_of_the_picture_is_refused() -> None:
    places = numbered((0, ROWS, COLUMNS), (0, ROWS, COLUMNS))
    call = {**kontext(1), "img_ids": places, "hidden_states": torch.randn(1, len(places), 4)}
    model = tokdyn.wrap(CALLS["Kontext"].build(), [TokenMerge()])
    with pytest.raises(tokdyn.InputError, match=f"{len(places)} image tokens"):
        model(**call)


@pytest.mark.parametrize("method", [FeatureCache(steps=(0, 2)), DepthSkip(blocks=(1,)), TokenMerge()])
@torch.no_grad()
def test_keys_and_values_of_references_are_kept_without_methods_only(method: Method) -> None:
    if not hasattr(diffusers, "Flux2KleinKVPipeline"):
        pytest.skip(f"diffusers {diffusers.__version__} has no Flux2KleinKVPipeline")
    pipe = diffusers.Flux2KleinKVPipeline(**{**flux2_pipe().components, "tokenizer": None})
    pipe.set_progress_bar_config(disable=True)
    tokdyn.wrap(pipe, [method])
    given = {**flux2_arguments(), "num_inference_steps": 3, "output_type": "np"}
    with pytest.raises(tokdyn.InputError, match=r"kv_cache_mode.*Flux2KleinPipeline"):
        pipe(**given)
    del given["image"]
    pipe(**given)
    assert len(tokdyn.stats(pipe).calls) == 3


@pytest.fixture
def first_tokens() -> Iterator[Callable[[], Method]]:
    """A method of a third party that keeps the first four tokens of all, without saying that it selects tokens."""
    from tokdyn.attach import Bracket, handles
    from tokdyn.methods import METHODS, Method, Stage, Traits

    @tokdyn.register_method
    class FirstTokens(Method):
        """Keep the first four tokens."""

        def traits(self, depth: int) -> Traits:
            return Traits(Stage.BLOCKS, tokens="subset", reads="grid")

    class First(Bracket):
        first, last = 0, 3

        def open(self, frame: Any, view: Any, x: Tensor, block: Any) -> Any:
            index = torch.arange(4).expand(len(x), -1)
            return x[:, :4], view.reduced(index, [4] * len(x), 0)

        def close(self, frame: Any, view: Any, x: Tensor) -> Any:
            return x, view

    handles(FirstTokens)(lambda plan: [First()])
    yield FirstTokens
    del METHODS["FirstTokens"]


@torch.no_grad()
def test_brackets_that_select_without_saying_so_are_refused_beside_references(first_tokens: Any) -> None:
    model = tokdyn.wrap(CALLS["Qwen"].build(), [first_tokens()])
    with pytest.raises(tokdyn.InputError, match="First"):
        model(**qwen(1))
