"""Tiny stand-ins for what the shell lines of the pages name, and settings that make these commands quick."""

from __future__ import annotations

import shutil
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokdyn.cli.main import app
from typer.testing import CliRunner

from tokdyn import DiT
from tokdyn.checkpoints import to_facebook

TINY = ("model.hidden_size=32", "model.depth=4", "model.num_heads=2")
TRAINING = (
    "training.steps=2", "training.images=null", "training.batch_size=4", "training.log_every=1",
    "training.sample_every=null", "training.precision=fp32",
)  # fmt: skip
PIPELINE = "black-forest-labs/"
PICTURE = ("steps=4", "height=16", "width=16")  # of a pipeline
UPCYCLED = ("steps=2", "sampling_steps=2", *PICTURE[1:])
QUICK = {
    "sample": ("steps=4", "count=4"),
    "calibrate": ("steps=4", "count=2"),
    "convert": ("num_heads=4",),
    "tune": ("steps=8", "count=4", "images=2", "trials=3", "finalists=1"),
    "eval": ("extractor=judge.ts", "metrics=frechet"),
    "report": ("steps=2", "count=2", "map_images=1"),
    "plot": ("steps=2", "count=2", "map_images=1"),
    "bench flops": ("steps=2", "images=1"),
    "bench speed": ("rounds=3", "warmup=1", "size=8"),
    "bench quality": ("steps=4", "count=4", "rounds=1", "timed=2"),
}
"""Settings that are appended to a command; the last value of a setting counts."""
SHORT = {"batch": "batch=1,2", "size": "size=8,16"}
"""What takes the place of long lists of settings that are given."""
SMALLER = {"DC-DiT-S": "DC-DiT-tiny", "DiT-S/2": "DiT-tiny/2"}


def run(*words: str) -> Any:
    """Run a command in this process."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, f"tokdyn {' '.join(words)}\n{result.output}"
    return result


def quick(words: Sequence[str]) -> list[str]:
    """Return the words of a command after `tokdyn`, with settings that make it quick."""
    command, given = " ".join(words[:2]), {word.lstrip("-").partition("=")[0] for word in words}
    more: tuple[str, ...] = ()
    if "gpus" in given:  # which is worked out in seconds for any model
        return list(words)
    if words[0] == "upcycle" and any(word.startswith(PIPELINE) for word in words):
        more = UPCYCLED
    elif words[0] in ("train", "upcycle"):
        if "--resume" not in words and list(words) != ["train", "photos/"]:
            more = (*TRAINING, *(TINY if words[0] == "train" else ("training.steps=4",)))
            if words[1].startswith("imagenet/"):  # which has a length of its own
                more = (*TINY, "data.num_classes=10")
            more += ("data.length=64",) if words[1] in ("demo", "--recipe") and "data.path" not in given else ()
    elif any(word.startswith(PIPELINE) for word in words):
        more = (*PICTURE, *(("steps=8", "trials=2", "finalists=1") if words[0] == "tune" else ()))
        more += ("rounds=1",) if command == "bench speed" else ()
    else:
        words = [_smaller(word) for word in words] if command == "bench speed" else words
        more = QUICK.get(words[0], QUICK.get(command, ()))
        more += tuple(SHORT[name] for name in SHORT if name in given and command == "bench speed")
    return [*words, *more]


def _smaller(word: str) -> str:
    for large, small in SMALLER.items():
        word = word.replace(large, small)
    return word


class StandIns:
    """Puts what a command reads into the current folder, under the name that the page gives it.

    Args:
        pipeline: folder of a tiny pipeline.
        stacks: content of stacks.yaml.
    """

    def __init__(self, pipeline: Path, stacks: str) -> None:
        self.pipeline, self.stacks = pipeline, stacks

    def put(self, words: Sequence[str]) -> None:
        """Make everything that a command reads and that is not there."""
        for word in words:
            key, _, value = word.rpartition("=")
            if key.lstrip("-") not in ("out", "plot", "csv", "cache"):
                self.make(value.rstrip("/"))
        if words[0] == "eval":
            self.make("judge.ts")

    def make(self, name: str) -> None:
        """Make what a page calls by this name, unless it is there or no such thing."""
        path = Path(name)
        if not name or path.exists():
            return
        for known, maker in self.makers().items():
            if name == known or (known.endswith("*") and name.startswith(known[:-1])) or path.suffix == known:
                path.parent.mkdir(parents=True, exist_ok=True)
                maker(path)
                return

    def makers(self) -> dict[str, Callable[[Path], object]]:
        """What is made by name, by the beginning of a name, or by the ending of a file."""
        return {
            "photos": pictures,
            "imagenet/train": pictures,
            "path/to/autoencoder": autoencoder,
            "black-forest-labs/FLUX.1-dev": lambda path: shutil.copytree(self.pipeline, path),
            "prompts.txt": lambda path: path.write_text("a red square\na blue square\n"),
            "stacks.yaml": self._stacks,
            "calibrated/cache": lambda path: self._calibrate("runs/demo", path),
            "runs/upcycled/methods": lambda path: self._calibrate("runs/upcycled", path),
            "quality/night": self._quality,
            "runs/*": trained,
            ".ts": network,
            ".pt": checkpoint,
            ".zip": zipped,
        }

    def _calibrate(self, model: str, path: Path) -> None:
        self.make(model)
        run("calibrate", model, "method=skip", "flops=0.7", *QUICK["calibrate"], f"out={path}")

    def _quality(self, path: Path) -> None:
        self.make("runs/dc")
        run("bench", "quality", "runs/dc", *QUICK["bench quality"], f"out={path}")

    def _stacks(self, path: Path) -> None:
        path.write_text(self.stacks)
        self.make("runs/dc")
        if "skips" in self.stacks:
            self._calibrate("runs/dc", Path("skips"))


def trained(folder: Path) -> None:
    """Train a DC-DiT for two steps, or a DiT if the name says so."""
    recipe = "shapes/dit-base" if "dit" in folder.name else "demo"
    run("train", recipe, *TINY, *TRAINING, "data.length=64", "data.size=16", "objective.kind=noise", f"out={folder}")


def pictures(folder: Path) -> None:
    """Write ten classes of four pictures."""
    random = np.random.default_rng(0)
    for index in range(40):
        path = folder / f"class {index % 10}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


def zipped(path: Path) -> None:
    """Write the same as a zip."""
    folder = path.with_suffix("")
    pictures(folder)
    with zipfile.ZipFile(path, "w") as file:
        for each in sorted(folder.rglob("*.png")):
            file.write(each, each.relative_to(folder))
    shutil.rmtree(folder)


def autoencoder(folder: Path) -> None:
    """Save an autoencoder that makes images eight times smaller."""
    from diffusers import AutoencoderTiny

    shape = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    blocks = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    AutoencoderTiny(**shape, **blocks).save_pretrained(folder)


class Mean(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)


def network(path: Path) -> None:
    """Save a network whose features are the means of quarters of the image."""
    with warnings.catch_warnings():  # torch announces the end of TorchScript
        warnings.simplefilter("ignore")
        torch.jit.script(Mean()).save(str(path))


def checkpoint(path: Path) -> None:
    """Save a DiT as the public code does."""
    model = DiT(sample_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=5)
    torch.save({"ema": to_facebook(model)}, path)
