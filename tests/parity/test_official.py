"""DC-DiT computes what the official code computes: outputs, kept sets, losses and gradients, to 1e-5 in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tokdyn.checkpoints import to_official
from tokdyn.diffusion.guidance import Branches
from tokdyn.diffusion.objective import Objective
from tokdyn.models import DCDiT
from tokdyn.ops import dechunk, pack, ratio_loss

CASES = ("drop0", "drop30", "drop60", "dropmix")
TOLERANCE = {"atol": 1e-5, "rtol": 0.0}  # fp32 sums in another order; measured differences are below 4e-6


def drop_of(facts: dict[str, Any], case: str) -> float | Tensor:
    drop = facts[case]["tail_drop"]
    return torch.tensor(drop) if isinstance(drop, list) else drop


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_kept_sets(
    run: Callable[..., Any], cases: dict[str, Tensor], facts: dict[str, Any], case: str
) -> None:
    with torch.no_grad():
        output = run(drop_of(facts, case))
    torch.testing.assert_close(output.sample, cases[f"{case}.out"], **TOLERANCE)
    torch.testing.assert_close(output.routing.probability, cases[f"{case}.prob"], **TOLERANCE)
    assert torch.equal(output.routing.keep, cases[f"{case}.mask"].bool())
    assert torch.equal(output.routing.natural_keep, cases[f"{case}.mask_natural"].bool())
    assert output.routing.keep.sum(dim=1).tolist() == facts[case]["kept"]
    assert output.routing.losses["ratio"].item() == pytest.approx(facts[case]["ratio_loss_N4"], abs=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("name", "target", "group_size"),
    [("ratio_loss_N4", 4, None), ("ratio_loss_N16", 16, None), ("ratio_loss_N4_groups_of_2", 4, 2)],
)
def test_ratio_losses(
    cases: dict[str, Tensor], facts: dict[str, Any], case: str, name: str, target: int, group_size: int | None
) -> None:
    loss = ratio_loss(cases[f"{case}.prob"], cases[f"{case}.mask_natural"].bool(), target, group_size)
    assert loss.item() == pytest.approx(facts[case][name], abs=1e-5)


def test_gradients(official: DCDiT, run: Callable[..., Any], cases: dict[str, Tensor], facts: dict[str, Any]) -> None:
    output = run()
    mse = (output.sample[:, :4] - cases["in.target"]).square().mean()
    loss = mse + 0.03 * output.routing.losses["ratio"]
    assert mse.item() == pytest.approx(facts["train"]["mse"], abs=1e-5)
    assert loss.item() == pytest.approx(facts["train"]["loss"], abs=1e-5)
    loss.backward()
    with torch.no_grad():  # map the names of gradients as the writer maps those of weights
        gradients = {name: value.grad for name, value in official.named_parameters() if value.grad is not None}
        for name, value in official.named_parameters():
            value.copy_(gradients.get(name, torch.zeros_like(value)))
    found = to_official(official)
    recorded = {name.removeprefix("grad."): value for name, value in cases.items() if name.startswith("grad.")}
    assert set(recorded) == set(found) - {"pos_embed"}
    for name, gradient in recorded.items():
        torch.testing.assert_close(found[name], gradient, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_parts(official: DCDiT, run: Callable[..., Any], cases: dict[str, Tensor]) -> None:
    seen: dict[str, Tensor] = {}
    for name in ("encoder", "norm", "decoder"):
        part = official.get_submodule(name)
        part.register_forward_hook(lambda _module, _inputs, output, name=name: seen.__setitem__(name, output))
    with torch.no_grad():
        routing = run().routing
    torch.testing.assert_close(seen["encoder"], cases["drop0.encoder"], **TOLERANCE)
    torch.testing.assert_close(seen["norm"], cases["drop0.main_packed"][0], **TOLERANCE)
    torch.testing.assert_close(seen["decoder"], cases["drop0.decoder"], **TOLERANCE)
    assert pack(routing.keep, routing.grid).total == cases["drop0.main_packed"].shape[1]


def test_dechunk(cases: dict[str, Tensor]) -> None:
    keep = cases["drop0.mask"].bool()
    out = dechunk(cases["drop0.main_packed"][0], cases["drop0.prob"], keep, (16, 16), 1.0)
    torch.testing.assert_close(out, cases["drop0.dechunk"], **TOLERANCE)


def test_lite_guidance_formula(official: DCDiT, cases: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Both guidance branches in one batch, each with its own tail drop; three channels are guided."""
    lite = facts["litecfg"]
    half = cases["litecfg.x"][:2]
    with torch.no_grad():
        output = official(
            torch.cat([half, half]),
            timestep=cases["litecfg.t"],
            class_labels=cases["litecfg.y"],
            tail_drop=torch.tensor(lite["tail_drop"]),
        ).sample
    eps, rest = output[:, : lite["guided_channels"]], output[:, lite["guided_channels"] :]
    conditional, unconditional = eps.chunk(2)
    guided = unconditional + lite["cfg_scale"] * (conditional - unconditional)
    torch.testing.assert_close(torch.cat([torch.cat([guided, guided]), rest], 1), cases["litecfg.out"], **TOLERANCE)


@pytest.mark.parametrize("image", [0, 1])
def test_lite_guidance_of_the_sampler(
    official: DCDiT, cases: dict[str, Tensor], facts: dict[str, Any], image: int
) -> None:
    """Guidance of the sampler, one recorded image at a time because their timesteps differ."""
    lite = facts["litecfg"]
    branches = Branches(
        official,
        Objective(),
        cases["litecfg.y"][image : image + 1],
        lite["cfg_scale"],
        "three",
        lite["tail_drop"][0],
        lite["tail_drop"][-1],
    )
    with torch.no_grad():
        denoised = branches(cases["litecfg.x"][image : image + 1], cases["litecfg.t"][image], True)
    recorded = cases["litecfg.out"][image : image + 1]
    torch.testing.assert_close(denoised.prediction, recorded[:, :4], **TOLERANCE)
    torch.testing.assert_close(denoised.variance, recorded[:, 4:], **TOLERANCE)
