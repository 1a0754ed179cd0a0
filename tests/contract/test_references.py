"""Tokens of reference images: token methods act on the generated tokens beside them, and every law holds."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch

import tokdyn
from tests.contract.coverage_videos import WITHOUT_BATCH
from tests.contract.kit import SHARED, sample, shallow
from tests.contract.references import BESIDE, CALLS, DENSE, LATER, ltx2, skyreels, tokens_of_blocks
from tests.contract.stacks import ACTIVE, acting
from tokdyn import Chunking, DepthSkip, FeatureCache, TokenDrop, TokenMerge
from tokdyn.adapters import adapter_for
from tokdyn.methods import Method
from tokdyn.testing import LAWS, Case, check_adapter
from tokdyn.tokens import beside, total

STACKS: dict[str, list[Method]] = {
    **{name: ACTIVE[name] for name in ("drop-nested", "cache", "cache-first", "curves", "chunk-ragged-train", "width")},
    "drop": [TokenDrop(rate=0.5)],
    "merge-references": [TokenMerge(ratio=0.5, references="merge", weighted=True, reuse=2)],
    "merge-important": [TokenMerge(ratio=0.4, references="merge", important=True)],
    "chunk-merge": [Chunking(target=2, ragged=True, router="cosine"), TokenMerge(references="merge", seed=3)],
    "chunk-stack": [FeatureCache(threshold=0.5), Chunking(target=3), TokenMerge(), DepthSkip(blocks=(2,))],
}
SOME = {"LTX-2", "Sana Video", "JoyImage Plus", "Flux 3"}  # whose laws are checked by default
FEWER = ("cache-first", "curves", "merge-important", "merge-references", "width", "drop", "chunk-stack")
FITTING = {"Sana Video": FEWER[:3], "Cosmos": FEWER[:6], "Kandinsky": FEWER[:6]}
"""The stacks of these that fit some models; routers are calibrated for other models of Cosmos and Kandinsky."""
BY_NAME = {law.__name__: law for law in LAWS}
DECLARED = (
    "samples_do_not_depend_on_each_other",
    "computed_flops_are_the_counted_ones",
    "gradients_are_the_same_with_checkpointing",
)
"""Laws that depend on what an adapter declares."""
WITHOUT = SHARED | WITHOUT_BATCH | {"image_cond_ids"}
every = pytest.mark.parametrize("name", CALLS)
with_references = pytest.mark.parametrize("name", BESIDE)


@pytest.mark.pairwise("references")
@pytest.mark.parametrize(("name", "stack"), [*product(sorted(CALLS.keys() - LATER), STACKS)])
@pytest.mark.parametrize("law", BY_NAME)
def test_laws_hold(law: str, name: str, stack: str) -> None:
    holds(law, name, stack)


@pytest.mark.pairwise("later references")
@pytest.mark.parametrize(
    ("name", "stack"),
    [
        pytest.param(name, stack, marks=[] if name in SOME else pytest.mark.slow)
        for name in sorted(LATER)
        for stack in FITTING.get(name, FEWER)
    ],
)
@pytest.mark.parametrize("law", DECLARED)
def test_laws_hold_for_models_that_were_declared_later(law: str, name: str, stack: str) -> None:
    holds(law, name, stack)


def holds(law: str, name: str, stack: str) -> None:
    model = CALLS[name].build()
    methods = tuple(STACKS[stack])
    BY_NAME[law](Case(lambda: copy.deepcopy(model), CALLS[name].inputs(3), methods, WITHOUT, 1e-5, acting))


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in CALLS])
def test_adapters_pass_their_check(name: str) -> None:
    checked = check_adapter(CALLS[name].build(), CALLS[name].inputs(2), shared=WITHOUT, tolerance=1e-5)
    assert len(checked) >= (6 if name in DENSE else 14)


@with_references
def test_adapters_say_which_tokens_are_references(name: str) -> None:
    model, call = CALLS[name].build(), CALLS[name].inputs(2)
    images = adapter_for(model).image_tokens(model, call)
    assert beside(images) == BESIDE[name]
    seen = tokens_of_blocks(model, call)[0]
    assert total(images) <= seen.shape[1]


@pytest.mark.parametrize(
    ("name", "grids"),
    [
        ("LTX-2", ((1, 3, 4), (1, 3, 4), (1, 3, 4), (2, 2, 2))),  # the first frame, two pictures, a video
        ("Framepack", ((1, 1, 1), (1, 2, 2), (2, 4, 3))),  # the oldest frames first
        ("JoyImage Plus", ((3, 4), (2, 2))),
        ("Fibo 2", ((3, 4), (2, 2))),
    ],
)
def test_adapters_tell_references_apart(name: str, grids: object) -> None:
    model = CALLS[name].build()
    assert adapter_for(model).image_tokens(model, CALLS[name].inputs(2)).references == grids


@pytest.mark.parametrize(("given", "count"), [((0.0, 0.0, 500.0), 24), ((500.0,) * 3, 0), ((20.0, 500.0, 500.0), 0)])
@torch.no_grad()
def test_frames_that_diffusion_forcing_has_finished_are_references(given: tuple[float, ...], count: int) -> None:
    """Also in a trajectory in which they become more; with a timestep of its own, a frame is being generated."""
    model, call = CALLS["SkyReels"].build(), skyreels(2, *given)
    assert sum(beside(adapter_for(model).image_tokens(model, call))) == count
    tokdyn.wrap(model, [FeatureCache(threshold=-1.0), TokenMerge(ratio=0.5, reuse=4)])
    with tokdyn.trajectory(model, steps=2) as here:
        for here.step, frames in enumerate(((500.0, 600.0, 700.0), given)):
            model(**skyreels(2, *frames))
    last = tokdyn.stats(model).calls[-1]
    assert last.attention_tokens == count + (36 - count) / 2


@torch.no_grad()
def test_a_condition_mask_of_zeros_tells_of_no_references() -> None:
    """As in unconditional calls of Cosmos 1 with input_frames_guidance, whose given frames the model cannot know."""
    model, call = CALLS["Cosmos"].build(), CALLS["Cosmos"].inputs(1)
    call["condition_mask"] = torch.zeros_like(call["condition_mask"])
    assert beside(adapter_for(model).image_tokens(model, call)) == (0, 0)


@torch.no_grad()
def test_sizes_of_a_video_are_read_from_the_spans_of_its_patches() -> None:
    model = tokdyn.wrap(CALLS["LTX-2"].build(), [TokenMerge(ratio=0.5)])
    call = ltx2(2)
    unnamed = {name: value for name, value in call.items() if name not in ("num_frames", "height", "width")}
    assert torch.equal(sample(model(**call)), sample(model(**unnamed)))


@pytest.mark.parametrize("name", sorted(LATER))
@torch.no_grad()
def test_a_cached_step_predicts_nearly_what_a_computed_one_would(name: str) -> None:
    """Just after a computed step; without blocks the prediction is far."""
    tiny = CALLS[name]
    first = tiny.inputs(2)
    second = {**first, "hidden_states": 0.9999 * first["hidden_states"]}
    exact = sample(tiny.build()(**second))
    depth = sum(len(tiny.build().get_submodule(blocks.path)) for blocks in adapter_for(tiny.build()).blocks)  # type: ignore[arg-type]
    without = sample(tokdyn.wrap(tiny.build(), [DepthSkip(blocks=tuple(range(depth)))])(**second))
    model = tokdyn.wrap(tiny.build(), [FeatureCache(threshold=float("inf"))])
    with tokdyn.trajectory(model, steps=3) as here:
        for here.step, call in enumerate((first, second)):
            found = sample(model(**call))
    assert tokdyn.traces(model)[-1].cached == {0, 1}
    assert (found - exact).abs().max() < 0.1 * (without - exact).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Kontext", "Qwen", "Wan"])
@torch.no_grad()
def test_one_graph(name: str) -> None:
    methods = [Chunking(target=2), TokenMerge(ratio=0.5, references="merge")]
    call = CALLS[name].inputs(2)
    model = acting(tokdyn.wrap(shallow(CALLS[name].build()), methods))
    expected = sample(model(**call))
    torch._dynamo.reset()
    found = sample(torch.compile(model, fullgraph=True, backend="eager")(**call))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
