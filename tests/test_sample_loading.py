"""Models found in training folders, and autoencoders found for models of latents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from tests.sampling import FACTS, NAMES, QUICK, tiny
from tokdyn.data.features import FeaturesConfig, write_features
from tokdyn.data.vae import LatentScaling, decode, load_vae, scaling_of, weights_digest
from tokdyn.diffusion.objective import Objective
from tokdyn.errors import CheckpointError, DataError, RecipeError
from tokdyn.recipe import load
from tokdyn.report.decoding import open_decoder
from tokdyn.report.pixels import to_pixels
from tokdyn.sample import SampleConfig, load_model, sample
from tokdyn.sample.job import prepare
from tokdyn.train import checkpoints, train
from tokdyn.train.snapshot import save_model


def training_folder(root: Path, finished: bool) -> Path:
    """Write two checkpoints of seeds 1 (weights) and 2 (averages), and a finished model of seed 3."""

    def write(folder: Path) -> None:
        save_model(tiny(1), folder / "model", FACTS)
        save_model(tiny(2), folder / "ema", FACTS)

    for step in (10, 20):
        checkpoints.save(root / "checkpoints", step, write, {}, keep=2)
    (root / "recipe.yaml").write_text("name: tiny\n")
    if finished:
        save_model(tiny(3), root / "model", FACTS)
    return root


@pytest.mark.parametrize(
    ("finished", "below", "ema", "seed", "step"),
    [
        (False, "", True, 2, 20),
        (False, "", False, 1, 20),
        (True, "", True, 3, None),
        (True, "", False, 1, 20),
        (True, "checkpoints", True, 2, 20),
        (True, "checkpoints/step_0000010", True, 2, 10),
        (True, "checkpoints/step_0000010/model", True, 1, None),
        (True, "model", True, 3, None),
    ],
)
def test_every_folder_of_a_training_run_can_be_loaded(tmp_path, finished, below, ema, seed, step):
    model, objective, info = load_model(training_folder(tmp_path, finished) / below, ema)
    expected = tiny(seed).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert model.config.router == tiny(seed).config.router
    assert not model.training
    assert objective == Objective()
    assert (info.name, info.step, info.class_names) == ("tiny/run", step, NAMES)


def test_weights_without_a_record_get_the_objective_of_dit(tmp_path):
    tiny(0, learn_sigma=False).save_pretrained(tmp_path / "bare" / "model")
    _, objective, info = load_model(tmp_path / "bare")
    assert objective == Objective(learn_sigma=False)
    assert (info.name, info.data, info.class_names) == ("bare", None, ())


def test_models_that_cannot_be_loaded_are_named(tmp_path, saved):
    with pytest.raises(CheckpointError, match="nothing"):
        load_model(tmp_path / "nothing")
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(CheckpointError, match="early"):
        load_model(tmp_path / "early")
    (saved / "tokdyn.json").write_text('{"objective": {"kind": "magic"}}')
    with pytest.raises(CheckpointError, match=r"tokdyn\.json"):
        load_model(saved)
    for names in (5, "abcd", list("abcde")):
        (saved / "tokdyn.json").write_text(json.dumps({"class_names": names}))
        with pytest.raises(CheckpointError, match=r"tokdyn\.json .* 4 "):
            load_model(saved)
    (saved / "tokdyn.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokdyn\.json "):
        load_model(saved)
    (saved / "tokdyn.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokdyn\.json .*list"):
        load_model(saved)


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    """Save a tiny autoencoder from 3 channels at 12x16 to 4 channels at 6x8."""
    torch.manual_seed(0)
    blocks = {"block_out_channels": (4, 4), "norm_num_groups": 2, "layers_per_block": 1, "latent_channels": 4}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(**blocks, **kinds, scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_latents_are_decoded_and_not_clamped(tmp_path, vae):
    save_model(tiny(0, in_channels=4), tmp_path / "latent", {**FACTS, "data": None})
    settings = {"model": str(tmp_path / "latent"), "out": tmp_path / "out", "count": 2, **QUICK}
    result = sample(SampleConfig(**settings, vae=str(vae), format="npz", maps=True))
    assert result.used["latents"]
    assert not result.used["clip"]
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (2, 12, 16, 3)
    with pytest.raises(RecipeError, match=r" 4 .*vae="):
        sample(SampleConfig(**settings))


def test_a_folder_decoded_by_another_autoencoder_is_not_resumed(tmp_path, vae):
    save_model(tiny(0, in_channels=4), tmp_path / "latent", {**FACTS, "data": None})
    settings = {"model": str(tmp_path / "latent"), "out": tmp_path / "out", "format": "folder", "count": 1, **QUICK}
    sample(SampleConfig(**settings, vae=str(vae)))
    network = AutoencoderKL.from_pretrained(vae)
    network.decoder.conv_in.weight.data.add_(1.0)
    network.save_pretrained(tmp_path / "other")
    with pytest.raises(RecipeError, match=r" vae: .*out"):
        sample(SampleConfig(**settings, vae=str(tmp_path / "other")))


@pytest.fixture
def latent_run(tmp_path: Path, vae: Path) -> Path:
    """Train a model for one step on latents with a scaling of their own."""
    settings = {"kind": "shapes", "size": (16, 16), "length": 8, "scaling_factor": 2.0, "shift_factor": 0.25}
    write_features(FeaturesConfig(vae=str(vae), out=str(tmp_path / "latents"), **settings))
    recipe = ["model.hidden_size=32", "model.depth=1", "model.num_heads=2", "data.kind=latents", "data.size=null"]
    recipe += ["training.steps=1", "training.batch_size=4", "training.sample_every=null", "optimizer.warmup_steps=0"]
    recipe += ["chunking.budget_warmup_steps=0", f"data.path={tmp_path / 'latents'}", f"out={tmp_path / 'run'}"]
    train(load("demo", recipe))
    return tmp_path / "run"


def test_a_model_of_latents_stores_its_autoencoder_and_scaling(tmp_path, latent_run, vae, monkeypatch):
    shutil.rmtree(tmp_path / "latents")  # the model stores both
    tmp_path.joinpath("elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    job = prepare(SampleConfig(model=str(latent_run), device="cpu"))
    assert job.decoder.scaling == LatentScaling(factor=2.0, mean=(0.25,))
    assert weights_digest(job.decoder.vae) == weights_digest(load_vae(str(vae)))
    copy = tmp_path / "copy"
    shutil.copytree(vae, copy)
    moved = prepare(SampleConfig(model=str(latent_run), device="cpu", vae=str(copy)))
    assert moved.decoder.scaling == job.decoder.scaling  # that of the data, whichever autoencoder decodes
    result = sample(SampleConfig(model=str(latent_run), out=tmp_path / "out", count=1, steps=1, format="npz"))
    with np.load(result.budgets[0].files[0]) as arrays:
        assert arrays["arr_0"].shape == (1, 16, 16, 3)


def test_an_autoencoder_that_has_changed_is_refused(tmp_path, latent_run, vae):
    network = AutoencoderKL.from_pretrained(vae)
    network.decoder.conv_in.weight.data.add_(1.0)
    network.save_pretrained(vae)
    with pytest.raises(RecipeError, match=r"vae .*vae=PATH"):
        prepare(SampleConfig(model=str(latent_run), device="cpu"))
    shutil.rmtree(vae)
    with pytest.raises(DataError, match=r"from .*vae"):
        prepare(SampleConfig(model=str(latent_run), device="cpu"))


def test_decoder_undoes_the_scaling_whatever_the_batch(vae):
    decoder = open_decoder(4, None, str(vae), torch.device("cpu"))
    latents = torch.randn(20, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    network = AutoencoderKL.from_pretrained(vae).eval()
    with torch.no_grad():
        expected = network.decode(latents / 0.5).sample
    assert np.abs(decoder(latents).astype(int) - to_pixels(expected).astype(int)).max() <= 1
    torch.testing.assert_close(decode(network, latents, scaling_of(network)), expected.clamp(-1, 1))


def test_autoencoders_that_do_not_fit_are_refused(tmp_path, vae, saved):
    settings = {"out": tmp_path / "out", "count": 1, **QUICK}
    with pytest.raises(RecipeError, match=r"vae=.*shapes"):
        sample(SampleConfig(model=str(saved), vae=str(vae), **settings))
    save_model(tiny(0, in_channels=8), tmp_path / "wide", {**FACTS, "data": None})
    with pytest.raises(RecipeError, match=r" 8 .* 4:.*vae="):
        sample(SampleConfig(model=str(tmp_path / "wide"), vae=str(vae), **settings))
    with pytest.raises(DataError, match="nowhere"):
        sample(SampleConfig(model=str(tmp_path / "wide"), vae=str(tmp_path / "nowhere"), **settings))
