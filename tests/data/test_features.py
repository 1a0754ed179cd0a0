"""Writing latents with `write_features`: their values, resuming, and what is refused."""

import logging
import math
import signal
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from pydantic import ValidationError

from tests.data.latents import config, kl, shapes, tiny
from tokdyn.data import DataConfig, LatentDataset, ShapesDataset, open_data, write_features
from tokdyn.data.vae import LatentScaling, load_vae, quiet_diffusers, weights_digest
from tokdyn.errors import DataError, InputError, OutputError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("side", [19, 21])
def test_a_size_that_the_autoencoder_would_crop_is_refused(tmp_path, side):
    with pytest.raises(DataError, match=f" {side} .* 2 "):
        write_features(config(tmp_path, size=side), kl())
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("vae", [kl(), tiny(), kl(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])])
def test_latents_are_the_scaled_outputs_of_the_autoencoder(tmp_path, vae):
    report = write_features(config(tmp_path, posterior="mean", flip=True), vae)
    data = open_data(DataConfig(kind="latents", path=str(tmp_path), flip=True))
    images, labels = shapes().batch(range(10))
    with torch.no_grad():
        outputs = [vae.encode(batch) for batch in (images, images.flip(-1))]
    if isinstance(vae, diffusers.AutoencoderTiny):
        plain, mirrored = (output.latents for output in outputs)
    else:
        plain, mirrored = (output.latent_dist.mean * 0.18215 for output in outputs)  # the published factor, by default
    if getattr(vae.config, "latents_mean", None) is not None:
        mean, std = (torch.tensor(vae.config[name]).view(4, 1, 1) for name in ("latents_mean", "latents_std"))
        plain, mirrored = ((latents / 0.18215 - mean) / std * 0.18215 for latents in (plain, mirrored))
    assert data.shape == report.shape == (4, 8, 12)
    assert (report.count, report.shards, report.resumed, report.skipped) == (10, 3, 0, 0)
    assert data.class_names == shapes().class_names
    flips = [False, True] * 5
    expected = torch.where(torch.tensor(flips)[:, None, None, None], mirrored, plain)
    samples, numbers = data.batch(range(10), flips)
    # Convolutions sum in another order over batches of another size.
    torch.testing.assert_close(samples, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(numbers, labels)


@pytest.mark.parametrize(("dtype", "bits"), [("fp32", 24), ("fp16", 11), ("bf16", 8)])
def test_stored_types(tmp_path, dtype, bits):
    write_features(config(tmp_path / "exact", posterior="mean"), kl())
    write_features(config(tmp_path / "stored", posterior="mean", dtype=dtype), kl())
    exact, _ = LatentDataset(tmp_path / "exact").batch(range(10))
    stored, _ = LatentDataset(tmp_path / "stored").batch(range(10))
    assert stored.dtype == torch.float32
    # Rounding to `bits` significant bits; below the normal numbers of fp16 the step is 2**-24.
    torch.testing.assert_close(stored, exact, rtol=2.0**-bits, atol=2.0**-25 if bits < 24 else 0)


def test_posterior_samples_depend_on_the_seed_and_not_on_batches(tmp_path):
    vae = kl()
    runs = {
        "a": config(tmp_path / "a"),
        "b": config(tmp_path / "b", batch_size=4, shard_size=7),
        "c": config(tmp_path / "c", seed=1),
        "mean": config(tmp_path / "mean", posterior="mean"),
    }
    for run in runs.values():
        write_features(run, vae, shapes())
    read = {name: LatentDataset(tmp_path / name).batch(range(10))[0] for name in runs}
    torch.testing.assert_close(read["a"], read["b"], atol=1e-5, rtol=1e-5)
    assert (read["a"] - read["c"]).abs().mean() > 0.01
    with torch.no_grad():
        posterior = vae.encode(shapes().batch(range(10))[0]).latent_dist
    noise = (read["a"] - read["mean"]) / 0.18215 / posterior.std
    assert abs(noise.mean()) < 4 / np.sqrt(noise.numel())  # four standard errors
    assert abs(noise.std() - 1) < 4 / np.sqrt(2 * noise.numel())


def test_mirrored_images_have_noise_of_their_own(tmp_path):
    """Noise of 384 independent values correlates by less than 6 standard errors, also for an image and its mirror."""
    vae = kl()
    for posterior in ("sample", "mean"):
        write_features(config(tmp_path / posterior, posterior=posterior, flip=True), vae)
    noise = []
    for flips in ([False] * 10, [True] * 10):
        sample, mean = (LatentDataset(tmp_path / name).batch(range(10), flips)[0] for name in ("sample", "mean"))
        noise.append((sample - mean).flatten(1))
    correlations = torch.corrcoef(torch.cat(noise)) - torch.eye(20)
    assert correlations.abs().max() < 6 / noise[0].shape[1] ** 0.5


def test_an_autoencoder_from_a_folder_or_a_pipeline_folder(tmp_path):
    vae = kl(shift_factor=0.25, scaling_factor=0.5)
    vae.save_pretrained(tmp_path / "vae")
    tiny().save_pretrained(tmp_path / "other" / "taesd")
    runs = {
        "a": {"vae": tmp_path / "vae"},
        "b": {"vae": tmp_path},
        "c": {"vae": tmp_path / "other", "subfolder": "taesd"},
    }
    for name, settings in runs.items():
        settings = {key: str(value) for key, value in settings.items()}
        write_features(config(tmp_path / name, posterior="mean", device="cpu", **settings))
    write_features(config(tmp_path / "d", posterior="mean"), vae)
    read = {name: LatentDataset(tmp_path / name) for name in "abcd"}
    assert torch.equal(read["a"].batch(range(10))[0], read["b"].batch(range(10))[0])
    assert torch.equal(read["a"].batch(range(10))[0], read["d"].batch(range(10))[0])
    assert read["a"].index.scaling == LatentScaling(factor=0.5, mean=(0.25,))
    assert read["a"].index.vae.source == str(tmp_path / "vae")
    assert read["a"].index.vae.sha256 == read["d"].index.vae.sha256 != read["c"].index.vae.sha256
    assert read["c"].index.vae.kind == "AutoencoderTiny"


def test_unreadable_images_are_left_out(tmp_path):
    for number in range(9):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number * 20, 0, 0)).save(path)
        if number in (1, 5, 3, 7):  # all of class b
            path.write_bytes(b"broken")
    settings = {"kind": "images", "path": str(tmp_path / "images"), "size": 16, "posterior": "mean", "shard_size": 2}
    with pytest.raises(DataError, match=r"^b/1\.png"):
        write_features(config(tmp_path / "raise", **settings), tiny())
    with pytest.warns(UserWarning, match=r"\.png"):
        report = write_features(config(tmp_path / "skip", on_error="skip", **settings), tiny())
    assert (report.count, report.skipped) == (5, 4)
    data = LatentDataset(tmp_path / "skip")
    assert data.class_names == ("a", "b")
    samples, labels = data.batch(range(5))
    assert labels.tolist() == [0] * 5
    images = open_data(DataConfig(kind="images", path=str(tmp_path / "images" / "a"), size=16))
    with torch.no_grad():
        expected = tiny().encode(images.batch(range(5))[0]).latents
    torch.testing.assert_close(samples, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("broken", [0, 3, 5])
def test_labels_and_noise_stay_with_their_images_when_broken_ones_are_skipped(tmp_path, broken):
    """Two images of each of three classes; one of them is broken, in the middle of a batch or at its ends."""
    names = [f"{'abc'[number // 2]}/{number}.png" for number in range(6)]
    for number, name in enumerate(names):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number * 40, 0, 0)).save(path)
    settings = {"kind": "images", "path": str(tmp_path / "images"), "size": 16, "shard_size": 6, "batch_size": 4}
    write_features(config(tmp_path / "sound", **settings), kl())
    (tmp_path / "images" / names[broken]).write_bytes(b"broken")
    with pytest.warns(UserWarning, match=r"\.png"):
        write_features(config(tmp_path / "skipped", on_error="skip", **settings), kl())
    latents, labels = LatentDataset(tmp_path / "sound").batch([number for number in range(6) if number != broken])
    stored, stored_labels = LatentDataset(tmp_path / "skipped").batch(range(5))
    assert stored_labels.tolist() == labels.tolist()
    torch.testing.assert_close(stored, latents, atol=1e-5, rtol=1e-5)


KILLED = """
import os, signal, sys
import torch
sys.path.insert(0, {tests!r})
from latents import config, kl, shapes
from tokdyn.data import ShapesDataset, write_features
from pathlib import Path

class Deadly(ShapesDataset):
    def fetch(self, indices, flips=None):
        if 9 in indices:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fetch(indices, flips)

torch.set_num_threads({threads})
write_features(config(Path({out!r}), flip=True), kl(), Deadly((16, 24), length=10))
"""


def test_a_killed_run_resumes_and_ends_with_the_same_files(tmp_path):
    write_features(config(tmp_path / "whole", flip=True), kl(), shapes())
    settings = {"tests": str(Path(__file__).parent), "threads": torch.get_num_threads(), "out": str(tmp_path / "cut")}
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(**settings)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in sorted((tmp_path / "cut").glob("[!.]*"))] == [
        "shard_00000.safetensors",
        "shard_00001.safetensors",
    ]
    with pytest.raises(DataError, match=r"index\.json.*`tokdyn features`"):
        LatentDataset(tmp_path / "cut")
    before = (tmp_path / "cut" / "shard_00001.safetensors").stat().st_mtime_ns
    report = write_features(config(tmp_path / "cut", flip=True), kl(), shapes())
    assert (report.count, report.shards, report.resumed) == (10, 3, 2)
    assert (tmp_path / "cut" / "shard_00001.safetensors").stat().st_mtime_ns == before
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_repeating_a_finished_run_writes_only_missing_and_damaged_shards(tmp_path):
    write_features(config(tmp_path), kl(), shapes())
    first = contents(tmp_path)
    assert write_features(config(tmp_path), kl(), shapes()).resumed == 3
    assert contents(tmp_path) == first
    (tmp_path / "shard_00000.safetensors").unlink()
    (tmp_path / "shard_00002.safetensors").write_bytes(first["shard_00002.safetensors"][:-9])
    assert write_features(config(tmp_path), kl(), shapes()).resumed == 1
    assert contents(tmp_path) == first


@pytest.mark.parametrize("settings", [{"seed": 1}, {"flip": True}, {"dtype": "bf16"}, {"scaling_factor": 3.0}])
def test_a_folder_with_other_latents_is_refused(tmp_path, settings):
    write_features(config(tmp_path), kl(), shapes())
    with pytest.raises(DataError, match=str(tmp_path)):
        write_features(config(tmp_path, **settings), kl(), shapes())
    (tmp_path / "index.json").unlink()
    with pytest.raises(DataError, match=r"shard_00000\.safetensors"):
        write_features(config(tmp_path, **settings), kl(), shapes())


def test_a_folder_with_latents_of_other_images_or_weights_is_refused(tmp_path):
    write_features(config(tmp_path), kl(), shapes())
    other = kl()
    next(other.parameters()).data.add_(1.0)
    for settings, vae, data in (
        ({}, other, shapes()),
        ({}, kl().bfloat16(), shapes()),
        ({}, kl(), ShapesDataset((16, 24), length=10, seed=1)),
        ({"shard_size": 5}, kl(), shapes()),
        ({"posterior": "mean"}, kl(), shapes()),
    ):
        with pytest.raises(DataError, match=str(tmp_path)):
            write_features(config(tmp_path, **settings), vae, data)


def test_a_folder_with_latents_of_another_precision_is_refused(tmp_path):
    """The weights are identified as they were loaded, so the type that they compute in counts by itself."""
    tiny().save_pretrained(tmp_path / "vae")
    settings = {"vae": str(tmp_path / "vae"), "device": "cpu"}
    write_features(config(tmp_path / "out", **settings))
    with pytest.raises(DataError, match=str(tmp_path / "out")):
        write_features(config(tmp_path / "out", vae_dtype="bf16", **settings))


def test_a_damaged_autoencoder_is_named(tmp_path, capfd):
    tiny().save_pretrained(tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"words"):
        weights.write_bytes(damaged)
        with pytest.raises(DataError, match=r"from .*vae"):
            write_features(config(tmp_path / "out", vae=str(tmp_path / "vae")))
    assert not (tmp_path / "out").exists()
    assert capfd.readouterr().err == ""


def test_without_the_hub_no_file_is_said_to_be_missing(tmp_path, monkeypatch, capfd):
    """diffusers reports a file that the hub cannot be asked for as one that does not exist."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="nobody/no-autoencoder") as raised:
        write_features(config(tmp_path / "out", vae="nobody/no-autoencoder"))
    assert "config.json" not in str(raised.value)
    assert not (tmp_path / "out").exists()
    assert capfd.readouterr().err == ""


def test_attempts_to_reach_the_hub_are_not_logged(caplog):
    client = logging.getLogger("huggingface_hub.utils._http")
    with quiet_diffusers():
        client.warning("retrying")
    assert not caplog.records
    client.warning("retrying")
    assert len(caplog.records) == 1


@pytest.mark.parametrize("vae_dtype", ["fp32", "bf16"])
def test_the_autoencoder_is_identified_by_its_weights_as_loaded(tmp_path, vae_dtype, monkeypatch, capfd):
    tiny().save_pretrained(tmp_path / "vae")
    capfd.readouterr()
    monkeypatch.chdir(tmp_path)
    write_features(config(tmp_path / "out", vae="vae", vae_dtype=vae_dtype))
    identity = LatentDataset(tmp_path / "out").index.vae
    assert identity.source == str(tmp_path / "vae")
    assert identity.sha256 == weights_digest(load_vae("vae"))
    assert capfd.readouterr().err == ""  # diffusers warns about casting


def test_wrong_settings_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    diffusers.UNet2DModel(
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=2,
        attention_head_dim=2,
    ).save_pretrained(tmp_path / "unet")
    tiny().save_pretrained(tmp_path / "tiny")
    for settings, values in (
        ({}, "vae"),
        ({"vae": str(tmp_path / "nothing")}, "nothing"),
        ({"vae": str(tmp_path / "unet")}, "UNet2DModel"),
        ({"vae": str(tmp_path / "tiny"), "channels": 1}, "3 channels.* 1.*channels=3"),
        ({"vae": str(tmp_path / "tiny"), "kind": "images"}, "kind=images.*path"),
    ):
        with pytest.raises(DataError, match=values):
            write_features(config(tmp_path / "out", **settings))
    for key, value in (("scaling_factor", 0), ("scaling_factor", math.nan), ("shift_factor", math.inf)):
        with pytest.raises(ValidationError):
            config(tmp_path / "out", **{key: value})
    with pytest.raises(InputError, match="device=abacus"):
        write_features(config(tmp_path / "out", vae=str(tmp_path / "tiny"), device="abacus"))
    with pytest.raises(OutputError, match=r"out=.*file"):
        write_features(config(tmp_path / "file"), tiny())
    assert not (tmp_path / "out").exists()


def test_latents_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(DataError, match="dtype=fp16"):
        write_features(config(tmp_path / "a", scaling_factor=1e8, dtype="fp16"), tiny())
    vae = tiny()
    next(vae.parameters()).data.fill_(float("nan"))
    with pytest.raises(DataError, match=r"torch\.float32"):
        write_features(config(tmp_path / "b"), vae)
