"""Dynamic width in training: masks, their gradients, the FLOPs loss, and other methods around it."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tokdyn
from tests.contract.models import TINY, one_of, sample
from tests.contract.widths import (
    ALL,
    NAMES,
    calls,
    clock,
    decided_flops,
    hold,
    in_double,
    layouts_on,
    method,
    random_gates,
    widths_of,
    wrapped,
)
from tokdyn import Chunking, DepthSkip, DynamicWidth, FeatureCache, TokenMerge


def losses_and_gradients(name, methods, seeds, reentrant=None):
    """One backward after as many forwards as there are seeds, with the FLOPs loss; what every parameter got."""
    model = random_gates(tokdyn.wrap(ALL[name].build(), methods)).train()
    if reentrant is not None:
        model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=reentrant))
    total = 0.0
    for seed in seeds:
        torch.manual_seed(seed)
        out = sample(model(**{**ALL[name].inputs(2), **clock(name, 0.1 + seed / 100, 0.6)}))
        total = total + (out.square().mean() + 10 * tokdyn.losses(model)["DynamicWidth"]) * (seed + 1)
    total.backward()
    gates = {name: p.grad for name, p in widths_of(model)[0].named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in gates.values())
    return total.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | gates


@pytest.mark.pairwise("checkpointing")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("public", "VisionTransformer")])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("seeds", [(5,), (5, 6)])
def test_gradients_and_losses_are_the_same_with_checkpointing(name, reentrant, seeds):
    plain = losses_and_gradients(name, [method(name)], seeds)
    saved = losses_and_gradients(name, [method(name)], seeds, reentrant)
    torch.testing.assert_close(plain[0], saved[0], rtol=1e-6, atol=0)
    for key, grad in saved[1].items():  # computing again may give zeros to what nothing depends on
        torch.testing.assert_close(grad, plain[1].get(key, torch.zeros_like(grad)), rtol=1e-4, atol=1e-7, msg=key)
    assert plain[1].keys() <= saved[1].keys()


@pytest.mark.parametrize("name", ["DiT", "FluxTransformer2DModel", "CogVideoXTransformer3DModel"])
def test_every_gate_learns(name):
    _, found = losses_and_gradients(name, [method(name)], (1,))
    gates = dict(widths_of(random_gates(tokdyn.wrap(ALL[name].build(), [method(name)])))[0].named_parameters())
    assert all(found[key].abs().sum() > 0 for key in gates)


@pytest.mark.parametrize(
    "name", ["DiT", "SD3Transformer2DModel", "HunyuanVideoTransformer3DModel", "CogVideoXTransformer3DModel"]
)
def test_training_computes_with_what_was_drawn_and_charges_for_it(name):
    """With gates that chance cannot move, training and sampling see the same, and so does the loss."""
    model, inputs = wrapped(name, target=0.4), in_double(ALL[name].inputs(2))
    model.double()
    with torch.no_grad():
        for gates in widths_of(model):
            for parameter in gates.parameters():  # logits in the thousands, so that noise up to 14 changes none
                parameter.mul_(1e3)
        expected = sample(model(**inputs))
        share = share_of(model)
    model.train()
    torch.testing.assert_close(sample(model(**inputs)), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(tokdyn.losses(model)["DynamicWidth"].item(), 2 * (share - 0.4) ** 2, rtol=1e-5, atol=0)


def share_of(model):
    """Share of the FLOPs, from what was recorded; the mean over samples."""
    spent, whole, layouts = 0.0, 0.0, layouts_on(model)
    for call in calls(model):
        attention, mlp = decided_flops(model, call)
        joint = any(layer.rows == "joint" and "channels" in layer.elements for layer in layouts[call.block].layers)
        words = call.text if joint else 0
        rows = (call.mlp_rows + call.samples * words) / (call.samples * (call.tokens + words))
        spent += attention * call.heads + mlp * call.channels * rows
        whole += attention + mlp
    return spent / whole


def test_a_budget_is_reached_by_training_on_its_loss_alone():
    model, inputs = tokdyn.wrap(TINY["DiT"].build(), [DynamicWidth(target=0.5)]).train(), TINY["DiT"].inputs(8)
    optimizer = torch.optim.Adam(model.tokdyn.parameters(), lr=0.3)
    torch.manual_seed(0)
    for _ in range(150):
        optimizer.zero_grad()
        model(**inputs)
        tokdyn.losses(model)["DynamicWidth"].backward()
        optimizer.step()
    ran = []
    for _ in range(8):
        model(**inputs)
        ran.append(tokdyn.losses(model)["DynamicWidth"].item())
    assert sum(ran) / len(ran) < 0.02  # 2 (r - 0.5)^2 with r within 0.1


def test_the_target_falls_over_the_warmup():
    model, inputs = (
        tokdyn.wrap(TINY["DiT"].build(), [DynamicWidth(target=0.5, warmup=4)]).train(),
        TINY["DiT"].inputs(2),
    )
    found = []
    for _ in range(6):
        model(**inputs)
        found.append(tokdyn.losses(model)["DynamicWidth"].item())
    expected = [2 * (1 - target) ** 2 for target in (1, 0.875, 0.75, 0.625, 0.5, 0.5)]  # everything is on
    assert found == pytest.approx(expected)
    assert model.tokdyn.state_dict()["parts.0.calls"] == 6


def test_blocks_that_are_skipped_are_not_charged():
    """A gate of a block that does not run gets nothing from the loss: closing it would save nothing."""
    model = random_gates(tokdyn.wrap(TINY["DiT"].build(), [DepthSkip(blocks=(1,)), DynamicWidth(tokens=False)])).train()
    model(**TINY["DiT"].inputs(2))
    tokdyn.losses(model)["DynamicWidth"].backward()
    by_block = widths_of(model)[0].heads.bias.grad.view(4, -1).abs().sum(1)
    assert (by_block > 0).tolist() == [True, False, True, True]


TOGETHER = {
    "chunking": lambda: [Chunking(target=2), DynamicWidth()],
    "ragged chunking": lambda: [Chunking(target=2, ragged=True), DynamicWidth()],
    "cache": lambda: [FeatureCache(threshold=10.0), DynamicWidth()],
    "skipping": lambda: [DepthSkip(table=((0.0, 0.5, (1,)), (0.5, 1.0, (2, 3)))), DynamicWidth()],
    "merging": lambda: [TokenMerge(ratio=((0.0, 0.2), (1.0, 0.6)), where="attention"), DynamicWidth()],
    "merging both": lambda: [TokenMerge(where="both"), DynamicWidth()],
}


@pytest.mark.parametrize(
    "name", ["DiT", "SD3Transformer2DModel", "HunyuanVideoTransformer3DModel", "rotary-over-heads", "DCDiT"]
)
@pytest.mark.parametrize("methods", TOGETHER)
def test_other_methods_around_it(name, methods):
    """Each acts, none makes samples depend on each other, and training has finite gradients for all gates."""
    if name == "DCDiT" and "chunking" in methods:
        pytest.skip("it chunks its tokens itself")
    levels = (0.25, 0.75, 0.25)
    with torch.no_grad():
        for narrow in (True, False):
            model = tokdyn.wrap(ALL[name].build(), TOGETHER[methods]())
            random_gates(model)
            if not narrow:
                hold(model)
            together = sample(model(**{**ALL[name].inputs(3), **clock(name, *levels)}))
            assert (min(call.heads for call in calls(model)) < 1) == narrow
            for i, level in enumerate(levels):
                tokdyn.reset(model)
                alone = sample(model(**{**one_of(ALL[name].inputs(3), i), **clock(name, level)}))
                torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=2e-6)
    if methods != "cache":
        losses_and_gradients(name, TOGETHER[methods](), (1,))
