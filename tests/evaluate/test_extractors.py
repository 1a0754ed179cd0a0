"""Feature extractors: their contract, their names, and errors when they are not available."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorInceptionV3

from tokdyn.errors import CheckpointError, InputError
from tokdyn.evaluate import EvalConfig, EvalResult, evaluate
from tokdyn.evaluate import inception as inception_module
from tokdyn.evaluate.extractor import Extractor, ExtractorInfo, file_sha256
from tokdyn.evaluate.inception import cached_weights
from tokdyn.evaluate.result import metric_name
from tokdyn.evaluate.timm_model import open_timm

CPU = torch.device("cpu")
IMAGES = torch.zeros(3, 3, 2, 2, dtype=torch.uint8)
INFO = ExtractorInfo(kind="torchscript", name="net", sha256="0" * 64)
ROWS = torch.arange(6.0).reshape(3, 2)


def run(**settings: Any) -> EvalResult:
    return evaluate(EvalConfig(**{"device": "cpu", **settings}))


@pytest.mark.parametrize(
    ("raw", "with_logits"),
    [
        (ROWS, False),
        ((ROWS,), False),
        ((ROWS, ROWS), True),
        ([ROWS, ROWS], True),
        ((ROWS, None), False),
        ({"features": ROWS}, False),
        ({"features": ROWS, "logits": ROWS}, True),
        (ROWS.to(torch.bfloat16), False),
    ],
)
def test_outputs_that_keep_the_contract(raw: object, with_logits: bool) -> None:
    outputs = Extractor(INFO, lambda images: raw, CPU)(IMAGES)
    assert torch.equal(outputs.features, ROWS)
    assert (outputs.logits is not None) == with_logits


@pytest.mark.parametrize(
    ("raw", "values"),
    [
        ("features", " str"),
        (None, " NoneType"),
        ((ROWS, ROWS, ROWS), "tuple .*3"),
        ({"pooled": ROWS}, "'pooled'"),
        (ROWS[0], "\\(2,\\) .*features .*3 "),
        (ROWS[:2], "\\(2, 2\\) .*features .*3 "),
        ((ROWS, ROWS[:, :, None]), "\\(3, 2, 1\\) .*logits"),
        (ROWS[:, :0], "\\(3, 0\\) .*features"),
        (ROWS / 0, "features .*NaN"),
    ],
)
def test_outputs_that_break_the_contract(raw: object, values: str) -> None:
    with pytest.raises(CheckpointError, match=values):
        Extractor(INFO, lambda images: raw, CPU)(IMAGES)


class EightPixelsOnly(nn.Module):
    """Takes images of 8 x 8 pixels only, like a network with a fixed last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8 * 8 * 3, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.float().flatten(1) / 255)


def test_input_size_fits_images_to_the_extractor(kit: Any) -> None:
    settings = {
        "generated": kit.npz("ours", kit.draw(12, 0, side=11)),
        "reference": kit.zip("theirs", {f"{side}.png": kit.draw(1, side, side=side)[0] for side in range(5, 20)}),
        "extractor": str(kit.torchscript("fixed", EightPixelsOnly())),
    }
    with pytest.raises(CheckpointError, match=r"fixed .*\(1, 3, 11, 11\).*input_size"):
        run(**settings)
    result = run(**settings, input_size=8)
    assert {"frechet_distance[fixed]", "kernel_distance[fixed]"} <= set(result.values)
    assert result.extractor.input_size == 8
    assert any(note.startswith("score") and "fixed" in note for note in result.notes)


def test_files_that_are_no_extractors_are_named(kit: Any) -> None:
    images = kit.npz("images", kit.draw(5, 0))
    with pytest.raises(CheckpointError, match=r"nowhere\.ts.*'inception'.*'timm:NAME'"):
        run(generated=images, reference=images, extractor=str(kit.folder / "nowhere.ts"))
    text = kit.folder / "text.ts"
    text.write_text("not a network")
    with pytest.raises(CheckpointError, match=r"text\.ts"):
        run(generated=images, reference=images, extractor=str(text))


def test_unavailable_devices_are_named(kit: Any, judge: str) -> None:
    images = kit.npz("images", kit.draw(5, 0))
    for device in ("warp", "cuda:99", "meta"):
        with pytest.raises(InputError, match=f"device={device}"):
            run(generated=images, extractor=judge, device=device)


def test_only_published_inception_is_called_fid() -> None:
    metrics = ("frechet_distance", "class_score", "kernel_distance", "precision", "recall", "class_accuracy")
    published = INFO.model_copy(update={"kind": "inception", "name": "inception", "standard": True})
    assert [metric_name(metric, published) for metric in metrics] == [
        "FID", "IS", "KID", "precision[inception]", "recall[inception]", "class_accuracy[inception]",
    ]  # fmt: skip
    for kind in ("inception", "torchscript", "timm"):
        other = INFO.model_copy(update={"kind": kind, "name": "FID"})
        assert [metric_name(metric, other) for metric in metrics] == [f"{metric}[FID]" for metric in metrics]


class Untrained(FeatureExtractorInceptionV3):
    """Inception before its weights are loaded."""

    def load_state_dict(self, *args: Any, **settings: Any) -> Any:
        return None


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write random weights of the Inception network."""
    path = tmp_path_factory.mktemp("inception") / "mine.pth"
    torch.save({}, path)
    torch.save(Untrained("inception", ["2048"], feature_extractor_weights_path=str(path)).state_dict(), path)
    return path


def test_inception_with_other_weights_has_other_names(kit: Any, inception_weights: Path) -> None:
    images = kit.npz("images", kit.draw(4, 0, side=8))
    result = run(
        generated=images,
        reference=images,
        weights=inception_weights,
        metrics="score,kid,precision_recall",
        neighbours=1,
    )
    assert set(result.values) == {"class_score[mine]", "kernel_distance[mine]", "precision[mine]", "recall[mine]"}
    assert any(warning.startswith("mine ") for warning in result.warnings)


@pytest.mark.slow  # eigenvalues of a matrix of 2048 x 2048
def test_inception_with_published_weights(kit: Any, inception_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights, declared to be the published ones."""
    monkeypatch.setattr(inception_module, "PUBLISHED_SHA256", file_sha256(inception_weights))
    images = kit.npz("images", kit.draw(4, 0, side=8), np.arange(4))
    published = run(generated=images, reference=images, weights=inception_weights, neighbours=1)
    assert set(published.values) == {"FID", "IS", "KID", "precision[inception]", "recall[inception]"}
    assert published.values["FID"] == pytest.approx(0, abs=1e-4)  # rounding of 2048 eigenvalues, nearly all zero
    assert any(re.search("class_accuracy.* 1008 ", note) for note in published.notes)
    assert any(warning.startswith("FID ") for warning in published.warnings)


def test_inception_without_network(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(kit.folder))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens on the discard port
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    images = kit.npz("images", kit.draw(4, 0))
    with pytest.raises(CheckpointError, match="Inception") as caught:
        run(generated=images, reference=images)
    assert all(value in str(caught.value) for value in (str(cached_weights()), "weights=FILE", "extractor=FILE.ts"))
    assert kit.folder in cached_weights().parents


def test_weights_of_another_network_are_refused(kit: Any) -> None:
    images = kit.npz("images", kit.draw(4, 0))
    with pytest.raises(CheckpointError, match=r"nowhere\.pth"):
        run(generated=images, weights=kit.folder / "nowhere.pth")
    torch.save({"layer": torch.zeros(2)}, kit.folder / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth"):
        run(generated=images, weights=kit.folder / "other.pth")
    torch.save({"layer": Path("anything")}, kit.folder / "objects.pth")
    with pytest.raises(CheckpointError, match=r"objects\.pth"):
        run(generated=images, weights=kit.folder / "objects.pth")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_timm_with_local_weights(kit: Any, suffix: str) -> None:
    """The number of classes is that of the checkpoint, and the images are resized to what the model expects."""
    network = timm.create_model("test_vit", num_classes=3)
    checkpoint = kit.folder / f"weights.{suffix}"
    if suffix == "pth":
        torch.save(network.state_dict(), checkpoint)
    else:
        save_file(network.state_dict(), checkpoint)
    images = kit.npz("images", kit.draw(6, 0, side=20), np.array([0, 1, 2, 0, 1, 2]))
    result = run(generated=images, reference=images, extractor="timm:test_vit", checkpoint=checkpoint)
    assert {"frechet_distance[test_vit]", "class_score[test_vit]", "class_accuracy[test_vit]"} <= set(result.values)
    assert result.values["frechet_distance[test_vit]"] == pytest.approx(0, abs=1e-5)
    assert result.extractor.input_size == network.default_cfg["input_size"][-1]
    network.head.bias.data[0] += 100
    torch.save(network.state_dict(), kit.folder / "first.pth")
    biased = run(generated=images, extractor="timm:test_vit", checkpoint=kit.folder / "first.pth")
    assert biased.values["class_accuracy[test_vit]"] == pytest.approx(2 / 6)
    assert biased.extractor.sha256 != result.extractor.sha256


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_timm_features_are_those_of_timms_own_transform(kit: Any, name: str) -> None:
    """The models differ in mean and deviation. Without a crop, images of the right size are only normalised."""
    network = timm.create_model(name, num_classes=3).eval()
    save_file(network.state_dict(), kit.folder / "weights.safetensors")
    extractor = open_timm(name, kit.folder / "weights.safetensors", None, CPU)
    side = extractor.info.input_size
    images = kit.draw(2, 0, side=side)
    settings = timm.data.resolve_model_data_config(network) | {"crop_pct": 1.0}
    transform = timm.data.create_transform(**settings, is_training=False)
    inputs = torch.stack([transform(Image.fromarray(image)) for image in images])
    with torch.no_grad():
        inner = network.forward_features(inputs)
        features, logits = network.forward_head(inner, pre_logits=True), network(inputs)
    outputs = extractor(torch.from_numpy(images).permute(0, 3, 1, 2))
    torch.testing.assert_close(outputs.features, features)
    torch.testing.assert_close(outputs.logits, logits)


def test_timm_models_that_are_not_available_are_named(kit: Any) -> None:
    images = kit.npz("images", kit.draw(4, 0))
    with pytest.raises(CheckpointError, match="resnet51"):
        run(generated=images, extractor="timm:resnet51")
    with pytest.raises(CheckpointError, match=r"timm:test_vit .*checkpoint=FILE"):
        run(generated=images, extractor="timm:test_vit")
    with pytest.raises(CheckpointError, match=r"nowhere\.pth"):
        run(generated=images, extractor="timm:test_vit", checkpoint=kit.folder / "nowhere.pth")
    save_file({"weight": torch.zeros(2)}, kit.folder / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors .*timm:test_vit"):
        run(generated=images, extractor="timm:test_vit", checkpoint=kit.folder / "other.safetensors")
    (kit.folder / "text.safetensors").write_text("text")
    with pytest.raises(CheckpointError, match=r"text\.safetensors"):
        run(generated=images, extractor="timm:test_vit", checkpoint=kit.folder / "text.safetensors")
