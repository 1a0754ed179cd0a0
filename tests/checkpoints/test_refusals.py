"""Weights and settings that do not fit are refused by name, and nothing is loaded in part."""

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
        ({"hidden_size": 64}, r"hidden_size=64.* 32\.$"),
        ({"depth": 3}, "depth=3"),
        ({"mlp_ratio": 3.0}, "mlp_ratio=3.0"),
        ({"learn_sigma": False}, "learn_sigma=False"),
        ({"num_classes": 10}, "num_classes=10"),
        ({"scaffold_width": 16}, "scaffold_width=16"),
        ({"router": "cosine"}, "router='cosine'"),
        ({"patch_size": 3}, "patch_size=3"),
        ({"patch_size": 0}, "patch_size=0.* 1"),
        ({"patch_size": "1"}, "patch_size='1'.* 1"),
        ({"sample_size": "8"}, r"sample_size='8'.*\(rows, columns\)"),
        ({"sample_size": (8, 8, 8)}, r"sample_size=\(8, 8, 8\)"),
        ({"sample_size": 16}, r"sample_size=16 .*patch_size=1 .*256 tokens.* 64 positions"),
        ({"sample_size": (4, 16)}, r"sample_size=\(4, 16\) .*8x8"),
        ({"num_heads": 5}, "num_heads=5 .* 32"),
        ({"width": 32}, r"DCDiT .*'width'.*hidden_size"),
        ({"sigma": -1.0}, r"DCDiT .*sigma.* -1"),
        ({"target": 0.5}, r"DCDiT .*target"),
    ],
    ids=str,
)
def test_contradicting_settings_are_refused(official: dict[str, Tensor], given: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(official, **{"num_heads": 4, **given})


def test_heads_of_other_widths_have_to_be_given(official: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match=r"width 32.*num_heads"):
        read(official)


def test_missing_and_left_over_tensors_are_counted_and_named(official: dict[str, Tensor]) -> None:
    dropped = [name for name in official if name.startswith("hnet.main_network.main_network.layers.0.mlp")]
    for name in dropped[1:]:
        del official[name]
    official["hnet.extra.weight"] = torch.zeros(1)
    official["hnet.encoder.rmsnorm.weight"] = torch.zeros(33)
    kept = dropped[0]
    message = (
        rf"{len(dropped) - 1} .*: blocks.0.mlp.*1 .*: hnet.extra.weight; "
        r"1 .*: encoder.norm.weight \(33,\) for \(32,\)"
    )
    assert kept.endswith("fc1.weight")
    with pytest.raises(CheckpointError, match=message):
        read(official, num_heads=4)


def test_missing_block_between_others_is_reported(dit: Callable[..., DiT]) -> None:
    written = {k: v for k, v in to_facebook(dit(depth=3)).items() if not k.startswith("blocks.1.")}
    with pytest.raises(CheckpointError, match=r"10 .*: blocks.1.adaLN_modulation.1.bias, .*\.\.\."):
        read(written, num_heads=4)


def test_missing_tensor_that_sizes_are_inferred_from_is_reported(official: dict[str, Tensor]) -> None:
    del official["x_embedder.proj.weight"]
    with pytest.raises(CheckpointError, match=r"'x_embedder.proj.weight'"):
        read(official, num_heads=4)


def test_tensors_with_and_without_a_prefix_are_refused(official: dict[str, Tensor]) -> None:
    official["module.pos_embed"] = official["pos_embed"]
    with pytest.raises(CheckpointError, match="'pos_embed'"):
        read(official, num_heads=4)


def test_different_embedders_in_blocks_are_refused(dit: Callable[..., DiT]) -> None:
    written = to_diffusers(dit(timestep_shift=1))
    written["transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"] += 1
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.1\.norm1\.emb\.timestep_embedder"):
        read(written, num_heads=4, sample_size=8)


def test_diffusers_weights_without_a_config_need_a_size(dit: Callable[..., DiT]) -> None:
    with pytest.raises(CheckpointError, match="sample_size"):
        read(to_diffusers(dit(timestep_shift=1)), num_heads=4)


def test_missing_projection_is_reported(dit: Callable[..., DiT]) -> None:
    written = to_diffusers(dit(timestep_shift=1))
    del written["transformer_blocks.0.attn1.to_v.bias"]
    with pytest.raises(CheckpointError, match=r"to_q.bias .*to_k .*to_v"):
        read(written, num_heads=4, sample_size=8)


def test_unknown_formats_and_kinds_are_refused(official: dict[str, Tensor], dit: Callable[..., DiT]) -> None:
    with pytest.raises(CheckpointError, match=r"layer.weight\..*hnet"):
        read({"layer.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="DyDiT: 15 "):
        read({**to_facebook(dit()), "blocks.0.attn_rate.router.weight": torch.zeros(1)}, num_heads=4)
    with pytest.raises(CheckpointError, match=r"'dc-dit' .*kind='dit'"):
        read(official, kind="dit", num_heads=4)
    with pytest.raises(CheckpointError, match="kind='hnet'"):
        read(official, kind="hnet", num_heads=4)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="nothing"):
        read({})
    with pytest.raises(CheckpointError, match="'step'"):
        read({"step": 3})
    with pytest.raises(CheckpointError, match="DiT"):
        read(dit())  # type: ignore[arg-type]


def test_outputs_that_are_neither_noise_nor_noise_and_variance(dit: Callable[..., DiT]) -> None:
    written = to_facebook(dit())
    written["final_layer.linear.weight"] = torch.zeros(48, 32)
    with pytest.raises(CheckpointError, match=r"48 .* 16; .* 16, .* 32 "):
        read(written, num_heads=4)
