"""Images, labels and settings of an evaluation: what is read and what is refused."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from tokdyn.errors import DataError
from tokdyn.evaluate import EvalConfig, EvalResult, evaluate
from tokdyn.evaluate.images import open_images


def run(**settings: Any) -> EvalResult:
    return evaluate(EvalConfig(**{"device": "cpu", **settings}))


def one_hot(classes: list[int]) -> Any:
    """Make images (N, 2, 2, 3) that the judge assigns to these classes."""
    images = np.zeros((len(classes), 12), dtype=np.uint8)
    images[np.arange(len(classes)), classes] = 255
    return images.reshape(-1, 3, 2, 2).transpose(0, 2, 3, 1).copy()


ACCURACY = "class_accuracy[judge]"


def test_class_accuracy_by_labels_of_an_npz(kit: Any, judge: str) -> None:
    path = kit.npz("images", one_hot([0, 1, 2, 3, 3]), np.array([0, 1, 2, 3, 0]))
    assert run(generated=path, extractor=judge).values[ACCURACY] == pytest.approx(0.8)


def test_class_accuracy_by_sorted_folder_names(kit: Any, judge: str) -> None:
    images = one_hot([0, 1, 2, 3, 1])
    names = ["ant/1.png", "bee/1.png", "cat/1.png", "dog/1.png", "ant/2.png"]
    path = kit.zip("images", dict(zip(names, images, strict=True)))
    assert run(generated=path, extractor=judge).values[ACCURACY] == pytest.approx(0.8)


def test_class_accuracy_by_numbered_folders(kit: Any, judge: str) -> None:
    """Numbers are the classes even if some are missing; in the order of the folders alone, 3 would be class 1."""
    path = kit.tree("images", dict(zip(["0/a.png", "3/a.png", "3/b.png"], one_hot([0, 3, 3]), strict=True)))
    assert run(generated=path, extractor=judge).values[ACCURACY] == 1.0


def test_class_accuracy_by_folders_numbered_from_one(kit: Any, judge: str) -> None:
    """All four classes of the judge are there, so the order of the numbers decides, as it does in training."""
    names = [f"{number}/a.png" for number in (1, 2, 3, 4)]
    path = kit.tree("images", dict(zip(names, one_hot([0, 1, 2, 0]), strict=True)))
    assert run(generated=path, extractor=judge).values[ACCURACY] == pytest.approx(3 / 4)


@pytest.mark.parametrize("side", ["generated", "reference"])
@pytest.mark.parametrize("broken", [0, 2, 4])
def test_labels_stay_with_their_images_when_broken_ones_are_skipped(
    kit: Any, judge: str, broken: int, side: str
) -> None:
    """One label shifted past the broken image would make the accuracy of the others smaller than one."""
    names = ["0/a.png", "1/a.png", "2/a.png", "3/a.png", "3/b.png"]
    files = dict(zip(names, one_hot([0, 1, 2, 3, 3]), strict=True)) | {names[broken]: b"no image"}
    path = kit.tree("images", files)
    sound = kit.npz("sound", one_hot([0, 1, 2, 3]), np.arange(4))
    sides = {"generated": sound, "reference": sound} | {side: path}
    result = run(**sides, extractor=judge, on_error="skip", neighbours=1)
    values = result.values if side == "generated" else result.reference_values
    assert values[ACCURACY] == 1.0
    assert (result.generated_images, result.reference_images) == (4, 4)


@pytest.mark.parametrize(
    ("files", "values"),
    [
        (["ant/1.png", "bee/1.png"], " 2 .*judge .* 4 "),
        (["0/1.png", "4/1.png"], " 0 to 4, judge .* 4 "),
        (["1.png", "2.png"], "arr_1"),
        (["1.png", "bee/2.png"], "arr_1"),
    ],
)
def test_class_accuracy_needs_the_classes_of_the_judge(kit: Any, judge: str, files: list[str], values: str) -> None:
    path = kit.tree("images", dict(zip(files, one_hot([0, 1]), strict=True)))
    assert re.search(f"class_accuracy.*{values}", " ".join(run(generated=path, extractor=judge).notes))
    with pytest.raises(DataError, match=f"class_accuracy.*{values}"):
        run(generated=path, extractor=judge, metrics="class_accuracy")


@pytest.mark.parametrize(("labels", "values"), [([-1, 0, 1], "-1 to 1"), ([0, 1, 4], "0 to 4")])
def test_labels_outside_the_classes_of_the_judge_are_refused(
    kit: Any, judge: str, labels: list[int], values: str
) -> None:
    path = kit.npz("images", kit.draw(3, 0), np.array(labels))
    with pytest.raises(DataError, match=f"class_accuracy.*{values}, judge"):
        run(generated=path, extractor=judge, metrics="class_accuracy")


@pytest.mark.parametrize("indices", [[0], [7], [1, 4, 5], list(range(8))])
def test_images_of_an_npz_are_read_by_position(kit: Any, indices: list[int]) -> None:
    images = kit.draw(8, 0)
    source = open_images(kit.npz("images", images))
    assert np.array_equal(np.stack(list(source.images(indices, None))), images[indices])


def test_nothing_to_measure(kit: Any, judge: str) -> None:
    images = kit.npz("images", kit.draw(3, 0))
    assert set(run(generated=images, extractor=judge).values) == {"class_score[judge]"}
    with pytest.raises(DataError, match=r"frechet.*reference="):
        run(generated=images, extractor=judge, metrics="frechet,score")
    with pytest.raises(DataError, match=r"precision_recall.* 3 .*neighbours="):
        run(generated=images, reference=images, extractor=judge, metrics="precision_recall")


def test_small_sets_are_measured_with_warnings(kit: Any, judge: str) -> None:
    ours, theirs = kit.npz("ours", kit.draw(12, 0)), kit.npz("theirs", kit.draw(13, 1))
    result = run(generated=ours, reference=theirs, extractor=judge)
    (warning,) = result.warnings  # the covariance of 13 images has full rank for 12 features, that of 12 has not
    assert re.search(r"frechet_distance\[judge\].* 12 generated .* 12 ", warning)
    assert result.used == {"score_splits": 1, "kid_subset_size": 6, "kid_subsets": 100, "neighbours": 3}
    for words in (("kid_subset_size", "1000", "6", "12"), ("score_splits", "10", "1", "12")):
        assert any(set(words) <= set(re.findall(r"\w+", note)) for note in result.notes)


def test_different_image_sizes_are_warned_of(kit: Any, judge: str) -> None:
    ours, theirs = kit.npz("ours", kit.draw(20, 0, side=4)), kit.npz("theirs", kit.draw(20, 1, side=6))
    assert any(
        re.search("4 x 4.*6 x 6.*input_size", warning)
        for warning in run(generated=ours, reference=theirs, extractor=judge).warnings
    )
    assert not run(generated=ours, reference=theirs, extractor=judge, input_size=4).warnings
    mixed = kit.tree(
        "mixed", {"1.png": kit.draw(1, 0)[0], "2.png": kit.draw(1, 0)[0], "grid.png": kit.draw(1, 0, side=9)[0]}
    )
    assert any("input_size" in warning for warning in run(generated=mixed, extractor=judge).warnings)


def test_the_folder_of_a_sampling_job_means_its_single_images(kit: Any, judge: str) -> None:
    """Figures of the job lie beside them, and the folder `images` is no class."""
    files = dict(zip([f"images/{name}" for name in ("0/a.png", "1/b.png", "3/c.png")], one_hot([0, 1, 3]), strict=True))
    beside = {"sample.json": b"{}", "maps.png": kit.draw(1, 0, side=9)[0]}
    path = kit.tree("run", {**files, **beside})
    result = run(generated=path, extractor=judge)
    assert result.generated_images == 3
    assert result.values[ACCURACY] == 1.0
    budgets = {f"tail_drop_{drop}/{name}": image for drop in (0, 0.3) for name, image in files.items()}
    path = kit.tree("budgets", {**budgets, **beside, "tail_drop_0/maps.png": kit.draw(1, 0, side=9)[0]})
    assert run(generated=path / "tail_drop_0", extractor=judge).generated_images == 3
    with pytest.raises(DataError, match=r" 2 .*tail_drop_0, tail_drop_0\.3"):
        run(generated=path, extractor=judge)
    grids = kit.tree("grids", {f"tail_drop_{drop}/grid.png": kit.draw(1, 0)[0] for drop in (0, 0.3)} | beside)
    for place in (grids, grids / "tail_drop_0", kit.tree("grid", {"grid.png": kit.draw(1, 0)[0], **beside})):
        with pytest.raises(DataError, match=r"format=folder.*format=npz"):
            run(generated=place, extractor=judge)
    kit.tree("packed", beside)
    kit.npz("packed/samples", kit.draw(4, 0))
    assert run(generated=kit.folder / "packed", extractor=judge).generated_images == 4


def test_statistics_that_are_not_finite_are_refused(kit: Any, judge: str) -> None:
    images = kit.npz("images", kit.draw(20, 0))
    for name, value in (("mu", np.full(12, np.nan)), ("sigma", np.full((12, 12), np.inf))):
        moments = {"mu": np.zeros(12), "sigma": np.eye(12), name: value}
        np.savez(kit.folder / "moments.npz", **moments)
        with pytest.raises(DataError, match=r"moments\.npz .*NaN"):
            run(generated=images, reference=kit.folder / "moments.npz", extractor=judge, metrics="frechet")


def test_file_names_need_not_be_unicode(kit: Any, judge: str) -> None:
    kit.tree("images", {"a.png": kit.draw(1, 0)[0], os.fsdecode(b"caf\xe9.png"): kit.draw(1, 1)[0]})
    result = run(
        generated=kit.folder / "images", reference=kit.folder / "images", extractor=judge,
        cache=kit.folder / "cache.safetensors", out=kit.folder / "out",
    )  # fmt: skip
    assert result.generated_images == 2


def test_missing_and_nearly_empty_sets_are_refused(kit: Any, judge: str) -> None:
    images = kit.npz("images", kit.draw(3, 0))
    with pytest.raises(DataError, match=r"nowhere"):
        run(generated=kit.folder / "nowhere", extractor=judge)
    for suffix in (".zip", ".npz", ".safetensors"):
        with pytest.raises(DataError, match=f"nowhere{suffix}"):
            run(generated=images, reference=kit.folder / f"nowhere{suffix}", extractor=judge)
    with pytest.raises(DataError, match=r"empty\.zip"):
        run(generated=kit.zip("empty", {}), extractor=judge)
    with pytest.raises(DataError, match=r"text\.zip"):
        run(generated=kit.zip("text", {"readme.txt": b"none here"}), extractor=judge)
    with pytest.raises(DataError, match=r"one\.zip"):
        run(generated=kit.zip("one", {"1.png": kit.draw(1, 0)[0]}), extractor=judge)
    with pytest.raises(DataError, match=r"none\.npz"):
        run(generated=kit.npz("none", kit.draw(0, 0)), extractor=judge)
    with pytest.raises(DataError, match=r"test_inputs\.py"):
        run(generated=images, extractor=judge, reference=__file__)


def test_broken_images_are_named_or_skipped(kit: Any, judge: str) -> None:
    images = kit.draw(6, 0)
    good = {f"{i}.png": image for i, image in enumerate(images)}
    path = kit.tree("images", good | {"2.png": b"no picture", "4.png": kit.png(images[4])[:45]})
    with pytest.raises(DataError, match=r"2\.png in .*images\b"):
        run(generated=path, extractor=judge)
    result = run(generated=path, extractor=judge, on_error="skip")
    kept = kit.npz("kept", images[[0, 1, 3, 5]])
    assert result.values == run(generated=kept, extractor=judge).values
    assert result.generated_images == 4
    assert [warning.split(" ")[0] for warning in result.warnings if ".png" in warning] == ["2.png", "4.png"]
    with pytest.raises(DataError, match=r"bad.*1\.png"):
        run(generated=kit.tree("bad", {"1.png": b"no", "2.png": b"no"}), extractor=judge, on_error="skip")
    with pytest.raises(DataError, match=r" 2 .*half.*1\.png"):
        run(generated=kit.tree("half", {"1.png": b"no", "2.png": images[0]}), extractor=judge, on_error="skip")


@pytest.mark.parametrize(
    ("arrays", "values"),
    [
        ({"images": np.zeros((2, 2, 2, 3), np.uint8)}, " images, .*arr_0"),
        ({"arr_0": np.zeros((2, 2, 2, 3), np.float32)}, r"arr_0 .*float32 .*\(2, 2, 2, 3\).*uint8"),
        ({"arr_0": np.zeros((2, 3, 2, 2), np.uint8)}, r"\(2, 3, 2, 2\).*\(N, H, W, 3\)"),
        ({"arr_0": np.zeros((2, 2, 2, 3), np.uint8, order="F")}, "C order"),
        (
            {"arr_0": np.zeros((2, 2, 2, 3), np.uint8), "arr_1": np.zeros(3, np.int64)},
            r"arr_1 .*\(3,\).* 2 ",
        ),
        ({"arr_0": np.zeros((2, 2, 2, 3), np.uint8), "arr_1": np.zeros(2)}, "arr_1 .*float64"),
    ],
)
def test_other_arrays_are_refused(kit: Any, judge: str, arrays: dict[str, Any], values: str) -> None:
    path = kit.folder / "images.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=values):
        run(generated=path, extractor=judge)


def test_damaged_npz(kit: Any, judge: str) -> None:
    path = kit.npz("images", kit.draw(100, 0))
    path.write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"images\.npz"):
        run(generated=path, extractor=judge)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", b"no array")
    with pytest.raises(DataError, match="arr_0"):
        run(generated=path, extractor=judge)
    content = io.BytesIO()
    np.save(content, kit.draw(100, 0))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", content.getvalue()[:-5])
    with pytest.raises(DataError, match=" 99 of 100"):
        run(generated=path, extractor=judge)


def test_images_are_upright_rgb(kit: Any) -> None:
    """A photograph taken with the camera held sideways, and a grey image."""
    photo, grey = io.BytesIO(), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (6, 4)).save(photo, "jpeg", exif=exif)
    Image.new("L", (6, 4)).save(grey, "png")
    images = open_images(kit.zip("images", {"1.jpg": photo.getvalue(), "2.png": grey.getvalue()}))
    assert [image.shape for image in images.images([0, 1], None)] == [(6, 4, 3), (4, 6, 3)]
    assert [image.shape for image in images.images([0, 1], 5)] == [(5, 5, 3)] * 2


def test_result_holds_what_is_needed_to_repeat_it(kit: Any, judge: str) -> None:
    images = kit.npz("images", kit.draw(20, 0))
    result = run(generated=images, reference=images, extractor=judge, out=kit.folder / "out")
    text = (kit.folder / "out" / "evaluation.json").read_text()
    assert EvalResult.model_validate_json(text) == result
    written = json.loads(text)
    assert {"python", "tokdyn", "torch", "torch-fidelity"} <= written["versions"].keys()
    assert written["machine"]["device"] == "cpu"
    assert written["machine"]["cpus"] >= 1
    assert len(written["extractor"]["sha256"]) == 64
    assert 0 < written["seconds"]["total"] < 60
    assert written["config"]["generated"] == str(images)
    assert not {"FID", "IS", "KID"} & written["values"].keys()


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ({"weights": "w.pth", "extractor": "net.ts"}, "weights=.*extractor=inception"),
        ({"checkpoint": "w.pth"}, "checkpoint=.*extractor=timm:NAME"),
        ({"cache": "c.pt", "reference": "r"}, r"cache=.*\.safetensors"),
        ({"cache": "c.safetensors"}, "cache=.*reference="),
        ({"metrics": ","}, "metrics="),
        ({"metrics": "fid"}, "'frechet', 'score'"),
        ({"limit": 1}, "limit"),
        ({"steps": 3}, "steps"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], values: str) -> None:
    with pytest.raises(ValidationError, match=values):
        EvalConfig(generated="images", **settings)
