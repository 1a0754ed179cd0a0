"""Statistics of a reference: cached, read back, and refused for another reference or network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from tokdyn.errors import DataError
from tokdyn.evaluate import EvalConfig, EvalResult, evaluate


@pytest.fixture
def settings(kit: Any, judge: str) -> dict[str, Any]:
    """Settings of an evaluation that writes kept.safetensors."""
    theirs = {f"{i % 4}/{i:02}.png": image for i, image in enumerate(kit.draw(40, 2))}
    return {
        "generated": kit.npz("ours", kit.draw(30, 1)),
        "reference": kit.tree("theirs", theirs),
        "extractor": judge,
        "cache": kit.folder / "kept.safetensors",
        "device": "cpu",
    }


def run(settings: dict[str, Any], **changes: Any) -> EvalResult:
    merged = settings | changes
    return evaluate(EvalConfig(**{name: value for name, value in merged.items() if value is not None}))


def numbers(result: EvalResult) -> Any:
    return result.values, result.spread, result.reference_values, result.reference_images, result.warnings


def test_cache_gives_the_same_numbers_with_and_without_the_images(kit: Any, settings: dict[str, Any]) -> None:
    plain = run(settings, cache=None)
    written = run(settings)
    read = run(settings)
    instead = run(settings, cache=None, reference=settings["cache"])
    assert numbers(plain) == numbers(written) == numbers(read) == numbers(instead)
    assert plain.reference_values.keys() == {"class_score[judge]", "class_accuracy[judge]"}
    assert sorted(path.name for path in kit.folder.iterdir()) == ["kept.safetensors", "ours.npz", "theirs"]


def test_cache_is_read_instead_of_the_images(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run(settings)
    monkeypatch.setattr("tokdyn.evaluate.images.decode", None)  # so decoding an image fails; ours are arrays
    assert run(settings).reference_images == 40


def test_changed_images_of_equal_size_are_refused(settings: dict[str, Any]) -> None:
    run(settings)
    first = min(settings["reference"].rglob("*.png"))
    content, times = first.read_bytes(), first.stat()
    first.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DataError, match=r"kept\.safetensors .*theirs"):
        run(settings)
    first.write_bytes(content)
    assert run(settings).reference_images == 40


def test_cache_holds_its_origin(settings: dict[str, Any]) -> None:
    result = run(settings)
    with safe_open(settings["cache"], "np") as file:
        assert {key: file.get_tensor(key).shape for key in file.keys()} == {  # noqa: SIM118 (not a mapping)
            "features": (40, 12), "mu": (12,), "sigma": (12, 12),
        }  # fmt: skip
        assert result.extractor.sha256 in file.metadata()["tokdyn"]


@pytest.mark.parametrize("way", ["cache", "reference"])
def test_other_networks_are_refused(kit: Any, settings: dict[str, Any], way: str) -> None:
    run(settings)
    changes = {} if way == "cache" else {"cache": None, "reference": settings["cache"]}
    other = str(kit.torchscript("critic", scale=2.0))
    with pytest.raises(DataError, match=r"torchscript .*judge .* critic"):
        run(settings, extractor=other, **changes)
    with pytest.raises(DataError, match=r"judge .*images at 4 pixels.*ANOTHER\.safetensors"):
        run(settings, input_size=4, **changes)


def test_a_renamed_network_may_read_the_cache(kit: Any, settings: dict[str, Any]) -> None:
    run(settings)
    renamed = kit.folder / "renamed.ts"
    renamed.write_bytes(Path(settings["extractor"]).read_bytes())
    assert "frechet_distance[renamed]" in run(settings, extractor=str(renamed)).values


def test_other_references_are_refused(kit: Any, settings: dict[str, Any]) -> None:
    run(settings)
    values = r"kept\.safetensors .*theirs"
    with pytest.raises(DataError, match=values):
        run(settings, reference_limit=20)
    kit.tree("theirs", {"0/one_more.png": kit.draw(1, 9)[0]})
    with pytest.raises(DataError, match=values):
        run(settings)


def test_limited_reference_is_kept_with_its_seed(settings: dict[str, Any]) -> None:
    assert numbers(run(settings, reference_limit=20)) == numbers(run(settings, reference_limit=20))
    with pytest.raises(DataError, match=r"reference_limit .*seed"):
        run(settings, reference_limit=20, seed=1)


def test_statistics_of_statistics_are_refused(kit: Any, settings: dict[str, Any]) -> None:
    run(settings)
    with pytest.raises(DataError, match=r"kept\.safetensors.*cache="):
        run(settings, reference=settings["cache"], cache=kit.folder / "again.safetensors")


def test_files_without_statistics_are_named(kit: Any, settings: dict[str, Any]) -> None:
    path = kit.folder / "other.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"other\.safetensors"):
        run(settings, reference=path, cache=None)
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(DataError, match=r"other\.safetensors.*cache="):
        run(settings, reference=path, cache=None)
    run(settings)
    with safe_open(settings["cache"], "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        metadata = file.metadata()
    save_file(tensors | {"mu": tensors["mu"][:5]}, path, metadata)
    with pytest.raises(DataError, match=r"other\.safetensors"):
        run(settings, reference=path, cache=None)


def test_published_moments(kit: Any, settings: dict[str, Any]) -> None:
    """An npz of mu and sigma serves the Frechet distance alone; it does not name its network, so the result warns."""
    images = kit.features(kit.draw(40, 2))
    path = kit.folder / "published.npz"
    np.savez(path, mu=images.mean(0), sigma=np.cov(images.T))
    result = run(settings, reference=path, cache=None)
    expected = run(settings, cache=None)
    name = "frechet_distance[judge]"
    assert result.values[name] == pytest.approx(expected.values[name], abs=1e-6)
    assert set(result.values) == {name, "class_score[judge]"}
    assert result.reference_images is None
    assert any("judge" in warning and "frechet" not in warning for warning in result.warnings)
    with pytest.raises(DataError, match=r"kid .*cache="):
        run(settings, reference=path, cache=None, metrics="kid")
    np.savez(path, mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(DataError, match=r" 7 .*judge .* 12"):
        run(settings, reference=path, cache=None)
    np.savez(path, mu=np.zeros(7), sigma=np.eye(6))
    with pytest.raises(DataError, match=r"mu .*\(7,\).*sigma .*\(6, 6\)"):
        run(settings, reference=path, cache=None)


def test_published_moments_beside_images_are_for_inception_alone(kit: Any, settings: dict[str, Any]) -> None:
    """ADM's reference batches hold Inception moments of all of ImageNet beside some images."""
    images = kit.draw(40, 2)
    np.savez(kit.folder / "batch.npz", arr_0=images, mu=np.zeros(2048), sigma=np.eye(2048))
    batch = run(settings, reference=kit.folder / "batch.npz", cache=None)
    plain = run(settings, reference=kit.npz("plain", images), cache=None)
    assert batch.values == plain.values
