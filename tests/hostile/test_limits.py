"""What exceeds a limit is refused by its name, and read when it is raised; pipes and devices are not waited for."""

from __future__ import annotations

import io
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.hostile.packing import archive, array, pickled, picture
from tests.hostile.readers import alarm, read_prompts
from tokdyn import DiT, limits, recipe
from tokdyn.bench.stacks import read_stacks
from tokdyn.checkpoints import read, to_facebook
from tokdyn.data import DataConfig, open_data
from tokdyn.errors import CheckpointError, DataError, InputError, RecipeError, TokdynError
from tokdyn.evaluate.images import open_images
from tokdyn.evaluate.statistics import load_moments, load_statistics
from tokdyn.presets.files import read as read_preset
from tokdyn.reading import printable, shown

SOUND = "model: {name: tiny}\ndata: {}\ntraining: {steps: 1}\n"
ROOT = Path(__file__).parents[2]


def text(folder: Path, content: str, name: str = "x.yaml") -> Path:
    (folder / name).write_text(content)
    return folder / name


def weights(folder: Path, name: str = "x.safetensors") -> Path:
    tensors = to_facebook(DiT(sample_size=4, hidden_size=8, depth=2, num_heads=2, num_classes=3))
    if name.endswith(".pt"):
        (folder / name).write_bytes(pickled(tensors))
    else:
        save_file(tensors, folder / name)
    return folder / name


def pictures(folder: Path) -> DataConfig:
    (folder / "x").mkdir()
    (folder / "x" / "a.png").write_bytes(picture(size=(20, 10)))
    return DataConfig(kind="images", path=str(folder), size=8)


def zipped(folder: Path) -> DataConfig:
    (folder / "x.zip").write_bytes(archive({"x/a.png": picture(), "x/b.png": picture()}))
    return DataConfig(kind="images", path=str(folder / "x.zip"), size=8)


def tars(folder: Path) -> DataConfig:
    for name in ("0.tar", "1.tar"):
        with tarfile.open(folder / name, "w") as file:
            entry = tarfile.TarInfo(f"a/{'x' * 200}.png")  # which a header of its own says
            entry.size = len(picture())
            file.addfile(entry, io.BytesIO(picture()))
    return DataConfig(kind="images", path=str(folder), size=8)


def npz(folder: Path) -> Path:
    (folder / "x.npz").write_bytes(
        archive({"arr_0.npy": array((2, 4, 4, 3), data=bytes(96)), "a.npy": b"", "b.npy": b""})
    )
    return folder / "x.npz"


def chain(folder: Path) -> Path:
    text(folder, SOUND, "0.yaml")
    for number in range(1, 5):
        text(folder, f"extends: {number - 1}.yaml\n", f"{number}.yaml")
    return folder / "4.yaml"


def with_config(folder: Path) -> Path:
    DiT(sample_size=4, hidden_size=8, depth=1, num_heads=2, num_classes=3).save_pretrained(folder / "m")
    return folder / "m"


CASES: dict[str, tuple[int, Callable[[Path], object]]] = {
    "TEXT_BYTES": (20, lambda folder: read_prompts(text(folder, "a red cube on a blue table\n", "x.txt"))),
    "YAML_BYTES": (20, lambda folder: recipe.load(text(folder, SOUND))),
    "YAML_NODES": (5, lambda folder: recipe.load(text(folder, SOUND))),
    "YAML_DEPTH": (1, lambda folder: recipe.load(text(folder, SOUND))),
    "EXTENDS": (3, lambda folder: recipe.load(chain(folder))),
    "JSON_BYTES": (50, lambda folder: read(with_config(folder))),
    "JSON_DEPTH": (1, lambda folder: read(with_config(folder))),
    "TENSORS": (3, lambda folder: read(weights(folder), num_heads=2)),
    "UNPACKED": (1, lambda folder: read(expanded(folder), num_heads=2)),
    "TOKENS": (3, lambda folder: read(weights(folder), num_heads=2)),
    "DEPTH": (1, lambda folder: read(weights(folder), num_heads=2)),
    "PARAMETERS": (100, lambda folder: recipe.load(text(folder, SOUND))),
    "ARRAY_BYTES": (20, lambda folder: open_images(npz(folder))),
    "ARCHIVE_ENTRIES": (1, lambda folder: open_images(npz(folder))),
    "SHARDS": (1, lambda folder: open_data(tars(folder))),
    "TAR_HEADER_BYTES": (100, lambda folder: open_data(tars(folder))),
    "IMAGE_BYTES": (20, lambda folder: open_data(pictures(folder))),
    "PIXELS": (100, lambda folder: open_data(pictures(folder))),
    "BATCH": (255, lambda folder: recipe.load(text(folder, SOUND + "optimizer: {}\n"), ["training.batch_size=256"])),
    "SAMPLES": (10, lambda folder: recipe.load(text(folder, SOUND), ["data.length=11"])),
    "STEPS": (10, lambda folder: recipe.load(text(folder, SOUND), ["training.steps=11"])),
    "TIMESTEPS": (10, lambda folder: recipe.load(text(folder, SOUND), ["objective.num_train_timesteps=11"])),
    "CLASSES": (2, lambda folder: recipe.load(text(folder, SOUND), ["data.num_classes=3"])),
    "WORKERS": (2, lambda folder: recipe.load(text(folder, SOUND), ["training.workers=3"])),
}


def expanded(folder: Path) -> Path:
    """A sound file whose tensors repeat their elements, to over 16 MB."""
    tensors = to_facebook(DiT(sample_size=4, hidden_size=8, depth=1, num_heads=2, num_classes=600_000))
    tensors["y_embedder.embedding_table.weight"] = torch.zeros(1).expand(600_001, 8)
    (folder / "x.pt").write_bytes(pickled(tensors))
    return folder / "x.pt"


def test_every_limit_has_a_case() -> None:
    assert set(CASES) == {limit.name for limit in limits.LIMITS}
    assert len(limits.LIMITS) == sum(isinstance(value, limits.Limit) for value in vars(limits).values())


@pytest.mark.parametrize("name", CASES)
def test_what_exceeds_a_limit_is_refused_by_its_name_and_read_when_it_is_raised(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    low, run = CASES[name]
    limit = next(each for each in limits.LIMITS if each.name == name)
    for folder in ("low", "high"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv(limit.variable, str(low))
    with pytest.raises(TokdynError, match=limit.variable) as caught:
        run(tmp_path / "low")
    assert f"{low:,}" in str(caught.value)
    if name == "UNPACKED":
        monkeypatch.setenv(limit.variable, str(10**6))
    else:
        monkeypatch.delenv(limit.variable)
    run(tmp_path / "high")


def test_limits_are_documented() -> None:
    page = (ROOT / "docs" / "limits.md").read_text()
    for limit in limits.LIMITS:
        assert f"| `{limit.variable}` | {limit.most:,} {limit.unit} | {limit.of} |" in page


@pytest.mark.parametrize("value", ["-1", "0", "many", "1e9", "9" * 30])
def test_a_wrong_variable_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKDYN_MAX_PIXELS", value)
    with pytest.raises(InputError, match="TOKDYN_MAX_PIXELS"):
        _ = limits.PIXELS.value


READS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "recipe": ("x.yaml", recipe.load),
    "preset": ("x.yaml", read_preset),
    "stack": ("x.yaml", lambda path: read_stacks([str(path)])),
    "pickle": ("x.pt", read),
    "weights": ("x.safetensors", read),
    "index": ("x.safetensors.index.json", read),
    "zip": ("x.zip", lambda path: open_data(DataConfig(kind="images", path=str(path), size=8))),
    "npz": ("x.npz", open_images),
    "moments": ("x.npz", load_moments),
    "statistics": ("x.safetensors", load_statistics),
    "image": ("c/x.png", lambda path: open_data(DataConfig(kind="images", path=str(path.parents[1]), size=8))),
}


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("name", READS)
def test_pipes_and_devices_are_not_waited_for(kind: str, name: str, tmp_path: Path) -> None:
    file, run = READS[name]
    path = tmp_path / "d" / file
    path.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with alarm(5), pytest.raises(TokdynError, match=re.escape(str(tmp_path / "d"))):
        run(path)


@pytest.mark.parametrize("name", ["config.json", "x.safetensors"])
def test_pipes_beside_weights_are_not_waited_for(name: str, tmp_path: Path) -> None:
    weights(tmp_path, "y.safetensors")
    os.mkfifo(tmp_path / name)
    with alarm(5):
        if name == "config.json":
            assert read(tmp_path, num_heads=2).config["depth"] == 2
        else:
            with pytest.raises(CheckpointError, match=r"2 files"):
                read(tmp_path)


def test_a_large_entry_of_a_zip_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 3 GB entry of zeros takes 3 MB in a zip; 40 MB are quicker."""
    monkeypatch.setenv("TOKDYN_MAX_IMAGE_BYTES", str(2**25))
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as file, file.open("a/x.png", "w") as entry:
        for _ in range(40):
            entry.write(bytes(2**20))
    with pytest.raises(DataError, match=r"a/x\.png in .*41,943,040 bytes.*TOKDYN_MAX_IMAGE_BYTES"):
        open_data(DataConfig(kind="images", path=str(tmp_path / "x.zip"), size=8))


def test_images_that_a_limit_was_raised_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow has a limit of its own, which is raised with ours."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert len(open_data(pictures(tmp_path))) == 1


@pytest.mark.parametrize("name", ["~nosuch/x", "~nosuch"])
def test_homes_of_unknown_users_are_no_tracebacks(name: str) -> None:
    for run in (
        recipe.load,
        read,
        read_preset,
        lambda path: read_stacks([path]),
        lambda path: open_data(DataConfig(kind="images", path=path, size=8)),
        lambda path: recipe.files.read(path),
    ):
        with pytest.raises(TokdynError, match=re.escape("nosuch")):
            run(name)
    assert recipe.load("demo", [f"out={name}"]).folder == name


def test_values_are_quoted_in_a_few_words() -> None:
    assert shown("x") == "'x'"
    assert shown([1, 2.5, None]) == "[1, 2.5, None]"
    for value in ("x" * 10**6, ["x"] * 10**6, {str(i): i for i in range(10**4)}, 10**5000, 10**300, b"x" * 10**6):
        assert len(shown(value)) < 200


def test_terminals_are_told_nothing_by_names_of_files() -> None:
    assert printable("a\x1b[2J\n\x00é ") == "a\\x1b[2J\\n\\x00é "
    assert printable("\udce9") == "\\udce9"


def test_a_batch_that_no_machine_holds_is_refused_before_it_is_allocated() -> None:
    from tokdyn.recipe.build import build_model

    large = recipe.load("demo", ["data.size=4096", "training.batch_size=10000000"])
    with pytest.raises(RecipeError, match=r"10,000,000 images"):
        build_model(large)
    wide = recipe.load("demo", ["model.hidden_size=16384", "model.depth=100"])
    with pytest.raises(RecipeError, match="weights"):
        build_model(wide)
