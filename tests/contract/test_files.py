"""Methods in files: they come back as they were, the base's own files stay clean, and damage is named."""

import json

import pytest
import torch

import tokdyn
from tests.contract.models import TINY, sample
from tokdyn.attach import load, save, unwrap, wrap
from tokdyn.errors import CheckpointError, InputError
from tokdyn.methods import DepthSkip, FeatureCache, TokenMerge

METHODS = [
    FeatureCache(threshold=0.3, coefficients=(2.0, 0.0)),
    TokenMerge(ratio=((0.0, 0.2), (1.0, 0.5)), blocks=(0, -1)),
    DepthSkip(table=((0.2, 0.9, (1, 2)),)),
]


@pytest.mark.parametrize("name", ["DiT", "FluxTransformer2DModel"])
@torch.no_grad()
def test_methods_come_back(name, tmp_path):
    model, inputs = wrap(TINY[name].build(), METHODS), TINY[name].inputs(2)
    expected = sample(model(**inputs))
    save(model, tmp_path / "methods")
    again = load(TINY[name].build(), tmp_path / "methods")
    assert torch.equal(sample(again(**inputs)), expected)
    assert [method for method, _ in tokdyn.parts(again)] == METHODS


@torch.no_grad()
def test_the_model_itself_is_saved_without_its_methods(tmp_path):
    model, inputs = TINY["DiT"].build(), TINY["DiT"].inputs(2)
    plain = sample(model(**inputs))
    wrap(model, METHODS).save_pretrained(tmp_path)
    assert not (tmp_path / "tokdyn_config.json").exists()
    assert torch.equal(sample(type(unwrap(model)).from_pretrained(tmp_path)(**inputs)), plain)


@torch.no_grad()
def test_a_pipeline_forgets_the_trajectory_when_it_is_done():
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        latent_channels=4, norm_num_groups=4, sample_size=8,
    )  # fmt: skip
    model = wrap(TINY["DiTTransformer2DModel"].build(), [FeatureCache(threshold=10.0, num_steps=6), TokenMerge()])
    pipeline = DiTPipeline(model, vae, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(len(tokdyn.stats(model).calls)))
    images = [
        pipeline(
            class_labels=[1, 2], num_inference_steps=6, generator=torch.Generator().manual_seed(3), output_type="np"
        ).images
        for _ in range(2)
    ]
    assert (images[0] == images[1]).all()
    assert len(seen) == 12
    run = tokdyn.stats(model)  # of the images that were just made
    assert [call.step for call in run.calls] == list(range(6))
    assert run.cached == 4
    tokdyn.reset(model)
    assert tokdyn.stats(model).calls == ()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": "SiT"}, "SiT.* DiT"),
        ({"methods": [{"method": "Magic"}]}, "'Magic'.*Chunking, TokenMerge"),
        ({"methods": [{"method": "TokenMerge", "rate": 1}]}, "TokenMerge.*'rate'"),
    ],
)
def test_damage_is_named(change, sentence, tmp_path):
    save(wrap(TINY["DiT"].build(), METHODS), tmp_path)
    path = tmp_path / "tokdyn_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    model = TINY["DiT"].build()
    with pytest.raises(CheckpointError, match=sentence):
        load(model, tmp_path)
    with pytest.raises(InputError, match=r"tokdyn\.wrap"):
        unwrap(model)
