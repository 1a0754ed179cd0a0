"""Previews of a training run: files, reproducibility, and no effect on the run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokdyn import DCDiT, DiT
from tokdyn.diffusion.settings import Sampler
from tokdyn.recipe import Recipe
from tokdyn.train.preview import draw_preview

TINY = {"sample_size": 8, "hidden_size": 32, "depth": 1, "num_heads": 2, "num_classes": 4}


def recipe(kind: str, **sections: object) -> Recipe:
    """Make a recipe with the sections that a preview reads."""
    base = {
        "name": "tiny",
        "model": {"kind": kind, "name": "tiny/2" if kind == "dit" else "tiny"},
        "data": {"kind": "shapes", "size": 8},
        "training": {"steps": 1, "precision": "fp32"},
        "preview": {"images": 5, "sampler": Sampler(scheduler="ddim", steps=3)},
    }
    return Recipe(**{**base, **sections})


def model(kind: type, **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    made = kind(**{**TINY, "in_channels": 3, "patch_size": 2, **settings})
    made.final_layer.linear.weight.data.normal_(std=0.1)
    return made.train()


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_chunking_model_gets_samples_and_maps(tmp_path):
    network = model(DCDiT)
    state = torch.get_rng_state()
    draw_preview(network, recipe("dcdit"), tmp_path, 1200)
    assert names(tmp_path) == ["maps/step_0001200.png", "samples/step_0001200.png"]
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training


def test_several_budgets_are_rows_of_one_picture(tmp_path):
    network = model(DCDiT)
    preview = {"images": 3, "sampler": Sampler(scheduler="ddim", steps=2), "maps": False}
    (one,) = draw_preview(network, recipe("dcdit", preview=preview), tmp_path / "one", 1)
    (two,) = draw_preview(network, recipe("dcdit", preview={**preview, "tail_drops": (0.0, 0.6)}), tmp_path / "two", 1)
    with Image.open(one) as single, Image.open(two) as double:
        assert double.width > single.width


def test_dit_gets_samples_without_maps_and_always_the_same(tmp_path):
    network, settings = model(DiT), recipe("dit")
    first, second = (draw_preview(network, settings, tmp_path / name, 1) for name in "ab")
    assert [path.parent.name for path in first] == ["samples"]
    with Image.open(first[0]) as one, Image.open(second[0]) as two:
        assert np.array_equal(np.asarray(one), np.asarray(two))


@pytest.mark.parametrize("objective", [{"kind": "noise"}, {"kind": "flow"}])
def test_the_default_sampler_fits_the_objective(tmp_path, objective):
    network = model(DiT, learn_sigma=objective["kind"] == "noise")
    settings = recipe("dit", objective=objective, preview={"images": 1})
    assert draw_preview(network, settings, tmp_path, 1)[0].is_file()


def test_latents_without_their_autoencoder_are_shown_in_false_colours(tmp_path):
    network = model(DiT, in_channels=4)
    settings = recipe("dit", data={"kind": "latents", "path": str(tmp_path / "gone")})
    assert draw_preview(network, settings, tmp_path, 1)[0].is_file()
