"""The readers of files, each as a function of a path, and what must hold when one reads a hostile file."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save

import tokdyn
from tests.hostile.packing import MARK
from tokdyn import DCDiT, DiT, recipe
from tokdyn.bench.stacks import read_stacks
from tokdyn.checkpoints import read
from tokdyn.data import DataConfig, LatentDataset, open_data
from tokdyn.data.decode import decode, quiet
from tokdyn.errors import TokdynError
from tokdyn.evaluate.images import open_images
from tokdyn.evaluate.statistics import load_moments, load_statistics
from tokdyn.presets.files import read as read_preset
from tokdyn.prompts import Drawing
from tokdyn.recipe.explain import explain

SECONDS = 1.0
"""How long a reader may take to refuse a file; imports and waiting for a busy machine are not counted."""
LONGEST = 700
"""Characters of an error."""
_ALARM = 20  # seconds of the clock after which a reader is said to hang


class HangError(BaseException):
    """Raised in a reader that takes too long. It is no Exception, because readers catch all of these."""


@cache
def _model() -> DiT:
    return DiT(sample_size=8, hidden_size=8, depth=2, num_heads=2, num_classes=3)


@cache
def _weights() -> bytes:
    """The weights of a small DC-DiT."""
    return save(DCDiT(sample_size=4, hidden_size=16, depth=1, num_heads=4, num_classes=3).state_dict())


def read_recipe(path: Path) -> None:
    """Load a recipe, and check its model without memory."""
    recipe.check(path)


def read_settings(path: Path) -> None:
    """Load the recipe `demo` with settings, one in a line."""
    recipe.check("demo", path.read_text(encoding="utf-8", errors="surrogateescape").splitlines())


def read_prompts(path: Path) -> None:
    """Read a file of prompts, as commands do."""
    from pydantic import ValidationError

    try:
        Drawing(prompts=str(path))  # type: ignore[arg-type]
    except ValidationError as error:
        raise explain(Drawing, error, "settings") from error


def read_checkpoint(path: Path) -> None:
    """Read weights of any format."""
    read(path, num_heads=2)


def read_config(path: Path) -> None:
    """Read sound weights with the file as their config.json."""
    folder = path.parent / "model"
    folder.mkdir()
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(_weights())
    path.replace(folder / "config.json")
    read(folder)


def read_sidecar(path: Path) -> None:
    """Load methods from a folder that holds the file."""
    folder = path.parent / "methods"
    folder.mkdir()
    path.replace(folder / "tokdyn_config.json")
    try:
        tokdyn.load(_model(), folder)
    finally:
        if hasattr(_model(), "tokdyn"):
            tokdyn.unwrap(_model())


def read_arrays(path: Path) -> None:
    """Read the images of an npz, or if it has none, its mean and covariance."""
    if path.name.startswith("moments"):
        load_moments(path)
        return
    found = open_images(path)
    for image in found.images(range(len(found)), 8):
        if isinstance(image, TokdynError):
            raise image


def read_zip(path: Path) -> None:
    """Read the images of a zip."""
    open_data(DataConfig(kind="images", path=str(path), size=8)).batch([0])


def read_image(path: Path) -> None:
    """Decode an image file."""
    with quiet():
        decode(path.read_bytes(), path.name, (8, 8), 3)


def read_latents(path: Path) -> None:
    """Open a folder of latents whose index is the file."""
    folder = path.parent / "latents"
    folder.mkdir()
    path.replace(folder / "index.json")
    LatentDataset(folder).batch([0])


READERS: dict[str, Callable[[Path], Any]] = {
    "recipes": read_recipe,
    "settings": read_settings,
    "presets": read_preset,
    "prompts": read_prompts,
    "stacks": lambda path: read_stacks([str(path)]),
    "checkpoints": read_checkpoint,
    "configs": read_config,
    "sidecars": read_sidecar,
    "arrays": read_arrays,
    "zips": read_zip,
    "images": read_image,
    "latents": read_latents,
    "statistics": load_statistics,
}
"""Readers by name, which is that of their folder in the corpus."""


@contextlib.contextmanager
def alarm(seconds: int = _ALARM) -> Iterator[None]:
    """Raise a HangError in the block after some seconds of the clock."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise HangError(f"over {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(reader: str, name: str, content: bytes, folder: Path, patience: int = 1) -> TokdynError | None:
    """Let a reader read a file, and return the error with which it refuses it; None if it accepts the file.

    Args:
        reader: one of READERS.
        name: name of the file.
        content: its bytes.
        folder: an empty folder.
        patience: how many times as long the reader may take, because its code is slowed down.

    Raises:
        AssertionError: it took too long, ran a payload, or its error is not a sentence.
        Exception: the reader's, if it is no TokdynError: a traceback for the user.
    """
    path = folder / name
    path.write_bytes(content)
    mark, here = folder / MARK, Path.cwd()
    refused = None
    os.chdir(folder)  # where a payload would leave its mark
    try:
        with alarm(_ALARM * patience), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            began = time.process_time()
            try:
                READERS[reader](path)
            except TokdynError as error:
                refused = error
            took = time.process_time() - began
    finally:
        os.chdir(here)
    assert not mark.exists(), f"{name} ran code in the reader of {reader}"
    assert took < SECONDS * patience, f"{name} took {took:.1f} s in the reader of {reader}"
    if refused is not None:
        text = str(refused)
        assert len(text) < LONGEST + 2 * len(str(path)), f"{name}: {len(text)} characters: {text[:200]}"
        assert "weights_only" not in text, f"{name}: {text}"
    return refused


def warm() -> None:
    """Let every reader import what it needs, so that it does not count as its time."""
    torch.set_num_threads(1)
    recipe.check("demo")
    recipe.check("upcycle/dc")
