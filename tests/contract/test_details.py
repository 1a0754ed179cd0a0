"""Details of methods at work that no other law would notice: what a setting does, and in which direction."""

import pytest
import torch

import tokdyn
from tests.contract.models import TINY, sample
from tests.contract.test_merge import expected, inputs_of_attention
from tokdyn import Chunking, DynamicWidth, FeatureCache, TokenDrop, TokenMerge
from tokdyn.attach import Bracket, handles
from tokdyn.methods import METHODS, Method, Stage, Traits
from tokdyn.methods.registry import from_settings, to_settings

NAME = "DiTTransformer2DModel"


@torch.no_grad()
def test_a_ratio_that_falls_with_the_noise_level_is_read_at_that_level():
    model = tokdyn.wrap(TINY["DiT"].build(), [TokenMerge(ratio=((0.0, 0.0), (1.0, 0.7)))])
    seen = {}
    for level in (0.1, 0.9):
        tokdyn.reset(model)
        model(**{**TINY["DiT"].inputs(2), **TINY["DiT"].at(2, level)})
        seen[level] = tokdyn.stats(model).calls[-1].attention_tokens
    assert seen == {0.1: 24 - int(24 * 0.07), 0.9: 24 - int(24 * 0.63)}


@torch.no_grad()
def test_blocks_share_a_matching_counted_from_the_first_that_merges():
    """With blocks 1 to 3 and reuse=2, blocks 1 and 2 share what block 1 found, and block 3 matches anew."""
    model, inputs = TINY[NAME].build(), TINY[NAME].inputs(2)
    normed, given = inputs_of_attention(tokdyn.wrap(model, [TokenMerge(blocks=(1, 3), reuse=2)]), inputs)
    for block, matched_at in ((1, 1), (2, 1), (3, 3)):
        wanted = expected(normed[matched_at], normed[block])
        torch.testing.assert_close(given[block], wanted, rtol=0, atol=1e-6)  # fp32


class Linear(torch.nn.Module):
    """A block whose effect is linear in the noise level that its condition carries."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.ones(8))
        self.other = torch.nn.Parameter(torch.ones(8, 8))
        self.third = torch.nn.Parameter(torch.ones(8, 8))

    def forward(self, x, level):
        return x + level[:, None, None] * self.slope


class LinearModel(torch.nn.Module):
    """Adds a tenth of a line in the noise level, three times."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Linear() for _ in range(3)])

    def forward(self, x, timestep):
        for block in self.blocks:
            x = block(x, timestep / 1000)
        return x


@torch.no_grad()
def test_a_cache_continues_an_effect_that_is_linear_in_the_noise_level_exactly():
    model, x = LinearModel(), torch.randn(2, 6, 8)
    tokdyn.wrap(model, [FeatureCache(steps=(0, 1), forecast=1)])
    for level in (900.0, 700.0, 500.0, 100.0):
        out = model(x, timestep=torch.full((2,), level))
        torch.testing.assert_close(out, x + 3 * level / 1000, rtol=0, atol=1e-5)
    assert [call.reused for call in tokdyn.stats(model).calls] == [0, 0, 2, 2]


@pytest.mark.parametrize("forecast", [2, "chebyshev"])
@torch.no_grad()
def test_forecasts_continue_what_is_linear_in_the_noise_level(forecast):
    """At unequal distances, and for samples at different levels; until five steps are computed, both are lines."""
    model, x = LinearModel(), torch.randn(2, 6, 8)
    tokdyn.wrap(model, [FeatureCache(steps=(0, 1, 2), forecast=forecast)])
    for level in (900.0, 820.0, 650.0, 500.0, 100.0):
        levels = torch.tensor([level, level - 50])
        out = model(x, timestep=levels)
        torch.testing.assert_close(out, x + 3 * levels.view(-1, 1, 1) / 1000, rtol=0, atol=1e-4)


@torch.no_grad()
def test_effects_on_the_host_or_in_fewer_bits_give_the_same_within_their_rounding():
    def drawn(**settings):
        model = tokdyn.wrap(TINY["DiT"].build(), [FeatureCache(steps=(0, 1), forecast=1, **settings)])
        calls = [{**TINY["DiT"].inputs(2), **TINY["DiT"].at(2, 0.9 - 0.1 * step)} for step in range(4)]
        found = torch.stack([sample(model(**call)) for call in calls])
        kept.append([call.cache_bytes for call in tokdyn.stats(model).calls])
        return found

    kept: list[list[int]] = []
    whole = drawn()
    tokens = 2 * 24 * 16  # elements of both samples
    assert kept == [[4 * tokens, 8 * tokens, 8 * tokens, 8 * tokens]]
    assert torch.equal(drawn(residual_device="host"), whole)
    errors = [(drawn(residual_dtype=kind) - whole)[2:].norm() for kind in ("float16", "bfloat16", "float8_e4m3fn")]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.1 * whole[2:].norm()
    assert torch.equal(drawn(residual_dtype="float32"), whole)
    assert [each[-1] / tokens for each in kept[2:]] == [4 + 8 / 16, 4, 2 + 8 / 16, 8]  # a scale of 4 bytes a token


@torch.no_grad()
def test_a_span_inside_a_span_knows_the_cells_of_its_tokens():
    """Merging inside both spans compares tokens by their cells; a token's cell decides into which bucket it falls."""
    seen = []

    class Looking(Method):
        def traits(self, depth):
            return Traits(Stage.SPAN, span=(1, 1))

    @handles(Looking)
    def build(plan):
        return [Look()]

    class Look(Bracket):
        first = last = 1

        def open(self, frame, view, x, block):
            seen.append(view.index)
            return x, view

        def close(self, frame, view, x):
            return x, view

    drops = [TokenDrop(rate=0.5, blocks=(0, 3), seed=3), TokenDrop(rate=0.5, blocks=(1, 2), seed=4)]
    model = tokdyn.wrap(TINY["DiT"].build(), [*drops, Looking(), TokenMerge(blocks=(1, 2))])
    with tokdyn.dropping(model, 0.5):
        model(**TINY["DiT"].inputs(2))
    (inner,) = seen
    assert inner.shape == (2, 6)
    assert (inner.diff(dim=1) > 0).all()  # rising cells of the full grid
    assert inner.max() > 12  # and not places among the 12 tokens of the outer span


def test_the_temperature_scales_the_gradients_of_gates():
    found = []
    for temperature in (1.0, 10.0):
        torch.manual_seed(0)
        model = tokdyn.wrap(
            TINY["DiT"].build(), [DynamicWidth(target=0.5, tokens=False, temperature=temperature)]
        ).train()
        ((_, gates),) = tokdyn.parts(model)
        with torch.no_grad():
            gates.heads.bias.zero_()  # at the threshold, where the slope of a sigmoid is a quarter over the temperature
        torch.manual_seed(1)
        sample(model(**TINY["DiT"].inputs(4))).square().mean().backward()
        found.append(gates.heads.bias.grad.abs().sum().item())
    assert found[0] > 2 * found[1] > 0


@pytest.mark.parametrize("name", ["DiT", NAME])
def test_gradients_pass_through_the_residual_projection(name):
    """Against finite differences in fp64, with a router that does not depend on its input."""
    torch.manual_seed(0)
    model = tokdyn.wrap(TINY[name].build(), [Chunking(target=4)]).double()
    ((_, part),) = tokdyn.parts(model)
    with torch.no_grad():
        for parameter in part.router.parameters():
            parameter.zero_()
        torch.nn.init.normal_(part.residual.weight)
    inputs = {
        key: value.double() if value.is_floating_point() else value for key, value in TINY[name].inputs(2).items()
    }
    x = inputs["hidden_states"]
    direction, step = torch.randn_like(x), 1e-5

    def loss(x):
        return sample(model(**{**inputs, "hidden_states": x})).square().mean()

    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    with torch.no_grad():
        expected_slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), expected_slope, rtol=1e-5, atol=1e-8)


VALUES = {
    "Chunking": {
        "target": 3.0,
        "router": "cosine",
        "sigma": None,
        "tail_drop": ((0.0, 0.1), (1.0, 0.2)),
        "ragged": True,
        "force_ends": True,
        "loss_weight": 0.5,
    },
    "TokenMerge": {
        "ratio": ((0.0, 0.1), (1.0, 0.6)),
        "where": "both",
        "partition": "grid",
        "bucket": 3,
        "seed": 5,
        "important": True,
        "blocks": (1, -1),
        "weighted": True,
        "reuse": 2,
        "reuse_steps": 3,
        "window": (4, 4),
        "metric_width": 8,
        "references": "merge",
    },
    "TokenDrop": {"rate": 0.25, "blocks": (0, 1), "seed": 9},
    "DepthSkip": {
        "blocks": (1, -1),
        "levels": (0.25, 0.75),
        "table": ((0.0, 0.5, (1,)),),
        "learned": True,
        "target": 0.4,
        "loss_weight": 0.5,
        "fingerprint": "X:1:2",
    },
    "DynamicWidth": {
        "target": 0.4,
        "heads": False,
        "channels": False,
        "tokens": False,
        "token_input": "stream",
        "embedding": 8,
        "temperature": 2.0,
        "warmup": 5,
        "loss_weight": 0.5,
    },
    "FeatureCache": {
        "threshold": 0.3,
        "rule": "easycache",
        "indicator": "first_block",
        "coefficients": (2.0, 0.5),
        "ratios": (1.0, 0.9),
        "steps": (0, 3),
        "num_steps": 9,
        "warmup": 2,
        "start": 0.1,
        "end": 0.8,
        "max_reused": 3,
        "forecast": 1,
        "residual_dtype": "bfloat16",
        "residual_device": "host",
        "fingerprint": "X:1:2",
    },
}
ALTERNATIVES = {
    "DepthSkip": ["blocks", "table", "learned"],
    "DynamicWidth": ["heads", "channels", "tokens"],
    "FeatureCache": ["rule", "ratios", "indicator", "coefficients", "steps", "warmup", "start", "end", "max_reused"],
}
"""Settings that are left out beside the one that is written, because they may not go together."""
NEEDED = {("FeatureCache", "ratios"): {"rule": "magcache"}}


@pytest.mark.parametrize(("name", "setting"), [(name, setting) for name in VALUES for setting in VALUES[name]])
def test_every_setting_at_a_value_that_is_no_default_is_written_and_read(name, setting):
    kind = METHODS[name]
    assert set(VALUES[name]) == set(kind.model_fields), "give every setting a value that is not its default"
    values = VALUES[name]
    assert values[setting] != kind.model_fields[setting].default
    others = {key: value for key, value in values.items() if key not in ALTERNATIVES.get(name, ())}
    method = kind(**{**others, **NEEDED.get((name, setting), {}), setting: values[setting]})
    again = from_settings(to_settings(method))
    assert again == method
    assert getattr(again, setting) == values[setting]


@torch.no_grad()
def test_an_inner_context_of_disabled_ends_with_what_was_before():
    model, inputs = tokdyn.wrap(TINY["DiT"].build(), [TokenMerge()]), TINY["DiT"].inputs(2)
    merged = sample(model(**inputs))
    with tokdyn.disabled(model):
        plain = sample(model(**inputs))
        with tokdyn.disabled(model):
            pass
        assert torch.equal(sample(model(**inputs)), plain)
    assert torch.equal(sample(model(**inputs)), merged)
    assert not torch.equal(plain, merged)
