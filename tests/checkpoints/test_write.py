"""Written models are read back exactly, in every sequence of layouts, and load in the code they are written for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file

import tokdyn
from tokdyn.checkpoints import read
from tokdyn.checkpoints.formats import Layout
from tokdyn.checkpoints.writer import write
from tokdyn.errors import CheckpointError, OutputError
from tokdyn.models import DCDiT, DiT

Make = Callable[..., Any]
PLACES: dict[Layout, str] = {
    "diffusers": "diffusers", "tokdyn": "own", "official": "dcdit.safetensors", "facebook": "dit.safetensors",
}  # fmt: skip
DIT: tuple[Layout, ...] = ("diffusers", "tokdyn", "facebook")
DCDIT: tuple[Layout, ...] = ("tokdyn", "official")


def chain(model: Any, layouts: tuple[Layout, ...], folder: Path) -> Any:
    """Write and read a model in one layout after the other."""
    for number, layout in enumerate(layouts):
        place = folder / str(number) / PLACES[layout]
        model = read(write(model, place, layout).place)
    return model


@pytest.mark.parametrize("first", DIT)
@pytest.mark.parametrize("second", DIT)
@pytest.mark.parametrize("settings", [{}, {"learn_sigma": False, "in_channels": 3, "num_classes": 1}], ids=str)
def test_dit_through_two_layouts(
    dit: Make, same: Make, tmp_path: Path, first: Layout, second: Layout, settings: dict[str, Any]
) -> None:
    model = dit(**settings)
    found = chain(model, (first, second), tmp_path)
    assert isinstance(found, DiT)
    assert same(model, found, channels=model.config.in_channels)
    assert _settings(found) == _settings(model)


@pytest.mark.parametrize("layout", [("diffusers", "tokdyn", "diffusers"), ("tokdyn", "diffusers")], ids=str)
def test_dit_that_computes_like_diffusers(dit: Make, same: Make, tmp_path: Path, layout: tuple[Layout, ...]) -> None:
    model = dit(timestep_shift=1, mlp_norm_eps=1e-5)
    found = chain(model, layout, tmp_path)
    assert same(model, found)
    assert _settings(found) == _settings(model)


@pytest.mark.parametrize("first", DCDIT)
@pytest.mark.parametrize("second", DCDIT)
@pytest.mark.parametrize("settings", [{}, {"force_ends": False, "target": 9.0, "sigma": 3.0}], ids=str)
def test_dcdit_through_two_layouts(
    dcdit: Make, same: Make, tmp_path: Path, first: Layout, second: Layout, settings: dict[str, Any]
) -> None:
    model = dcdit(**settings)
    found = chain(model, (first, second), tmp_path)
    assert isinstance(found, DCDiT)
    assert found.config.target == model.config.target
    assert _settings(found) == _settings(model) | {"scaffold_width": 8}  # inferred where the model has None


def test_diffusers_loads_its_layout(dit: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """fp32; the two implementations add in different orders."""
    model = dit(timestep_shift=1, mlp_norm_eps=1e-5)
    written = write(model, tmp_path / "there", "diffusers")
    stock = DiTTransformer2DModel.from_pretrained(written.place).eval()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 5])
    with torch.no_grad():
        found = stock(x, timestep=t, class_labels=y).sample
        torch.testing.assert_close(model(x, timestep=t, class_labels=y).sample, found, atol=1e-5, rtol=1e-5)
    assert written.notes == ()


def test_facebook_and_diffusers_layouts_agree_under_either_function(dit: Make, tmp_path: Path) -> None:
    """Both layouts hold one set of weights: read as facebook's DiT or as diffusers' DiT, they give equal outputs."""
    model = dit()
    facebook = write(model, tmp_path / "dit.safetensors", "facebook").place
    written = write(model, tmp_path / "there", "diffusers")
    assert len(written.notes) == 1
    stock = DiTTransformer2DModel.from_pretrained(written.place).eval()  # skips the note in config.json
    assert "_tokdyn" in json.loads((written.place / "config.json").read_text())
    plain = tmp_path / "stock"  # diffusers copies the note, which no longer counts in what it saved
    stock.save_pretrained(plain)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 5])

    def out(found: Any) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = found(x, timestep=t, class_labels=y).sample
        return result

    own = {"timestep_shift": 0, "mlp_norm_eps": 1e-6}
    theirs = {"timestep_shift": 1, "mlp_norm_eps": 1e-6}  # norm_eps as written
    expected = out(read(facebook))
    for folder in (written.place, plain):
        torch.testing.assert_close(out(read(folder, **own)), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out(read(folder, **theirs)), out(stock), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out(read(facebook, **theirs)), out(stock), atol=1e-5, rtol=1e-5)
    assert torch.equal(out(read(written.place)), expected)  # because of the note
    torch.testing.assert_close(out(read(plain)), out(stock), atol=1e-5, rtol=1e-5)  # like diffusers
    assert not torch.allclose(expected, out(stock), atol=1e-4)  # the two functions do differ


def test_half_precision_tensors(dit: Make, tmp_path: Path) -> None:
    model = dit()
    for layout in DIT:
        written = write(model, tmp_path / layout / PLACES[layout], layout, torch.bfloat16)
        found = read(written.place).state_dict()
        assert all(torch.equal(found[name], value.bfloat16().float()) for name, value in _trained(model))
        assert next(model.parameters()).dtype == torch.float32


def test_wrapped_model_keeps_its_methods_in_a_tokdyn_folder(dit: Make, same: Make, tmp_path: Path) -> None:
    model = tokdyn.wrap(dit(), [tokdyn.TokenMerge(ratio=0.5), tokdyn.DynamicWidth(target=0.5)])
    written = write(model, tmp_path / "own", "tokdyn", facts={"name": "here"})
    names = {"config.json", "diffusion_pytorch_model.safetensors", "tokdyn.json", "tokdyn.safetensors"}
    assert {path.name for path in written.files} == names | {"tokdyn_config.json"}
    again = read(written.place)
    tokdyn.load(again, written.place)
    assert same(model, again)
    with pytest.raises(CheckpointError, match=r"facebook .*to=tokdyn"):
        write(model, tmp_path / "x.safetensors", "facebook")


@pytest.mark.parametrize(
    ("settings", "to", "message"),
    [
        ({"timestep_shift": 1}, "facebook", "timestep_shift=0"),
        ({"timestep_map": (-0.001, 1.0)}, "facebook", r"timestep_map=\(1.0, 0.0\)"),
        ({"timestep_map": (-0.001, 1.0)}, "diffusers", r"timestep_map=\(1.0, 0.0\)"),
        ({"mlp_ratio": 2.0}, "diffusers", "mlp_ratio=4.* 2"),
        ({"sample_size": (8, 16)}, "diffusers", "square grid"),
        ({}, "official", "official .*DCDiT.* DiT"),
    ],
    ids=str,
)
def test_layouts_refuse_dits_they_cannot_hold(
    dit: Make, tmp_path: Path, settings: Any, to: Layout, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write(dit(**settings), tmp_path / PLACES[to], to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "to", "message"),
    [
        ({"router": "cosine"}, "official", "router='spatial_predictability'"),
        ({"patch_size": 2}, "official", "patch_size=1"),
        ({"position_scale": 0.5}, "official", "position_scale=1.0"),
        ({"condition_adaptor": True}, "official", "condition_adaptor=False"),
        ({}, "facebook", "facebook .*DiT.* DCDiT"),
        ({}, "diffusers", "diffusers .*DiT.* DCDiT"),
    ],
    ids=str,
)
def test_layouts_refuse_dcdits_they_cannot_hold(
    dcdit: Make, tmp_path: Path, settings: Any, to: Layout, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write(dcdit(**settings), tmp_path / PLACES[to], to)
    assert not list(tmp_path.iterdir())


def test_differences_from_the_official_code_are_noted(dcdit: Make, tmp_path: Path) -> None:
    written = write(dcdit(force_ends=False, sigma=None), tmp_path / "x.safetensors", "official")
    assert len(written.notes) == 2
    assert write(dcdit(), tmp_path / "y.safetensors", "official").notes == ()


def test_existing_wrong_and_unwritable_places_are_refused(
    dit: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file.safetensors").write_text("")
    with pytest.raises(OutputError, match="there"):
        write(dit(), tmp_path / "there", "tokdyn")
    with pytest.raises(OutputError, match=r"file.safetensors"):
        write(dit(), tmp_path / "file.safetensors", "facebook")
    with pytest.raises(OutputError, match=r"file.pt .* \.safetensors"):
        write(dit(), tmp_path / "file.pt", "facebook")
    with pytest.raises(OutputError, match=r"file.safetensors.below"):
        write(dit(), tmp_path / "file.safetensors" / "below", "diffusers")
    monkeypatch.setattr("tokdyn.checkpoints.writer.save_file", _full)
    with pytest.raises(OutputError, match="No space left"):
        write(dit(), tmp_path / "new", "diffusers")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.safetensors", "there"]  # no partial files


def test_eight_bits_are_read_back_to_half_a_step(dcdit: Make, tmp_path: Path) -> None:
    model = dcdit(hidden_size=64, num_heads=4)
    place = write(model, tmp_path / "small", "tokdyn", torch.int8).place
    found = read(place)
    assert isinstance(found, DCDiT)
    assert found.config.target == model.config.target
    rounded = 0
    for name, tensor in model.state_dict().items():
        error = (found.state_dict()[name] - tensor).abs()
        if name.startswith("chunking."):
            assert not error.any(), name  # a router decides by small differences
        elif tensor.dim() > 1 and len(tensor) > 1 and tensor.numel() >= 1024:
            step = tensor.flatten(1).abs().amax(1) / 127
            assert (error.flatten(1).amax(1) <= 0.501 * step).all(), name
            rounded += tensor.numel()
        else:
            assert torch.equal(found.state_dict()[name], tensor.half().float()), name
    assert rounded > 0.8 * sum(parameter.numel() for parameter in model.parameters())
    sizes = [sum(f.stat().st_size for f in each.glob("*.safetensors")) for each in (place, _written(model, tmp_path))]
    assert sizes[0] < 0.8 * sizes[1]  # the router, which stays in fp32, is large in a model as small as this
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 5])
    with torch.no_grad():
        one, other = (each(x, timestep=t, class_labels=y).sample for each in (model, found))
    assert 0 < (one - other).norm() < 0.05 * one.norm()


def test_eight_bits_are_refused_where_nothing_could_read_them(dit: Make, tmp_path: Path) -> None:
    for layout in ("diffusers", "facebook"):
        with pytest.raises(CheckpointError, match="eight bits"):
            write(dit(), tmp_path / PLACES[layout], layout, torch.int8)
    with pytest.raises(CheckpointError, match="eight bits"):
        write(tokdyn.wrap(dit(), [tokdyn.DepthSkip(blocks=(0,))]), tmp_path / "own", "tokdyn", torch.int8)
    place = write(dit(), tmp_path / "own", "tokdyn", torch.int8).place / "diffusion_pytorch_model.safetensors"
    tensors = load_file(place)
    (name, *_) = (name for name in tensors if name.endswith(".row_scale"))
    save_file({**tensors, name: tensors[name][1:]}, place)
    with pytest.raises(CheckpointError, match=name.removesuffix(".row_scale")):
        read(place.parent)


def _written(model: Any, folder: Path) -> Path:
    return write(model, folder / "half", "tokdyn", torch.float16).place


def _full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def _settings(model: Any) -> dict[str, Any]:
    plain = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}


def _trained(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [(name, value) for name, value in model.named_parameters() if value.requires_grad]
