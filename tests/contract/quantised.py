"""Models whose weights are stored in four or eight bits, by each library that does so on a CPU, for tests.

The libraries need not be installed: torchao, bitsandbytes, gguf and optimum-quanto. A test that asks for a missing one
is skipped. Casting in storage needs diffusers alone.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.contract.kit import of_diffusers
from tests.contract.models import TINY

Quantise = Callable[[nn.Module], nn.Module]
"""Quantises the linear layers of a model, in place."""


def library(name: str) -> Any:
    """An optional library; some warn or print when they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def _torchao(config: str) -> Quantise:
    def quantise(model: nn.Module) -> nn.Module:
        torchao = library("torchao.quantization")
        torchao.quantize_(model, getattr(torchao, config)())
        return model

    return quantise


def _replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Linear | None]) -> nn.Module:
    """Put other layers in the place of linear ones, found as these libraries find them.

    Layers of modules that a model keeps in fp32 stay as they are, as in `from_pretrained`.
    """

    def replace(parent: nn.Module) -> int:
        count = 0
        for name, child in list(parent.named_children()):
            if name in kept:
                continue
            if isinstance(child, nn.Linear) and (layer := make(child)) is not None:
                layer.bias = child.bias
                parent.add_module(name, layer.train(child.training).requires_grad_(False))
                count += 1
            else:
                count += replace(child)
        return count

    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    if not replace(model):
        pytest.skip(f"no layer of the tiny {type(model).__name__} has a size that can be quantised")
    return model


def _bitsandbytes(bits: int) -> Quantise:
    def quantise(model: nn.Module) -> nn.Module:
        bnb = library("bitsandbytes").nn

        def make(linear: nn.Linear) -> nn.Linear | None:
            if bits == 4 and (linear.in_features % 32 or linear.out_features % 32):
                return None  # these are the groups of the kernel that some processors use
            sizes = (linear.in_features, linear.out_features, linear.bias is not None)
            if bits == 8:
                layer = bnb.Linear8bitLt(*sizes, has_fp16_weights=False)
                layer.weight = bnb.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
            else:
                layer = bnb.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
                layer.weight = bnb.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", blocksize=32)
            return layer  # type: ignore[no-any-return]

        return _replaced(model, make).to("cpu")

    return quantise


def _gguf(model: nn.Module) -> nn.Module:
    """Q8_0, in groups of 32 inputs; layers with other numbers of inputs stay as they are."""
    gguf = library("gguf")
    utils: Any = importlib.import_module("diffusers.quantizers.gguf.utils")
    kind = gguf.GGMLQuantizationType.Q8_0

    def make(linear: nn.Linear) -> nn.Linear | None:
        if linear.in_features % 32:
            return None
        layer = utils.GGUFLinear(
            linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=torch.float32
        )
        packed = torch.from_numpy(gguf.quants.quantize(linear.weight.detach().numpy(), kind))
        layer.weight = utils.GGUFParameter(packed, quant_type=kind)
        return layer  # type: ignore[no-any-return]

    return _replaced(model, make)


def _quanto(model: nn.Module) -> nn.Module:
    quanto = library("optimum.quanto")
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    quanto.quantize(model, weights=quanto.qint8, include=layers)  # as diffusers does: no convolutions
    quanto.freeze(model)
    return model


def _cast(model: Any) -> nn.Module:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return model  # type: ignore[no-any-return]


def _cast_by_function(model: nn.Module) -> nn.Module:
    from diffusers.hooks import apply_layerwise_casting
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

    skip = (*DEFAULT_SKIP_MODULES_PATTERN, "condition_embedder")  # Wan's reads the type of its weights and casts to it
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=skip)
    return model


WAYS: dict[str, Quantise] = {
    "cast": _cast,
    "cast-by-function": _cast_by_function,
    "torchao-int8": _torchao("Int8WeightOnlyConfig"),
    "torchao-int8-dynamic": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao-float8": _torchao("Float8WeightOnlyConfig"),
    "bitsandbytes-8": _bitsandbytes(8),
    "bitsandbytes-4": _bitsandbytes(4),
    "gguf": _gguf,
    "quanto": _quanto,
}


def dit() -> nn.Module:
    """The tiny DiT with the 32 channels that a group of GGUF takes."""
    return of_diffusers(
        "DiTTransformer2DModel",
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=4, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
    )  # fmt: skip


def build(name: str) -> nn.Module:
    return dit() if name == "DiTTransformer2DModel" else TINY[name].build()


def linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The linear layers of a model, quantised or not, without those of methods, by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith("tokdyn."):
            yield name, module


@torch.no_grad()
def rounded(name: str, quantised: nn.Module) -> nn.Module:
    """The model with plain weights that are those of its quantised twin, read off from what its layers do."""
    model: Any = build(name)
    for path, value in quantised.named_parameters():
        if value.dtype == torch.float8_e4m3fn:  # casting takes embeddings and convolutions too
            model.get_parameter(path).copy_(value)
    for path, layer in linears(quantised):
        held: Any = model.get_submodule(path)
        at_zero = layer(torch.zeros(1, layer.in_features))
        held.weight.copy_((layer(torch.eye(layer.in_features)) - at_zero).T)
    return model  # type: ignore[no-any-return]
