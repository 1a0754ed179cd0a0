"""A preset is chosen by what a pipeline is, and refused where that is not enough."""

from __future__ import annotations

import json
import tempfile
import warnings
from typing import Any

import diffusers
import pytest
import torch

import tokdyn
from tests.contract.models import TINY, of_diffusers
from tests.contract.pipelines import build, vae
from tokdyn import FeatureCache, InputError, UnsupportedModelError
from tokdyn.methods.registry import from_settings

WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 1, "attention_head_dim": 12, "out_channels": 4, "text_dim": 12,
    "freq_dim": 16, "ffn_dim": 8,
}  # fmt: skip


def flux(channels: int = 64, guidance: bool = True) -> Any:
    return of_diffusers(
        "FluxTransformer2DModel", patch_size=1, in_channels=channels, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=1, joint_attention_dim=12, pooled_projection_dim=10,
        guidance_embeds=guidance, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def wan(layers: int, channels: int = 16, **more: Any) -> Any:
    return of_diffusers("WanTransformer3DModel", **WAN, num_layers=layers, in_channels=channels, **more)


def flux_pipe(kind: Any = diffusers.FluxPipeline, **more: Any) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return kind(scheduler, vae(), None, None, None, None, flux(**more))


def wan_pipe(model: Any, other: Any = None) -> Any:
    pipe = build("Wan")
    pipe.register_modules(transformer=model, transformer_2=other)
    return pipe


def methods_of(model: Any) -> list[Any]:
    """The methods of a wrapped model, as it is saved with them."""
    with tempfile.TemporaryDirectory() as folder:
        saved = json.loads((tokdyn.save(model, folder) / "tokdyn_config.json").read_text())
    return [from_settings(settings) for settings in saved["methods"]]


def test_a_pipeline_gets_the_preset_of_its_model_and_is_told_once_which_and_why(capsys: Any) -> None:
    for _ in range(2):
        pipe = tokdyn.wrap(flux_pipe(), "fast")
        assert methods_of(pipe.transformer) == tokdyn.preset("FLUX.1-dev", "fast")
        tokdyn.unwrap(pipe)
    told = capsys.readouterr().err
    assert told.count("FLUX.1-dev/fast") == 1
    for said in ("FluxPipeline", "guidance_embeds=True", "2x", "ali-vilab/TeaCache", "not measured"):
        assert said in told


def test_the_class_of_the_pipeline_tells_models_of_one_configuration_apart() -> None:
    pipe = flux_pipe(diffusers.FluxKontextPipeline)
    tokdyn.wrap(pipe, "balanced")
    assert methods_of(pipe.transformer) == tokdyn.preset("FLUX.1-Kontext-dev", "balanced")
    with pytest.raises(InputError, match=r"'FLUX.1-Kontext-dev/balanced' or 'FLUX.1-dev/fast'"):
        tokdyn.wrap(flux(), "fast")
    model = tokdyn.wrap(flux(), "FLUX.1-dev/fast")
    assert methods_of(model) == tokdyn.preset("FLUX.1-dev", "fast")


@pytest.mark.parametrize(
    ("pipe", "says"),
    [
        (lambda: flux_pipe(guidance=False), r"FLUX.1-schnell .*TokenMerge"),
        (lambda: flux_pipe(channels=16), "none of those of .*FLUX.1-dev"),
        (lambda: build("PixArt"), "no preset fits this PixArtSigmaPipeline"),
        (lambda: wan_pipe(wan(1)), "none of those of .*Wan2.1-T2V-1.3B"),
    ],
)
def test_a_pipeline_without_a_preset_is_refused_in_words_and_left_as_it_was(pipe: Any, says: str) -> None:
    built = pipe()
    with pytest.raises(InputError, match=says):
        tokdyn.wrap(built, "fast")
    assert not tokdyn.pipelines.is_wrapped(built)


def test_the_number_of_blocks_and_of_denoisers_tells_the_models_of_wan_apart() -> None:
    small = tokdyn.wrap(wan_pipe(wan(30)), "fast")
    assert methods_of(small.transformer) == tokdyn.preset("Wan2.1-T2V-1.3B", "fast")
    experts = tokdyn.wrap(wan_pipe(wan(40), wan(40)), "quality")
    expected = tokdyn.preset("Wan2.2-T2V-A14B", "quality")
    assert {name: methods_of(getattr(experts, name)) for name in expected} == expected
    with pytest.raises(InputError, match=r"Wan2.1-T2V-14B/quality' or 'Wan2.2-T2V-A14B"):
        tokdyn.wrap(wan(40), "quality")
    with pytest.raises(InputError, match="transformer_2"):
        tokdyn.wrap(wan_pipe(wan(40)), "Wan2.2-T2V-A14B/quality")


def test_a_name_decides_where_the_configuration_cannot() -> None:
    settings = {"channels": 36, "image_dim": 8, "added_kv_proj_dim": 12}
    model = wan(1, **settings)
    model.register_to_config(num_layers=40, image_dim=1280)  # of the real one, which tiny weights need not have
    with pytest.raises(InputError, match=r"480P/fast' or 'Wan2.1-I2V-14B-720P"):
        tokdyn.wrap(model, "fast")
    model.register_to_config(_name_or_path="Wan-AI/Wan2.1-I2V-14B-720P-Diffusers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokdyn.wrap(model, "fast")
    assert methods_of(model) == tokdyn.preset("Wan2.1-I2V-14B-720P", "fast")


def test_a_preset_of_another_model_is_refused_or_warned_about() -> None:
    model = TINY["DiTTransformer2DModel"].build()
    with pytest.raises(UnsupportedModelError, match=r"FluxTransformer2DModel.* DiTTransformer2DModel"):
        tokdyn.wrap(model, "FLUX.1-dev/fast")
    with pytest.warns(UserWarning, match="not a FluxTransformer2DModel"):
        tokdyn.unwrap(tokdyn.wrap(model, tokdyn.preset("FLUX.1-dev", "fast")))
    with pytest.warns(UserWarning, match="num_layers is 40 .*not 30"):
        tokdyn.wrap(wan_pipe(wan(40)), "Wan2.1-T2V-1.3B/fast")
    copied = FeatureCache(coefficients=tokdyn.preset("Mochi-1", "fast")[0].coefficients)
    with pytest.warns(UserWarning, match="published for a MochiTransformer3DModel"):
        tokdyn.wrap(model, [copied])


@torch.no_grad()
def test_a_preset_acts_like_its_methods() -> None:
    arguments = {
        "prompt_embeds": torch.randn(1, 6, 12), "pooled_prompt_embeds": torch.randn(1, 10), "height": 32, "width": 32,
        "num_inference_steps": 28, "output_type": "latent",
    }  # fmt: skip
    pipe = diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), vae(channels=16), None, None, None, None, flux()
    )
    pipe.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        return pipe(**arguments, generator=torch.Generator().manual_seed(1))[0]

    tokdyn.wrap(pipe, "mask-fast")
    shown = draw()
    reused = tokdyn.stats(pipe).cached
    tokdyn.wrap(tokdyn.unwrap(pipe), tokdyn.preset("FLUX.1-dev", "mask-fast"))
    assert torch.equal(draw(), shown)
    assert reused == 17
    tokdyn.unwrap(pipe)
    tokdyn.wrap(pipe, "mask-fast")
    arguments["num_inference_steps"] = 8
    with pytest.warns(UserWarning, match="takes 8 steps, not 28"):
        draw()


@torch.no_grad()
def test_a_preset_is_compared_by_its_name() -> None:
    """`tokdyn.compare` takes what `tokdyn.wrap` takes."""
    pipe = flux_pipe()
    pipe.register_modules(vae=vae(16))
    pipe.set_progress_bar_config(disable=True)
    embeds = {"prompt_embeds": torch.zeros(1, 6, 12), "pooled_prompt_embeds": torch.zeros(1, 10)}
    call = {**embeds, "height": 16, "width": 16, "num_inference_steps": 4}
    compared = tokdyn.compare(pipe, "balanced", [call])
    assert not tokdyn.pipelines.is_wrapped(pipe)
    expected = tokdyn.compare(pipe, tokdyn.preset("FLUX.1-dev", "balanced"), [call])
    assert compared.methods == expected.methods
    assert (compared.pairs[0].acting == expected.pairs[0].acting).all()
    with pytest.raises(InputError, match="no setting 'nope'"):
        tokdyn.compare(pipe, "nope", [call])
    assert not tokdyn.pipelines.is_wrapped(pipe)
