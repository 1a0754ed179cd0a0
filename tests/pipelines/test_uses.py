"""What users do with pipelines: offload, LoRA, copies, files, other pipelines around one model, threads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from torch import Tensor, nn

import tokdyn
from tests.contract.models import TINY
from tests.contract.pipelines import build, images, prompts
from tests.pipelines.calls import quiet, seen
from tokdyn import Chunking, FeatureCache, TokenMerge

STACK = [FeatureCache(steps=(0, 2)), TokenMerge(ratio=0.5)]
CPU = torch.device("cpu")
WEIGHTS = "pytorch_lora_weights.safetensors"


def models(pipe: Any) -> list[nn.Module]:
    return [each for each in pipe.components.values() if isinstance(each, nn.Module)]


def offload(how: Callable[..., Any]) -> Callable[[Any], None]:
    def enable(pipe: Any) -> None:
        for model in models(pipe):
            how(model, execution_device=CPU)

    return enable


def group_offload(kind: str, **more: int) -> Callable[[Any], None]:
    return lambda pipe: pipe.enable_group_offload(onload_device=CPU, offload_type=kind, **more)


WAYS: dict[str, Callable[[Any], None]] = {
    "sequential": offload(cpu_offload),
    "model": offload(cpu_offload_with_hook),
    "leaf": group_offload("leaf_level"),
    "block": group_offload("block_level", num_blocks_per_group=2),
}


@pytest.mark.parametrize(("name", "way"), [*(("SD3", way) for way in WAYS), ("Wan", "model"), ("Wan", "block")])
def test_offloaded_pipelines_compute_the_same(name: str, way: str) -> None:
    pipe = build(name)
    plain = images(pipe, name)
    tokdyn.wrap(pipe, STACK)
    expected = images(pipe, name)
    WAYS[way](pipe)
    assert torch.equal(images(pipe, name), expected)
    assert torch.equal(images(pipe, name), expected)
    with tokdyn.disabled(pipe):
        assert torch.equal(images(pipe, name), plain)
    tokdyn.unwrap(pipe)
    assert torch.equal(images(pipe, name), plain)


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    """Folders with two LoRAs for the transformer of SD3."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    for seed in (1, 2):
        pipe = build("SD3")
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
        weights = get_peft_model_state_dict(pipe.transformer)
        generator = torch.Generator().manual_seed(seed)
        weights = {key: torch.randn(value.shape, generator=generator) for key, value in weights.items()}
        pipe.save_lora_weights(tmp_path / str(seed), transformer_lora_layers=weights)
    return [tmp_path / "1", tmp_path / "2"]


def test_loras_come_and_go(adapters: list[Path]) -> None:
    """Every state is that of a pipeline that was wrapped afterwards."""
    pipe = build("SD3")
    plain = images(pipe, "SD3")
    tokdyn.wrap(pipe, STACK)
    bare = images(pipe, "SD3")

    def reference(*folders: Path) -> Tensor:
        other = build("SD3")
        for place, folder in enumerate(folders):
            other.load_lora_weights(folder, weight_name=WEIGHTS, adapter_name=str(place))
        other.set_adapters([str(place) for place in range(len(folders))])
        return images(tokdyn.wrap(other, STACK), "SD3")

    first, second = reference(adapters[0]), reference(adapters[1])
    assert not torch.equal(first, second)
    pipe.load_lora_weights(adapters[0], weight_name=WEIGHTS, adapter_name="a")
    assert torch.equal(images(pipe, "SD3"), first)
    pipe.load_lora_weights(adapters[1], weight_name=WEIGHTS, adapter_name="a", hotswap=True)
    assert torch.equal(images(pipe, "SD3"), second)
    pipe.fuse_lora()
    assert torch.allclose(images(pipe, "SD3"), second, atol=1e-4)  # weights are rounded when they are added
    pipe.unfuse_lora()
    assert torch.allclose(images(pipe, "SD3"), second, atol=1e-4)
    pipe.unload_lora_weights()
    assert torch.allclose(images(pipe, "SD3"), bare, atol=1e-4)
    tokdyn.unwrap(pipe)
    assert torch.allclose(images(pipe, "SD3"), plain, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_adapters_are_mixed(adapters: list[Path]) -> None:
    pipe, other = tokdyn.wrap(build("SD3"), STACK), build("SD3")
    for each in (pipe, other):
        for name, folder in zip("ab", adapters, strict=True):
            each.load_lora_weights(folder, weight_name=WEIGHTS, adapter_name=name)
        each.set_adapters(["a", "b"], [0.5, 0.25])
    with tokdyn.disabled(pipe):
        assert torch.equal(images(pipe, "SD3"), images(other, "SD3"))
    mixed = images(pipe, "SD3")
    assert torch.equal(mixed, images(tokdyn.wrap(other, STACK), "SD3"))
    pipe.disable_lora()
    assert torch.equal(images(pipe, "SD3"), images(tokdyn.wrap(build("SD3"), STACK), "SD3"))
    pipe.enable_lora()
    assert torch.equal(images(pipe, "SD3"), mixed)


def test_a_copy_is_wrapped_and_tells_its_own_model() -> None:
    pipe = tokdyn.wrap(build("SD3"), STACK)
    expected, told = images(pipe, "SD3"), seen(pipe)
    twin = copy.deepcopy(pipe)
    assert twin.transformer is not pipe.transformer
    assert torch.equal(images(twin, "SD3"), expected)
    assert seen(twin) == told
    tokdyn.unwrap(twin)
    assert type(twin) is diffusers.StableDiffusion3Pipeline
    assert torch.equal(images(pipe, "SD3"), expected)


def test_a_saved_pipeline_has_no_methods(tmp_path: Path) -> None:
    plain = images(build("SD3"), "SD3")
    pipe = tokdyn.wrap(build("SD3"), [*STACK, Chunking(target=2)])
    expected = images(pipe, "SD3")
    pipe.save_pretrained(tmp_path / "pipeline")
    tokdyn.save(pipe, tmp_path / "methods")
    missing = {f"{kind}{place}": None for kind in ("text_encoder", "tokenizer") for place in ("", "_2", "_3")}
    again = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline", **missing))
    assert type(again) is diffusers.StableDiffusion3Pipeline
    assert torch.equal(images(again, "SD3"), plain)
    assert torch.equal(images(tokdyn.load(again, tmp_path / "methods"), "SD3"), expected)


def test_a_pipeline_changes_its_dtype() -> None:
    inputs = {key: value.double() for key, value in prompts(pooled=True).items()}
    expected = images(tokdyn.wrap(build("SD3").to(torch.float64), STACK), "SD3", **inputs)
    pipe = tokdyn.wrap(build("SD3"), STACK)
    single = images(pipe, "SD3")
    assert torch.equal(images(pipe.to(torch.float64), "SD3", **inputs), expected)
    assert torch.equal(images(pipe.to(torch.float32), "SD3"), single)


def image_to_image(pipe: Any) -> Tensor:
    given = {"image": torch.linspace(0, 1, 8 * 16).expand(1, 3, -1).unflatten(-1, (8, 16)), "strength": 0.6}
    made = pipe(**given, **prompts(pooled=True), num_inference_steps=5, output_type="np",
                generator=torch.Generator().manual_seed(3))[0]  # fmt: skip
    return torch.as_tensor(made).clone()


def test_the_pipeline_that_is_called_tells_a_shared_model() -> None:
    """One made by `from_pipe` is not wrapped; it shares the methods, and guesses unless it is wrapped with the same."""
    plain = image_to_image(quiet(diffusers.StableDiffusion3Img2ImgPipeline(**build("SD3").components)))
    pipe = tokdyn.wrap(build("SD3"), STACK)
    expected = images(pipe, "SD3")
    second = quiet(diffusers.AutoPipelineForImage2Image.from_pipe(pipe))
    assert type(second) is diffusers.StableDiffusion3Img2ImgPipeline
    assert second.transformer is pipe.transformer
    assert diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(pipe).transformer is pipe.transformer
    guessed = image_to_image(second)
    assert torch.equal(images(pipe, "SD3"), expected)
    with pytest.raises(tokdyn.InputError, match="wrapped already"):
        tokdyn.wrap(second, STACK[1:])
    tokdyn.wrap(second, STACK)
    with pytest.raises(tokdyn.InputError, match="wrapped already"):
        tokdyn.wrap(second, STACK)
    told = image_to_image(second)
    assert [(step, reused) for step, branch, reused in seen(second) if branch == "cond"] == [(0, 0), (1, 1), (2, 0)]
    assert torch.equal(told, guessed)
    assert torch.equal(images(pipe, "SD3"), expected)
    tokdyn.unwrap(second)
    assert torch.equal(image_to_image(second), plain)
    with pytest.raises(tokdyn.InputError, match="not wrapped"):
        tokdyn.stats(pipe)
    tokdyn.unwrap(pipe)
    assert type(pipe) is diffusers.StableDiffusion3Pipeline
    with pytest.raises(tokdyn.InputError, match="not wrapped"):
        tokdyn.unwrap(pipe)


def test_a_model_that_takes_the_place_of_a_wrapped_one_is_plain() -> None:
    plain = images(build("SD3"), "SD3")
    pipe = tokdyn.wrap(build("SD3"), STACK)
    before = pipe.transformer
    expected = images(pipe, "SD3")
    pipe.transformer = TINY["SD3Transformer2DModel"].build()
    assert torch.equal(images(pipe, "SD3"), plain)
    tokdyn.wrap(pipe, STACK)
    assert torch.equal(images(pipe, "SD3"), expected)
    tokdyn.unwrap(pipe)
    assert type(pipe) is diffusers.StableDiffusion3Pipeline
    pipe.transformer = before
    assert torch.equal(images(pipe, "SD3"), images(build("SD3"), "SD3")) is False


def test_a_call_after_a_failed_one_is_like_the_first() -> None:
    pipe = tokdyn.wrap(build("SD3"), STACK)
    expected = images(pipe, "SD3")
    with pytest.raises(RuntimeError):
        images(pipe, "SD3", prompt_embeds=torch.zeros(1, 6, 99), negative_prompt_embeds=torch.zeros(1, 6, 99))
    assert torch.equal(images(pipe, "SD3"), expected)
    assert {step for step, _, _ in seen(pipe)} == {0, 1, 2, 3}


def test_guidance_is_switched_on_and_off_between_calls() -> None:
    pipe = tokdyn.wrap(build("Flux"), STACK)
    guided, alone = images(pipe, "Flux"), images(pipe, "Flux", true_cfg_scale=1.0)
    assert not torch.equal(guided, alone)
    assert {branch for _, branch, _ in seen(pipe)} == {"cond"}
    assert torch.equal(images(pipe, "Flux"), guided)
    assert torch.equal(images(pipe, "Flux", true_cfg_scale=1.0), alone)


def test_pipelines_run_at_once() -> None:
    names = ("SD3", "SD3", "Flux")
    pipes = [tokdyn.wrap(build(name), STACK) for name in names]
    expected = [images(pipe, name) for pipe, name in zip(pipes, names, strict=True)]
    made: list[list[Tensor]] = [[] for _ in names]

    def run(place: int) -> None:
        made[place].extend(images(pipes[place], names[place]) for _ in range(2))

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each, wanted in zip(made, expected, strict=True):
        assert len(each) == 2
        assert all(torch.equal(image, wanted) for image in each)


def test_a_picture_that_a_callback_draws_leaves_the_outer_trajectory_as_it_is() -> None:
    """With the same transformer and a scheduler of its own."""
    methods = [FeatureCache(steps=(0, 3))]
    pipe, other = tokdyn.wrap(build("SD3"), methods), build("SD3")
    other.register_modules(transformer=pipe.transformer)
    tokdyn.wrap(other, methods)
    alone, expected = images(other, "SD3", 2), images(pipe, "SD3")
    statistics = [(call.step, call.branch, call.reused) for call in tokdyn.stats(pipe).calls]
    drawn = []

    def draw(_: Any, step: int, *rest: Any) -> dict[str, Any]:
        drawn.append(images(other, "SD3", 2))
        return {}

    assert torch.equal(images(pipe, "SD3", callback_on_step_end=draw), expected)
    assert len(drawn) == 4
    assert all(torch.equal(each, alone) for each in drawn)
    assert [(call.step, call.branch, call.reused) for call in tokdyn.stats(pipe).calls] == statistics
    with tokdyn.trajectory(pipe.transformer):  # around a call; it has the statistics of the call
        images(pipe, "SD3")
    assert [(call.step, call.branch, call.reused) for call in tokdyn.stats(pipe).calls] == statistics
