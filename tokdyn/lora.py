"""LoRA that belongs to the methods of a model: low-rank changes of the linear layers of its blocks (arXiv 2106.09685).

They are layers of peft, in an adapter of the name "tokdyn", beside which the model may have other adapters. They are
saved and loaded with the methods, disabled with them, and removed by `unwrap`. The weights of the base stay as they
are, so they may be quantised.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.errors import InputError

NAME = "tokdyn"
_PREFIX = "lora."
_HALVES = (torch.bfloat16, torch.float16)


def require_peft() -> None:
    """Raise an InputError that says what to install, if peft is missing."""
    if importlib.util.find_spec("peft") is None:
        raise InputError("LoRA needs peft, which is not installed: pip install 'tokdyn[lora]'.")


def linear_layers(model: nn.Module, blocks: Collection[nn.Module]) -> list[str]:
    """Return the names of the linear layers in some modules of a model, whatever adapters they have already."""
    inside = {id(module) for block in blocks for module in block.modules()}
    names: list[str] = []
    adapted: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(adapted) and adapted:
            continue  # what an adapter has put around or beside a layer
        if id(module) in inside and isinstance(_base(module), nn.Linear):
            names.append(name)
        if "base_layer" in module._modules:
            adapted = (*adapted, f"{name}.")
    return names


def add_lora(model: nn.Module, layers: Collection[str], rank: int, training: bool = True) -> None:
    """Put LoRA that changes nothing yet around layers of a model, in place. Its first factors are drawn at random.

    Args:
        model: the model, which keeps which of its parameters require gradients.
        layers: names of linear layers.
        rank: r; the change of a layer is the product of matrices (D_out, r) and (r, D_in).
        training: keep the matrices in fp32; otherwise in the type of the layers where that is a 16-bit one.

    Raises:
        InputError: peft is not installed, or there are no such layers.
    """
    require_peft()
    import peft

    missing = set(layers) - {name for name, module in model.named_modules() if isinstance(_base(module), nn.Linear)}
    if missing or not layers:
        what = f"no linear layer {min(missing)}" if missing else "no linear layers in its blocks"
        raise InputError(f"this {type(model).__name__} has {what}, so LoRA cannot be put there.")
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    kind = peft.tuners.tuners_utils.BaseTunerLayer
    active = {layer: layer.active_adapters for layer in model.modules() if isinstance(layer, kind)}
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(layers))
    with warnings.catch_warnings():  # of adapters that are there already
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        peft.inject_adapter_in_model(config, model, NAME)
    if hasattr(type(model), "_hf_peft_config_loaded"):  # diffusers then lets adapters be switched and fused
        vars(model)["_hf_peft_config_loaded"] = True
    for parameter, requires in required:
        parameter.requires_grad_(requires)
    for layer, names in active.items():  # which peft has changed
        layer._active_adapter = names
    for layer in _layers(model).values():
        layer._active_adapter = [*(_others(layer) if layer in active else ()), NAME]
        for matrix in (layer.lora_A[NAME], layer.lora_B[NAME]):
            half = matrix.weight.dtype in _HALVES and not training
            matrix.to(matrix.weight.dtype if half else torch.float32).requires_grad_(True)


def lora_rank(model: nn.Module) -> int | None:
    """Return the rank of a model's LoRA; None if it has none."""
    return next((int(layer.r[NAME]) for layer in _layers(model).values()), None)


def lora_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the matrices of a model's LoRA, as "lora.LAYER.A" (r, D_in) and "lora.LAYER.B" (D_out, r)."""
    return {
        f"{_PREFIX}{name}.{half}": getattr(layer, f"lora_{half}")[NAME].weight
        for name, layer in _layers(model).items()
        for half in ("A", "B")
    }


def layers_of(names: Collection[str]) -> list[str]:
    """Return the names of the layers that tensors of `lora_tensors` belong to; other tensors are left out."""
    return sorted({name.removeprefix(_PREFIX).rpartition(".")[0] for name in names if name.startswith(_PREFIX)})


def load_lora(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the values of `lora_tensors`, among others, into the LoRA of a model.

    Raises:
        RuntimeError: one is missing, is left over or has another shape.
    """
    own = lora_tensors(model)
    given = {name: value for name, value in tensors.items() if name.startswith(_PREFIX)}
    for name in sorted(own.keys() ^ given.keys()):
        raise RuntimeError(f"{name} is {'missing' if name in own else 'not expected'}")
    with torch.no_grad():
        for name, value in given.items():
            if value.shape != own[name].shape:
                raise RuntimeError(f"{name} is {tuple(value.shape)}, expected {tuple(own[name].shape)}")
            own[name].copy_(value)


def remove_lora(model: nn.Module) -> None:
    """Remove the LoRA of a model, if it has any, in place; other adapters stay as they are."""
    found = _layers(model)
    _refuse_fused(model, found)
    for name, layer in found.items():
        layer._active_adapter = _others(layer)  # so that peft activates no other one
        layer.delete_adapter(NAME)
        if not len(layer.lora_A):
            _put(model, name, layer.base_layer)
    configs = getattr(model, "peft_config", {})
    if found and configs.pop(NAME, None) is not None and not configs:
        del model.peft_config
        model.__dict__.pop("_hf_peft_config_loaded", None)


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Switch the LoRA of a model off while the context is open: its layers compute bit for bit as they did before.

    Raises:
        InputError: it is fused into the weights.
    """
    found = _layers(model)
    _refuse_fused(model, found)
    before = [(layer, layer._active_adapter) for layer in found.values()]
    for layer, _ in before:
        layer._active_adapter = _others(layer)
    try:
        yield
    finally:
        for layer, active in before:
            layer._active_adapter = active


@contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """Put the layers that have LoRA of methods and no other adapter in their own places while the context is open."""
    found = {name: layer for name, layer in _layers(model).items() if len(layer.lora_A) == 1}
    for name, layer in found.items():
        _put(model, name, layer.base_layer)
    try:
        yield
    finally:
        for name, layer in found.items():
            _put(model, name, layer)


def _layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers of peft that have LoRA of methods, by name."""
    if "peft" not in sys.modules:
        return {}
    return {name: each for name, each in model.named_modules() if NAME in (each._modules.get("lora_A") or ())}


def _base(module: nn.Module) -> nn.Module:
    """Return the layer inside of what adapters have put around it."""
    inside = module._modules.get("base_layer")
    return module if inside is None else _base(inside)


def _others(layer: Any) -> list[str]:
    """Return the other active adapters of a layer."""
    return [name for name in layer.active_adapters if name != NAME and name in layer.lora_A]


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another one of this name."""
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module


def _refuse_fused(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Refuse LoRA that is fused into the weights.

    Raises:
        InputError: it is.
    """
    if any(NAME in layer.merged_adapters for layer in layers.values()):
        raise InputError(
            f"the LoRA of the methods is fused into the weights of this {type(model).__name__}, so they cannot be "
            "disabled or removed; call unfuse_lora() first."
        )
