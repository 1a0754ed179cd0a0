"""Compute the FLOPs of DiT (arXiv 2212.09748) and DC-DiT (arXiv 2603.06351) from their settings; a multiply-add is 2.

Notation: B images, N cells of the token grid, M kept tokens of an image, D width, e scaffold width, L blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokdyn.errors import InputError
from tokdyn.methods.costs import residual_flops, router_flops, smoothing_flops
from tokdyn.ops.dispatch import is_plain

FREQUENCIES = 256
"""Sine and cosine channels of the timestep embedding in both models."""
_SETTINGS = {"hidden_size", "depth", "patch_size", "in_channels", "mlp_ratio", "learn_sigma", "num_classes"}


def model_config(model: Any) -> Mapping[str, Any]:
    """Return the settings of a `DiT` or `DCDiT`.

    Args:
        model: a `tokdyn.models.DiT` or `DCDiT` (also on the meta device), or a mapping with the settings of one.

    Raises:
        InputError: it is neither a model of these classes nor such a mapping.
    """
    config = model if isinstance(model, Mapping) else getattr(model, "config", None)
    if not isinstance(config, Mapping) or not set(config) >= _SETTINGS:
        raise InputError(
            f"FLOPs can be computed from the settings of tokdyn.models.DiT and DCDiT, but this is a "
            f"{type(model).__name__}; call tokdyn.cost.count(model, *inputs) to count a forward pass."
        )
    return config


def is_chunked(config: Mapping[str, Any]) -> bool:
    """Return whether these are the settings of a DC-DiT, and not of a DiT."""
    return "encoder_depth" in config


def grid_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the token grid (rows, columns) of inputs of the configured size."""
    size, patch = config["sample_size"], config["patch_size"]
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows // patch, columns // patch


def kept_tokens(config: Mapping[str, Any], kept: float | Sequence[int] | None = None, batch: int = 1) -> list[float]:
    """Return the number of tokens of each image that the blocks of a DC-DiT compute.

    Args:
        config: settings of a DC-DiT.
        kept: kept share in (0, 1], or the number of kept tokens of each image, or None for the model's target 1/N.
        batch: B, unless `kept` is a list.

    Returns:
        B numbers. A share of N is not rounded, so that it is right as the mean over many images.

    Raises:
        InputError: a share is outside (0, 1], or a count outside [1, N].
    """
    rows, columns = grid_of(config)
    cells = rows * columns
    if kept is None:
        kept = 1.0 / float(config["target"])
    if isinstance(kept, (int, float)):
        if not 0.0 < kept <= 1.0:
            raise InputError(f"the kept share is {kept}; give more than 0 and at most 1.")
        return [kept * cells] * batch
    counts = [float(count) for count in kept]
    if not counts or not all(1 <= count <= cells for count in counts):
        raise InputError(f"the kept counts are {list(kept)}; give a number from 1 to {cells} for every image.")
    return counts


def model_parts(
    model: Any, kept: float | Sequence[int] | None = None, batch: int = 1, device: str = "cpu"
) -> dict[str, int]:
    """Compute the FLOPs of one forward pass by part, summed over the batch; a multiply-add is 2 FLOPs.

    Args:
        model: a `DiT`, a `DCDiT` or the settings of one.
        kept: for a DC-DiT, the kept share, or the number of kept tokens of each image (their number is then B), or None
            for 1/N.
        batch: B.
        device: device type. On CPU, de-chunking smooths by weighted sums, which are not counted; elsewhere by one
            product with a band matrix per axis.

    Returns:
        FLOPs by part, in the order of execution: embed, (encoder, router, residual,) adaLN, projections, attention,
        mlp, (dechunk, decoder,) head. Attention is a sum of M**2 terms over the images.

    Raises:
        InputError: the model is not a `DiT` or `DCDiT`, or `kept` is out of range or given for a DiT.
    """
    config = model_config(model)
    rows, columns = grid_of(config)
    cells, width, patch = rows * columns, config["hidden_size"], config["patch_size"]
    channels = config["in_channels"]
    outputs = patch * patch * channels * (2 if config["learn_sigma"] else 1)
    time = 2 * width * (FREQUENCIES + width)
    if not is_chunked(config):
        if kept is not None:
            raise InputError(f"kept={kept} cannot be set for a DiT, which computes all of its tokens; leave it out.")
        parts: dict[str, float] = {"embed": batch * (2 * cells * channels * patch * patch * width + time)}
        parts |= _blocks(config, [float(cells)] * batch)
        parts["head"] = batch * (2 * cells * width * outputs + 4 * width * width)
        return {name: round(value) for name, value in parts.items()}
    counts = kept_tokens(config, kept, batch)
    batch, narrow = len(counts), config.get("scaffold_width") or width // 4
    parts = {"embed": batch * (18 * cells * channels * patch * patch * narrow + time)}
    encoder = [(narrow, narrow)] * (config["encoder_depth"] - 1) + [(narrow, width)]
    decoder = [(width, narrow)] + [(narrow, narrow)] * (config["decoder_depth"] - 1)
    parts["encoder"] = batch * sum(_convolutional(cells, width, *pair) for pair in encoder)
    parts["router"] = batch * router_flops(config["router"], cells, width)
    parts["residual"] = batch * residual_flops(cells, width)
    parts |= _blocks(config, counts)
    smoothed = config["sigma"] and (device != "cpu" or is_plain())
    parts["dechunk"] = batch * smoothing_flops((rows, columns), width) if smoothed else 0
    parts["decoder"] = batch * sum(_convolutional(cells, width, *pair) for pair in decoder)
    parts["head"] = batch * (2 * cells * narrow * outputs + 4 * width * narrow)
    return {name: round(value) for name, value in parts.items()}


def flops_per_image(model: Any, kept: float | None = None, unconditional: float | None = None) -> float:
    """Compute the FLOPs of one denoising step of one image; a multiply-add is 2 FLOPs.

    Multiply it by the number of steps to get the papers' "TFLOPs/img", and by 3 to get a training step, whose backward
    pass costs two forward passes.

    Args:
        model: a `DiT`, a `DCDiT` or the settings of one.
        kept: for a DC-DiT, the kept share after tail drop; None means the target, 1/N.
        unconditional: if given, an unconditional branch for guidance is added. For a DC-DiT this is the kept share of
            that branch (smaller than `kept` in Lite-CFG); for a DiT the value does not matter.

    Returns:
        FLOPs per image.

    Raises:
        InputError: as in `model_parts`.
    """
    chunked = is_chunked(model_config(model))
    total = float(sum(model_parts(model, kept).values()))
    if unconditional is not None:
        total += sum(model_parts(model, unconditional if chunked else None).values())
    return total


def compute_matched_steps(steps: int, warmup: int, baseline: float, full: float, budgets: Sequence[float]) -> int:
    """Compute how many training steps of a new model cost as much as those of a baseline (arXiv 2603.06351 v2).

    The result is `S_w + (S * F_b - S_w * F_0) / mean(F)`.

    Args:
        steps: S, steps of the baseline.
        warmup: S_w, first steps of the new model, which run without tail drop.
        baseline: F_b, FLOPs per image of the baseline (a multiply-add is 2; any unit, the same for all arguments).
        full: F_0, FLOPs per image without tail drop.
        budgets: FLOPs per image at each tail drop that training draws from with equal probability.

    Returns:
        Steps, rounded to the nearest integer.

    Raises:
        InputError: a cost is not positive, there are no budgets, or the warm-up alone costs more than the baseline.
    """
    costs = [baseline, full, *budgets]
    if len(costs) < 3 or min(costs) <= 0:
        raise InputError(f"the FLOPs per image are {costs}; give positive numbers and at least one budget.")
    left = steps * baseline - warmup * full
    if left < 0:
        raise InputError(
            f"warmup={warmup} steps at {full:.3g} FLOPs cost more than steps={steps} of the baseline at {baseline:.3g} "
            "FLOPs; use fewer warm-up steps."
        )
    return round(warmup + left * len(budgets) / sum(budgets))


def _blocks(config: Mapping[str, Any], counts: Sequence[float]) -> dict[str, float]:
    """Compute the FLOPs of all blocks by part, given the number of tokens of each image; adaLN runs once per image."""
    width, depth, hidden = config["hidden_size"], config["depth"], int(config["hidden_size"] * config["mlp_ratio"])
    tokens, pairs = sum(counts), sum(count * count for count in counts)
    return {
        "adaLN": depth * 2 * len(counts) * width * 6 * width,
        "projections": depth * 2 * tokens * width * 4 * width,
        "attention": depth * 4 * pairs * width,
        "mlp": depth * 4 * tokens * width * hidden,
    }


def _convolutional(cells: int, condition: int, inputs: int, outputs: int) -> int:
    """Compute the FLOPs of a residual block of the scaffold: two 3x3 convolutions, condition, and a 1x1 skip.

    Args:
        cells: N.
        condition: width of the condition.
        inputs: width of the input.
        outputs: width of the output.
    """
    inner = min(inputs, outputs)
    skip = 2 * cells * inputs * outputs if inputs != outputs else 0
    return 18 * cells * inner * (inputs + outputs) + 2 * condition * inner + skip
