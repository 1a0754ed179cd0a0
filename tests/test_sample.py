"""Sampling to files: what is written, what is continued, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from pydantic import ValidationError

from tokdyn import DCDiT, DiT
from tokdyn.cost import flops_per_image
from tokdyn.data.config import DataConfig
from tokdyn.data.features import FeaturesConfig, write_features
from tokdyn.data.vae import LatentScaling, decode, load_vae, scaling_of, weights_digest
from tokdyn.diffusion.objective import Objective
from tokdyn.diffusion.sampling import Sampler, generate
from tokdyn.errors import CheckpointError, DataError, InputError, OutputError, RecipeError, UnsupportedModelError
from tokdyn.recipe import load
from tokdyn.report.decoding import open_decoder
from tokdyn.report.pixels import to_pixels
from tokdyn.sample import SampleConfig, load_model, sample
from tokdyn.sample import run as runs
from tokdyn.sample.job import prepare
from tokdyn.train import checkpoints, train
from tokdyn.train.snapshot import save_model

TINY = {"sample_size": (6, 8), "in_channels": 3, "hidden_size": 32, "depth": 1, "num_heads": 2, "num_classes": 4}
NAMES = ("apple", "bear", "car", "dog")
FACTS = {
    "name": "tiny/run",
    "objective": {"kind": "noise"},
    "data": DataConfig(kind="shapes", num_classes=4).model_dump(mode="json"),
    "class_names": list(NAMES),
}
QUICK = {"steps": 3, "scheduler": "ddim", "device": "cpu"}


def tiny(seed: int, kind: type = DCDiT, **settings: object) -> torch.nn.Module:
    """A model with random weights, which says something other than zero."""
    torch.manual_seed(seed)
    model = kind(**{**TINY, "patch_size": 1, **settings})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A DC-DiT as training saves it."""
    save_model(tiny(0), tmp_path / "saved", FACTS)
    return tmp_path / "saved"


def png(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_grid_holds_the_images_and_json_the_settings(saved, tmp_path):
    result = sample(SampleConfig(model=str(saved), out=tmp_path / "out", count=6, batch_size=4, **QUICK))
    assert result.budgets[0].files == (tmp_path / "out" / "grid.png",)
    assert png(tmp_path / "out" / "grid.png").shape[2] == 3
    told = json.loads((tmp_path / "out" / "sample.json").read_text())
    assert told["settings"]["steps"] == 3
    assert told["model"]["class"] == "DCDiT"
    assert told["model"]["parameters"] == sum(p.numel() for p in tiny(0).parameters())
    assert told["used"] == {"scheduler": "ddim", "clip": True, "precision": "fp32", "device": "cpu", "latents": False}
    assert told["budgets"][0]["images_per_second"] > 0
    assert len(told["budgets"][0]["steps"]) == 3


def test_kept_share_and_flops_are_those_of_the_steps(saved, tmp_path):
    settings = {"guidance": 2.0, "uncond_tail_drop": 0.9, "guidance_interval": (0.5, 1.0), "count": 5, "batch_size": 2}
    result = sample(SampleConfig(model=str(saved), out=tmp_path / "out", **settings, **QUICK))
    model, objective, _ = load_model(saved)
    budget = result.budgets[0]
    made = generate(
        model,
        Sampler(steps=3, scheduler="ddim", guidance=2.0, uncond_tail_drop=0.9, guidance_interval=(0.5, 1.0), clip=True),
        objective,
        [0, 1, 2, 3, 0],
        range(5),
    )
    for step, record in zip(budget.steps, made.steps, strict=True):
        assert (step.uncond_kept is None) == (not step.level >= 0.5)
        counts = [record.counts.cond, *([record.counts.uncond] if record.guided else [])]
        assert [step.kept, step.uncond_kept][: len(counts)] == pytest.approx(
            [float(c.double().mean()) / 48 for c in counts]
        )
        each = [flops_per_image(model, count / 48) for branch in counts for count in branch.tolist()]
        assert step.gflops == pytest.approx(sum(each) / 5 / 1e9, rel=1e-6)  # the mean of the costs, image by image
        assert step.uncond_kept is None or step.uncond_kept < step.kept
    assert budget.tflops_per_image == pytest.approx(sum(step.gflops for step in budget.steps) / 1000)
    shares = [share for step in budget.steps for share in (step.kept, step.uncond_kept) if share is not None]
    assert budget.kept == pytest.approx(np.mean(shares))


def test_npz_has_the_layout_of_adm_and_the_same_images_as_a_folder(saved, tmp_path):
    settings = {"model": str(saved), "count": 5, "classes": "dog,1", "seed": 3, **QUICK}
    sample(SampleConfig(**settings, out=tmp_path / "npz", format="npz", batch_size=2))
    sample(SampleConfig(**settings, out=tmp_path / "folder", format="folder", batch_size=5))
    with np.load(tmp_path / "npz" / "samples.npz") as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
        assert list(arrays) == ["arr_0", "arr_1"]
    assert images.dtype == np.uint8
    assert images.shape == (5, 6, 8, 3)
    assert labels.tolist() == [3, 1, 3, 1, 3]
    files = sorted((tmp_path / "folder" / "images").iterdir())
    assert [file.name for file in files] == [f"{index:06d}.png" for index in range(5)]
    difference = np.abs(np.stack([png(file) for file in files]).astype(int) - images.astype(int))
    assert difference.max() <= 1  # batches of another size sum in another order
    assert not list(tmp_path.rglob("*.half"))


def test_folder_keeps_what_is_there_and_makes_what_is_missing(saved, tmp_path):
    settings = {"model": str(saved), "out": tmp_path, "format": "folder", **QUICK}
    sample(SampleConfig(**settings, count=3))
    files = [tmp_path / "images" / f"{index:06d}.png" for index in range(5)]
    third = png(files[2])
    files[2].unlink()
    files[0].write_bytes(b"kept as it is")
    result = sample(SampleConfig(**settings, count=5, batch_size=2))
    assert result.budgets[0].made == 3
    assert files[0].read_bytes() == b"kept as it is"
    assert np.abs(png(files[2]).astype(int) - third.astype(int)).max() <= 1
    assert all(file.is_file() for file in files)
    again = sample(SampleConfig(**settings, count=5))
    assert again.budgets[0].made == 0
    assert again.budgets[0].images_per_second is None


def test_a_continued_folder_tells_the_cost_of_all_its_images(saved, tmp_path):
    settings = {"model": str(saved), "format": "folder", "batch_size": 2, "guidance": 2.0, **QUICK}
    whole = sample(SampleConfig(**settings, out=tmp_path / "whole", count=7)).budgets[0]
    assert (whole.images, whole.made, whole.measured) == (7, 7, 7)
    sample(SampleConfig(**settings, out=tmp_path / "parts", count=2))
    for made, count in ((5, 7), (0, 7), (0, 3)):
        parts = sample(SampleConfig(**settings, out=tmp_path / "parts", count=count)).budgets[0]
        assert (parts.images, parts.made, parts.measured) == (count, made, 7)
        assert parts.kept == pytest.approx(whole.kept)
        assert parts.tflops_per_image == pytest.approx(whole.tflops_per_image)
        for one, other in zip(parts.steps, whole.steps, strict=True):
            assert (one.timestep, one.level) == (other.timestep, other.level)
            assert (one.kept, one.uncond_kept, one.gflops) == pytest.approx(
                (other.kept, other.uncond_kept, other.gflops)
            )
        told = json.loads((tmp_path / "parts" / "sample.json").read_text())["budgets"][0]
        assert told["kept"] == parts.kept


def interrupt(monkeypatch, batches: int) -> None:
    """Presses Ctrl-C once, after so many batches."""
    real, calls = runs.generate, []

    def generated(*args, **keywords):
        calls.append(None)
        if len(calls) == batches + 1:
            raise KeyboardInterrupt
        return real(*args, **keywords)

    monkeypatch.setattr(runs, "generate", generated)


def test_a_run_that_is_cut_off_leaves_what_its_images_cost(saved, tmp_path, monkeypatch):
    settings = {"model": str(saved), "format": "folder", "batch_size": 2, **QUICK}
    whole = sample(SampleConfig(**settings, out=tmp_path / "whole", count=6)).budgets[0]
    interrupt(monkeypatch, batches=2)
    with pytest.raises(KeyboardInterrupt):
        sample(SampleConfig(**settings, out=tmp_path / "cut", count=6))
    (told,) = json.loads((tmp_path / "cut" / "sample.json").read_text())["budgets"]
    assert (told["images"], told["made"], told["measured"]) == (4, 4, 4)
    rest = sample(SampleConfig(**settings, out=tmp_path / "cut", count=6)).budgets[0]
    assert (rest.images, rest.made, rest.measured) == (6, 2, 6)
    assert rest.kept == pytest.approx(whole.kept)


def test_an_archive_that_is_cut_off_is_not_there(saved, tmp_path, monkeypatch):
    interrupt(monkeypatch, batches=1)
    with pytest.raises(KeyboardInterrupt):
        sample(SampleConfig(model=str(saved), out=tmp_path / "out", format="npz", count=4, batch_size=2, **QUICK))
    assert list((tmp_path / "out").iterdir()) == []


def test_maps_of_a_complete_folder_are_kept_or_asked_for_in_vain(saved, tmp_path):
    settings = {"model": str(saved), "format": "folder", "count": 2, **QUICK}
    sample(SampleConfig(**settings, out=tmp_path / "out"))
    with pytest.raises(RecipeError, match="there already, so there is no trajectory to draw maps of"):
        sample(SampleConfig(**settings, out=tmp_path / "out", maps=True))
    sample(SampleConfig(**settings, out=tmp_path / "mapped", maps=True))
    again = sample(SampleConfig(**settings, out=tmp_path / "mapped", maps=True))
    assert again.budgets[0].files == (tmp_path / "mapped" / "images", tmp_path / "mapped" / "maps.png")


@pytest.mark.parametrize("content", ["[]", "{}", '{"identity": null}', "{"])
def test_images_beside_a_broken_record_are_not_continued(saved, tmp_path, content):
    settings = {"model": str(saved), "out": tmp_path, "format": "folder", "count": 1, **QUICK}
    sample(SampleConfig(**settings))
    (tmp_path / "sample.json").write_text(content)
    with pytest.raises(RecipeError, match=r"no sample\.json that says how"):
        sample(SampleConfig(**settings))


def test_damaged_weights_make_no_pictures(tmp_path):
    model = tiny(0)
    model.final_layer.linear.bias.data.fill_(float("nan"))
    save_model(model, tmp_path / "nan", FACTS)
    for form in ("grid", "folder", "npz"):
        with pytest.raises(CheckpointError, match="values that are not finite"):
            sample(SampleConfig(model=str(tmp_path / "nan"), out=tmp_path / form, format=form, count=2, **QUICK))
        assert not [file for file in (tmp_path / form).rglob("*") if file.suffix in (".png", ".npz", ".half")]


def test_out_that_is_a_file_is_refused_before_anything_is_made(saved, tmp_path):
    (tmp_path / "file").write_text("mine")
    for form in ("grid", "folder", "npz"):
        with pytest.raises(OutputError, match="cannot be a folder"):
            sample(SampleConfig(model=str(saved), out=tmp_path / "file" / "deep", format=form, count=1, **QUICK))


def test_the_home_folder_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert SampleConfig(model="x", out="~/pictures").out == tmp_path / "pictures"


@pytest.mark.parametrize("change", [{"steps": 4}, {"seed": 1}, {"tail_drop": 0.5}, {"classes": "apple"}])
def test_folder_of_other_images_is_not_continued(saved, tmp_path, change):
    settings = {"model": str(saved), "out": tmp_path / "out", "format": "folder", "count": 1, **QUICK}
    sample(SampleConfig(**settings))
    with pytest.raises(RecipeError, match=f"images made with another {next(iter(change))}: choose another out"):
        sample(SampleConfig(**{**settings, **change}))


def test_folder_of_other_weights_or_of_unknown_origin_is_not_continued(saved, tmp_path):
    settings = {"out": tmp_path / "out", "format": "folder", "count": 1, **QUICK}
    sample(SampleConfig(model=str(saved), **settings))
    save_model(tiny(1), tmp_path / "other", FACTS)
    with pytest.raises(RecipeError, match="another weights"):
        sample(SampleConfig(model=str(tmp_path / "other"), **settings))
    (tmp_path / "out" / "sample.json").unlink()
    with pytest.raises(RecipeError, match=r"no sample\.json that says how"):
        sample(SampleConfig(model=str(saved), **settings))


def test_class_folders_are_what_evaluation_reads(saved, tmp_path):
    settings = {"format": "folder", "class_folders": True, "count": 6, **QUICK}
    sample(SampleConfig(model=str(saved), out=tmp_path / "out", **settings))
    found = sorted(file.relative_to(tmp_path / "out" / "images").as_posix() for file in tmp_path.rglob("*.png"))
    assert found == ["0/000000.png", "0/000004.png", "1/000001.png", "1/000005.png", "2/000002.png", "3/000003.png"]


def test_several_budgets_start_from_the_same_seeds_and_are_shown_side_by_side(saved, tmp_path):
    settings = {"model": str(saved), "count": 3, **QUICK}
    result = sample(SampleConfig(**settings, out=tmp_path / "all", tail_drop="0,0.6", maps=True))
    assert [budget.tail_drop for budget in result.budgets] == [0.0, 0.6]
    assert result.budgets[1].kept < result.budgets[0].kept
    assert result.budgets[1].tflops_per_image < result.budgets[0].tflops_per_image
    assert {file.name for file in result.files} == {"budgets.png", "trajectory.png"}
    for name in ("grid.png", "maps.png"):
        assert png(tmp_path / "all" / "tail_drop_0.6" / name).size
    sample(SampleConfig(**settings, out=tmp_path / "one", tail_drop=0.6))
    assert np.array_equal(png(tmp_path / "one" / "grid.png"), png(tmp_path / "all" / "tail_drop_0.6" / "grid.png"))


def test_dit_samples_without_budgets_and_maps(tmp_path):
    save_model(tiny(0, DiT, patch_size=2), tmp_path / "dit", FACTS)
    settings = {"model": str(tmp_path / "dit"), "out": tmp_path / "out", "count": 2, **QUICK}
    budget = sample(SampleConfig(**settings, guidance=1.5)).budgets[0]
    assert budget.kept is None
    expected = 2 * flops_per_image(load_model(tmp_path / "dit")[0]) / 1e9
    assert all(step.gflops == pytest.approx(expected) for step in budget.steps)
    with pytest.raises(UnsupportedModelError, match="computes every token: there are no maps"):
        sample(SampleConfig(**settings, maps=True))
    for drops in ({"tail_drop": 0.5}, {"guidance": 2.0, "uncond_tail_drop": 0.5}):
        with pytest.raises(UnsupportedModelError, match="cannot drop any"):
            sample(SampleConfig(**{**settings, "out": tmp_path / "none"}, format="folder", **drops))
    assert not (tmp_path / "none").exists()


def test_flow_models_sample_with_euler(tmp_path):
    save_model(tiny(0, learn_sigma=False), tmp_path / "flow", {**FACTS, "objective": {"kind": "flow"}})
    result = sample(SampleConfig(model=str(tmp_path / "flow"), out=tmp_path / "out", count=2, steps=2, device="cpu"))
    assert result.used["scheduler"] == "euler"


def training_folder(root: Path, finished: bool) -> Path:
    """Two checkpoints with seeds 1 (weights) and 2 (averages), and seed 3 for the finished model."""

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


def test_weights_without_facts_get_the_objective_of_dit(tmp_path):
    tiny(0, learn_sigma=False).save_pretrained(tmp_path / "bare" / "model")
    _, objective, info = load_model(tmp_path / "bare")
    assert objective == Objective(learn_sigma=False)
    assert (info.name, info.data, info.class_names) == ("bare", None, ())


def test_what_cannot_be_loaded_is_named(tmp_path, saved):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "nothing")
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(CheckpointError, match="training folder without a finished model or a checkpoint"):
        load_model(tmp_path / "early")
    (saved / "tokdyn.json").write_text('{"objective": {"kind": "magic"}}')
    with pytest.raises(CheckpointError, match="does not describe an objective"):
        load_model(saved)
    for names in (5, "abcd", list("abcde")):
        (saved / "tokdyn.json").write_text(json.dumps({"class_names": names}))
        with pytest.raises(CheckpointError, match="does not list the 4 classes of the model"):
            load_model(saved)
    (saved / "tokdyn.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokdyn\.json is not readable JSON"):
        load_model(saved)
    (saved / "tokdyn.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a list, expected a JSON object"):
        load_model(saved)


def test_a_name_that_looks_like_a_number_is_a_name(tmp_path):
    """Folders called 1 to 4 are common; `classes=1` and `classes=1,2` must agree."""
    save_model(tiny(0), tmp_path / "saved", {**FACTS, "class_names": ["1", "2", "3", "4"]})
    for given, expected in (("1", (0,)), (1, (0,)), ("1,2", (0, 1)), ([4], (3,)), ("0", (0,)), ("none", (4,))):
        job = prepare(SampleConfig(model=str(tmp_path / "saved"), classes=given, device="cpu"))
        assert job.classes == expected


def test_the_name_of_a_run_does_not_lead_out_of_samples(tmp_path):
    for name in ("../../elsewhere", "/elsewhere", "elsewhere"):
        save_model(tiny(0), tmp_path / "saved", {**FACTS, "name": name})
        assert prepare(SampleConfig(model=str(tmp_path / "saved"), device="cpu")).out == Path("samples/elsewhere")


def test_too_large_a_batch_is_named(saved, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runs, "generate", full)
    with pytest.raises(InputError, match="2 images do not fit into the memory of cpu; lower batch_size"):
        sample(SampleConfig(model=str(saved), out=tmp_path / "out", count=4, batch_size=2, **QUICK))


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    """A tiny autoencoder: 3 channels at 12x16 to 4 channels at 6x8."""
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
    with pytest.raises(RecipeError, match=r"latents of 4 channels and nothing says which autoencoder.*give vae="):
        sample(SampleConfig(**settings))


@pytest.fixture
def latent_run(tmp_path: Path, vae: Path) -> Path:
    """A model trained for a step on latents that were written with a scaling of their own."""
    settings = {"kind": "shapes", "size": (16, 16), "length": 8, "scaling_factor": 2.0, "shift_factor": 0.25}
    write_features(FeaturesConfig(vae=str(vae), out=str(tmp_path / "latents"), **settings))
    words = ["model.hidden_size=32", "model.depth=1", "model.num_heads=2", "data.kind=latents", "data.size=null"]
    words += ["training.steps=1", "training.batch_size=4", "training.sample_every=null", "optimizer.warmup_steps=0"]
    words += ["chunking.budget_warmup_steps=0", f"data.path={tmp_path / 'latents'}", f"out={tmp_path / 'run'}"]
    train(load("demo", words))
    return tmp_path / "run"


def test_a_model_of_latents_knows_its_autoencoder_and_scaling(tmp_path, latent_run, vae, monkeypatch):
    shutil.rmtree(tmp_path / "latents")  # the model says it all
    tmp_path.joinpath("elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    job = prepare(SampleConfig(model=str(latent_run), device="cpu"))
    assert job.decoder.scaling == LatentScaling(factor=2.0, mean=(0.25,))
    assert weights_digest(job.decoder.vae) == weights_digest(load_vae(str(vae)))
    copy = tmp_path / "copy"
    shutil.copytree(vae, copy)
    moved = prepare(SampleConfig(model=str(latent_run), device="cpu", vae=str(copy)))
    assert moved.decoder.scaling == job.decoder.scaling  # of the data, whoever decodes them
    result = sample(SampleConfig(model=str(latent_run), out=tmp_path / "out", count=1, steps=1, format="npz"))
    with np.load(result.budgets[0].files[0]) as arrays:
        assert arrays["arr_0"].shape == (1, 16, 16, 3)


def test_an_autoencoder_that_has_changed_is_refused(tmp_path, latent_run, vae):
    network = AutoencoderKL.from_pretrained(vae)
    network.decoder.conv_in.weight.data.add_(1.0)
    network.save_pretrained(vae)
    with pytest.raises(RecipeError, match="is no longer the autoencoder that the training data were made with"):
        prepare(SampleConfig(model=str(latent_run), device="cpu"))
    shutil.rmtree(vae)
    with pytest.raises(DataError, match="No autoencoder can be loaded from"):
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
    with pytest.raises(RecipeError, match=r"trained on pixels \(shapes\); leave it out"):
        sample(SampleConfig(model=str(saved), vae=str(vae), **settings))
    save_model(tiny(0, in_channels=8), tmp_path / "wide", {**FACTS, "data": None})
    with pytest.raises(RecipeError, match="latents of 8 channels, but the autoencoder decodes 4"):
        sample(SampleConfig(model=str(tmp_path / "wide"), vae=str(vae), **settings))
    with pytest.raises(DataError, match="No autoencoder can be loaded"):
        sample(SampleConfig(model=str(tmp_path / "wide"), vae=str(tmp_path / "nowhere"), **settings))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"classes": "bare"}, RecipeError, r"did you mean bear\?"),
        ({"classes": "zzz"}, RecipeError, "known are apple, bear, car, dog"),
        ({"classes": 4}, RecipeError, "class 4 does not exist: the model knows 0 to 3"),
        ({"classes": ""}, RecipeError, "classes is empty"),
        ({"device": "toaster"}, InputError, "device=toaster cannot be used here"),
        ({"scheduler": "euler"}, RecipeError, "euler cannot sample a noise objective"),
        ({"steps": 2000}, RecipeError, "takes 1 to 1000 steps"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(saved, tmp_path, settings, error, words):
    asked = {"model": str(saved), "out": tmp_path / "out", "count": 1, "format": "folder", **QUICK, **settings}
    with pytest.raises(error, match=words):
        sample(SampleConfig(**asked))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"uncond_tail_drop": 0.9}, "no effect without guidance"),
        ({"class_folders": True}, "class_folders is for format=folder"),
        ({"columns": 3, "format": "npz"}, "columns is for format=grid"),
        ({"tail_drop": [0.3, 0.3]}, "the budget 0.3 is listed twice"),
        ({"tail_drop": "0.3,0.30000001"}, "the budget 0.3 is listed twice"),
        ({"tail_drop": []}, "no budget is given"),
        ({"guidance_interval": "0.2,0.8"}, "guidance_interval has no effect without guidance"),
        ({"guidance_channels": "three"}, "guidance_channels has no effect without guidance"),
        ({"map_images": 2}, "map_images has no effect without maps"),
        ({"guidance_interval": 0.3, "guidance": 2}, "two noise levels LOW,HIGH are needed, got 0.3"),
        ({"steps": 10**9}, "less than or equal to 100000"),
        ({"tail_drop": "0,1.5"}, "less than or equal to 1"),
        ({"guidance_interval": "0.9,0.1"}, "low then high"),
        ({"colour": 1}, "Extra inputs"),
    ],
)
def test_settings_without_effect_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        SampleConfig(model="x", **settings)


def test_settings_read_from_the_command_line():
    config = SampleConfig(model="x", tail_drop="0, 0.3", guidance_interval="0.1,0.7", classes="cat,3", guidance=2)
    assert config.tail_drop == (0.0, 0.3)
    assert config.guidance_interval == (0.1, 0.7)
    assert config.classes == ("cat", "3")
    assert SampleConfig(model="x", tail_drop=0.5, classes=7).classes == (7,)
    assert SampleConfig.model_validate_json(config.model_dump_json()) == config


def test_names_that_cannot_be_drawn_become_numbers(tmp_path):
    save_model(tiny(0), tmp_path / "saved", {**FACTS, "class_names": ["犬", "caf\udce9", "car", "dog"]})
    job = prepare(SampleConfig(model=str(tmp_path / "saved"), out=tmp_path / "out", count=4, device="cpu"))
    assert job.names == ["0", "1", "car", "dog"]
    assert prepare(job.config.model_copy(update={"classes": ("犬",)})).labels == [0] * 4


def test_no_class_is_a_class_too(saved, tmp_path):
    result = sample(
        SampleConfig(model=str(saved), out=tmp_path / "out", classes="none", count=1, format="npz", **QUICK)
    )
    with np.load(result.budgets[0].files[0]) as arrays:
        assert arrays["arr_1"].tolist() == [4]


def test_maps_of_a_model_without_routing_say_so():
    from tokdyn.report.maps import MapRecorder

    with pytest.raises(InputError, match="computes every token"):
        MapRecorder(3).maps()
