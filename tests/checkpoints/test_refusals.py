"""What does not fit is refused with a sentence that names what is wrong, and nothing is half loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tokdyn.checkpoints import read, to_diffusers, to_facebook, to_official
from tokdyn.errors import CheckpointError
from tokdyn.models import DCDiT, DiT


@pytest.fixture
def official(dcdit: Callable[..., DCDiT]) -> dict[str, Tensor]:
    return to_official(dcdit())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hidden_size": 64}, r"hidden_size=64, given for .* contradicts its weights, where it is 32"),
        ({"depth": 3}, "depth=3"),
        ({"mlp_ratio": 3.0}, "mlp_ratio=3.0"),
        ({"learn_sigma": False}, "learn_sigma=False"),
        ({"num_classes": 10}, "num_classes=10"),
        ({"scaffold_width": 16}, "scaffold_width=16"),
        ({"router": "cosine"}, "router='cosine'"),
        ({"patch_size": 3}, "which patch_size=3 does not divide"),
        ({"patch_size": 0}, "patch_size=0, given for .* at least 1"),
        ({"patch_size": "1"}, "patch_size='1', given for .* at least 1"),
        ({"sample_size": "8"}, r"sample_size='8', given for .* should be a number or \(rows, columns\)"),
        ({"sample_size": (8, 8, 8)}, r"sample_size=\(8, 8, 8\), given for"),
        ({"sample_size": 16}, r"sample_size=16 with patch_size=1 has 256 tokens, but .* has 64 positions"),
        ({"sample_size": (4, 16)}, "contradicts .* those of a grid of 8 x 8 tokens"),
        ({"num_heads": 5}, "num_heads=5 does not divide the width 32"),
        ({"width": 32}, "'width' is no setting of DCDiT; known are"),
        ({"sigma": -1.0}, "DCDiT .*sigma is -1.0"),
        ({"target": 0.5}, "no DCDiT can be built for .*target"),
    ],
    ids=str,
)
def test_contradictions(official: dict[str, Tensor], given: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(official, **{"num_heads": 4, **given})


def test_heads_must_be_given_for_other_widths(official: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match=r"not known for width 32; give num_heads="):
        read(official)


def test_missing_and_left_over_tensors_are_counted_and_named(official: dict[str, Tensor]) -> None:
    dropped = [name for name in official if name.startswith("hnet.main_network.main_network.layers.0.mlp")]
    for name in dropped[1:]:
        del official[name]
    official["hnet.extra.weight"] = torch.zeros(1)
    official["hnet.encoder.rmsnorm.weight"] = torch.zeros(33)
    kept = dropped[0]
    message = (
        rf"{len(dropped) - 1} missing: blocks.0.mlp.*1 left over: hnet.extra.weight; "
        r"1 of another shape: encoder.norm.weight \(33,\) for \(32,\)"
    )
    assert kept.endswith("fc1.weight")
    with pytest.raises(CheckpointError, match=message):
        read(official, num_heads=4)


def test_a_gap_between_blocks_is_missing(dit: Callable[..., DiT]) -> None:
    written = {k: v for k, v in to_facebook(dit(depth=3)).items() if not k.startswith("blocks.1.")}
    with pytest.raises(CheckpointError, match=r"10 missing: blocks.1.adaLN_modulation.1.bias, .*\.\.\.\."):
        read(written, num_heads=4)


def test_a_tensor_that_sizes_need(official: dict[str, Tensor]) -> None:
    del official["x_embedder.proj.weight"]
    with pytest.raises(CheckpointError, match=r"lacks 'x_embedder.proj.weight'"):
        read(official, num_heads=4)


def test_the_same_tensor_with_and_without_prefix(official: dict[str, Tensor]) -> None:
    official["module.pos_embed"] = official["pos_embed"]
    with pytest.raises(CheckpointError, match="'pos_embed' twice"):
        read(official, num_heads=4)


def test_embedders_that_differ_between_blocks(dit: Callable[..., DiT]) -> None:
    written = to_diffusers(dit(timestep_shift=1))
    written["transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"] += 1
    with pytest.raises(CheckpointError, match=r"different embedders in its blocks \(transformer_blocks.1"):
        read(written, num_heads=4, sample_size=8)


def test_diffusers_weights_without_their_config_need_a_size(dit: Callable[..., DiT]) -> None:
    with pytest.raises(CheckpointError, match="no position table; give sample_size="):
        read(to_diffusers(dit(timestep_shift=1)), num_heads=4)


def test_a_projection_that_is_not_there(dit: Callable[..., DiT]) -> None:
    written = to_diffusers(dit(timestep_shift=1))
    del written["transformer_blocks.0.attn1.to_v.bias"]
    with pytest.raises(CheckpointError, match="without its to_k or to_v"):
        read(written, num_heads=4, sample_size=8)


def test_unknown_formats(official: dict[str, Tensor], dit: Callable[..., DiT]) -> None:
    with pytest.raises(CheckpointError, match=r"no known format: it has layer.weight\. Known are official DC-DiT"):
        read({"layer.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="does not hold the gates of a DyDiT"):
        read({**to_facebook(dit()), "blocks.0.attn_rate.router.weight": torch.zeros(1)}, num_heads=4)
    with pytest.raises(CheckpointError, match="was to be read as 'dit', but its tensors are those of 'dc-dit'"):
        read(official, kind="dit", num_heads=4)
    with pytest.raises(CheckpointError, match="kind='hnet' is unknown"):
        read(official, kind="hnet", num_heads=4)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="holds nothing and no state dict"):
        read({})
    with pytest.raises(CheckpointError, match="holds 'step' and no state dict"):
        read({"step": 3})
    with pytest.raises(CheckpointError, match="the source is a DiT; expected a path or a state dict"):
        read(dit())  # type: ignore[arg-type]


def test_outputs_that_are_neither_noise_nor_noise_and_variance(dit: Callable[..., DiT]) -> None:
    written = to_facebook(dit())
    written["final_layer.linear.weight"] = torch.zeros(48, 32)
    with pytest.raises(
        CheckpointError, match=r"predicts 48 values a token from 16; expected 16 or, with learned variance, 32"
    ):
        read(written, num_heads=4)
