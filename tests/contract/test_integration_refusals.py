"""What does not go together with fewer tokens, or is no model, is refused in one sentence that says what to do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import tokdyn
from tests.contract.ecosystem import FEW, equip, predict
from tests.contract.models import TINY, works
from tests.contract.pipelines import build
from tests.contract.widths import blocks_of
from tokdyn.adapters import ADAPTERS
from tokdyn.errors import InputError, UnsupportedModelError
from tokdyn.methods import Chunking, DepthSkip, FeatureCache, TokenDrop, TokenMerge

REDUCING = [[TokenMerge(ratio=0.5)], [Chunking(target=2)]]
ARGUMENTS = [
    (name, argument, stacks)
    for adapter in ADAPTERS
    for name in adapter.classes
    if name in TINY
    for arguments, stacks in (
        (adapter.refuse, REDUCING),
        (adapter.refuse_always, [*REDUCING, [FeatureCache(threshold=0.1)], [DepthSkip(blocks=(1,))]]),
    )
    for argument in arguments
]


def value_of(argument: str) -> Any:
    """Something that is not empty."""
    if argument.endswith("attention_kwargs"):
        return {"ip_adapter_image_embeds": [torch.zeros(2, 1, 4)]}
    return [torch.zeros(2, 20, 32)]


@pytest.mark.parametrize(("name", "argument", "stacks"), ARGUMENTS)
def test_arguments_that_do_not_go_with_methods(name: str, argument: str, stacks: list[list[Any]]) -> None:
    """ControlNet residuals and image prompts with fewer tokens, caches of keys: refused before anything is computed."""
    for methods in (each for each in stacks if works(name, each)):
        model = equip(TINY[name].build(), methods)
        ran: list[int] = []
        blocks_of(model)[0].register_forward_hook(lambda *_, ran=ran: ran.append(1))
        with pytest.raises(InputError, match=rf"\b{argument}\b.*\b{name}\b.+\.$"):
            model(**{**TINY[name].inputs(2), argument: value_of(argument)})
        assert not ran
        assert not tokdyn.stats(model).calls


def test_control_residuals_are_welcome_where_all_tokens_are_there() -> None:
    name = "FluxTransformer2DModel"
    residuals = [torch.randn(2, 20, 32) for _ in range(2)]
    plain, control = TINY[name].build(), {"controlnet_block_samples": residuals}
    with torch.no_grad():
        expected = plain(**TINY[name].inputs(2), **control).sample
        model = equip(TINY[name].build(), [DepthSkip(blocks=(3,)), FeatureCache(threshold=0.1)])
        with tokdyn.disabled(model):
            assert torch.equal(model(**TINY[name].inputs(2), **control).sample, expected)
        assert not torch.equal(model(**TINY[name].inputs(2), **control).sample, predict(model, name))
        assert torch.equal(tokdyn.unwrap(model)(**TINY[name].inputs(2), **control).sample, expected)


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "FluxTransformer2DModel", "QwenImageTransformer2DModel"])
def test_tokens_that_are_split_over_devices(name: str) -> None:
    """The hooks of context parallelism, put on without a process group, which they need only when called."""
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel

    refused = {
        "TokenMerge": [TokenMerge()],
        "Chunking": [Chunking(target=2)],
        "TokenDrop": [TokenDrop()],
        "FeatureCache": [FeatureCache(rule="seacache")],
    }
    for method, methods in refused.items():
        words = f"^{method} .*{name} "
        early = TINY[name].build()
        apply_context_parallel(early, ContextParallelConfig(ulysses_degree=2), early._cp_plan)
        with pytest.raises(InputError, match=words):
            tokdyn.wrap(early, methods)
        assert not hasattr(early, "tokdyn")
        late = equip(TINY[name].build(), methods)
        apply_context_parallel(late, ContextParallelConfig(ulysses_degree=2), late._cp_plan)
        with pytest.raises(InputError, match=words):
            predict(late, name)
        configured = equip(TINY[name].build(), methods)
        configured._parallel_config = SimpleNamespace(context_parallel_config=ContextParallelConfig(ulysses_degree=2))
        with pytest.raises(InputError, match=words):
            predict(configured, name)
    allowed = TINY[name].build()
    apply_context_parallel(allowed, ContextParallelConfig(ulysses_degree=2), allowed._cp_plan)
    tokdyn.wrap(allowed, [DepthSkip(blocks=(1,)), FeatureCache(threshold=0.1)])


def test_containers_are_refused_and_looked_through() -> None:
    model = equip(TINY["DiT"].build(), [TokenMerge(), DepthSkip(blocks=(1,))])
    plain = TINY["DiT"].build()
    for make, path, then in (
        (torch.compile, "_orig_mod", "torch.compile"),
        (nn.DataParallel, "module", "DistributedDataParallel"),
        (AveragedModel, "module", "AveragedModel"),
    ):
        kind = type(make(plain)).__name__
        with pytest.raises(UnsupportedModelError, match=rf"^{kind} .*tokdyn\.wrap.*model\.{path}, then {then} "):
            tokdyn.wrap(make(plain), [TokenMerge()])
        outside = make(model)
        assert tokdyn.losses(outside) == {}
        with pytest.raises(InputError, match=kind):
            tokdyn.unwrap(outside)
    assert issubclass(DistributedDataParallel, nn.Module)  # two processes try it, in test_integration_parallel.py
    with tokdyn.disabled(torch.compile(model)):
        assert torch.equal(predict(model, "DiT"), predict(plain, "DiT"))
    assert not torch.equal(predict(model, "DiT"), predict(plain, "DiT"))
    with pytest.raises(InputError, match="AveragedModel"):
        tokdyn.stats(AveragedModel(plain))


def test_what_is_about_one_model_takes_no_pipeline() -> None:
    pipe = build("Wan")
    for action in (tokdyn.traces, tokdyn.parts, tokdyn.losses):
        with pytest.raises(UnsupportedModelError, match=r"^WanPipeline .*pipe\.transformer\.$"):
            action(pipe)
    pipe.register_modules(transformer_2=TINY["WanTransformer3DModel"].build())
    with pytest.raises(UnsupportedModelError, match=r"pipe\.transformer or pipe\.transformer_2\.$"):
        tokdyn.traces(pipe)
    for thing in (None, "facebook/DiT-XL-2-256", {"model": pipe}, TINY["DiT"].build().state_dict()):
        with pytest.raises(UnsupportedModelError, match=rf"^{type(thing).__name__} .*torch\.nn\.Module\.$"):
            tokdyn.wrap(thing, [TokenMerge()])  # type: ignore[type-var]


@pytest.mark.parametrize("name", FEW)
def test_a_refusal_changes_nothing(name: str) -> None:
    model = TINY[name].build()
    classes = [type(part) for part in model.modules()]
    with pytest.raises(tokdyn.CompositionError):
        tokdyn.wrap(model, [TokenMerge(), TokenMerge(ratio=0.2)])
    with pytest.raises(InputError, match=r"'TokenMerge'.*tokdyn\.TokenMerge\("):
        tokdyn.wrap(model, ["TokenMerge"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="block 9 "):
        tokdyn.wrap(model, [DepthSkip(blocks=(9,))])
    assert [type(part) for part in model.modules()] == classes
    assert not hasattr(model, "tokdyn")
    equip(model, [TokenMerge()])
    with pytest.raises(InputError, match=r"tokdyn\.unwrap"):
        tokdyn.wrap(model, [DepthSkip()])
    assert torch.equal(predict(tokdyn.unwrap(model), name), predict(TINY[name].build(), name))


def test_blocks_that_a_call_leaves_out_are_not_those_where_methods_begin_or_end() -> None:
    name = "SD3Transformer2DModel"
    model = equip(TINY[name].build(), [FeatureCache(threshold=0.1)])
    with pytest.raises(InputError, match=r"^skip_layers .*block 0.* SD3Transformer2D"):
        model(**TINY[name].inputs(2), skip_layers=[0])
    model = equip(TINY[name].build(), [DepthSkip(blocks=(1,)), TokenMerge(ratio=0.5)])
    out = model(**TINY[name].inputs(2), skip_layers=[0])[0]
    assert torch.isfinite(out).all()
    assert tokdyn.stats(model).calls[-1].blocks == tuple(range(2, len(blocks_of(model))))


@pytest.mark.parametrize("indicator", ["input", "first_block"])
@torch.no_grad()
def test_blocks_where_a_cache_that_never_acts_begins_or_ends_may_be_left_out(indicator: str) -> None:
    name = "SD3Transformer2DModel"
    last = len(blocks_of(TINY[name].build())) - 1
    for left_out in ([0], [last]):
        plain = TINY[name].build()(**TINY[name].inputs(2), skip_layers=left_out)[0]
        model = equip(TINY[name].build(), [FeatureCache(threshold=-1.0, indicator=indicator)])
        assert torch.equal(model(**TINY[name].inputs(2), skip_layers=left_out)[0], plain)
