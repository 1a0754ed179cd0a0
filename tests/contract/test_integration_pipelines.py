"""Pipelines of diffusers with a wrapped model: run twice, with guidance, with other samplers, several at once."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import diffusers
import pytest
import torch

import tokdyn
from tests.contract.ecosystem import equip
from tests.contract.models import TINY
from tests.contract.pipelines import PIPES, build, images
from tests.contract.widths import blocks_of
from tokdyn.attach import argument_names
from tokdyn.methods import Chunking, DepthSkip, FeatureCache, TokenMerge

CACHED = [FeatureCache(steps=(0, 2)), TokenMerge(ratio=0.5), DepthSkip(blocks=(2,))]
THRESHOLD = [FeatureCache(threshold=0.3), Chunking(target=2), TokenMerge(ratio=0.3)]
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 2.0}


def multistep(config: Any) -> Any:
    """UniPC where it takes the noise levels that a pipeline chooses, as it does from diffusers 0.37 on."""
    if "sigmas" in inspect.signature(diffusers.UniPCMultistepScheduler.set_timesteps).parameters:
        return diffusers.UniPCMultistepScheduler(**UNIPC)
    return diffusers.FlowMatchEulerDiscreteScheduler.from_config(config, use_exponential_sigmas=True)


OTHERS: dict[str, Any] = {
    "DiT": diffusers.DPMSolverMultistepScheduler.from_config,
    "PixArt": diffusers.EulerDiscreteScheduler.from_config,
    "SD3": diffusers.FlowMatchHeunDiscreteScheduler.from_config,  # calls the model twice at a level
    "Z-Image": lambda config: diffusers.FlowMatchEulerDiscreteScheduler.from_config(config, shift=5.0),
    "Wan": lambda config: diffusers.UniPCMultistepScheduler(**UNIPC),
    "Flux": multistep,
    "LTX": multistep,
}
every = pytest.mark.parametrize("name", PIPES)


@contextmanager
def noted_calls(model: Any) -> Iterator[list[dict[str, Any]]]:
    """The arguments of the calls of a model, by name."""
    calls: list[dict[str, Any]] = []
    names = argument_names(model)
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append({**dict(zip(names, args, strict=False)), **kwargs}), with_kwargs=True
    )
    yield calls
    hook.remove()


def call_later(model: Any, name: str, call: dict[str, Any], steps: int) -> None:
    """Call a model as some steps after a call: at a lower noise level, with latents that have moved a little."""
    clock = TINY[type(model).__name__].clock
    assert clock is not None
    level, noise, image = clock
    main = next(iter(call))
    x = call[main]
    moved = [0.98**steps * each for each in x] if isinstance(x, list) else 0.98**steps * x
    branch = PIPES[name].branches[-1]
    with nullcontext() if branch is None else model.cache_context(branch), torch.no_grad():
        model(**{**call, main: moved, level: call[level] - round(0.01 * (noise - image), 2) * steps})


@every
@pytest.mark.parametrize("methods", [CACHED, THRESHOLD], ids=["cached", "threshold"])
def test_it_runs_twice_and_forgets_in_between(name: str, methods: list[Any]) -> None:
    pipe = build(name)
    plain = images(pipe, name)
    model = equip(pipe.transformer, methods)
    with noted_calls(model) as calls:
        first = images(pipe, name)
    for steps in range(1, 4):
        call_later(model, name, calls[-1], steps)
    reused = [bool(call.cached) for call in tokdyn.traces(model)]
    assert not reused[0]
    assert methods is THRESHOLD or reused == [False, True, False]  # of a trajectory of their own
    assert torch.equal(images(pipe, name), first)
    assert first.isfinite().all()
    assert not torch.equal(first, plain)
    with tokdyn.disabled(pipe.transformer):
        assert torch.equal(images(pipe, name), plain)
    assert torch.equal(images(pipe, name), first)
    tokdyn.unwrap(pipe.transformer)
    assert torch.equal(images(pipe, name), plain)


@every
def test_every_branch_of_guidance_has_a_cache_of_its_own(name: str) -> None:
    """Steps 0 and 2 of every branch are computed; names come from the pipeline where it calls each branch."""
    pipe = build(name)
    model = equip(pipe.transformer, CACHED)
    ran: list[int] = []
    blocks_of(model)[0].register_forward_hook(lambda *_: ran.append(1))
    images(pipe, name)
    names, calls = PIPES[name].branches, tokdyn.traces(model)
    assert [call.branch for call in calls] == list(names) * 4
    assert [len(call.cached) == call.batch for call in calls] == [step in (1, 3) for step in range(4) for _ in names]
    assert len(ran) == 2 * len(names)


@every
def test_the_number_of_steps_and_the_sampler_may_change(name: str) -> None:
    pipe = build(name)
    equip(pipe.transformer, THRESHOLD)
    first, more = images(pipe, name), images(pipe, name, steps=6)
    assert torch.equal(images(pipe, name), first)
    assert torch.equal(images(pipe, name, steps=6), more)
    before = pipe.scheduler
    pipe.scheduler = OTHERS[name](before.config)
    other = images(pipe, name)
    assert other.isfinite().all()
    assert not torch.equal(other, first)
    assert torch.equal(images(pipe, name), other)
    pipe.scheduler = before
    assert torch.equal(images(pipe, name), first)


@pytest.mark.parametrize("name", ["SD3", "Flux", "Wan"])
def test_callbacks_read_statistics_and_interrupt(name: str) -> None:
    pipe = build(name)
    equip(pipe.transformer, [Chunking(target=2), DepthSkip(blocks=(1,))])
    expected = images(pipe, name)
    seen: list[int] = []

    def note(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        calls = tokdyn.stats(pipeline.transformer).calls
        seen.append(len(calls))
        assert calls[-1].blocks == (0, 2, 3)
        assert set(calls[-1].kept) == {round(calls[-1].cells / 2)}
        return values

    assert torch.equal(images(pipe, name, callback_on_step_end=note), expected)
    calls = len(PIPES[name].branches)
    assert seen == [calls, 2 * calls, 3 * calls, 4 * calls]

    def stop(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipeline._interrupt = True
        return values

    images(pipe, name, callback_on_step_end=stop)
    assert torch.equal(images(pipe, name), expected)


def test_budgets_of_guidance_branches_reach_the_calls() -> None:
    """Lite-CFG through pipelines: two calls by name in Flux, halves of a batch in SD3, the unconditional one first."""
    kept: list[Any] = []

    def note(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        kept.append([call.kept for call in tokdyn.stats(pipeline.transformer).calls])
        return values

    for name in ("Flux", "SD3"):
        pipe = build(name)
        equip(pipe.transformer, [Chunking(target=2)])
        tokdyn.set_tail_drop(pipe.transformer, {"cond": 0.0, "uncond": 0.5})
        images(pipe, name, steps=2, callback_on_step_end=note)
    flux, halves = kept[1], kept[3]
    assert flux == [(48,), (24,)] * 2
    assert halves == [(8,), (16,)] * 2


@pytest.mark.parametrize("name", ["Flux", "DiT"])
def test_a_trajectory_that_was_broken_off_leaves_nothing_behind(name: str) -> None:
    pipe = build(name)
    model = equip(pipe.transformer, [FeatureCache(steps=(0,))])
    expected = images(pipe, name)

    def breaking(*_: Any) -> None:
        raise KeyboardInterrupt

    for step in range(3):
        handle = blocks_of(model)[1].register_forward_pre_hook(breaking)
        with pytest.raises(KeyboardInterrupt):
            images(pipe, name, steps=4 + step)
        handle.remove()
        assert torch.equal(images(pipe, name), expected)


def test_a_pipeline_that_names_its_branches_may_be_broken_off_between_two_calls() -> None:
    """The first level again, under a name that was there: the next trajectory begins."""
    name = "Flux"
    pipe = build(name)
    equip(pipe.transformer, [FeatureCache(steps=(0,))])
    expected = images(pipe, name)

    def breaking(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        images(pipe, name, prompt_embeds=torch.ones(1, 6, 12), callback_on_step_end=breaking)
    assert torch.equal(images(pipe, name), expected)


def test_two_pipelines_of_one_class_have_methods_of_their_own() -> None:
    name = "Flux"
    pipes = [build(name) for _ in range(3)]
    plain = images(pipes[2], name)
    equip(pipes[0].transformer, CACHED)
    equip(pipes[1].transformer, THRESHOLD)
    alone = [images(pipe, name) for pipe in pipes]
    assert torch.equal(alone[2], plain)
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        found[number] = images(pipes[number], name)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], alone[number]) for number in range(3))

    def between(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:  # a whole trajectory of the other in the middle of this one
            assert torch.equal(images(pipes[1], name), alone[1])
        return values

    assert torch.equal(images(pipes[0], name, callback_on_step_end=between), alone[0])


def test_pipelines_find_hooks_lora_and_files_as_before(tmp_path: Any) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    name = "Flux"
    donor = build(name).transformer
    torch.manual_seed(1)
    donor.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    weights = {f"transformer.{key}": value for key, value in get_peft_model_state_dict(donor).items()}
    pipe = build(name)
    equip(pipe.transformer, CACHED)
    expected = images(pipe, name)
    pipe.load_lora_weights(weights, adapter_name="style")
    styled = images(pipe, name)
    assert not torch.equal(styled, expected)
    pipe.set_adapters("style", 0.0)
    torch.testing.assert_close(images(pipe, name), expected, rtol=0, atol=1e-6)
    pipe.unload_lora_weights()
    assert torch.equal(images(pipe, name), expected)
    pipe.save_pretrained(tmp_path)
    empty = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_encoder", "feature_extractor")
    again = diffusers.FluxPipeline.from_pretrained(tmp_path, **dict.fromkeys(empty))
    again.set_progress_bar_config(disable=True)
    assert not hasattr(again.transformer, "tokdyn")
    equip(again.transformer, CACHED)
    assert torch.equal(images(again, name), expected)
