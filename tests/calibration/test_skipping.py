"""Calibrated depth skipping: influence, targets, tables and the sequential choice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import tokdyn
from tests.calibration.trajectories import LEVELS, trajectory, watch_blocks
from tests.contract.foreign import INFERRED
from tests.contract.models import CLOCKED, TINY, sample
from tokdyn.calibration import calibrate_skipping, calibrates
from tokdyn.calibration.levels import bins_of
from tokdyn.cost import count
from tokdyn.ops.skipping import block_influence

every = pytest.mark.parametrize("name", CLOCKED)


def spent(model, calls):
    """Count the FLOPs of calls."""
    return sum(count(model, **call)[0] for call in calls)


@every
def test_counted_flops_meet_the_target_within_one_cell(name):
    model, calls = TINY[name].build(), trajectory(name, LEVELS[::3], branches=1)
    found = calibrate_skipping(model, calls, tokdyn.DepthSkip(), flops=0.7, levels=2)
    plain = spent(model, calls)
    tokdyn.wrap(model, [found.method])
    assert spent(model, calls) / plain == pytest.approx(found.flops, rel=1e-12)
    assert 0.7 - float(found.measured.cost.max()) / plain < found.flops <= 0.7
    assert float(found.measured.cost.sum() + found.measured.other.sum()) == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize("name", sorted({*CLOCKED} - {"DCDiT"}))
@torch.no_grad()
def test_influence_is_that_of_the_image_tokens(name):
    """Hooks on the plain model see the same."""
    model, calls = TINY[name].build(), trajectory(name, (0.9, 0.3), branches=1)
    found = calibrate_skipping(model, calls, tokdyn.DepthSkip(), flops=0.95, levels=2)
    expected = [
        torch.stack([block_influence(before, after).double().mean() for before, after, _ in watch_blocks(model, call)])
        for call in reversed(calls)  # rows rise with the noise level
    ]
    torch.testing.assert_close(found.measured.influence, torch.stack(expected), rtol=0, atol=1e-6)


@torch.no_grad()
def test_influence_on_packed_rows_is_a_mean_over_each_sample():
    model, calls = TINY["DCDiT"].build(), trajectory("DCDiT", (0.6,), branches=1, batch=3)
    calls[0]["tail_drop"] = torch.tensor([0.0, 0.5, 0.8])
    found = calibrate_skipping(model, calls, tokdyn.DepthSkip(), flops=0.95, levels=1)
    expected = []

    def hook(block, args, kwargs, out):
        x, packing = args[0], [*args, *kwargs.values()][2]
        parts = zip(x.split(packing.lengths), out.split(packing.lengths), strict=True)
        assert len(set(packing.lengths)) > 1
        expected.append(torch.cat([block_influence(a[None], b[None]) for a, b in parts]).double().mean())

    for block in model.blocks:
        block.register_forward_hook(hook, with_kwargs=True)
    model(**calls[0])
    torch.testing.assert_close(found.measured.influence[0], torch.stack(expected), rtol=0, atol=1e-6)


@every
def test_sequential_choice_is_not_worse_at_equal_flops(name):
    model, calls = TINY[name].build(), trajectory(name, LEVELS[::2], branches=1)
    once, again = (
        calibrate_skipping(model, calls, tokdyn.DepthSkip(), 0.75, levels=2, sequential=sequential, errors=True)
        for sequential in (False, True)
    )
    cell = float(once.measured.cost.max() / (once.measured.cost.sum() + once.measured.other.sum()))
    assert abs(once.flops - again.flops) < cell
    assert squared(again.error) <= squared(once.error)
    assert squared(again.error) > 0


class Sets(torch.nn.Module):
    """A block that sets one channel of all tokens, at the cost of a product."""

    def __init__(self, channel, value):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(8, 1)
        self.register_buffer("keep", torch.eye(8).index_fill(0, torch.tensor(channel), 0.0))
        self.register_buffer("put", torch.zeros(8).index_fill(0, torch.tensor(channel), value))

    def forward(self, x, c):
        return x @ self.keep + self.put


class DiT(torch.nn.Module):
    """The public layout with blocks of known effect: the head depends almost only on channel 7."""

    def __init__(self):
        super().__init__()
        self.x_embedder, self.t_embedder = torch.nn.Module(), torch.nn.Identity()
        self.x_embedder.proj = torch.nn.Conv2d(1, 8, 1, bias=False)
        torch.nn.init.constant_(self.x_embedder.proj.weight, 1.0)
        self.x_embedder.proj.weight.data[7] = 0.0
        self.blocks = torch.nn.ModuleList([Sets(7, 0.05), Sets(7, 0.05), Sets(1, 1.5), Sets(2, 1.6)])
        self.final_layer = torch.nn.Linear(8, 1, bias=False)
        self.final_layer.weight.data = torch.tensor([[0.0, 0.01, 0.01, 0.0, 0.0, 0.0, 0.0, 20.0]])

    def forward(self, x, t):
        batch, _, rows, columns = x.shape
        h = self.x_embedder.proj(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            h = block(h, t)
        return self.final_layer(h).transpose(1, 2).reshape(batch, 1, rows, columns)


def test_sequential_choice_notices_that_two_blocks_replace_each_other():
    """The second block repeats the first, so either may be skipped but not both, though both have little influence."""
    calls = [{"x": torch.ones(1, 1, 2, 2), "t": torch.tensor([500.0])}]
    once, again = (
        calibrate_skipping(DiT(), calls, tokdyn.DepthSkip(), 0.6, levels=1, sequential=sequential, errors=True)
        for sequential in (False, True)
    )
    assert once.flops == again.flops
    assert once.skips == ((0, 1),)
    assert again.skips in (((0, 2),), ((1, 2),), ((0, 3),), ((1, 3),))
    assert again.error[0] < 0.02 < 0.9 < once.error[0]


def squared(errors):
    return sum(error**2 for error in errors)


@torch.no_grad()
def test_measured_error_is_that_of_the_wrapped_model():
    model, calls = TINY["DiT"].build(), trajectory("DiT", LEVELS[:4])
    found = calibrate_skipping(model, calls, tokdyn.DepthSkip(), 0.7, levels=1, errors=True)
    plain = [sample(model(**call)).double() for call in calls]
    tokdyn.wrap(model, [found.method])
    shares = []
    for call, y0 in zip(calls, plain, strict=True):
        error = (sample(model(**call)).double() - y0).flatten(1)
        shares.append(error.square().sum(1) / y0.flatten(1).square().sum(1))
    assert found.error == pytest.approx((float(torch.cat(shares).mean()) ** 0.5,), rel=1e-5)  # fp32 against fp64


def test_fresh_model_that_predicts_zero_has_finite_errors():
    torch.manual_seed(0)
    model = tokdyn.DiT(sample_size=8, patch_size=2, in_channels=4, hidden_size=16, depth=4, num_heads=2, num_classes=10)
    found = calibrate_skipping(model, trajectory("DiT"), tokdyn.DepthSkip(), 0.7, levels=2, sequential=True)
    assert found.error == (0.0, 0.0)
    assert found.flops <= 0.7


def test_table_covers_all_levels_and_keeps_steps_together():
    model = TINY["DiT"].build()
    calls = trajectory("DiT")
    method = tokdyn.calibrate(model, iter(calls), tokdyn.DepthSkip(), flops=0.6, levels=3, protected=(0, -1))
    assert [row[0] for row in method.table] == [0.0, *(row[1] for row in method.table[:-1])]
    assert method.table[-1][1] == 1.0
    assert len(method.table) == 3
    assert all(set(blocks) <= {1, 2} for _, _, blocks in method.table)
    assert any(blocks for _, _, blocks in method.table)
    edges = {edge for low, high, _ in method.table for edge in (low, high)} - {0.0, 1.0}
    assert edges.isdisjoint(LEVELS)


def test_intervals_of_noise_levels():
    assert bins_of([0.9, 0.9, 0.5, 0.1], 3).edges == pytest.approx((0.0, 0.3, 0.7, 1.0))
    assert len(bins_of([0.5] * 7, None)) == 1
    assert len(bins_of([step / 50 for step in range(50)], None)) == 10
    assert bins_of([0.2, 0.8], (0.5,)).edges == (0.0, 0.5, 1.0)
    bins = bins_of([0.1, 0.4, 0.7, 1.2], 4)
    assert [bins.of(level) for level in (-0.1, 0.0, 0.1, 0.4, 0.7, 1.0, 1.2)] == [0, 0, 0, 1, 2, 3, 3]


def test_samples_at_different_levels_count_for_different_rows():
    tiny, model = TINY["DiT"], TINY["DiT"].build()
    low, high = tiny.at(1, 0.2)["timestep"], tiny.at(1, 0.8)["timestep"]
    together = {**tiny.inputs(2), "timestep": torch.cat([low, high])}
    apart = [{name: value[i : i + 1] for name, value in together.items()} for i in range(2)]
    one, two = (
        calibrate_skipping(model, calls, tokdyn.DepthSkip(), 0.8, levels=2).measured for calls in ([together], apart)
    )
    torch.testing.assert_close(one.influence, two.influence, rtol=0, atol=1e-6)
    torch.testing.assert_close(one.cost, two.cost, rtol=1e-12, atol=0)


def test_model_is_left_as_it_was():
    model = TINY["DiT"].build()
    model.train()
    model.blocks[1].eval()
    modes = [part.training for part in model.modules()]
    attributes = set(vars(model))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    tokdyn.calibrate(model, trajectory("DiT"), tokdyn.DepthSkip(), flops=0.8, sequential=True, levels=1)
    assert [part.training for part in model.modules()] == modes
    assert set(vars(model)) == attributes
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_saved_table_is_loaded(tmp_path):
    model, calls = TINY["DiT"].build(), trajectory("DiT")
    method = tokdyn.calibrate(model, calls, tokdyn.DepthSkip(), flops=0.7)
    tokdyn.save(tokdyn.wrap(model, [method]), tmp_path)
    assert tokdyn.parts(tokdyn.load(TINY["DiT"].build(), tmp_path)) == [(method, None)]


@pytest.mark.parametrize(
    ("method", "options", "named"),
    [
        (tokdyn.DepthSkip(), {}, r"DepthSkip .*flops=0\.7"),
        (tokdyn.DepthSkip(), {"flops": 0.05, "protected": (0, 1, 2)}, r"0\.05"),
        (tokdyn.DepthSkip(), {"flops": 1.7}, r"1\.7"),
        (tokdyn.DepthSkip(), {"flops": 0.7, "protected": (9,)}, "block 9 .* 4 blocks"),
        (tokdyn.DepthSkip(), {"flops": 0.7, "levels": 0}, "levels=0"),
        (tokdyn.DepthSkip(), {"flops": 0.7, "levels": (0.5, 0.4)}, r"levels=\(0\.5, 0\.4\)"),
        (tokdyn.DepthSkip(), {"flops": 0.7, "levels": (0.99,)}, r"0\.99 to 1"),
        (tokdyn.DepthSkip(), {"flops": 0.7, "degree": 2}, "degree .*DepthSkip"),
        (tokdyn.DepthSkip(blocks=(1,)), {"flops": 0.7}, r"DepthSkip\(blocks=\(1,\)\)"),
        (tokdyn.DepthSkip(learned=True), {"flops": 0.7}, r"DepthSkip\(learned=True\)"),
        (tokdyn.TokenMerge(), {}, "TokenMerge"),
    ],
)
def test_invalid_options_are_refused(method, options, named):
    with pytest.raises(tokdyn.InputError, match=named):
        tokdyn.calibrate(TINY["DiT"].build(), trajectory("DiT"), method, **options)


def test_invalid_calls_and_models_are_refused():
    model, skip = TINY["DiT"].build(), tokdyn.DepthSkip()
    with pytest.raises(tokdyn.InputError, match=r"tokdyn\.recording"):
        tokdyn.calibrate(model, [], skip, flops=0.7)
    with pytest.raises(tokdyn.InputError, match=r"Tensor.*tokdyn\.recording"):
        tokdyn.calibrate(model, [torch.zeros(1)], skip, flops=0.7)
    with pytest.raises(tokdyn.InputError, match=r"DiT .*tokdyn\.unwrap"):
        tokdyn.calibrate(tokdyn.wrap(model, []), trajectory("DiT"), skip, flops=0.7)
    with pytest.raises(tokdyn.UnsupportedModelError, match="Linear"):
        tokdyn.calibrate(torch.nn.Linear(2, 2), [{"input": torch.zeros(2)}], skip, flops=0.7)


def test_models_without_a_noise_level_are_refused():
    tiny = TINY["VisionTransformer"]
    with pytest.raises(tokdyn.UnsupportedModelError, match=r"VisionTransformer .*noise level"):
        tokdyn.calibrate(tiny.build(), [tiny.inputs(1)], tokdyn.DepthSkip(), flops=0.7)


@pytest.mark.usefixtures("nothing_declared")
def test_models_without_an_adapter_are_refused():
    tiny = INFERRED["PRXTransformer2DModel"].tiny
    with pytest.raises(tokdyn.UnsupportedModelError, match=r"PRXTransformer2DModel .*adapter"):
        tokdyn.calibrate(tiny.build(), [tiny.inputs(1)], tokdyn.DepthSkip(), flops=0.7)


def test_a_method_of_a_users_own_is_calibrated_by_its_own_function():
    class Every(tokdyn.methods.Method):
        steps: float = 1.0
        kept: int = 0

    @calibrates(Every)
    def calibrate_every(model, calls, method, steps, degree=2):
        return SimpleNamespace(method=method.model_copy(update={"steps": steps, "kept": degree * len(list(calls))}))

    model, calls = TINY["DiT"].build(), trajectory("DiT")
    found = tokdyn.calibrate(model, calls, Every(), steps=0.5)
    assert found == Every(steps=0.5, kept=2 * len(calls))
    with pytest.raises(tokdyn.InputError, match=r"Every .*steps"):
        tokdyn.calibrate(model, calls, Every(), degree=3)
    with pytest.raises(tokdyn.InputError, match=r"levels .*Every"):
        tokdyn.calibrate(model, calls, Every(), steps=0.5, levels=3)
