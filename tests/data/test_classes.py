"""Labels from class folders: training and evaluation give every image the same one."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tokdyn.data import DataConfig, open_data
from tokdyn.data.classes import class_folders
from tokdyn.evaluate.images import open_images

FOLDERS = {
    "numbers": [str(number) for number in range(12)],
    "padded numbers": [f"{number:03d}" for number in range(12)],
    "numbers from one": [str(number) for number in range(1, 13)],
    "some numbers": ["3", "7", "20"],
    "one number twice": ["1", "01", "2"],
    "numbers and names": ["10", "9", "x1", "x"],
    "names": ["dog", "ant", "ant-hill", "10 cats"],
    "dates": ["20240101", "20231231", "99999999999999999999"],
    "digits that are no decimals": ["²", "1"],
}


def png() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    return content.getvalue()


def files(folders: list[str], nested: bool) -> list[str]:
    """Two files per folder; nested ones lie in subfolders whose names sort the other way round."""
    if not nested:
        return [f"{folder}/{name}.png" for folder in folders for name in "ab"]
    return [f"{folder}/{len(folders) - place}/{name}.png" for place, folder in enumerate(folders) for name in "ab"]


def write(root: Path, names: list[str], form: str) -> Path:
    if form == "folder":
        for name in names:
            (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "images" / name).write_bytes(png())
        return root / "images"
    inside = "train/" if form == "folder in a zip" else ""
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for name in names:
            archive.writestr(inside + name, png())
    return root / "images.zip" / inside


@pytest.mark.parametrize("form", ["folder", "zip", "folder in a zip"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", FOLDERS)
def test_training_and_evaluation_agree(tmp_path: Path, kind: str, nested: bool, form: str) -> None:
    path = write(tmp_path, files(FOLDERS[kind], nested), form)
    trained = open_data(DataConfig(kind="images", path=str(path), size=8, in_memory=False))
    judged = open_images(path)
    assert trained.names == list(judged.names)
    assert judged.labels is not None
    assert judged.labels.values.tolist() == trained.labels.tolist()
    assert judged.labels.num_classes == trained.num_classes == len(FOLDERS[kind])
    assert [trained.class_names[label] for label in trained.labels] == [name.split("/")[0] for name in trained.names]


def test_folders_are_numbered_by_value_if_they_are_numbers() -> None:
    names = [f"{folder}/x.png" for folder in ("10", "2", "0", "1")]
    classes = class_folders(names)
    assert classes.names == ("0", "1", "2", "10")
    assert classes.labels.tolist() == [3, 2, 0, 1]
    assert classes.numbers == (0, 1, 2, 10)


def test_folders_are_numbered_by_name_if_one_is_no_number() -> None:
    classes = class_folders([f"{folder}/x.png" for folder in ("10", "2", "a")])
    assert classes.names == ("10", "2", "a")
    assert classes.numbers is None


@pytest.mark.parametrize("kind", ["one number twice", "dates", "digits that are no decimals"])
def test_names_that_are_no_class_numbers(kind: str) -> None:
    assert class_folders(files(FOLDERS[kind], nested=False)).numbers is None


def test_labels_of_a_few_classes_are_their_numbers(tmp_path: Path) -> None:
    """A folder of a few classes, as `tokdyn sample classes=3,7 class_folders=true` writes it for a model of twelve."""
    labels = open_images(write(tmp_path, files(["03", "07"], nested=False), "folder")).labels
    assert labels is not None
    assert labels.among(12).tolist() == [3, 3, 7, 7]
    assert labels.among(2).tolist() == [0, 0, 1, 1]
