"""Unusual calls of wrapped models: odd grids, one cell, another size every call, timesteps of tokens, ways to call.

Every adapter but sibling classes is called with every size, with one stack that merges, chunks, skips and caches; a
size that the model itself refuses is left out. All methods are tried on all sizes of one model.
"""

from __future__ import annotations

import inspect
from itertools import product
from typing import Any

import pytest
import torch
from torch.func import functional_call

import tokdyn
from tests.contract.ecosystem import MODELS, SAMPLING, TRAINING, equip, fits, predict, stack_of
from tests.contract.models import TINY, ids, latents, of_diffusers, one_of, sample
from tests.contract.siblings import SIBLINGS
from tokdyn.methods import Chunking, DepthSkip, TokenMerge

GRIDS = ((1, 1), (1, 5), (5, 1), (3, 7), (2, 2))
LATENTS_4D = {"PixArt", "SD3", "AuraFlow", "Lumina2", "DiT"}
CELLS_4D = {"DCDiT", "Sana"}
SQUARE = {"DiTTransformer2DModel"}  # the plain model takes no other
OWN_NORM = {"DCDiT"}  # its decoder refuses one cell of one sample


def kind(name: str) -> str:
    return name.removesuffix("Transformer2DModel").removesuffix("Transformer3DModel")


def of_size(name: str, batch: int, rows: int, columns: int) -> dict[str, Any]:
    """Arguments for a grid of so many cells, in one frame where there are frames."""
    given, cells = TINY[name].inputs(batch), rows * columns
    family = kind(name)
    changes: dict[str, Any]
    if name in SQUARE or family in LATENTS_4D:
        changes = {"hidden_states": latents(batch, 4, 2 * rows, 2 * columns)}
    elif family in CELLS_4D:
        changes = {"hidden_states": latents(batch, 4, rows, columns)}
    elif family in ("Wan", "HunyuanVideo"):
        changes = {"hidden_states": latents(batch, 4, 1, 2 * rows, 2 * columns)}
    elif family == "CogVideoX":
        rotary = (latents(cells, 16), latents(cells, 16))
        changes = {"hidden_states": latents(batch, 1, 4, 2 * rows, 2 * columns), "image_rotary_emb": rotary}
    elif family == "ZImage":
        changes = {"x": list(latents(batch, 4, 1, 2 * rows, 2 * columns))}
    elif family == "LTXVideo":
        changes = {"num_frames": 1, "height": rows, "width": columns, "hidden_states": latents(batch, cells, 4)}
    elif family == "QwenImage":
        changes = {"img_shapes": [[(1, rows, columns)]] * batch, "hidden_states": latents(batch, cells, 16)}
    else:
        places = ids(rows, columns)
        places = torch.cat([places, torch.zeros(cells, 1)], dim=1) if family == "Flux2" else places
        changes = {"img_ids": places, "hidden_states": latents(batch, cells, 4)}
    return {**given, **changes}


def grids_of(name: str) -> list[tuple[int, int]]:
    found = [grid for grid in GRIDS if name not in SQUARE or grid[0] == grid[1]]
    return [grid for grid in found if name not in OWN_NORM or grid != (1, 1)]


@torch.no_grad()
def called(model: Any, name: str, inputs: dict[str, Any], batch: int) -> torch.Tensor:
    """What a model predicts at two noise levels of a new trajectory."""
    tokdyn.reset(model)
    return torch.stack([sample(model(**{**inputs, **TINY[name].at(batch, level)})) for level in (0.9, 0.4)])


KNOWN = [name for name in MODELS if TINY[name].clock is not None and name not in SIBLINGS]
CASES = [*((name, stack_of(name)) for name in KNOWN), *product(["DiT"], SAMPLING)]


@pytest.mark.parametrize(("name", "stack"), CASES)
def test_one_model_takes_any_size_and_samples_stay_independent(name: str, stack: str) -> None:
    """fp32, sums in another order: 5e-6."""
    model = equip(TINY[name].build(), stack)
    for rows, columns in grids_of(name):
        inputs = of_size(name, 3, rows, columns)
        together = called(model, name, inputs, 3)
        assert together.isfinite().all()
        alone = called(model, name, one_of(inputs, 1), 1)
        torch.testing.assert_close(alone, together[:, 1:2], rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", [name for name in KNOWN if fits(name, "stack")])
def test_gradients_are_finite_at_any_size(name: str) -> None:
    model = equip(TINY[name].build(), TRAINING).train()
    for rows, columns in grids_of(name):
        model.zero_grad()
        loss = sample(model(**of_size(name, 1, rows, columns))).square().mean()
        (loss + sum(tokdyn.losses(model).values())).backward()
        found = [value.grad for value in model.parameters() if value.grad is not None]
        assert found
        assert all(value.isfinite().all() for value in found)


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "LTXVideoTransformer3DModel"])
@pytest.mark.parametrize("stack", ["levels", "cache-first", "stack"])
@torch.no_grad()
def test_tokens_may_have_timesteps_of_their_own(name: str, stack: str) -> None:
    """As Wan 2.2 and LTX give them to images that become videos; the noisiest token is the level of a sample."""
    inputs = TINY[name].inputs(3)
    of_samples = inputs["timestep"]
    model = equip(TINY[name].build(), stack)
    expected = sample(model(**inputs))
    of_tokens = of_samples[:, None].expand(3, 24).contiguous()
    tokdyn.reset(model)
    torch.testing.assert_close(sample(model(**{**inputs, "timestep": of_tokens})), expected, rtol=0, atol=2e-6)
    of_tokens[:, :12] = 0  # the first frame is given
    of_tokens[1, 12:] = 900
    mixed = {**inputs, "timestep": of_tokens}
    tokdyn.reset(model)
    together = sample(model(**mixed))
    assert tokdyn.stats(model).calls[-1].level == pytest.approx((0.5 + 0.9 + 0.5) / 3)
    for i in range(3):
        tokdyn.reset(model)
        torch.testing.assert_close(sample(model(**one_of(mixed, i))), together[i : i + 1], rtol=0, atol=2e-6)


@torch.no_grad()
def test_images_that_become_videos_have_words_of_the_image_beside_the_text() -> None:
    model = of_diffusers(
        "WanTransformer3DModel",
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=4,
        text_dim=12, freq_dim=32, ffn_dim=48, num_layers=4, cross_attn_norm=True, image_dim=10,
        added_kv_proj_dim=32, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    inputs = {
        "hidden_states": latents(2, 8, 2, 8, 6),
        "encoder_hidden_states": latents(2, 512, 12),
        "encoder_hidden_states_image": latents(2, 257, 10),
        "timestep": torch.full((2,), 500),
    }
    plain = sample(model(**inputs))
    equip(model, [Chunking(target=2), TokenMerge(ratio=0.3), DepthSkip(blocks=(1,), levels=(0.0, 0.5))])
    together = sample(model(**inputs))
    assert not torch.equal(together, plain)
    torch.testing.assert_close(sample(model(**one_of(inputs, 1))), together[1:], rtol=0, atol=2e-6)


MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask")
WORDS = ["ZImage", "QwenImage", "HunyuanVideo", "LTXVideo", "PixArt"]


@pytest.mark.parametrize("name", [name for name in MODELS if kind(name) in WORDS])
@pytest.mark.parametrize("stack", ["levels", "stack"])
@torch.no_grad()
def test_prompts_may_differ_in_length(name: str, stack: str) -> None:
    inputs = TINY[name].inputs(3)
    if kind(name) == "ZImage":
        inputs["cap_feats"] = [latents(1, words, 12)[0] for words in (6, 40, 3)]
    else:
        mask = torch.ones(3, 6)
        mask[1, 4:] = mask[2, 2:] = 0
        key = next((key for key in MASKS if key in inputs), MASKS[0])
        inputs[key] = mask.to(inputs[key].dtype) if key in inputs else mask
    model = equip(TINY[name].build(), stack)
    together = sample(model(**inputs))
    for i in range(3):
        tokdyn.reset(model)
        torch.testing.assert_close(sample(model(**one_of(inputs, i))), together[i : i + 1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", KNOWN)
def test_ways_to_call_are_the_same(name: str) -> None:
    model, inputs = equip(TINY[name].build(), stack_of(name)), TINY[name].inputs(2)
    with torch.no_grad():
        expected = sample(model(**inputs))

    def equal(found: Any) -> None:
        assert torch.equal(sample(found), expected)
        tokdyn.reset(model)

    tokdyn.reset(model)
    parameters = list(inspect.signature(model.forward).parameters.values())
    last = max(place for place, each in enumerate(parameters) if each.name in inputs)
    positional = [inputs.get(each.name, each.default) for each in parameters[: last + 1]]
    with torch.no_grad():
        equal(model(*positional))
        equal(model(*positional[:1], **{key: value for key, value in inputs.items() if key != parameters[0].name}))
        found = model(**inputs, return_dict=False)
        assert isinstance(found, tuple)
        equal(found)
        equal(model.forward(**inputs))
        equal(functional_call(model, dict(model.named_parameters()), (), inputs))
        doubled = {key: value * 1.5 for key, value in model.named_parameters()}
        assert not torch.equal(sample(functional_call(model, doubled, (), inputs)), expected)
        tokdyn.reset(model)
    with torch.inference_mode():
        equal(model(**inputs))


@pytest.mark.parametrize("name", ["DiT", "FluxTransformer2DModel"])
def test_inference_mode_leaves_nothing_that_training_trips_over(name: str) -> None:
    model = equip(TINY[name].build(), "stack")
    with torch.inference_mode():
        first = predict(model, name, 0.9)
    with torch.no_grad():
        after = predict(model, name, 0.4)  # caches hold what inference mode made
        tokdyn.reset(model)
        assert torch.equal(predict(model, name, 0.9), first)
        assert torch.equal(predict(model, name, 0.4), after)
    with torch.inference_mode():
        predict(model, name, 0.9)
    other = tokdyn.unwrap(model)
    equip(other, TRAINING).train()
    (predict(other, name).square().mean() + sum(tokdyn.losses(other).values())).backward()
    assert all(value.grad.isfinite().all() for value in other.tokdyn.parameters())
