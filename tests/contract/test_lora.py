"""LoRA that belongs to the methods of a model: added, saved with them in one file, disabled and removed with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tokdyn
from tests.contract.ecosystem import predict
from tests.contract.models import TINY
from tests.contract.test_integration_lora import adapted
from tokdyn import Chunking, TokenMerge
from tokdyn.adapters import adapter_for
from tokdyn.attach import add_lora, linear_layers, lora_tensors
from tokdyn.errors import CheckpointError, InputError

FLUX = "FluxTransformer2DModel"
FAMILIES = [
    FLUX,
    "SD3Transformer2DModel",
    "WanTransformer3DModel",
    "ZImageTransformer2DModel",
    "PixArtTransformer2DModel",
]


def with_lora(name: str, rank: int = 2, model: Any = None) -> Any:
    """A model with Chunking whose LoRA and residual projection have an effect."""
    torch.manual_seed(1)
    student = tokdyn.wrap(TINY[name].build() if model is None else model, [Chunking(target=2)])
    blocks = [block for each in adapter_for(student).blocks for block in student.get_submodule(each.path).children()]
    add_lora(student, linear_layers(student, blocks), rank)
    parts = nn.ModuleList(part for _, part in tokdyn.parts(student) if part is not None)
    with torch.no_grad():
        for parameter in (*lora_tensors(student).values(), *parts.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return student.eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_saved_with_the_methods_in_one_file(name: str, tmp_path: Path) -> None:
    """Whoever loads it gets the same predictions; disabled and unwrapped, the model is as it was, bit for bit."""
    base = TINY[name].build().eval()
    plain, before = predict(base, name), state(base)
    modules = [(path, type(module)) for path, module in base.named_modules()]
    student = with_lora(name)
    expected = predict(student, name)
    assert tokdyn.save(student, tmp_path / "methods.safetensors") == tmp_path / "methods.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == ["methods.safetensors"]
    tokdyn.load(base, tmp_path / "methods.safetensors")
    assert torch.equal(predict(base, name), expected)
    assert not torch.equal(expected, plain)
    with tokdyn.disabled(base):
        assert torch.equal(predict(base, name), plain)
    assert torch.equal(predict(base, name), expected)
    tokdyn.unwrap(base)
    assert torch.equal(predict(base, name), plain)
    assert [(path, type(module)) for path, module in base.named_modules()] == modules
    assert {name: value.tolist() for name, value in state(base).items()} == {n: v.tolist() for n, v in before.items()}
    assert not hasattr(base, "peft_config")


@torch.no_grad()
def test_methods_without_lora_fit_into_one_file_too(tmp_path: Path) -> None:
    student = tokdyn.wrap(TINY[FLUX].build().eval(), [Chunking(target=2), TokenMerge(where="mlp")])
    tokdyn.save(student, tmp_path / "folder")
    tokdyn.save(student, tmp_path / "one.safetensors")
    found = [tokdyn.load(TINY[FLUX].build().eval(), tmp_path / name) for name in ("folder", "one.safetensors")]
    assert torch.equal(*(predict(model, FLUX) for model in found))
    bare = tokdyn.wrap(TINY[FLUX].build().eval(), [TokenMerge(where="mlp")])
    tokdyn.load(TINY[FLUX].build(), tokdyn.save(bare, tmp_path / "bare.safetensors"))


@torch.no_grad()
def test_adapters_of_others_stay() -> None:
    """One that was there before keeps acting with the methods disabled and after they are gone."""
    styled = adapted(TINY[FLUX].build(), FLUX).eval()
    expected, keys = predict(styled, FLUX), set(styled.state_dict())
    student = with_lora(FLUX, model=styled)
    assert not torch.equal(predict(student, FLUX), expected)
    with tokdyn.disabled(student):
        assert torch.equal(predict(student, FLUX), expected)
    student.set_adapters(["style"])  # which leaves the other one out
    without = predict(student, FLUX)
    student.set_adapters(["style", "tokdyn"])
    assert not torch.equal(predict(student, FLUX), without)
    tokdyn.unwrap(student)
    assert torch.equal(predict(student, FLUX), expected)
    assert set(student.state_dict()) == keys
    assert set(student.peft_config) == {"style"}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Already found a .peft_config")  # by peft
def test_an_adapter_that_comes_later_acts_beside_it() -> None:
    student = with_lora(FLUX)
    alone = predict(student, FLUX)
    adapted(student, FLUX)
    student.set_adapters(["tokdyn", "style"])
    assert not torch.equal(predict(student, FLUX), alone)
    student.delete_adapters("style")
    assert torch.equal(predict(student, FLUX), alone)


@torch.no_grad()
def test_the_model_itself_is_saved_without_it(tmp_path: Path) -> None:
    base = TINY[FLUX].build().eval()
    plain = predict(base, FLUX)
    student = with_lora(FLUX, model=base)
    expected = predict(student, FLUX)
    student.save_pretrained(tmp_path / "model")
    assert torch.equal(predict(student, FLUX), expected)
    again = type(TINY[FLUX].build()).from_pretrained(tmp_path / "model").eval()
    assert torch.equal(predict(again, FLUX), plain)


@torch.no_grad()
def test_layerwise_casting_keeps_its_precision() -> None:
    """As it keeps that of routers: only the model's own weights are stored in eight bits."""
    student = with_lora(FLUX)
    student.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert {value.dtype for value in lora_tensors(student).values()} == {torch.float32}
    assert torch.isfinite(predict(student, FLUX)).all()


@torch.no_grad()
def test_what_is_fused_can_be_neither_disabled_nor_removed() -> None:
    student = with_lora(FLUX)
    expected = predict(student, FLUX)
    student.fuse_lora()
    for act in (lambda: tokdyn.disabled(student).__enter__(), lambda: tokdyn.unwrap(student)):
        with pytest.raises(InputError, match="unfuse_lora"):
            act()
    student.unfuse_lora()
    torch.testing.assert_close(predict(student, FLUX), expected, rtol=0, atol=2e-5)
    tokdyn.unwrap(student)


def test_it_follows_the_type_of_the_model_when_it_is_loaded(tmp_path: Path) -> None:
    tokdyn.save(with_lora(FLUX), tmp_path / "one.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        model = tokdyn.load(TINY[FLUX].build().to(dtype), tmp_path / "one.safetensors")
        assert {value.dtype for value in lora_tensors(model).values()} == {dtype}


def test_which_parameters_require_gradients_stays(tmp_path: Path) -> None:
    tokdyn.save(with_lora(FLUX), tmp_path / "one.safetensors")
    model = TINY[FLUX].build()
    model.proj_out.requires_grad_(False)
    required = {name: value.requires_grad for name, value in model.named_parameters()}
    tokdyn.unwrap(tokdyn.load(model, tmp_path / "one.safetensors"))
    assert {name: value.requires_grad for name, value in model.named_parameters()} == required


def test_damaged_files_are_refused_and_leave_the_model_alone(tmp_path: Path) -> None:
    path = tokdyn.save(with_lora(FLUX), tmp_path / "one.safetensors")
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["tokdyn"])
    assert content["lora"] == {"rank": 2}
    layer = next(name for name in tensors if name.startswith("lora.")).removesuffix(".A")
    without = {name: value for name, value in tensors.items() if name != f"{layer}.B"}
    renamed = {name.replace("lora.transformer_blocks", "lora.elsewhere"): value for name, value in tensors.items()}
    wrong: list[tuple[Any, dict[str, Tensor], str]] = [
        (content, without, r"\.B"),
        (content, renamed, "elsewhere"),
        (content, {name: value for name, value in tensors.items() if not name.startswith("lora.")}, "LoRA|lora"),
        (content, {**tensors, f"{layer}.A": torch.zeros(3, 32)}, "rank 2"),
        (content, {**tensors, "lora.proj_out.C": torch.zeros(2, 2)}, r"proj_out\.A"),
        ({**content, "lora": {"rank": 2**40}}, tensors, "rank"),
        ({**content, "lora": {"rank": True}}, tensors, "rank"),
        ({**content, "lora": [2]}, tensors, "rank"),
        ([], tensors, "settings"),
        ({**content, "model": "SD3Transformer2DModel"}, tensors, "SD3Transformer2DModel"),
    ]
    for settings, held, match in wrong:
        save_file(held, path, {"tokdyn": json.dumps(settings)})
        model = TINY[FLUX].build()
        with pytest.raises(CheckpointError, match=match):
            tokdyn.load(model, path)
        assert not any("lora" in name or name.startswith("tokdyn") for name, _ in model.named_modules())
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="settings"):
        tokdyn.load(TINY[FLUX].build(), path)
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"one\.safetensors"):
        tokdyn.load(TINY[FLUX].build(), path)
    with pytest.raises(CheckpointError, match=r"missing\.safetensors"):
        tokdyn.load(TINY[FLUX].build(), tmp_path / "missing.safetensors")


def test_peft_is_asked_for_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tokdyn.save(with_lora(FLUX), tmp_path / "one.safetensors")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    model = TINY[FLUX].build()
    with pytest.raises(InputError, match=r"pip install 'tokdyn\[lora\]'"):
        tokdyn.load(model, path)
    assert not hasattr(model, "tokdyn")
