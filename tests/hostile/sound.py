"""Small sound files of every format, from which spoiled ones are made: they lead deeper into readers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch

import tokdyn
from tests.hostile.making import CORPUS
from tests.hostile.packing import archive, array, noise, pickled, picture
from tokdyn import DCDiT, DepthSkip, DiT, TokenMerge, recipe
from tokdyn.checkpoints import to_facebook, to_official
from tokdyn.data.shards import write_shard
from tokdyn.evaluate.extractor import ExtractorInfo
from tokdyn.evaluate.statistics import Moments, Origin, save_statistics
from tokdyn.files import shipped_recipes
from tokdyn.recipe import files, shipped

SIZES = {"sample_size": 4, "hidden_size": 8, "depth": 1, "num_heads": 2, "num_classes": 3}


def recipes() -> Iterator[tuple[str, bytes]]:
    for name in ("demo", "shapes/dit-base"):
        yield "sound.yaml", recipe.dump(recipe.load(name)).encode()
    yield "short.yaml", shipped.show("demo").encode()


def settings() -> Iterator[tuple[str, bytes]]:
    yield (
        "sound.txt",
        b"optimizer.lr=3e-4\nmodel.depth=3\nchunking.tail_drops=[0, 0.3]\nout=runs/x\ndata={size: 16x24}\n",
    )


def presets() -> Iterator[tuple[str, bytes]]:
    for path in sorted((shipped_recipes() / "presets").glob("*.yaml"))[:3]:
        yield "sound.yaml", path.read_bytes()


def prompts() -> Iterator[tuple[str, bytes]]:
    yield "sound.yaml", b"- a red cube\n- {prompt: make it night, image: street.png, strength: 0.5}\n"
    yield "sound.json", b'["a red cube", {"prompt": "b", "height": 64, "width": 64}]'
    yield "sound.txt", b"a red cube\na blue square\n"


def stacks() -> Iterator[tuple[str, bytes]]:
    yield (
        "sound.yaml",
        b"- {name: a, methods: [{method: TokenMerge, ratio: 0.3}, {method: cache, threshold: 0.2}]}\n- {name: b}\n",
    )


def checkpoints() -> Iterator[tuple[str, bytes]]:
    from safetensors.torch import save

    dit, dcdit = to_facebook(DiT(**SIZES)), to_official(DCDiT(**{**SIZES, "hidden_size": 16}))
    yield "dit.safetensors", save(dit)
    yield "dc-dit.safetensors", save(dcdit, {"format": "pt"})
    for zipped in (True, False):
        yield "dit.pt", pickled({"ema": dit, "model": dit}, zipped)


def configs() -> Iterator[tuple[str, bytes]]:
    model = DCDiT(sample_size=4, hidden_size=16, depth=1, num_heads=4, num_classes=3)
    yield "sound.json", model.to_json_string().encode()


def sidecars() -> Iterator[tuple[str, bytes]]:
    model = DiT(**{**SIZES, "depth": 2})
    tokdyn.wrap(model, [TokenMerge(ratio=0.3), DepthSkip(blocks=(1,))])
    with tempfile.TemporaryDirectory() as folder:
        tokdyn.save(model, folder)
        yield "sound.json", (Path(folder) / "tokdyn_config.json").read_bytes()


def arrays() -> Iterator[tuple[str, bytes]]:
    pixels = np.random.default_rng(0).bytes(3 * 4 * 4 * 3)
    labels = array((3,), "<i8", np.arange(3, dtype="<i8").tobytes())
    yield "sound.npz", archive({"arr_0.npy": array((3, 4, 4, 3), data=pixels), "arr_1.npy": labels})
    moments = {"mu.npy": array((2,), "<f8", bytes(16)), "sigma.npy": array((2, 2), "<f8", bytes(32))}
    yield "moments.npz", archive(moments)


def zips() -> Iterator[tuple[str, bytes]]:
    import zipfile

    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield "sound.zip", archive({"a/x.png": picture(), "b/y.bmp": noise()}, method)


def images() -> Iterator[tuple[str, bytes]]:
    for kind in ("PNG", "TIFF", "GIF", "BMP", "PPM", "JPEG", "WEBP", "JPEG2000", "TGA"):
        yield f"sound.{kind.lower()}", picture(kind)
    yield "grey.tif", picture("TIFF", "I;16")
    yield "palette.png", picture("PNG", "P")


def latents() -> Iterator[tuple[str, bytes]]:
    yield "sound.json", (CORPUS / "latents" / "missing.json").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard_00000.safetensors"
        write_shard(path, torch.zeros(1, 4, 2, 2), torch.zeros(1, dtype=torch.int64), None, "f")
        content = json.loads((CORPUS / "latents" / "missing.json").read_text())
        content["shards"][0]["size"] = path.stat().st_size
        yield "sound.json", json.dumps(content).encode()


def statistics() -> Iterator[tuple[str, bytes]]:
    info = ExtractorInfo(kind="torchscript", name="n", sha256="0")
    origin = Origin(extractor=info, images=2, image_size=None, source="s", fingerprint="f")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sound.safetensors"
        save_statistics(path, torch.zeros(2, 3), Moments(np.zeros(3), np.eye(3)), origin)
        yield "sound.safetensors", path.read_bytes()


MAKERS: dict[str, Callable[[], Iterator[tuple[str, bytes]]]] = {
    "recipes": recipes, "settings": settings, "presets": presets, "prompts": prompts, "stacks": stacks,
    "checkpoints": checkpoints, "configs": configs, "sidecars": sidecars, "arrays": arrays, "zips": zips,
    "images": images,
    "latents": latents, "statistics": statistics,
}  # fmt: skip


@cache
def seeds(reader: str) -> dict[str, list[bytes]]:
    """Return the files to spoil for a reader, sound and hostile ones, by the ending of their name."""
    found: dict[str, list[bytes]] = {}
    hostile = ((path.name, path.read_bytes()) for path in sorted((CORPUS / reader).iterdir()))
    for name, content in (*MAKERS[reader](), *hostile):
        found.setdefault(
            "".join(Path(name).suffixes[-2:]) if name.endswith(".index.json") else Path(name).suffix, []
        ).append(content)
    return found


def settings_of(name: str) -> dict[str, object]:
    """Return a shipped recipe, resolved, as nested settings."""
    return files.deep_merge(recipe.load(name).model_dump(mode="json"), {})
