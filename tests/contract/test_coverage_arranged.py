"""Classes whose blocks arrange their tokens in ways of their own: every method that works acts, and the laws hold."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokdyn
from tests.contract.coverage_arranged import (
    ARRANGED,
    COLUMNS,
    FRAMES,
    PLACES,
    ROWS,
    STORED,
    anyflow_far,
    anyflow_far_cache,
    anyflow_far_inputs,
    cosmos3,
    cosmos3_inputs,
    latte,
    latte_inputs,
    wan_animate2,
    wan_animate2_cache,
    wan_animate2_inputs,
)
from tests.contract.kit import latents, moved
from tests.contract.stacks import ACTIVE, acting
from tokdyn import Chunking, DepthSkip, DynamicWidth, FeatureCache, InputError, TokenDrop, TokenMerge
from tokdyn.adapters import adapter_for
from tokdyn.attach import dropping, unsupported
from tokdyn.methods import METHODS, Method
from tokdyn.testing import LAWS, Case, check_adapter
from tokdyn.tokens import ImageTokens, total

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")
DEAR = {"WanAnimate2Transformer3DModel", "AnyFlowFARTransformer3DModel"}  # flex attention without a compiler
every = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in DEAR else []) for name in sorted(ARRANGED)]
)
ALIKE = "samples_do_not_depend_on_each_other"
ONE_SAMPLE = "Cosmos3OmniTransformer"
CASES = [
    *(("LatteTransformer3DModel", stack) for stack in ("merge-weighted", "curves", "width")),
    *((ONE_SAMPLE, stack) for stack in ("chunk-stack", "drop-nested", "width")),
]
DEPENDING = (ALIKE, "computed_flops_are_the_counted_ones", "gradients_are_the_same_with_checkpointing")
BY_NAME = {law.__name__: law for law in LAWS}


def outputs(model: nn.Module, call: dict[str, Any]) -> list[Tensor]:
    """All tensors that a model predicts."""
    found = [value for value in model(**call, return_dict=False) if isinstance(value, (Tensor, list))]
    return [torch.stack(value) if isinstance(value, list) else value for value in found]


def works(model: nn.Module, *methods: Method) -> bool:
    return all(unsupported(adapter_for(model), method) is None for method in methods)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [block for blocks in adapter_for(model).blocks for block in model.get_submodule(blocks.path).children()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@every
@torch.no_grad()
def test_every_method_that_works_acts_and_changes_nothing_at_rate_0(name: str) -> None:
    model, call = ARRANGED[name].build(), ARRANGED[name].inputs(2)
    plain, adapter = outputs(model, call), adapter_for(model)
    cells = total(adapter.image_tokens(model, call))
    neutral: tuple[list[Method], ...] = (
        [FeatureCache(threshold=0.0), TokenMerge(ratio=0.0, where="mlp"), DepthSkip(), DynamicWidth(target=1.0)],
        [Chunking(target=1.0)],
    )
    for methods in neutral:
        if works(model, *methods):
            tokdyn.wrap(model, methods)
            assert same(outputs(model, call), plain)
            tokdyn.unwrap(model)

    def run(method: Method) -> Any:
        tokdyn.wrap(model, [method])
        with dropping(model, 0.5) if isinstance(method, TokenDrop) else nullcontext():
            found = outputs(acting(model), call)
        trace = tokdyn.traces(model)[-1]
        tokdyn.unwrap(model)
        assert not torch.equal(found[0], plain[0])
        assert all(value.isfinite().all() for value in found)
        return trace.blocks

    left = {block.mlp[0][1] for block in run(TokenMerge(ratio=0.5, where="mlp"))}
    assert max(left) < cells
    if works(model, TokenMerge()):
        assert any(block.attention and block.attention[0][1] < cells for block in run(TokenMerge()))
    if works(model, Chunking(target=2)):
        assert {block.tokens < cells for block in run(Chunking(target=2))} == {True}
        assert {block.tokens < cells for block in run(TokenDrop(rate=0.5, blocks=(0, -1)))} == {True}
    if works(model, DynamicWidth()):
        assert any(block.heads < 1 and block.mlp_rows for block in run(DynamicWidth()))
    assert same(outputs(model, call), plain)


@every
@torch.no_grad()
def test_a_skipped_block_returns_its_input_and_computes_nothing(name: str) -> None:
    model, call = ARRANGED[name].build(), ARRANGED[name].inputs(2)
    blocks, ran = blocks_of(model), []
    for number, block in enumerate(blocks):
        for layer in (module for module in block.modules() if isinstance(module, nn.Linear)):
            layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    tokdyn.wrap(model, [DepthSkip(blocks=(1,))])
    found = outputs(model, call)
    assert {*ran} == {*range(len(blocks))} - {1}
    tokdyn.unwrap(model)
    several = len(adapter_for(model).blocks[0].returns) > 1
    blocks[1].forward = lambda *args, **kwargs: args[:2] if several else args[0]  # type: ignore[assignment]
    assert same(found, outputs(model, call))


@every
@torch.no_grad()
def test_a_cached_step_is_close_to_a_computed_one(name: str) -> None:
    """Just after a computed step; a step without blocks is far from it."""
    model, tiny = ARRANGED[name].build(), ARRANGED[name]
    before, after = ({**tiny.inputs(2), **tiny.at(2, level)} for level in (0.5, 0.4999))
    main = "vision_tokens" if name == ONE_SAMPLE else "hidden_states"
    for each in {main, "sound_tokens"} & after.keys():
        value = after[each]
        after[each] = [0.9999 * part for part in value] if isinstance(value, list) else 0.9999 * value
    exact = outputs(model, after)
    tokdyn.wrap(model, [DepthSkip(blocks=tuple(range(len(blocks_of(model)))))])
    without = outputs(model, after)
    tokdyn.unwrap(model)
    tokdyn.wrap(model, [FeatureCache(threshold=1e9)])
    outputs(model, before)
    found = outputs(model, after)
    assert len(tokdyn.traces(model)[-1].cached) == (1 if name == ONE_SAMPLE else 2)
    assert not tokdyn.traces(model)[-1].blocks
    for cached, computed, skipped in zip(found, exact, without, strict=True):
        assert (cached - computed).abs().max() < 0.1 * (skipped - computed).abs().max()


@pytest.mark.pairwise("arranged")
@pytest.mark.parametrize(("name", "stack"), CASES)
@pytest.mark.parametrize("law", DEPENDING)
def test_laws_hold(law: Any, name: str, stack: str) -> None:
    """Samples stand at different noise levels, where there are several."""
    if name == ONE_SAMPLE and law == ALIKE:
        pytest.skip("a call has one sample")
    model, call = ARRANGED[name].build(), ARRANGED[name].inputs(3)
    if name != ONE_SAMPLE:
        call["timestep"] = torch.tensor([300, 700, 300])
    BY_NAME[law](Case(lambda: copy.deepcopy(model), call, tuple(ACTIVE[stack]), (), 1e-5, acting))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ARRANGED))
def test_every_method_obeys_every_law(name: str) -> None:
    model, call = ARRANGED[name].build(), ARRANGED[name].inputs(2)
    if name == "LatteTransformer3DModel":
        assert len(check_adapter(model, call, tolerance=1e-5)) >= 8
        return
    methods = [method for kind in METHODS.values() for method in kind.examples() if works(model, method)]
    assert len(methods) >= 6
    without = {ALIKE, *(DEPENDING[2:] if name in DEAR else ())}  # flex attention has no backward pass on CPU
    for method in methods:
        for law in LAWS:
            if law.__name__ not in without:
                law(Case(lambda: copy.deepcopy(model), call, (method,), (), 1e-5, acting))


# Latte: frames and places in turn


def attended(methods: list[Method], call: dict[str, Any]) -> list[tuple[int, ...]]:
    """The shapes of what the attentions within frames and across frames get."""
    model, shapes = latte(), []
    for block in blocks_of(model):
        block.attn1.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))  # type: ignore[union-attr]
    tokdyn.wrap(model, methods)(**call)
    return shapes


@torch.no_grad()
def test_tokens_of_latte_are_merged_within_their_frames() -> None:
    cells = ROWS * COLUMNS
    shapes = attended([TokenMerge(ratio=0.5)], latte_inputs(2))
    assert shapes == [(2 * FRAMES, cells // 2, 32), (2 * cells, FRAMES, 32)] * 2


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"seed": 3}, {"weighted": True}, {"reuse": 2}, {"important": True}])
def test_a_frame_of_latte_is_merged_as_if_it_were_alone(settings: dict[str, Any]) -> None:
    """Without attention across frames, a video is as good as its frames one after the other."""
    model, call = tokdyn.wrap(latte(), [TokenMerge(ratio=0.5, **settings)]), latte_inputs(2)
    call = {**call, "enable_temporal_attentions": False}
    together = outputs(model, call)[0]
    frames = [outputs(model, {**call, "hidden_states": call["hidden_states"][:, :, [k]]})[0] for k in range(FRAMES)]
    torch.testing.assert_close(together, torch.cat(frames, dim=2), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_call_of_latte_without_attention_across_frames_leaves_out_its_blocks() -> None:
    call = {**latte_inputs(2), "enable_temporal_attentions": False}
    model = tokdyn.wrap(latte(), [DepthSkip(blocks=(1,))])
    model(**call)
    assert [block.block for block in tokdyn.traces(model)[-1].blocks] == [0]
    with pytest.raises(InputError, match=r"leaves out block 3 .*LatteTransformer3DModel"):
        tokdyn.wrap(tokdyn.unwrap(model), [FeatureCache()])(**call)


# Cosmos 3: one sample, of text, video, sound and action


def test_cosmos3_reads_what_is_generated() -> None:
    model, read = cosmos3(), lambda **more: adapter_for(cosmos3()).image_tokens(model, cosmos3_inputs(**more))
    assert read(first=0, sound=0) == ImageTokens((FRAMES, ROWS, COLUMNS))
    assert read(first=2, action=4) == ImageTokens((1, ROWS, COLUMNS), ((2, ROWS, COLUMNS), (7,), (4,)), 1)
    scattered = {**cosmos3_inputs(first=0), "vision_noisy_frame_indexes": [torch.tensor([0, 2])]}
    with pytest.raises(InputError, match=r"\[\[0, 2\]\]"):
        adapter_for(model).image_tokens(model, scattered)


@torch.no_grad()
def test_the_noise_level_of_cosmos3_is_that_of_its_noisiest_token() -> None:
    model = cosmos3()
    level = adapter_for(model).level
    assert level is not None
    assert level(model, cosmos3_inputs(level=0.7)).tolist() == pytest.approx([0.7])
    only_action = {**cosmos3_inputs(action=4, sound=0, level=0.3), "vision_timesteps": torch.zeros(0)}
    assert level(model, only_action).tolist() == pytest.approx([0.3])


class Layers:
    """What the first block of a Cosmos 3 gets and the last returns in a call."""

    def __init__(self, model: Any, call: dict[str, Any]) -> None:
        handles = [
            model.layers[0].register_forward_pre_hook(lambda _, args: setattr(self, "given", args)),
            model.layers[-1].register_forward_hook(lambda _, args, out: setattr(self, "returned", out)),
        ]
        model(**call)
        for handle in handles:
            handle.remove()


@torch.no_grad()
def test_tokens_that_cosmos3_leaves_out_are_generated_ones_and_missing_everywhere() -> None:
    call = cosmos3_inputs(first=1, sound=7)
    model: Any = cosmos3()
    plain = Layers(model, call)
    tokdyn.wrap(model, [TokenDrop(rate=0.5, blocks=(0, -1))])
    with dropping(model, 0.5):
        dropped = Layers(model, call)
    tokdyn.unwrap(model)
    (text, tokens, rotary), left = plain.given, dropped.given[1]
    kept = (tokens[:, None] == left[None]).all(dim=-1).any(dim=1)
    frame = ROWS * COLUMNS
    generated = slice(frame, FRAMES * frame)
    assert kept[:frame].all()
    assert kept[generated.stop :].all()
    assert int(kept[generated].sum()) == (FRAMES - 1) * frame // 2
    state = text, tokens[kept]
    for layer in model.layers:
        state = layer(*state, (*rotary[:2], *(each[kept] for each in rotary[2:])))
    torch.testing.assert_close(dropped.returned, state, rtol=0, atol=1e-6)


@torch.no_grad()
def test_merged_tokens_of_cosmos3_are_those_of_its_attention() -> None:
    model: Any = cosmos3()
    seen: list[int] = []
    model.layers[0].self_attn.register_forward_pre_hook(lambda _, args: seen.extend(len(each) for each in args[:2]))
    tokdyn.wrap(model, [TokenMerge(ratio=0.5)])(**cosmos3_inputs(first=1, sound=7))
    frame = ROWS * COLUMNS
    assert seen == [5, frame + (FRAMES - 1) * frame // 2 + 7]


@torch.no_grad()
def test_prompts_of_cosmos3_have_caches_of_their_own() -> None:
    """Also where nobody names the guidance branch."""
    first = cosmos3_inputs(level=0.5)
    second = {**cosmos3_inputs(level=0.45), "vision_tokens": [1.05 * first["vision_tokens"][0]]}
    model = tokdyn.wrap(cosmos3(), [FeatureCache(threshold=1e9)])
    ids = first["input_ids"]
    found = [outputs(model, {**call, "input_ids": each})[0] for call in (first, second) for each in (ids, ids + 9)]
    assert [len(trace.cached) for trace in tokdyn.traces(model)] == [0, 0, 1, 1]
    assert not torch.allclose(found[2], found[3])


# Wan Animate 2: keys and values of the driving video


def driving(cache: Any) -> dict[str, Any]:
    """A call that encodes the driving video of one sample."""
    return {
        "hidden_states": list(latents(1, 4, STORED, 4, 6)),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": list(latents(1, 5, 12)),
        "condition_latents": list(latents(1, 3, STORED, 4, 6)),
        "kv_cache": cache,
        "kv_cache_mode": "extract",
        "seq_len": STORED * PLACES,
        "offset_grid_sizes": torch.tensor([[STORED, 2, 3]]),
    }


@torch.no_grad()
def test_the_driving_video_is_encoded_without_methods() -> None:
    model = wan_animate2()
    plain, cache = wan_animate2_cache(1), wan_animate2_cache(1)
    expected = outputs(model, driving(plain))
    tokdyn.wrap(model, [DepthSkip(blocks=(0, 1, 2)), DynamicWidth()])
    assert same(outputs(acting(model), driving(cache)), expected)
    for layer in range(3):
        assert same([*cache.get(layer).get()], [*plain.get(layer).get()])
    assert not tokdyn.traces(model)


@torch.no_grad()
@pytest.mark.parametrize(
    "methods",
    [[DepthSkip(table=((0.0, 0.4, (1,)), (0.4, 1.0, (2,))))], pytest.param([DynamicWidth()], marks=pytest.mark.slow)],
)
def test_samples_of_wan_animate2_read_their_own_driving_video(methods: list[Method]) -> None:
    model = acting(tokdyn.wrap(wan_animate2(), methods))
    call = {**wan_animate2_inputs(2), "timestep": torch.tensor([200.0, 800.0])}
    together = outputs(model, call)[0]
    second = {name: value[1:] if isinstance(value, (Tensor, list)) else value for name, value in call.items()}
    second["origin_area"], second["kv_cache"] = call["origin_area"], wan_animate2_cache(2)
    for layer in range(3):
        second["kv_cache"].get(layer).store(*(each[1:] for each in call["kv_cache"].get(layer).get()))
    torch.testing.assert_close(outputs(model, second)[0][0], together[1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_block_that_wan_animate2_leaves_out_itself_is_no_end() -> None:
    model = tokdyn.wrap(wan_animate2(layers=10), [FeatureCache()])
    with pytest.raises(InputError, match=r"leaves out block 9 .*WanAnimate2Transformer3DModel"):
        model(**wan_animate2_inputs(1, 10), is_uncondtion=True)


@torch.no_grad()
def test_a_later_step_of_wan_animate2_is_recognised() -> None:
    call = wan_animate2_inputs(1)
    model = tokdyn.wrap(wan_animate2(), [FeatureCache(threshold=1e9)])
    outputs(model, call)
    outputs(model, {**moved(call), "timestep": torch.tensor([450.0])})
    assert tokdyn.traces(model)[-1].cached == {0}


# AnyFlow FAR: keys and values of earlier frames


@torch.no_grad()
def test_the_cache_of_anyflow_far_is_filled_without_methods() -> None:
    call: dict[str, Any] = {**anyflow_far_inputs(1), "chunk_partition": [1]}
    model, stored = anyflow_far(), []
    for methods in ([], [DepthSkip(blocks=(1,)), FeatureCache(threshold=1e9)]):
        tokdyn.wrap(model, methods)
        cache = anyflow_far_cache(1)
        model(**{**call, "kv_cache": cache, "kv_cache_flag": {"num_cached_chunks": 0, "is_cache_step": True}})
        stored.append([cache[layer]["full_cache"] for layer in range(3)])
        assert not tokdyn.traces(model)
        tokdyn.unwrap(model)
    assert same(*stored)
    assert not torch.equal(stored[0][1], anyflow_far_cache(1)[1]["full_cache"])


@torch.no_grad()
def test_samples_of_anyflow_far_read_their_own_frames() -> None:
    """Also two of them, as many as keys and values."""
    model = tokdyn.wrap(anyflow_far(), [DepthSkip(table=((0.0, 0.4, (1,)), (0.4, 1.0, (2,))))])
    call = {**anyflow_far_inputs(2), "timestep": torch.tensor([[200.0], [800.0]])}
    together = outputs(model, call)[0]
    second = {name: value[1:] if isinstance(value, Tensor) else value for name, value in call.items()}
    cache = {
        layer: {name: each[:, 1:] for name, each in tensors.items()} for layer, tensors in call["kv_cache"].items()
    }
    torch.testing.assert_close(outputs(model, {**second, "kv_cache": cache})[0][0], together[1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_rollout_of_anyflow_far_without_a_cache_skips_blocks() -> None:
    call = {name: value for name, value in anyflow_far_inputs(1).items() if not name.startswith("kv_cache")}
    call |= {"hidden_states": latents(1, 2, 4, 8, 8)}
    call |= {name: torch.full((1, 2), value) for name, value in (("timestep", 500.0), ("r_timestep", 400.0))}
    model = tokdyn.wrap(anyflow_far(), [DepthSkip(blocks=(1,))])
    assert outputs(model, call)[0].isfinite().all()
    assert [block.block for block in tokdyn.traces(model)[-1].blocks] == [0, 2]
