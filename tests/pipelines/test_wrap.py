"""Wrapped pipelines: every denoiser is found, and the pipeline says where a trajectory is."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch

import tokdyn
from tests.contract.coverage_images import bria
from tests.contract.models import TINY
from tests.contract.pipelines import PIPES, build, flux, images, prompts, sd3, vae, wan
from tests.contract.test_integration_pipelines import OTHERS
from tests.contract.test_trajectories import other
from tokdyn import Chunking, DepthSkip, FeatureCache, TokenMerge

LISTED = [FeatureCache(steps=(0, 2)), TokenMerge(ratio=0.5)]
ALWAYS = [FeatureCache(threshold=1e9)]  # reuses every step but the first and, where their number is known, the last
every = pytest.mark.parametrize("name", PIPES)


def reused(pipe: Any) -> dict[int, bool]:
    """For each step whether its calls were reused, which all of them are or none."""
    found: dict[int, set[bool]] = {}
    for call in tokdyn.stats(pipe).calls:
        found.setdefault(call.step, set()).add(bool(call.reused))
    assert all(len(each) == 1 for each in found.values())
    return {step: each.pop() for step, each in found.items()}


@every
def test_a_pipeline_is_wrapped_in_place_and_unwrapped_exactly(name: str) -> None:
    pipe = build(name)
    kind, plain = type(pipe), images(pipe, name)
    assert tokdyn.wrap(pipe, LISTED) is pipe
    assert isinstance(pipe, kind)
    assert (type(pipe).__name__, type(pipe).__module__) == (kind.__name__, kind.__module__)
    assert inspect.signature(pipe.__call__) == inspect.signature(kind.__call__.__get__(pipe))
    first = images(pipe, name)
    assert not torch.equal(first, plain)
    assert torch.equal(images(pipe, name), first)
    with tokdyn.disabled(pipe):
        assert torch.equal(images(pipe, name), plain)
    assert tokdyn.unwrap(pipe) is pipe
    assert type(pipe) is kind
    assert torch.equal(images(pipe, name), plain)


@every
@pytest.mark.parametrize("sampler", ["own", "other"])
def test_every_timestep_is_a_step_and_the_last_is_computed(name: str, sampler: str) -> None:
    """Also with two calls of the model at one noise level, and in a second call with another number of steps."""
    pipe = tokdyn.wrap(build(name), ALWAYS)
    if sampler == "other":
        pipe.scheduler = OTHERS[name](pipe.scheduler.config)
    kind = type(pipe.scheduler)
    for steps in (5, 3):
        images(pipe, name, steps)
        assert type(pipe.scheduler) is kind
        last = len(pipe.scheduler.timesteps) - 1
        assert last >= steps - 1
        assert reused(pipe) == {step: 0 < step < last for step in range(last + 1)}
        assert {call.branch for call in tokdyn.stats(pipe).calls} == {"cond", "uncond"}


def test_steps_are_counted_where_image_to_image_begins() -> None:
    """At strength 0.6 three of 5 steps are left, of which the last is computed, whatever the settings say."""
    whole = flux()
    pipe = diffusers.FluxImg2ImgPipeline(
        **{**whole.components, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    )
    pipe.set_progress_bar_config(disable=True)
    tokdyn.wrap(pipe, [FeatureCache(threshold=1e9, num_steps=5)])
    given = {key: value for key, value in prompts(pooled=True).items() if not key.startswith("negative")}
    size = {"height": 16, "width": 24, "output_type": "np"}
    pipe(image=torch.rand(1, 3, 16, 24), strength=0.6, num_inference_steps=5, **size, **given)
    assert reused(pipe) == {0: False, 1: True, 2: False}


@pytest.mark.parametrize("name", ["Flux", "SD3", "Wan"])
def test_a_callback_that_raises_leaves_nothing_behind(name: str) -> None:
    pipe = tokdyn.wrap(build(name), [FeatureCache(steps=(0, 3))])
    expected = images(pipe, name)
    kind = type(pipe.scheduler)

    def stop(pipe: Any, step: int, *_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        images(pipe, name, callback_on_step_end=stop)
    assert type(pipe.scheduler) is kind
    assert torch.equal(images(pipe, name), expected)


def test_arguments_of_the_scheduler_are_still_seen() -> None:
    """Pipelines ask which arguments a scheduler takes: with eta = 1 DDIM draws noise, without it none."""
    pipe = build("PixArt")
    plain, noisy = images(pipe, "PixArt"), images(pipe, "PixArt", eta=1.0)
    assert not torch.equal(plain, noisy)
    tokdyn.wrap(pipe, [DepthSkip()])
    assert torch.equal(images(pipe, "PixArt", eta=1.0), noisy)


def experts() -> Any:
    """A Wan pipeline whose first steps are made by one model and the others by a second."""
    pipe = wan()
    torch.manual_seed(1)
    pipe.register_modules(transformer_2=TINY["WanTransformer3DModel"].build())
    pipe.register_to_config(boundary_ratio=0.8)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Series(diffusers.DiffusionPipeline):
    """Makes several images after one call of `set_timesteps`, beside which a copy of the scheduler steps, too."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, images: int, steps: int) -> None:
        self.scheduler.set_timesteps(steps)
        beside, inputs = copy.deepcopy(self.scheduler), TINY["DiTTransformer2DModel"].inputs(1)
        self.kept = [beside, copy.copy(beside), type(self.scheduler).from_config(self.scheduler.config)]
        for seed in range(images):
            x = other(inputs["hidden_states"], seed)
            for timestep in self.scheduler.timesteps:
                out = self.transformer(**{**inputs, "hidden_states": x, "timestep": timestep[None]}).sample[:, :4]
                beside.step(out, timestep, x)
                x = self.scheduler.step(out, timestep, x).prev_sample


def test_a_trajectory_ends_with_its_last_step() -> None:
    pipe = Series(TINY["DiTTransformer2DModel"].build(), diffusers.DDIMScheduler())
    tokdyn.wrap(pipe, ALWAYS)
    with noted_cached(pipe.transformer) as cached:
        pipe(images=3, steps=4)
    assert cached == [False, True, True, False] * 3
    assert list(reused(pipe)) == [0, 1, 2, 3]
    assert all(type(each) is diffusers.DDIMScheduler for each in pipe.kept)  # not merely equal to it
    pickle.dumps(pipe.kept)


@contextmanager
def noted_cached(model: Any) -> Iterator[list[bool]]:
    """Whether each call of a wrapped model was reused."""
    cached: list[bool] = []
    hook = model.register_forward_hook(lambda *_: cached.append(not ran.pop() if ran else True))
    ran: list[bool] = []
    inside = model.transformer_blocks[1].register_forward_hook(lambda *_: ran.append(True))
    yield cached
    hook.remove()
    inside.remove()


def test_both_experts_are_wrapped_and_share_the_steps() -> None:
    pipe = tokdyn.wrap(experts(), ALWAYS)
    images(pipe, "Wan", 6)
    seen = [{call.step for call in tokdyn.stats(model).calls} for model in (pipe.transformer, pipe.transformer_2)]
    assert all(seen)
    assert not seen[0] & seen[1]
    found = reused(pipe)
    assert list(found) == [0, 1, 2, 3, 4, 5]
    assert not found[0]
    assert not found[min(seen[1])]  # the first step of the second expert
    assert not found[5]
    assert sum(found.values()) == 3


def test_statistics_are_those_of_the_last_call_also_if_one_expert_had_no_part_in_it() -> None:
    pipe = tokdyn.wrap(experts(), ALWAYS)
    images(pipe, "Wan", 6)
    images(pipe, "Wan", 1)  # high noise alone
    assert [call.step for call in tokdyn.stats(pipe).calls] == [0, 0]
    assert tokdyn.stats(pipe).pipeline_seconds


def test_each_expert_may_have_methods_of_its_own(tmp_path: Any) -> None:
    pipe = tokdyn.wrap(experts(), {"transformer_2": [Chunking(target=2)]})
    assert [method.target for method, _ in tokdyn.parts(pipe.transformer_2)] == [2]
    with pytest.raises(tokdyn.InputError, match="not wrapped"):
        tokdyn.stats(pipe.transformer)
    expected = images(pipe, "Wan")
    tokdyn.set_tail_drop(pipe, 0.5)
    assert not torch.equal(images(pipe, "Wan"), expected)
    tokdyn.set_tail_drop(pipe, None)
    folder = tokdyn.save(pipe, tmp_path / "methods")
    again = tokdyn.load(experts(), folder)
    assert torch.equal(images(again, "Wan"), expected)
    tokdyn.unwrap(again)
    with pytest.raises(tokdyn.InputError, match="not wrapped"):
        tokdyn.stats(again)


def test_methods_saved_from_a_model_load_into_its_pipeline(tmp_path: Any) -> None:
    pipe = tokdyn.wrap(build("SD3"), LISTED)
    expected = images(pipe, "SD3")
    again = tokdyn.load(build("SD3"), tokdyn.save(pipe.transformer, tmp_path))
    assert torch.equal(images(again, "SD3"), expected)
    with pytest.raises(tokdyn.CheckpointError, match="no methods"):
        tokdyn.load(build("SD3"), tmp_path / "nowhere")


def test_saving_replaces_the_methods_of_other_denoisers_and_of_a_model(tmp_path: Any) -> None:
    pipe = tokdyn.wrap(experts(), [*ALWAYS, Chunking()])
    tokdyn.save(pipe, tmp_path)
    tokdyn.wrap(tokdyn.unwrap(pipe), {"transformer": [DepthSkip(blocks=(1,))]})
    tokdyn.save(pipe, tmp_path)
    tokdyn.load(tokdyn.unwrap(pipe), tmp_path)
    with pytest.raises(tokdyn.InputError, match="not wrapped"):
        tokdyn.stats(pipe.transformer_2)
    one = build("SD3")
    tokdyn.save(tokdyn.wrap(one.transformer, ALWAYS), tmp_path)
    tokdyn.unwrap(one.transformer)
    tokdyn.save(tokdyn.wrap(one, [DepthSkip(blocks=(1,))]), tmp_path)
    tokdyn.load(tokdyn.unwrap(one), tmp_path)
    assert [method for method, _ in tokdyn.parts(one.transformer)] == [DepthSkip(blocks=(1,))]


@pytest.mark.parametrize("methods", ["FeatureCache", None, {}, {"transformer": None}])
def test_methods_that_are_no_list_are_refused(methods: Any) -> None:
    pipe = build("SD3")
    with pytest.raises(tokdyn.InputError, match=r"is not a list of methods|no denoiser is named"):
        tokdyn.wrap(pipe, methods)
    assert not tokdyn.pipelines.is_wrapped(pipe)


@pytest.mark.parametrize("methods", [FeatureCache(), {"transformer": FeatureCache()}])
def test_a_method_is_as_good_as_a_list_of_it(methods: Any) -> None:
    pipe = tokdyn.wrap(build("SD3"), methods)
    assert [method for method, _ in tokdyn.parts(pipe.transformer)] == [FeatureCache()]
    model = tokdyn.wrap(build("SD3").transformer, FeatureCache())
    assert [method for method, _ in tokdyn.parts(model)] == [FeatureCache()]


def test_what_cannot_be_wrapped_is_refused_and_nothing_is_wrapped() -> None:
    pipe = experts()
    kind = type(pipe)
    for methods, match in (
        ({"transformer_3": ALWAYS}, "transformer_3"),
        ({"transformer": ALWAYS, "transformer_2": [DepthSkip(blocks=(99,))]}, "99"),
    ):
        with pytest.raises(tokdyn.InputError, match=match):
            tokdyn.wrap(pipe, methods)
        assert type(pipe) is kind
        with pytest.raises(tokdyn.InputError, match="not wrapped"):
            tokdyn.stats(pipe.transformer)
    unet = diffusers.UNet2DModel(
        block_out_channels=(4, 8), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=2, sample_size=8,
    )  # fmt: skip
    with pytest.raises(tokdyn.UnsupportedModelError, match="unet"):
        tokdyn.wrap(diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()), ALWAYS)
    with pytest.raises(tokdyn.InputError, match="pipelines"):
        tokdyn.wrap(sd3().transformer, {"transformer": ALWAYS})


def test_a_pipeline_may_compare_the_class_of_its_scheduler() -> None:
    """Bria's asks another scheduler than the one of its class to scale its latents."""
    text = torch.randn(1, 6, 12, generator=torch.Generator().manual_seed(1))
    pipe = diffusers.BriaPipeline(
        transformer=bria(in_channels=16),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(), text_encoder=None, tokenizer=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        return pipe(
            prompt_embeds=text, negative_prompt_embeds=-text, generator=torch.Generator().manual_seed(0), height=16,
            width=32, num_inference_steps=3, output_type="latent", return_dict=False,
        )[0]  # fmt: skip

    plain = draw()
    assert torch.equal(tokdyn.wrap(pipe, [FeatureCache(threshold=-1.0)]) and draw(), plain)
    assert [step.step for step in tokdyn.stats(pipe).steps] == [0, 1, 2]
