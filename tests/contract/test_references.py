"""Tokens of reference images: token methods act on the generated tokens beside them, and every law holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import tokdyn
from tests.contract.coverage_videos import WITHOUT_BATCH
from tests.contract.edits import EDITS, flux2_arguments, flux2_pipe
from tests.contract.kit import SHARED, sample, shallow
from tests.contract.references import (
    BESIDE,
    CALLS,
    COLUMNS,
    LATER,
    ROWS,
    kontext,
    ltx2,
    numbered,
    qwen,
    skyreels,
)
from tests.contract.stacks import ACTIVE, acting
from tokdyn import Chunking, DepthSkip, FeatureCache, TokenDrop, TokenMerge
from tokdyn.adapters import adapter_for
from tokdyn.adapters.tokens import split
from tokdyn.methods import Method
from tokdyn.ops.destinations import grid_destinations
from tokdyn.ops.merging import match, merge
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
DENSE = {"Sana Video"}
QUICK = {"Kontext", "Qwen-Image-Edit-Plus", "Flux 2", "Wan", "LTX", "LTX-2"}  # pipelines that are drawn with by default
SOME = {"LTX-2", "Sana Video", "JoyImage Plus", "Flux 3"}  # whose laws are checked by default
"""Models whose blocks need all tokens."""
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


def tokens_of_blocks(model: nn.Module, call: dict[str, Any], sublayer: str | None = None) -> list[Tensor]:
    """The tokens that every block, or its attention, is called with."""
    seen: list[Tensor] = []
    for blocks in adapter_for(model).blocks[:1]:
        for block in model.get_submodule(blocks.path):  # type: ignore[attr-defined]
            module = block if sublayer is None else getattr(block, sublayer)
            name = blocks.tokens if sublayer is None else "hidden_states"
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: seen.append(kwargs[name] if name in kwargs else args[0]),
                with_kwargs=True,
            )
    model(**call)
    return seen


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *product(["Kontext", "Qwen", "Wan", "LTX"], [Chunking(target=2)]),
        *product(sorted(BESIDE.keys() - {*DENSE, "Z-Image"}), [TokenDrop(rate=0.5, blocks=(0, -1))]),
    ],
    ids=lambda one: one if isinstance(one, str) else type(one).__name__,
)
def test_references_stay_whole_where_tokens_are_left_out(name: str, method: Method) -> None:
    model, call = CALLS[name].build().train(), CALLS[name].inputs(2)
    adapter = adapter_for(model)
    count, (first, last) = total(adapter.image_tokens(model, call)), BESIDE[name]
    text, whole = split(tokens_of_blocks(copy.deepcopy(model), call)[0], count, adapter.blocks[0].image)
    own = count - first - last
    tokens = tokens_of_blocks(tokdyn.wrap(model, [method]), call)[0]
    reduced = split(tokens, count - own // 2, adapter.blocks[0].image)[1]
    assert reduced.shape[1] == tokens.shape[1] - (0 if text is None else text.shape[1])
    assert torch.equal(reduced[:, :first], whole[:, :first])
    assert torch.equal(reduced[:, reduced.shape[1] - last :], whole[:, whole.shape[1] - last :])
    stop = reduced.shape[1] - last
    for kept, all_tokens in zip(reduced[:, first:stop], whole[:, first : first + own], strict=True):
        assert all((token == all_tokens).all(dim=1).any() for token in kept)


@pytest.mark.parametrize("name", ["Kontext", "Flux 3"])
def test_tokens_that_are_left_out_might_as_well_not_have_been_given(name: str) -> None:
    """Beside references, those that are left in all blocks get what the model predicts for them alone."""
    model, call = CALLS[name].build().train(), CALLS[name].inputs(1)
    own = ROWS * COLUMNS
    whole = tokens_of_blocks(copy.deepcopy(model), call)[0][0]
    seen: list[Tensor] = []
    dropping = tokdyn.wrap(copy.deepcopy(model), [TokenDrop(rate=0.5, blocks=(0, -1))])
    first = dropping.get_submodule(adapter_for(model).blocks[0].path)[0]  # type: ignore[index]
    first.register_forward_pre_hook(lambda _, args, kwargs: seen.append([*args, *kwargs.values()][0]), with_kwargs=True)
    out = sample(dropping(**call))
    kept = (whole[:own, None] == seen[0][0]).all(dim=2).any(dim=1).nonzero().flatten()
    assert len(kept) == own // 2
    given = torch.cat([kept, torch.arange(own, call["hidden_states"].shape[1])])
    fewer = {**call, "hidden_states": call["hidden_states"][:, given], "img_ids": call["img_ids"][given]}
    expected = sample(model(**fewer))[:, : len(kept)]
    torch.testing.assert_close(out[:, kept], expected, rtol=0, atol=1e-5)  # fp32


@torch.no_grad()
def test_references_that_join_later_are_not_merged() -> None:
    """Attention of the first joint block of Flux 3 gets text, references and merged tokens."""
    call = CALLS["Flux 3"].inputs(2)

    def attention(methods: list[Method]) -> Tensor:
        model, seen = tokdyn.wrap(CALLS["Flux 3"].build(), methods), list[Tensor]()
        joint = model.single_transformer_blocks[0].attn  # type: ignore[index,union-attr]
        joint.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True)
        model(**call)
        return seen[0]

    text, own, references = attention([]).split([6, ROWS * COLUMNS, 16], dim=1)
    rows = own.flatten(0, 1)
    plan = match(rows, [own.shape[1]] * 2, grid_destinations(2, (ROWS, COLUMNS), rows.device), 0.5)
    expected = torch.cat([text, references, merge(rows, plan).view(2, -1, own.shape[2])], dim=1)
    found = attention([TokenMerge(ratio=0.5, blocks=(2, 3))])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # fp32


@pytest.mark.parametrize("references", ["keep", "merge"])
@pytest.mark.parametrize("name", ["Qwen", "Wan", "LTX-2"])
@torch.no_grad()
def test_attention_gets_tokens_merged_within_one_image(name: str, references: Any) -> None:
    """The first block's attention gets what the plain functions make of each image by itself."""
    sublayer = "attn" if name == "Qwen" else "attn1"
    plain, call = CALLS[name].build(), CALLS[name].inputs(2)
    whole = tokens_of_blocks(plain, call, sublayer)[0]
    model = tokdyn.wrap(CALLS[name].build(), [TokenMerge(ratio=0.5, references=references)])
    found = tokens_of_blocks(model, call, sublayer)[0]
    images = adapter_for(model).image_tokens(model, call)
    grids = [*images.references[: images.leading], images.grid, *images.references[images.leading :]]
    expected = []
    for number, (grid, part) in enumerate(
        zip(grids, whole.split([torch.Size(grid).numel() for grid in grids], dim=1), strict=True)
    ):
        rows = part.reshape(-1, part.shape[-1])
        plan = match(rows, [part.shape[1]] * 2, grid_destinations(2, grid, rows.device), 0.5)
        merged = merge(rows, plan).view(2, -1, part.shape[-1])
        expected.append(merged if number == images.leading or references == "merge" else part)
    torch.testing.assert_close(found, torch.cat(expected, dim=1), rtol=0, atol=1e-6)  # fp32


@every
@torch.no_grad()
def test_nothing_changes_where_nothing_is_merged_or_left_out(name: str) -> None:
    """Bit for bit: no sequence is rotated either, for attention would add in another order."""
    call = CALLS[name].inputs(2)
    plain = sample(CALLS[name].build()(**call))
    outside: list[list[Method]] = [[FeatureCache(threshold=-1.0), Chunking(target=1)], [TokenDrop(rate=0.0)]]
    around: list[Method] = [FeatureCache(threshold=-1.0), TokenMerge(ratio=0.0, references="merge")]
    for methods in [around] if name in DENSE else [*outside, around]:
        assert torch.equal(sample(tokdyn.wrap(CALLS[name].build(), methods)(**call)), plain)


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


@pytest.fixture
def edit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pipeline, and a function that makes a picture with it."""
    import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as plus

    for size in ("VAE_IMAGE_SIZE", "CONDITION_IMAGE_SIZE"):
        monkeypatch.setattr(plus, size, 32 * 32)
    build, arguments = EDITS[request.param]
    pipe = build()
    pipe.set_progress_bar_config(disable=True)

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(3)
        found = pipe(**arguments(), num_inference_steps=3, output_type="np", generator=generator)[0]
        return torch.as_tensor(found).clone()

    return pipe, draw


@pytest.mark.parametrize(
    "edit", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in EDITS], indirect=True
)
@torch.no_grad()
def test_editing_pipelines_work_wrapped(edit: Any) -> None:
    pipe, draw = edit
    plain = draw()
    tokdyn.wrap(pipe, [FeatureCache(steps=(0, 2)), DepthSkip(blocks=(1,))])
    draw()
    calls = tokdyn.stats(pipe).calls
    assert {call.step: call.reused for call in calls} == {0: 0, 1: calls[0].samples, 2: 0}
    tokdyn.unwrap(pipe)
    tokdyn.wrap(pipe, [TokenMerge(ratio=0.5)])
    assert not torch.equal(draw(), plain)
    for call in tokdyn.stats(pipe).calls:
        assert 0 < call.attention_tokens < call.cells
    with tokdyn.disabled(pipe):
        assert torch.equal(draw(), plain)
    tokdyn.unwrap(pipe)
    assert torch.equal(draw(), plain)
