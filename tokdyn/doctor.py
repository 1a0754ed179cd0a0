"""Examine this installation and machine: what works here, what does not, and what to do about it (`tokdyn doctor`)."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokdyn.errors import TokdynError

_LITTLE = 5 * 2**30  # bytes of free disk, less than one text-to-image pipeline takes
OPTIONAL = {
    "transformers": "text encoders of diffusers' pipelines",
    "sentencepiece": "tokenizers of T5, which many pipelines have",
    "peft": "LoRA",
    "gradio": "tokdyn playground",
    "bitsandbytes": "weights in 8 and 4 bits",
    "torchao": "weights in 8 and 4 bits",
    "gguf": "GGUF checkpoints",
    "tensorboard": "training.trackers=[tensorboard]",
    "wandb": "training.trackers=[wandb]",
}
"""Packages that tokdyn works with and does not need, and what each is for."""
ATTENTION = {"flash_attn": "flash-attn", "xformers": "xformers", "sageattention": "sageattention"}
"""Modules with attention kernels for diffusers' models, each with the name of its package."""


@dataclass(frozen=True)
class Finding:
    """One fact about an installation.

    Attributes:
        section: what it is about: "versions", "devices", "number types", "attention", "files", "hub" or "optional".
        name: of the thing.
        value: what was found, in words.
        works: whether it works here; None for a fact that is neither good nor bad.
        required: whether tokdyn cannot be used without it.
        advice: what to do if it does not work; "" if there is nothing to do.
    """

    section: str
    name: str
    value: str
    works: bool | None = None
    required: bool = False
    advice: str = ""

    @property
    def broken(self) -> bool:
        """Whether tokdyn cannot be used before this is mended."""
        return self.required and self.works is False


def examine() -> list[Finding]:
    """Examine the installation and the machine. It loads torch and diffusers, asks the hub once, and writes nothing.

    Returns:
        The findings by section. What cannot be examined, because something before it is broken, is left out.
    """
    found = list(_versions())
    if not any(each.broken for each in found):
        found += [_self_test(), *_devices(), *_number_types(), *_attention()]
    return [*found, *_files(), *_hub(), *_optional()]


def _versions() -> Iterator[Finding]:
    """Yield the versions of Python, of tokdyn and of all packages that it needs."""
    from tokdyn import __version__

    yield Finding("versions", "tokdyn", __version__, True, True)
    yield Finding("versions", "python", platform.python_version(), True, True)
    for name, specifier in _requirements():
        install = f"pip install '{name}{specifier}'"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("versions", name, "not installed", False, True, install)
            continue
        if specifier and not _meets(version, specifier):
            yield Finding("versions", name, f"{version}, but {specifier} is needed", False, True, install)
            continue
        reason = _import_error(name) if name in ("torch", "diffusers") else None
        if reason is None:
            yield Finding("versions", name, version, True, True)
        else:
            yield Finding("versions", name, f"{version} cannot be imported: {reason}", False, True, f"{install} again")


def _requirements() -> list[tuple[str, str]]:
    """Return the packages that tokdyn needs, torch and diffusers first, each with the versions that it takes."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("tokdyn") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that was not installed
        lines = ["torch", "diffusers"]
    needed = [Requirement(line) for line in lines]
    needed = [each for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    listed = [(each.name, str(each.specifier)) for each in needed]
    return sorted(listed, key=lambda each: (each[0] not in ("torch", "diffusers"), each[0]))


def _meets(version: str, specifier: str) -> bool:
    """Return whether a version is one of those that a specifier such as ">=2.10" allows."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


def _import_error(module: str) -> str | None:
    """Import a module; return the first line of the error, or None if there is none."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a damaged installation raises errors of all kinds
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def _self_test() -> Finding:
    """Compute one image with a tiny DC-DiT on the CPU."""
    import torch

    try:
        from tokdyn.models import DCDiT

        with torch.no_grad():
            image = DCDiT.named("tiny", sample_size=8).eval()(torch.zeros(1, 4, 8, 8), timestep=500).sample
        works, value = bool(image.isfinite().all()), "a tiny DC-DiT computes an image"
    except Exception as error:
        works, value = False, f"a tiny DC-DiT fails: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return Finding("versions", "self-test", value, works, True, "" if works else "pip install --force-reinstall tokdyn")


def _devices() -> Iterator[Finding]:
    """Yield the processor and the accelerators that torch can use."""
    import torch

    from tokdyn.host import memory, processor

    cores, total = os.cpu_count() or 1, memory()
    size = "" if total is None else f", {total / 2**30:.0f} GiB of memory"
    yield Finding("devices", "cpu", f"{processor()}, {cores} cores, {torch.get_num_threads()} threads{size}", True)
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        value = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, capability {facts.major}.{facts.minor}"
        yield Finding("devices", f"cuda:{index}", value, True)
    for name, backend in (("mps", torch.backends.mps), ("xpu", getattr(torch, "xpu", None))):
        if backend is not None and backend.is_available():
            yield Finding("devices", name, "available", True)
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        how = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        advice = "install the torch for your driver: https://pytorch.org/get-started/locally"
        yield Finding(
            "devices", "cuda", f"there is an NVIDIA driver, but this torch ({how}) finds no GPU", False, False, advice
        )
    elif not torch.cuda.is_available():
        yield Finding("devices", "cuda", "no GPU; tokdyn computes on the CPU", None)


def _number_types() -> Iterator[Finding]:
    """Yield in which number types matrix products are fast."""
    import torch

    from tokdyn.ops.precision import cpu_multiplies
    from tokdyn.ops.torch_private import cpu_capabilities

    known = cpu_capabilities() if cpu_capabilities else {}
    units = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512", "bf16": "NEON"}
    unit = next((title for name, title in units.items() if known.get(name)), "")
    if cpu_multiplies(torch.bfloat16):
        yield Finding("number types", "bf16 on cpu", f"fast, with {unit}", True)
    else:
        yield Finding("number types", "bf16 on cpu", "no instructions for it, so that tokdyn computes in fp32", None)
    vectors = next((title for name, title in (("avx512", "AVX-512"), ("avx2", "AVX2")) if known.get(name)), "")
    if vectors:
        yield Finding("number types", "fp32 on cpu", f"with {vectors}", True)
    if torch.cuda.is_available():
        works = torch.cuda.is_bf16_supported(including_emulation=False)
        yield Finding("number types", "bf16 on cuda", "fast" if works else "slow; use precision=fp32", works)


def _attention() -> Iterator[Finding]:
    """Yield which kernels of attention run, by trying them, and which packages with kernels are installed."""
    import torch
    from torch.nn.attention import SDPBackend

    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        kernels = {
            "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION,
            "math": SDPBackend.MATH,
        }
        running = [name for name, backend in kernels.items() if _attends(device, backend)]
        yield Finding("attention", f"sdpa on {device}", ", ".join(running) or "no kernel runs", bool(running))
    varlen = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    if torch.cuda.is_available():
        advice = "" if varlen else "pip install 'torch>=2.10'"
        text = "tokens of several images in one call" if varlen else "this torch does not have it"
        yield Finding("attention", "variable length", text, varlen, False, advice)
    for module, package in ATTENTION.items():
        if importlib.util.find_spec(module) is None:
            value = (
                f"not installed; pip install {package}, for diffusers" if torch.cuda.is_available() else "not installed"
            )
            yield Finding("attention", package, value)
            continue
        reason = _import_error(module)
        value = _version(package) if reason is None else f"{_version(package)} cannot be imported: {reason}"
        advice = "" if reason is None else f"install a {package} that was built for this torch, or remove it"
        yield Finding("attention", package, value, reason is None, False, advice)


def _attends(device: str, backend: Any) -> bool:
    """Return whether a kernel of scaled_dot_product_attention runs on a device."""
    import warnings

    import torch
    from torch.nn.attention import sdpa_kernel

    query = torch.zeros(1, 1, 16, 64, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        with warnings.catch_warnings(), sdpa_kernel(backend):
            warnings.simplefilter("ignore")  # says why a kernel was not chosen
            torch.nn.functional.scaled_dot_product_attention(query, query, query)
    except RuntimeError:
        return False
    return True


def _version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def _files() -> Iterator[Finding]:
    """Yield what ships with tokdyn, and the folders that it writes to, with the room that they have."""
    from tokdyn.files import shipped_recipes

    try:
        count = sum(1 for path in shipped_recipes().rglob("*.yaml") if not path.name.startswith("_"))
        yield Finding("files", "recipes", f"{count} recipes and presets", count > 0, True)
    except TokdynError as error:
        yield Finding("files", "recipes", str(error), False, True, "pip install --force-reinstall tokdyn")
    places = {"this folder": Path.cwd(), "cache of tokdyn": _cache(), "cache of the hub": _hub_cache()}
    for name, folder in places.items():
        nearest = folder.absolute()
        while not nearest.exists():
            nearest = nearest.parent
        free = shutil.disk_usage(nearest).free
        value = f"{folder}, {free / 2**30:.0f} GiB free"
        if not os.access(nearest, os.W_OK):
            yield Finding(
                "files", name, f"{folder}, not writable", False, False, f"make {folder} writable, or set {_SETS[name]}"
            )
        elif free < _LITTLE:
            yield Finding(
                "files", name, value, False, False, f"make room, or set {_SETS[name]} to a place that has some"
            )
        else:
            yield Finding("files", name, value, True)


_SETS = {"this folder": "out=FOLDER", "cache of tokdyn": "TOKDYN_CACHE", "cache of the hub": "HF_HUB_CACHE"}
"""By what the folders are chosen."""


def _cache() -> Path:
    """Return the folder of files that tokdyn has downloaded."""
    from tokdyn.bases.download import cache_folder

    return cache_folder()


def _hub_cache() -> Path:
    """Return the folder of files that came from the hub."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _hub() -> Iterator[Finding]:
    """Yield whether models can be downloaded."""
    from huggingface_hub import constants

    from tokdyn.hub import reachable

    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", constants.ENDPOINT, "off, because HF_HUB_OFFLINE is set; cached models work", None)
    elif reachable():
        yield Finding("hub", constants.ENDPOINT, "answers", True)
    else:
        advice = "check the network, or set HF_HUB_OFFLINE=1 and use models on this machine"
        yield Finding("hub", constants.ENDPOINT, "does not answer; cached models work", False, False, advice)


def _optional() -> Iterator[Finding]:
    """Yield the packages that tokdyn does not need."""
    for package, purpose in OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            yield Finding("optional", package, f"not installed; pip install {package}, for {purpose}")
        else:
            yield Finding("optional", package, f"{_version(package)}, for {purpose}", True)
