"""Build a model from the tensors of a checkpoint, if all of them match it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokdyn.errors import CheckpointError, TokdynError
from tokdyn.models import DCDiT, DiT
from tokdyn.ops import sincos_position
from tokdyn.reading import one_line

Model = TypeVar("Model", DiT, DCDiT)


def fill(model_class: type[Model], settings: Mapping[str, Any], tensors: Mapping[str, Tensor], origin: str) -> Model:
    """Build a model with the tensors of a checkpoint. If the position table is missing, it is computed.

    Args:
        model_class: `DiT` or `DCDiT`.
        settings: keyword arguments of the class; `sample_size` is (rows, columns).
        tensors: tensors by tokdyn's names.
        origin: name of the checkpoint, for error messages.

    Returns:
        The model, in evaluation mode, in fp32.

    Raises:
        CheckpointError: the settings are impossible, or names or shapes do not match. The message gives the number of
            mismatches of each kind and the first names.
    """
    height, width = settings["sample_size"]
    size = height if height == width else (height, width)
    try:
        with torch.device("meta"):  # only shapes are needed, because the weights are replaced
            model: Model = model_class(**{**settings, "sample_size": size})
    except TokdynError as error:
        raise CheckpointError(f"{origin} needs a {model_class.__name__} that cannot be built: {error}") from error
    expected = model.state_dict()
    missing = sorted(set(expected) - set(tensors) - {"pos_embed"})
    surplus = sorted(set(tensors) - set(expected))
    wrong = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(value.shape)}"
        for name, value in sorted(expected.items())
        if name in tensors and tensors[name].shape != value.shape
    ]
    if missing or surplus or wrong:
        problems = (("missing", missing), ("left over", surplus), ("of another shape", wrong))
        report = "; ".join(f"{len(names)} {problem}: {first_few(names)}" for problem, names in problems if names)
        raise CheckpointError(
            f"{origin} does not hold the tensors of a {model_class.__name__}. By tokdyn's names: {report}. Nothing was "
            "loaded; check the settings that were given."
        )
    own = {name: tensor.detach().to(torch.float32, copy=True).contiguous() for name, tensor in tensors.items()}
    if "pos_embed" not in own:
        patch = settings["patch_size"]
        scale = settings.get("position_scale", 1.0)
        own["pos_embed"] = sincos_position((height // patch, width // patch), settings["hidden_size"], scale)[None]
    model.load_state_dict(own, assign=True)
    model.eval()
    return model


def first_few(names: Sequence[str], limit: int = 4) -> str:
    """Join the first few names with commas, followed by dots if there are more."""
    return ", ".join(one_line(name, 80) for name in names[:limit]) + (", ..." if len(names) > limit else "")
