"""Every format is recognised by its tensor names, sized by its shapes and read back exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tokdyn.checkpoints import read, to_diffusers, to_facebook, to_official
from tokdyn.errors import CheckpointError
from tokdyn.models import DCDiT, DiT

SHAPES: list[dict[str, Any]] = [
    {},
    {"depth": 1},
    {"depth": 3, "mlp_ratio": 2.5, "learn_sigma": False, "in_channels": 3},
    {"sample_size": 12, "num_classes": 1},
    {"sample_size": (4, 6)},
    {"sample_size": (16, 4)},  # as many cells as an 8x8 grid: only the position table tells them apart
    {"hidden_size": 36, "num_heads": 3, "mlp_ratio": 3.7},
]
SCAFFOLDS = [
    *SHAPES,
    {"scaffold_width": 16},
    {"encoder_depth": 1, "decoder_depth": 3},
    {"encoder_depth": 4, "decoder_depth": 1, "scaffold_width": 32},
]


def geometry(settings: dict[str, Any]) -> tuple[int, tuple[int, int]]:
    size = settings.get("sample_size", 8)
    return settings.get("in_channels", 4), (size, size) if isinstance(size, int) else size


@pytest.mark.parametrize("settings", SCAFFOLDS, ids=str)
def test_official_weights(same: Callable[..., bool], dcdit: Callable[..., DCDiT], settings: dict[str, Any]) -> None:
    model = dcdit(**settings)
    found = read(to_official(model), num_heads=model.config["num_heads"])
    assert isinstance(found, DCDiT)
    assert same(model, found, *geometry(settings))
    for name in ("sample_size", "depth", "in_channels", "num_classes", "learn_sigma", "encoder_depth", "force_ends"):
        assert found.config[name] == model.config[name]


@pytest.mark.parametrize("settings", [*SHAPES, {"patch_size": 4}, {"patch_size": 1}], ids=str)
def test_facebook_weights(same: Callable[..., bool], dit: Callable[..., DiT], settings: dict[str, Any]) -> None:
    model = dit(**settings)
    found = read(to_facebook(model), num_heads=model.config["num_heads"])
    assert isinstance(found, DiT)
    assert same(model, found, *geometry(settings))
    assert found.config["patch_size"] == model.config["patch_size"]


@pytest.mark.parametrize("settings", [{}, {"depth": 1, "patch_size": 4}, {"learn_sigma": False}], ids=str)
def test_diffusers_weights(same: Callable[..., bool], dit: Callable[..., DiT], settings: dict[str, Any]) -> None:
    model = dit(timestep_shift=1, mlp_norm_eps=1e-5, **settings)
    written = to_diffusers(model)
    assert same(model, read(written, num_heads=4, sample_size=8))
    assert same(model, read({**written, "pos_embed.pos_embed": model.pos_embed}, num_heads=4, sample_size=(8, 8)))


@pytest.mark.parametrize(
    "settings",
    [{"router": "cosine"}, {"router": "random"}, {"patch_size": 2}, {"sigma": None}],
    ids=str,
)
def test_own_state_dict(same: Callable[..., bool], dcdit: Callable[..., DCDiT], settings: dict[str, Any]) -> None:
    model = dcdit(**settings)
    unseen = {name: settings[name] for name in settings if name != "router"}
    found = read(model.state_dict(), num_heads=4, force_ends=True, **unseen)
    assert same(model, found)
    assert found.config["router"] == model.config["router"]


@pytest.mark.parametrize("wrap", ["module.{}", "_orig_mod.{}", "module._orig_mod._fsdp_wrapped_module.{}"])
def test_prefixes_of_wrappers(same: Callable[..., bool], dcdit: Callable[..., DCDiT], wrap: str) -> None:
    model = dcdit()
    written = {wrap.format(name): tensor for name, tensor in to_official(model).items()}
    assert same(model, read(written, num_heads=4))
    inside = {name.replace("layers.", "layers._fsdp_wrapped_module."): value for name, value in written.items()}
    # FSDP wraps blocks, so its name also occurs inside of names: layers.0._fsdp_wrapped_module.attn
    inside = {name.replace("._fsdp_wrapped_module.0.", ".0._fsdp_wrapped_module."): v for name, v in inside.items()}
    assert same(model, read(inside, num_heads=4))


def test_half_precision_weights_become_fp32(dcdit: Callable[..., DCDiT]) -> None:
    model = dcdit(sample_size=(4, 6))
    found = read({name: tensor.bfloat16() for name, tensor in to_official(model).items()}, num_heads=4)
    assert {tensor.dtype for tensor in found.state_dict().values()} == {torch.float32}
    assert tuple(found.config["sample_size"]) == (4, 6)


def test_defaults_of_official_weights(dcdit: Callable[..., DCDiT]) -> None:
    small, large = to_official(dcdit()), to_official(dcdit(sample_size=64, depth=1))
    assert read(small, num_heads=4).config["sigma"] == 1.0
    assert read(large, num_heads=4).config["sigma"] == 2.0
    given = read(large, num_heads=2, sigma=1.5, target=16.0, force_ends=False)
    assert (given.config["sigma"], given.config["num_heads"], given.config["target"]) == (1.5, 2, 16.0)
    assert not given.config["force_ends"]


def test_own_weights_have_the_defaults_of_the_class(dcdit: Callable[..., DCDiT]) -> None:
    """Even on a grid of 64x64; only official weights of that size were trained with a wider kernel."""
    model = dcdit(sample_size=64, depth=1)
    assert read(model.state_dict(), num_heads=4).config["sigma"] == model.config["sigma"] == 1.0


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_heads_of_published_widths(width: int, heads: int) -> None:
    with torch.device("meta"):
        shapes = DiT(hidden_size=width, depth=1, num_heads=1, num_classes=1, sample_size=2).state_dict()
    found = read({name: torch.zeros(tensor.shape) for name, tensor in shapes.items()})
    assert found.config["num_heads"] == heads


def test_position_tables_of_another_kind_are_kept(dit: Callable[..., DiT]) -> None:
    written = to_facebook(dit())
    written["pos_embed"] = torch.randn(written["pos_embed"].shape)
    found = read(written, num_heads=4)
    assert torch.equal(found.pos_embed, written["pos_embed"])
    assert not found.pos_embed.requires_grad
    written["pos_embed"] = torch.randn(1, 24, 32)
    with pytest.raises(CheckpointError, match=r"24 .*sample_size=\(rows, columns\)"):
        read(written, num_heads=4)
    assert read(written, num_heads=4, sample_size=(8, 12)).config["sample_size"] == (8, 12)


def test_sit_has_to_be_given(dit: Callable[..., DiT], tmp_path: Any) -> None:
    path = tmp_path / "SiT-XL-2-256x256.pt"
    torch.save(to_facebook(dit()), path)
    with pytest.raises(CheckpointError, match=r"SiT or DiT.* kind"):
        read(path, num_heads=4)
    assert isinstance(read(path, kind="sit", num_heads=4), DiT)
    assert isinstance(read(path, kind="dit", num_heads=4), DiT)


def test_models_that_other_code_cannot_compute_are_refused(
    dit: Callable[..., DiT], dcdit: Callable[..., DCDiT]
) -> None:
    with pytest.raises(CheckpointError, match="router='spatial_predictability'"):
        to_official(dcdit(router="cosine"))
    with pytest.raises(CheckpointError, match="patch_size=1"):
        to_official(dcdit(patch_size=2))
    with pytest.raises(CheckpointError, match="timestep_shift=0"):
        to_facebook(dit(timestep_shift=1))
    with pytest.raises(CheckpointError, match="approximate=True"):
        to_diffusers(dit())
    assert len(to_diffusers(dit(), approximate=True)) > 0
    with pytest.raises(CheckpointError, match="square grid"):
        to_diffusers(dit(timestep_shift=1, sample_size=(4, 8)))
