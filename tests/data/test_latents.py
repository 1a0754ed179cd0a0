"""Reading latents: scaling, flips, workers, and damage that is found."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.data.latents import config, kl, shapes, tiny
from tokdyn.data import BatchStream, DataConfig, LatentDataset, open_data, write_features
from tokdyn.data.vae import LatentScaling, decode, scaling_of
from tokdyn.errors import DataError


def test_scaling_can_be_replaced_and_undone(tmp_path):
    vae = tiny()
    write_features(config(tmp_path, scaling_factor=2.0, shift_factor=0.5), vae, shapes())
    data = LatentDataset(tmp_path)
    assert data.index.scaling == LatentScaling(factor=2.0, mean=(0.5,))
    images, _ = shapes().batch(range(10))
    latents, _ = data.batch(range(10))
    with torch.no_grad():
        expected = vae.decode(vae.encode(images).latents).sample.clamp(-1, 1)
    torch.testing.assert_close(decode(vae, latents, data.index.scaling), expected, atol=1e-4, rtol=1e-4)
    own = LatentScaling(factor=0.3, mean=(1.0, 2.0, 3.0, 4.0), std=(2.0, 3.0, 4.0, 5.0))
    torch.testing.assert_close(own.invert(own.apply(latents)), latents, atol=1e-5, rtol=1e-5)


def test_latents_stream_with_flips_in_worker_processes(tmp_path):
    write_features(config(tmp_path, flip=True), tiny())
    data = LatentDataset(tmp_path)
    stream = BatchStream(data, 4, seed=0, flip=True)
    plain, mirrored = data.batch(range(10))[0], data.batch(range(10), [True] * 10)[0]
    for step, (samples, _) in enumerate(stream.loader(0, 5, workers=2)):
        for sample, index, flip in zip(samples, stream.indices(step), stream.flips(step), strict=True):
            assert torch.equal(sample, (mirrored if flip else plain)[index])
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again.batch(range(10))[0], plain)


def test_latents_without_flipped_copies_cannot_be_flipped(tmp_path):
    write_features(config(tmp_path), tiny())
    data = LatentDataset(tmp_path)
    with pytest.raises(DataError, match="flip=true"):
        BatchStream(data, 4, seed=0, flip=True)
    with pytest.raises(DataError, match="flip=true"):
        open_data(DataConfig(kind="latents", path=str(tmp_path), flip=True))
    with pytest.raises(DataError, match="flip=true"):
        data.batch([0], [True])


def edit_index(folder: Path, **changes: object) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def flip_a_byte(folder: Path) -> None:
    path = folder / "shard_00001.safetensors"
    place = path.read_bytes().rindex(load_file(path)["latents"][2].numpy().tobytes())
    content = bytearray(path.read_bytes())
    content[place + 5] ^= 1
    path.write_bytes(content)


def change_a_label(folder: Path) -> None:
    path = folder / "shard_00001.safetensors"
    tensors = load_file(path)
    tensors["labels"][2] += 1
    save_file(tensors, path, {"fingerprint": json.loads((folder / "index.json").read_text())["fingerprint"]})


SECOND = "shard_00001.safetensors"
DAMAGE = {
    "cut short": (lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes()[:-5]), "shard_00001"),
    "not safetensors": (lambda f: (f / SECOND).write_bytes(b"abc"), "shard_00001"),
    "missing": (lambda f: (f / SECOND).unlink(), "shard_00001"),
    "another shard": (lambda f: (f / "shard_00002.safetensors").replace(f / SECOND), "shard_00001.*4 samples"),
    "other tensors": (lambda f: save_file({"x": torch.zeros(3)}, f / SECOND), "shard_00001"),
    "a flipped bit": (flip_a_byte, "shard_00001.* 2 "),
    "a wrong label": (change_a_label, "shard_00001.* 2 "),
    "no index": (lambda f: (f / "index.json").unlink(), r"index\.json"),
    "not JSON": (lambda f: (f / "index.json").write_text("{"), r"index\.json"),
    "another version": (lambda f: edit_index(f, version=2), r"index\.json.*\(version"),
    "an unknown key": (lambda f: edit_index(f, more=1), r"index\.json.*\(more"),
    "a wrong count": (lambda f: edit_index(f, count=11), " 11 "),
    "a wrong shape": (lambda f: edit_index(f, shape=[4, 8, 8]), "shard_00000"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_named(tmp_path, damage):
    write_features(config(tmp_path), tiny())
    inflict, values = DAMAGE[damage]
    inflict(tmp_path)
    with pytest.raises(DataError, match=values):
        LatentDataset(tmp_path).batch(range(10))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux to see what is mapped")
def test_shards_are_mapped_and_not_loaded(tmp_path):
    write_features(config(tmp_path), tiny())
    data = LatentDataset(tmp_path)
    for _ in range(2):
        assert str(tmp_path / "shard_00000.safetensors") in Path("/proc/self/maps").read_text()
        assert data[0][0].shape == data.shape  # reading leaves the file mapped


def test_latents_that_do_not_fit_the_recipe_are_refused(tmp_path):
    write_features(config(tmp_path), tiny())
    assert open_data(DataConfig(kind="latents", path=str(tmp_path), size=(8, 12), num_classes=10)).shape == (4, 8, 12)
    for settings, values in (
        ({"size": 8}, "8x12.*size=8"),
        ({"num_classes": 3}, " 10 .*num_classes=3"),
        ({"path": str(tmp_path / "nowhere")}, "nowhere"),
        ({"path": __file__}, r"\.py"),
        ({"path": None}, "kind=latents.*path"),
    ):
        with pytest.raises(DataError, match=values):
            open_data(DataConfig(**{"kind": "latents", "path": str(tmp_path), **settings}))


def test_scaling_of_published_families():
    assert scaling_of(kl()) == LatentScaling(factor=0.18215)
    assert scaling_of(tiny()) == LatentScaling()


def test_statistics_count_for_autoencoders_with_a_posterior_only():
    """The others apply the mean and deviation of their config themselves."""
    statistics = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    with_posterior, without = kl(**statistics), tiny()
    without.register_to_config(**statistics)
    assert scaling_of(with_posterior).mean == (0.1, 0.2, 0.3, 0.4)
    assert scaling_of(without) == LatentScaling()
