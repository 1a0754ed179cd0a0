"""Every format that tokdyn writes and reads again: how a small folder of it is written, and what it must give.

    python tests/saved/formats.py

writes a folder of every format that has none, or whose layout is no longer that of its newest folder. Folders that are
there are never overwritten: later versions have to read them.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tokdyn
from tokdyn import Chunking, DCDiT, DepthSkip, DiT, DynamicWidth, FeatureCache, TokenDrop, TokenMerge, recipe
from tokdyn.bench.stacks import read_stacks
from tokdyn.checkpoints import read, write
from tokdyn.data import FeaturesConfig, LatentDataset, write_features
from tokdyn.evaluate.extractor import ExtractorInfo
from tokdyn.evaluate.statistics import Origin, load_statistics, moments_of, save_statistics
from tokdyn.methods import Method
from tokdyn.recipe import yaml_text
from tokdyn.sample import SampleConfig, load_model, sample
from tokdyn.train import metrics, train
from tokdyn.upcycling import DistilSettings, distil

HERE = Path(__file__).parent
TENSORS, VALUES = "expected.safetensors", "expected.json"
SIZES = {"sample_size": (4, 6), "in_channels": 3, "hidden_size": 8, "depth": 2, "num_heads": 2, "num_classes": 3}
STACKS: dict[str, list[Method]] = {
    "chunking": [Chunking(target=2, ragged=True, tail_drop=((0.0, 0.5), (1.0, 0.0)))],
    "merge": [TokenMerge(ratio=((0.0, 0.3), (1.0, 0.6)), where="both", seed=3)],
    "drop": [TokenDrop(rate=0.5, blocks=(0, -1))],
    "learned_skipping": [DepthSkip(learned=True)],
    "calibrated_skipping": [DepthSkip(table=((0.0, 0.5, (0,)), (0.5, 1.0, (-1,))))],
    "width": [DynamicWidth(target=0.5)],
    "cache": [FeatureCache(threshold=0.6, coefficients=(2.0, 1.0, 0.0), num_steps=4)],
    "stack": [
        FeatureCache(steps=(0, 2)),
        Chunking(target=2, router="cosine"),
        TokenMerge(weighted=True),
        DynamicWidth(),
    ],
}
SHALLOW = {**SIZES, "depth": 1}
RECIPES = ("shapes/dit-base", "cifar10/dcdit-learned", "imagenet/dc-dit-v1-xl-n16-256", "upcycle/dc-dydit")
LORA = DistilSettings(steps=2, trained="lora", rank=2, tail_drops=(0.0, 0.5))
LAYOUTS = {"diffusers": DiT, "tokdyn": DCDiT, "official": DCDiT, "facebook": DiT}


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        write: a folder of it.
        read: what later versions must find in such a folder: tensors to a tolerance, everything else exactly. May
            change the folder.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], dict[str, Any]]


def randomized(model: nn.Module, seed: int = 0) -> Any:
    """Give every parameter random numbers, so that each has an effect on what is predicted."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (each for each in model.parameters() if each.requires_grad):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def predictions(model: Any, channels: int = 3) -> Tensor:
    """(3, B, C, R, C) what a model predicts in three steps of a trajectory."""
    count = 2 * channels * 4 * 6
    start = torch.sin(torch.arange(count) * 0.7).view(2, channels, 4, 6)
    found = [
        model(start * (1 - 0.02 * step), timestep=torch.tensor([time, time]), class_labels=torch.tensor([0, 2])).sample
        for step, time in enumerate((900, 850, 300))
    ]
    return torch.stack(found)


def base(sizes: dict[str, Any] = SIZES) -> DiT:
    return randomized(DiT(**sizes))


def write_methods(folder: Path) -> None:
    base().save_pretrained(folder / "base")
    for name, methods in STACKS.items():
        tokdyn.save(randomized(tokdyn.wrap(base(), methods), 1), folder / name)


def read_methods(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for place in sorted(each for each in folder.glob("*/") if each.name != "base"):
        model = tokdyn.load(DiT.from_pretrained(folder / "base").eval(), place)
        methods = [method for method, _ in tokdyn.parts(model)]
        drops = any(isinstance(method, TokenDrop) for method in methods)
        with tokdyn.dropping(model, 0.5) if drops else torch.no_grad():
            found[place.name] = predictions(model)
        found[f"{place.name} names"] = [type(method).__name__ for method in methods]
    return found


def write_models(folder: Path) -> None:
    base(SHALLOW).save_pretrained(folder / "dit")
    randomized(DCDiT(**SHALLOW)).save_pretrained(folder / "dcdit")
    randomized(tokdyn.upcycle(base(SHALLOW), "dc", target=4)).save_pretrained(folder / "upcycled")
    for layout, family in LAYOUTS.items():
        ending = ".safetensors" if layout in ("official", "facebook") else ""
        sizes = {**SHALLOW, "sample_size": 4} if layout != "tokdyn" else SHALLOW
        write(randomized(family(**sizes)), folder / f"as_{layout}{ending}", to=layout)


def read_models(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        "dit": predictions(DiT.from_pretrained(folder / "dit").eval()),
        "dcdit": predictions(DCDiT.from_pretrained(folder / "dcdit").eval()),
        "upcycled": predictions(DCDiT.from_pretrained(folder / "upcycled").eval()),
    }
    for place in sorted(folder.glob("as_*")):
        model = read(place)
        found[place.stem] = square_prediction(model)
        found[f"{place.stem} class"] = type(model).__name__
    return found


@torch.no_grad()
def square_prediction(model: Any) -> Tensor:
    start = torch.sin(torch.arange(2 * 3 * 4 * 4) * 0.7).view(2, 3, 4, 4)
    found: Tensor = model.eval()(start, timestep=torch.tensor([900, 300]), class_labels=torch.tensor([0, 2])).sample
    return found


TRAINING = {
    "data": {"kind": "shapes", "size": 16, "length": 8},
    "optimizer": {"lr": 1e-3},
    "training": {"batch_size": 2, "steps": 2, "precision": "fp32", "log_every": 1, "keep_checkpoints": 1},
}
TINY = {"name": "tiny/4", "hidden_size": 8, "depth": 1, "num_heads": 2}


def write_training(folder: Path) -> None:
    """Train a DiT, and a DC-DiT with dynamic width that is upcycled from it."""
    with chdir(folder):
        train(recipe.resolve({**TRAINING, "model": {"kind": "dit", **TINY}, "out": "base"}))
        methods = [{"method": "DynamicWidth", "target": 0.5, "warmup": 2}]
        phases = [{"name": "learn", "teacher": 1.0}]
        upcycle = {"base": "base", "phases": phases, "methods": methods}
        model = {"kind": "dcdit", "name": "base"}
        train(recipe.resolve({**TRAINING, "model": model, "upcycle": upcycle, "out": "upcycled"}))
        shutil.rmtree("base/checkpoints")


def read_training(folder: Path) -> dict[str, Any]:
    """Load both models, and go on with the run of the second."""
    found: dict[str, Any] = {}
    with chdir(folder):
        for name in ("base", "upcycled"):
            model, objective, info = load_model(name)
            found[name] = shapes_prediction(model)
            found[f"{name} facts"] = [objective.kind, info.data.kind, info.data.size, list(info.class_names)]
        train(recipe.load("upcycled", ["training.steps=3"]), resume=True)
        found["resumed"] = shapes_prediction(load_model("upcycled")[0])
        found["steps"] = [row["step"] for row in metrics.read(Path("upcycled/metrics.jsonl"))]
    return found


@torch.no_grad()
def shapes_prediction(model: Any) -> Tensor:
    start = torch.sin(torch.arange(2 * 3 * 16 * 16) * 0.7).view(2, 3, 16, 16)
    found: Tensor = model.eval()(start, timestep=torch.tensor([900, 300]), class_labels=torch.tensor([0, 1])).sample
    return found


def write_distillation(folder: Path) -> None:
    base().save_pretrained(folder / "base")
    student = tokdyn.wrap(base(), [Chunking(target=2)])
    torch.manual_seed(0)
    distil(student, calls(), folder / "run", DistilSettings(steps=2), facts={"methods": ["dc"]})
    torch.manual_seed(0)
    distil(tokdyn.wrap(base(), [Chunking(target=2)]), calls(), folder / "lora", LORA)


def read_distillation(folder: Path) -> dict[str, Any]:
    model = DiT.from_pretrained(folder / "base").eval()
    parts = folder / "run" / "methods"
    student = tokdyn.load(model, parts if parts.is_dir() else parts.with_suffix(".safetensors"))
    found = {"student": predictions(student)}
    distil(student, calls(), folder / "run", DistilSettings(steps=3), resume=True)
    found["resumed"] = predictions(student)
    if (folder / "lora").is_dir():
        model = DiT.from_pretrained(folder / "base").eval()
        student = tokdyn.load(model, folder / "lora" / "methods.safetensors")
        found["lora"] = predictions(student)
        distil(student, calls(), folder / "lora", LORA.model_copy(update={"steps": 3}), resume=True)
        found["lora resumed"] = predictions(student)
    return found


def calls() -> list[dict[str, Tensor]]:
    inputs = torch.sin(torch.arange(2 * 2 * 3 * 4 * 6) * 0.3).view(2, 2, 3, 4, 6)
    labels = torch.tensor([0, 2])
    return [
        {"hidden_states": each, "timestep": torch.tensor([time, time]), "class_labels": labels}
        for each, time in zip(inputs, (800, 400), strict=True)
    ]


def write_latents(folder: Path) -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    vae = AutoencoderTiny(encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), **blocks).eval()
    with chdir(folder):
        vae.save_pretrained("vae")
        settings = {"kind": "shapes", "size": (16, 24), "length": 5, "shard_size": 3, "dtype": "fp16", "flip": True}
        write_features(FeaturesConfig(out="latents", vae="vae", device="cpu", **settings))
        shutil.rmtree("vae")


def read_latents(folder: Path) -> dict[str, Any]:
    data = LatentDataset(folder / "latents")
    plain, labels, _ = data.fetch(range(5))
    flipped, _, _ = data.fetch(range(5), [True] * 5)
    return {"latents": plain, "flipped": flipped, "labels": labels, "classes": list(data.class_names)}


def write_statistics(folder: Path) -> None:
    features = torch.sin(torch.arange(20.0)).view(5, 4)
    network = ExtractorInfo(kind="torchscript", name="judge", sha256="0" * 64, input_size=4)
    origin = Origin(extractor=network, images=5, image_size=(8, 8), source="images", fingerprint="1" * 64)
    save_statistics(folder / "reference.safetensors", features, moments_of(features), origin)


def read_statistics(folder: Path) -> dict[str, Any]:
    found = load_statistics(folder / "reference.safetensors")
    moments = {"mean": torch.from_numpy(found.moments.mean), "covariance": torch.from_numpy(found.moments.covariance)}
    return {**moments, "features": found.features, "origin": json.loads(found.origin.model_dump_json())}


def write_settings(folder: Path) -> None:
    for name in RECIPES:
        path = folder / "recipes" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(recipe.dump(recipe.load(name)))
    stacks = [
        {"name": "merged", "methods": [{"method": "TokenMerge", "ratio": [[0.0, 0.1], [1.0, 0.5]]}], "tail_drop": 0.2},
        {"name": "skipped", "model": "runs/x", "methods": [{"method": "skip", "blocks": [1]}], "uncond_tail_drop": 0.9},
    ]
    (folder / "stack.yaml").write_text(yaml_text.dump(stacks))


def read_settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted((folder / "recipes").rglob("*.yaml")):
        found[path.relative_to(folder).as_posix()] = recipe.load(path).model_dump(mode="json")
    found["stacks"] = [json.loads(stack.model_dump_json()) for stack in read_stacks([str(folder / "stack.yaml")])]
    return found


QUICK = {"format": "folder", "count": 2, "steps": 2, "scheduler": "ddim", "device": "cpu", "tail_drop": (0.0, 0.3)}


def write_samples(folder: Path) -> None:
    randomized(DCDiT(**SIZES)).save_pretrained(folder / "model")
    sample(SampleConfig(model=str(folder / "model"), out=folder / "samples", **QUICK))


def read_samples(folder: Path) -> dict[str, Any]:
    """Go on with a folder of images: none is sampled again, one is new."""
    settings = {**QUICK, "count": 3}
    result = sample(SampleConfig(model=str(folder / "model"), out=folder / "samples", **settings))
    return {"images": [[budget.tail_drop, budget.images, budget.made] for budget in result.budgets]}


FORMATS = {
    "methods": Format(write_methods, read_methods),
    "models": Format(write_models, read_models),
    "training": Format(write_training, read_training),
    "distillation": Format(write_distillation, read_distillation),
    "latents": Format(write_latents, read_latents),
    "statistics": Format(write_statistics, read_statistics),
    "settings": Format(write_settings, read_settings),
    "samples": Format(write_samples, read_samples),
}


def folders(name: str) -> list[Path]:
    """The folders of a format, the oldest first."""
    return sorted((HERE / name).glob("*/"), key=lambda folder: int(folder.name))


@contextmanager
def copied(folder: Path) -> Iterator[Path]:
    """Copy a folder that may be changed."""
    with tempfile.TemporaryDirectory() as place:
        yield Path(shutil.copytree(folder, Path(place) / "copy"))


def quietly(function: Callable[..., Any], *arguments: Any) -> Any:
    with redirect_stdout(StringIO()):
        return function(*arguments)


def layout(folder: Path) -> dict[str, Any]:
    """What a later version could stumble over: names of files, keys of texts, names and shapes of tensors."""
    found: dict[str, Any] = {}
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in (TENSORS, VALUES):
            continue
        found[name] = path.suffix
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {key: str(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
                notes = {key: keys(_parsed(value)) for key, value in (file.metadata() or {}).items()}
            found[name] = {**tensors, **{f"metadata {key}": value for key, value in notes.items()}}
        elif path.suffix in (".json", ".yaml"):
            found[name] = keys(yaml.safe_load(path.read_text()))
        elif path.suffix == ".jsonl":
            found[name] = [keys(json.loads(line)) for line in path.read_text().splitlines()]
    return found


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def keys(value: Any) -> Any:
    """The names in nested settings, without what they are set to."""
    if isinstance(value, dict):
        return {str(key): keys(each) for key, each in value.items()}
    return [keys(each) for each in value if isinstance(each, dict)] if isinstance(value, list) else None


def expected(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / VALUES).read_text())
    return {**values, **(load_file(folder / TENSORS) if (folder / TENSORS).is_file() else {})}


def write_folder(name: str, folder: Path) -> None:
    """Write a folder of a format, with what it must give.

    Raises:
        FileExistsError: it is there.
    """
    with tempfile.TemporaryDirectory() as place:
        half = Path(place) / "half"
        half.mkdir()
        quietly(FORMATS[name].write, half)
        with copied(half) as copy:
            found = quietly(FORMATS[name].read, copy)
        tensors = {key: value.contiguous() for key, value in found.items() if isinstance(value, Tensor)}
        values = {key: value for key, value in found.items() if key not in tensors}
        if tensors:
            save_file(tensors, half / TENSORS)
        (half / VALUES).write_text(json.dumps(values, indent=1) + "\n")
        shutil.copytree(half, folder)


def main() -> None:
    for name in FORMATS:
        with tempfile.TemporaryDirectory() as place:
            quietly(FORMATS[name].write, Path(place))
            known = folders(name)
            if known and layout(known[-1]) == layout(Path(place)):
                print(f"{name}: as in {known[-1].relative_to(HERE)}")
                continue
        folder = HERE / name / str(len(known) + 1)
        write_folder(name, folder)
        print(f"{name}: wrote {folder.relative_to(HERE)}")


if __name__ == "__main__":
    sys.exit(main())
