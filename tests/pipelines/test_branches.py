"""Which branch of guidance each call, or part of a batch, is; and attention that treats the parts differently."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0
from torch import nn

import tokdyn
from tests.contract.models import TINY
from tests.contract.pipelines import PIPES, build, images
from tests.pipelines.calls import PAG, branches, kept, pixart_pag, sd3_pag, seen, two_images
from tokdyn import Chunking, DepthSkip, FeatureCache, TokenMerge
from tokdyn.adapters import adapter_for
from tokdyn.adapters.coupling import check_groups, coupled_parts, together

LITE = {"cond": 0.0, "uncond": 0.9}
SKIPPED: dict[str, Any] = {
    "skip_guidance_layers": [1],
    "skip_layer_guidance_stop": 0.9,
    "skip_layer_guidance_scale": 2.0,
}


def without_guidance(name: str) -> dict[str, float]:
    return {"Flux": {"true_cfg_scale": 1.0}, "Z-Image": {"guidance_scale": 0.0}}.get(name, {"guidance_scale": 1.0})


@pytest.mark.parametrize("name", PIPES)
def test_budgets_are_those_of_the_branches_with_and_without_guidance(name: str) -> None:
    """Without guidance there is one branch, also where the number of images is even."""
    pipe = tokdyn.wrap(build(name), [Chunking(target=2)])
    tokdyn.set_tail_drop(pipe, LITE)
    images(pipe, name, 2)
    both = kept(pipe)
    assert set(both) == {"cond", "uncond"}
    assert min(both["cond"]) > max(both["uncond"])
    images(pipe, name, 2, **without_guidance(name))
    assert kept(pipe) == {"cond": both["cond"]}
    assert branches(pipe) == {0: ("cond",), 1: ("cond",)}


def test_two_images_in_one_call_are_not_two_branches() -> None:
    pipe = tokdyn.wrap(build("PixArt"), [Chunking(target=2)])
    tokdyn.set_tail_drop(pipe, LITE)
    images(pipe, "PixArt", 2, num_images_per_prompt=2, guidance_scale=1.0)
    assert kept(pipe) == {"cond": (16, 16)}
    images(pipe, "PixArt", 2, num_images_per_prompt=2)
    assert kept(pipe) == {"cond": (16, 16), "uncond": (2, 2)}


@pytest.mark.parametrize("name", ["PixArt", "DiT"])
def test_two_pictures_from_equal_noise_are_not_two_branches(name: str) -> None:
    """These pipelines tell in no property whether they guide; their first batch has two equal halves either way."""
    pipe = tokdyn.wrap(build(name), [Chunking(target=2)])
    two = {"num_images_per_prompt": 2} if name == "PixArt" else {"class_labels": [1, 2]}
    for scale, expected in ((1.0, ("cond",)), (3.0, ("uncond", "cond"))):
        noise = [torch.Generator().manual_seed(3) for _ in range(2)]
        given = {**PIPES[name].arguments(), **two, "guidance_scale": scale}
        pipe(**given, num_inference_steps=2, output_type="np", generator=noise)
        assert {frozenset(each) for each in branches(pipe).values()} == {frozenset(expected)}
        assert {len(each) for each in kept(pipe).values()} == {2}


def test_guidance_may_end_within_a_trajectory() -> None:
    """Z-Image then leaves the unconditional half out of its batches."""
    pipe = tokdyn.wrap(build("Z-Image"), [FeatureCache(threshold=1e9)])
    images(pipe, "Z-Image", 6, cfg_truncation=0.45)
    assert branches(pipe) == {**dict.fromkeys(range(3), ("cond", "uncond")), **dict.fromkeys((3, 4, 5), ("cond",))}
    assert all(not reused for step, _, reused in seen(pipe) if step in (0, 3, 5))


def test_a_call_that_skips_layers_is_a_branch_of_its_own() -> None:
    """It has the samples of one branch only, and may not repeat what the conditional one did."""
    pipe = build("SD3")
    plain = images(pipe, "SD3", 6, **SKIPPED)
    tokdyn.wrap(pipe, [FeatureCache(threshold=1e9)])
    first = images(pipe, "SD3", 6, **SKIPPED)
    assert branches(pipe) == {0: ("uncond", "cond"), **dict.fromkeys(range(1, 6), ("uncond", "cond", "perturbed"))}
    reused = {(step, branch) for step, branch, reused in seen(pipe) if reused}
    assert reused == {(step, branch) for step in range(1, 5) for branch in ("uncond", "cond", "perturbed")} - {
        (1, "perturbed")
    }
    assert torch.equal(images(pipe, "SD3", 6, **SKIPPED), first)
    tokdyn.unwrap(pipe)
    tokdyn.wrap(pipe, [Chunking(target=2)])
    tokdyn.set_tail_drop(pipe, LITE)
    images(pipe, "SD3", 6, **SKIPPED)
    assert kept(pipe) == {"uncond": (2,), "cond": (16,), "perturbed": (16,)}
    tokdyn.unwrap(pipe)
    assert torch.equal(images(pipe, "SD3", 6, **SKIPPED), plain)


@pytest.mark.parametrize("name", PAG)
@pytest.mark.parametrize("scale", [4.5, 1.0], ids=["guided", "unguided"])
def test_thirds_of_a_batch_are_three_branches(name: str, scale: float) -> None:
    pipe = PAG[name]()
    plain = two_images(pipe, name, [0, 1], guidance_scale=scale)
    tokdyn.wrap(pipe, [FeatureCache(steps=(0, 3)), DepthSkip(blocks=(2,)), TokenMerge(ratio=0.5)])
    first = two_images(pipe, name, [0, 1], guidance_scale=scale)
    named = ("uncond", "cond", "perturbed") if scale > 1.0 else ("cond", "perturbed")
    assert branches(pipe) == dict.fromkeys(range(8), named)
    assert {call.samples for call in tokdyn.stats(pipe).calls} == {2}
    assert torch.equal(two_images(pipe, name, [0, 1], guidance_scale=scale), first)
    tokdyn.unwrap(pipe)
    assert torch.equal(two_images(pipe, name, [0, 1], guidance_scale=scale), plain)


@pytest.mark.parametrize(("name", "threshold"), [("PixArt", 0.2), ("SD3", 0.3)])
def test_images_of_a_batch_are_as_alone_under_perturbed_attention(name: str, threshold: float) -> None:
    """A cache computes all parts of an image or none, as attention perturbs the last part of what it gets."""
    pipe = tokdyn.wrap(PAG[name](), [FeatureCache(threshold=threshold)])
    both = two_images(pipe, name, [0, 1])
    counts = {step: {reused for at, _, reused in seen(pipe) if at == step} for step in branches(pipe)}
    assert all(len(each) == 1 for each in counts.values())
    assert {1} in counts.values(), "in no step one image was reused and the other was not"
    alone = torch.cat([two_images(pipe, name, [image]) for image in (0, 1)])
    assert torch.allclose(both, alone, atol=5e-5)  # guidance enlarges the rounding of fp32


def test_what_would_split_the_parts_of_a_batch_is_refused() -> None:
    """Numbers of tokens may differ between images but not between the branches of one."""
    pipe = tokdyn.wrap(sd3_pag(), [Chunking(target=2, ragged=True)])
    ((_, module),) = tokdyn.parts(pipe.transformer)
    nn.init.zeros_(module.get_parameter("router.bias"))  # type: ignore[union-attr]
    both = two_images(pipe, "SD3", [0, 1])
    assert kept(pipe)["uncond"] == kept(pipe)["cond"] == kept(pipe)["perturbed"]
    assert len(set(kept(pipe)["cond"])) == 2
    alone = torch.cat([two_images(pipe, "SD3", [image]) for image in (0, 1)])
    assert torch.allclose(both, alone, atol=5e-5)
    tokdyn.set_tail_drop(pipe, {"cond": 0.0, "uncond": 0.5})
    with pytest.raises(tokdyn.InputError, match=r"block 2 .* 3 parts"):
        two_images(pipe, "SD3", [0, 1])
    tokdyn.set_tail_drop(pipe, None)
    assert torch.equal(two_images(pipe, "SD3", [0, 1]), both)


def test_parts_are_found_by_the_class_of_the_processor() -> None:
    pipe = pixart_pag()
    assert coupled_parts(pipe.transformer) == 1
    block = pipe.transformer.transformer_blocks[1]
    block.attn1.processor = PAGCFGIdentitySelfAttnProcessor2_0()
    assert coupled_parts(pipe.transformer) == 3

    class Custom(PAGCFGIdentitySelfAttnProcessor2_0):  # type: ignore[misc]
        pass

    block.attn1.processor = Custom()
    assert coupled_parts(block) == 3
    assert coupled_parts(pipe.transformer.transformer_blocks[0]) == 1
    check_groups(block, 1, [(0, 2, 4), (1, 3, 5)], 6)
    check_groups(nn.Linear(1, 1), 1, [(0,), (1, 2)], 3)
    for groups, batch in (([(0, 1)], 6), ([(0, 2)], 6), ([(0, 1), (2, 3)], 4)):
        with pytest.raises(tokdyn.InputError, match="block 1 "):
            check_groups(block, 1, groups, batch)


def test_decisions_are_made_together() -> None:
    assert together([True, True, True, False, True, True], 3) == [True, False, True, False, True, False]
    assert together([True, False], 1) == [True, False]
    assert together([True, False, True], 2) == [False, False, False]


def test_a_loop_names_the_parts_of_its_batches() -> None:
    """Here the conditional branch comes first, whatever is usual for the model."""
    model = tokdyn.wrap(TINY["PixArtTransformer2DModel"].build(), [Chunking(target=2)])
    tokdyn.set_tail_drop(model, LITE)
    inputs = TINY["PixArtTransformer2DModel"].inputs(3)
    with torch.no_grad(), tokdyn.trajectory(model, steps=1) as here:
        here.step = 0
        here.branch = ("cond", "uncond", "perturbed")
        model(**inputs)
        assert [(call.branch, call.samples) for call in tokdyn.stats(model).calls] == [
            ("cond", 1), ("uncond", 1), ("perturbed", 1)
        ]  # fmt: skip
        found = kept(model)
        assert found["cond"] == found["perturbed"]
        assert found["cond"] > found["uncond"]
        here.branch = ("cond", "uncond")
        with pytest.raises(tokdyn.InputError, match="3 samples"):
            model(**inputs)


def test_models_without_an_adapter_have_the_order_of_their_pipelines() -> None:
    """The unconditional half comes first nearly everywhere in diffusers, but not in the pipeline of this model."""
    model = diffusers.LuminaNextDiT2DModel(
        sample_size=4, in_channels=4, hidden_size=24, num_layers=2, num_attention_heads=3, num_kv_heads=1,
        multiple_of=16, cross_attention_dim=32,
    )  # fmt: skip
    assert adapter_for(model).halves == ("cond", "uncond")
