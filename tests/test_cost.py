"""Computed FLOPs equal the counted and the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import tokdyn
from tokdyn import checkpoints
from tokdyn.cost import Flops, compute_matched_steps, count, flops_per_image, kept_tokens, model_parts
from tokdyn.cost.counter import operator_formulas
from tokdyn.errors import InputError
from tokdyn.models import DCDiT, DiT
from tokdyn.ops import attention_backend, plain

DATA = Path(__file__).parent / "parity" / "data"
SMALL: dict[str, Any] = {"hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 5, "sample_size": 8}


def meta(model: type[DiT] | type[DCDiT], name: str, **settings: Any) -> Any:
    with torch.device("meta"):
        return model.named(name, **settings)


def call(model: nn.Module, batch: int = 3, size: tuple[int, int] = (8, 8), **keywords: Any) -> Flops:
    channels = model.config["in_channels"]
    x = torch.randn(batch, channels, *size, dtype=next(model.parameters()).dtype)
    timestep, labels = torch.arange(batch), torch.arange(batch) % 2
    return tokdyn.flops(model, x, timestep=timestep, class_labels=labels, **keywords)


# Counted with torch's FlopCounterMode on one 32x32x4 latent, 2 FLOPs per multiply-add (arXiv 2603.06351).
@pytest.mark.parametrize(
    ("name", "gflops"), [("S/2", 12.11), ("B/2", 46.01), ("L/2", 161.40), ("XL/2", 237.24), ("XL/4", 58.09)]
)
def test_published_costs_of_dit(name: str, gflops: float) -> None:
    model = meta(DiT, name)
    assert round(flops_per_image(model) / 1e9, 2) == gflops
    counted = tokdyn.flops(model, torch.zeros(1, 4, 32, 32), timestep=torch.zeros(1), class_labels=torch.tensor([0]))
    assert counted.counted == counted.total == flops_per_image(model)


@pytest.mark.parametrize(
    ("name", "steps250", "guided"), [("S/2", 3.02, 6.04), ("B/2", 11.46, 22.93), ("L/2", 40.21, 80.41)]
)
def test_published_costs_of_sampling(name: str, steps250: float, guided: float) -> None:
    """TFLOPs per image over 250 steps. The paper leaves out small parts, half a percent at most."""
    model = meta(DiT, name)
    assert 250 * flops_per_image(model) / 1e12 == pytest.approx(steps250, rel=6e-3)
    assert 250 * flops_per_image(model, unconditional=0.1) / 1e12 == pytest.approx(guided, rel=6e-3)


@pytest.mark.parametrize(("name", "gflops", "tolerance"), [("S", 16.2, 0.06), ("B", 59.7, 0.02)])
def test_published_costs_of_dc_dit(name: str, gflops: float, tolerance: float) -> None:
    """The references were measured at kept counts around 1/4, hence the tolerance."""
    assert flops_per_image(meta(DCDiT, name)) / 1e9 == pytest.approx(gflops, rel=tolerance)


def test_share_of_the_scaffold() -> None:
    """Convolutions and residual outside of the blocks: about 22% of S, 11 to 13% of L and XL, 54% of B at N = 16."""
    for name, target, low, high in (
        ("S", 4, 0.2, 0.23),
        ("XL", 4, 0.1, 0.13),
        ("L", 4, 0.1, 0.135),
        ("B", 16, 0.5, 0.58),
    ):
        parts = model_parts(meta(DCDiT, name, target=float(target)))
        outside = sum(parts[part] for part in ("embed", "encoder", "router", "residual", "decoder", "head"))
        assert low < outside / sum(parts.values()) < high


def test_recorded_parts_of_the_official_code() -> None:
    facts = json.loads((DATA / "dcdit_official_16x16.json").read_text())
    recorded, config = facts["flops_drop0"], facts["config"]
    model = checkpoints.read(DATA / "dcdit_official_16x16.weights.safetensors", num_heads=config["num_heads"])
    kept = facts["drop0"]["kept"]
    parts = model_parts(model, kept)
    assert parts["embed"] == recorded["embeddings"]
    assert parts["encoder"] == recorded["encoder"]
    assert parts["router"] == recorded["routing"]
    assert parts["decoder"] == recorded["decoder"]
    assert parts["head"] == recorded["final_layer"]
    # The official count adds an estimate for attention, with 3 per pair for softmax, to the products it has counted.
    inner = sum(parts[part] for part in ("adaLN", "projections", "attention", "mlp"))
    width, heads, pairs = config["hidden_size"], config["num_heads"], sum(n * n for n in kept)
    assert inner == recorded["main_network"] - config["depth"] * pairs * (4 * width + 3 * heads)


@pytest.mark.parametrize(
    "settings",
    [{}, {"depth": 1, "patch_size": 4, "mlp_ratio": 2.5}, {"learn_sigma": False, "in_channels": 3}],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 3])
def test_dit_agrees_with_the_counter(settings: dict[str, Any], batch: int) -> None:
    found = call(DiT(**{**SMALL, "patch_size": 2, **settings}), batch)
    assert found.counted == found.total
    assert found.per_image * batch == found.total
    assert sum(found.counted_parts.values()) == found.counted


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"router": "cosine"},
        {"router": "random"},
        {"patch_size": 2, "mlp_ratio": 2.0},
        {"encoder_depth": 1, "decoder_depth": 3, "scaffold_width": 16},
        {"scaffold_width": 32},
        {"sample_size": (4, 12), "learn_sigma": False, "in_channels": 3},
        {"sigma": None, "official_init": True, "force_ends": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["auto", "split", "padded"])
def test_dc_dit_agrees_with_the_counter(settings: dict[str, Any], backend: Any) -> None:
    model = DCDiT(**{**SMALL, **settings}).eval()
    size = model.config["sample_size"]
    with attention_backend(backend):
        found = call(model, 3, (size, size) if isinstance(size, int) else size, tail_drop=torch.tensor([0.0, 0.5, 0.9]))
    assert found.counted == found.total
    assert backend != "split" or "padding" not in found.parts


@pytest.mark.parametrize("model", [DiT, DCDiT])
@pytest.mark.parametrize("backend", ["auto", "split", "padded"])
@pytest.mark.parametrize("side", [8, 10])
def test_padding_in_bf16_is_a_part(model: type[DiT] | type[DCDiT], backend: Any, side: int) -> None:
    """Where short samples are padded to the longest, the FLOPs of empty rows are counted and named."""
    small = model(**{**SMALL, "patch_size": 2, "sample_size": side}).eval().to(torch.bfloat16)
    with attention_backend(backend):
        found = call(small, 3, (side, side))
    assert found.counted == found.total
    assert (found.parts.get("padding", 0) > 0) == (model is DCDiT and backend != "split")


@pytest.mark.parametrize("model", [DiT, DCDiT])
@pytest.mark.parametrize("size", [(12, 4), (16, 16)])
def test_inputs_may_have_another_size_than_the_model(model: type[DiT] | type[DCDiT], size: tuple[int, int]) -> None:
    found = call(model(**{**SMALL, "patch_size": 2}).eval(), 3, size)
    assert found.counted == found.total
    with torch.device("meta"):
        stored, own = (model(**{**SMALL, "patch_size": 2, "sample_size": each}) for each in (8, size))
    assert tokdyn.flops(stored, torch.zeros(1, 4, *size), timestep=0).total == tokdyn.flops(own).total


@pytest.mark.parametrize("model", [DiT, DCDiT])
def test_arguments_may_come_in_any_order(model: type[DiT] | type[DCDiT]) -> None:
    x = torch.randn(3, 4, 8, 8)
    found = tokdyn.flops(model(**SMALL).eval(), timestep=torch.tensor([5]), hidden_states=x, return_dict=False)
    assert found.batch == 3
    assert found.counted == found.total


def test_smoothing_on_the_grid() -> None:
    """The plain functions, which CUDA runs: a band matrix per axis."""
    for size in ((8, 8), (4, 12), (2, 130)):
        model = DCDiT(**{**SMALL, "sample_size": size}).eval()
        x = torch.randn(2, 4, *size)
        with plain():
            total, _, output = count(model, x, timestep=5, class_labels=torch.tensor([0, 1]))
            assert tokdyn.flops(model, x, timestep=5).counted == tokdyn.flops(model, x, timestep=5).total
        kept = output.routing.keep.sum(dim=1).tolist()
        assert total == sum(model_parts(model, kept, device="cuda").values())


def test_packed_attention_on_cuda_is_a_sum_of_squares() -> None:
    """The counter passes tensors to this formula; the lengths are 3, 1 and 4."""
    formula = operator_formulas()[torch.ops.torch_attn._varlen_attn]
    rows = torch.zeros(8, 2, 5)
    offsets = torch.tensor([0, 3, 4, 8], dtype=torch.int32)
    assert formula(rows, rows, rows, offsets, offsets, 4, 4) == 4 * (9 + 1 + 16) * 2 * 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dc_dit_agrees_with_the_counter_on_cuda(dtype: torch.dtype) -> None:
    model = DCDiT(**SMALL).eval().to("cuda", dtype)
    x = torch.randn(3, 4, 8, 8, device="cuda", dtype=dtype)
    found = tokdyn.flops(model, x, timestep=5, tail_drop=torch.tensor([0.0, 0.5, 0.9], device="cuda"))
    assert found.counted == found.total


@given(counts=st.lists(st.integers(1, 64), min_size=1, max_size=4))
def test_attention_is_the_sum_of_squares(counts: list[int]) -> None:
    parts = model_parts({**dict(DCDiT_CONFIG)}, counts)
    assert parts["attention"] == 2 * 4 * 32 * sum(n * n for n in counts)
    alone = [model_parts(DCDiT_CONFIG, [n]) for n in counts]
    assert parts == {name: sum(each[name] for each in alone) for name in parts}


with torch.device("meta"):
    DCDiT_CONFIG = dict(DCDiT(**SMALL).config)


def test_budgets_scale_the_blocks_alone() -> None:
    """Tail drop leaves the scaffold as it is; projections and MLP are linear in the tokens, attention quadratic."""
    full, half = model_parts(DCDiT_CONFIG, 0.5), model_parts(DCDiT_CONFIG, 0.25)
    for part in full:
        ratio = {"projections": 2, "mlp": 2, "attention": 4}.get(part, 1)
        assert full[part] == ratio * half[part]
    assert flops_per_image(DCDiT_CONFIG, 0.25) == sum(half.values()) == flops_per_image(DCDiT_CONFIG)
    assert flops_per_image(DCDiT_CONFIG, 0.5, unconditional=0.25) == sum(full.values()) + sum(half.values())
    assert kept_tokens(DCDiT_CONFIG, 0.3) == [0.3 * 64]


def test_models_on_the_meta_device_are_computed() -> None:
    large = tokdyn.flops(meta(DCDiT, "XL"), torch.zeros(2, 4, 32, 32), timestep=torch.zeros(2))
    assert large.counted is None
    assert large.total == 2 * flops_per_image(meta(DCDiT, "XL"))
    assert tokdyn.flops(meta(DiT, "XL/2")).total == flops_per_image(meta(DiT, "XL/2"))


def test_foreign_models_are_counted() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    found = tokdyn.flops(model, torch.randn(5, 4))
    assert found.parts == {"0": 5 * 2 * 4 * 8, "2": 5 * 2 * 8 * 2}
    assert found.counted == found.total
    with pytest.raises(InputError, match=r"Sequential.*tokdyn\.cost\.count"):
        tokdyn.flops(model)
    query = torch.randn(2, 3, 7, 4)
    total, _, out = count(Attend(), query)
    assert total == 2 * 2 * 2 * 3 * 7 * 7 * 4
    assert out.shape == query.shape


class Attend(nn.Module):
    """Nothing but attention, on any kernel that the device has."""

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(query, query, query)


class FlexAttend(nn.Module):
    """Attends as blocks of 64 tokens choose, by flex attention that is not compiled, as in Kandinsky 6 SR."""

    def forward(self, x: torch.Tensor) -> Any:
        number, index = torch.ones(1, 1, 2, dtype=torch.int32), torch.arange(2, dtype=torch.int32).expand(1, 1, 2, 2)
        mask = BlockMask.from_kv_blocks(torch.zeros_like(number), index, number, index, BLOCK_SIZE=64)
        return flex_attention(x, x, x, block_mask=mask)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_without_a_compiler_is_counted_as_it_is_computed() -> None:
    """By the products of all queries and keys, of which the mask is taken afterwards."""
    x, model = torch.randn(1, 2, 128, 8), FlexAttend()
    found, _, output = count(model, x)
    assert found == tokdyn.flops(model, x).total == 4 * 2 * 128 * 128 * 8
    assert torch.equal(output, model(x))


def test_report_names_parts_and_unit() -> None:
    report = str(call(DiT(**{**SMALL, "patch_size": 2})))
    assert "multiply-add" in report
    assert "attention" in report


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (0.0, r"0\.0"),
        (1.5, r"1\.5"),
        ([], r"\[\].* 64 "),
        ([0], r"\[0\].* 64 "),
        ([65], r"\[65\].* 64 "),
    ],
)
def test_impossible_budgets_are_refused(kept: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model_parts(DCDiT_CONFIG, kept)


def test_budget_of_a_dit_is_refused() -> None:
    with pytest.raises(InputError, match=r"kept=0.5"):
        model_parts(meta(DiT, "S/2"), 0.5)


# Published step counts that match 400K steps of a DiT. They follow from the measured kept shares, which are not
# published; with exactly 1/4 kept, the formula comes within 2.5%.
@pytest.mark.parametrize(("name", "steps"), [("S", 421_230), ("B", 408_071), ("L", 486_372), ("XL", 494_943)])
def test_compute_matched_steps_of_the_paper(name: str, steps: int) -> None:
    model = meta(DCDiT, name)
    budgets = [flops_per_image(model, 0.25 * (1 - drop / 10)) for drop in range(7)]
    found = compute_matched_steps(400_000, 5_000, flops_per_image(meta(DiT, f"{name}/2")), budgets[0], budgets)
    assert found == pytest.approx(steps, rel=0.025)


def test_compute_matched_steps() -> None:
    assert compute_matched_steps(100, 0, 2.0, 1.0, [1.0]) == 200
    assert compute_matched_steps(100, 10, 2.0, 4.0, [1.0, 3.0]) == 10 + 80
    with pytest.raises(InputError, match=r"warmup=10 .*steps=10 "):
        compute_matched_steps(10, 10, 1.0, 2.0, [1.0])
    with pytest.raises(InputError, match=r"\[1\.0, 2\.0\]"):
        compute_matched_steps(10, 1, 1.0, 2.0, [])
