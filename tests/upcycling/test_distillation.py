"""Distillation: which tokens of student and teacher belong together, the value of each loss, and its gradients."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokdyn
from tests.upcycling.models import inputs, small_base
from tokdyn import DCDiT, TokenMerge
from tokdyn.errors import InputError
from tokdyn.methods import WidthGates
from tokdyn.ops import sincos_position
from tokdyn.ops.torch_private import has_hooks
from tokdyn.upcycling import Distillation
from tokdyn.upcycling.distillation import (
    LossTerms,
    cells_per_patch_side,
    corner_plan,
    normalised_mse,
    patch_of,
)

ALL = torch.ones(3, dtype=torch.bool)


def block_outputs(model: nn.Module, *arguments: Any, **keywords: Any) -> tuple[list[Tensor], Any]:
    """Call a model and return the outputs of its blocks beside its own."""
    outputs: list[Tensor] = []
    handles = [block.register_forward_hook(lambda _, __, out: outputs.append(out)) for block in model.blocks]
    result = model(*arguments, **keywords)
    for handle in handles:
        handle.remove()
    return outputs, result


def error_over_variance(student: Tensor, teacher: Tensor) -> float:
    """Mean squared error over the mean variance of the last axis, in fp64."""
    student, teacher = (value.detach().double().flatten(0, -2) for value in (student, teacher))
    return float(((student - teacher) ** 2).mean() / teacher.var(dim=0, unbiased=False).mean())


def mean_error(students: Sequence[Tensor], teachers: Tensor, targets: Sequence[Tensor] | None = None) -> float:
    """Mean over images of the squared error of their tokens, over the variance of all the teacher's tokens, in fp64."""
    errors = [
        (student.detach().double() - target.double()).square().mean()
        / teacher.double().var(dim=0, unbiased=False).mean()
        for student, target, teacher in zip(students, targets or teachers, teachers, strict=True)
    ]
    return float(torch.stack(errors).mean())


@pytest.mark.parametrize("grid", [(8, 8), (8, 12), (12, 8)])
def test_corner_cells_have_the_positions_of_the_patches(grid: tuple[int, int]) -> None:
    student = tokdyn.upcycle(small_base(), "dc", target=4)
    side = cells_per_patch_side(student)
    plan = corner_plan(grid, side)
    patches = (grid[0] // side, grid[1] // side)
    assert int(plan.sum()) == patches[0] * patches[1]
    student.encoder.register_forward_hook(lambda _, args, tokens: torch.zeros_like(tokens))
    rows: list[Tensor] = []
    student.blocks[0].register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    pixels = [student.config.patch_size * size for size in grid]
    student(torch.randn(1, 3, *pixels), 500, None, plan=plan[None])
    assert torch.equal(rows[0], sincos_position(patches, 32))


@pytest.mark.parametrize(("grid", "side"), [((8, 8), 2), ((8, 12), 2), ((12, 8), 4), ((8, 12), 1)])
def test_every_cell_lies_in_the_patch_that_covers_it(grid: tuple[int, int], side: int) -> None:
    """Against a raster of patches in which each number is repeated over the cells of its patch."""
    patches = torch.arange(grid[0] * grid[1] // side**2).reshape(grid[0] // side, grid[1] // side)
    expected = patches.repeat_interleave(side, dim=0).repeat_interleave(side, dim=1).flatten()
    assert torch.equal(patch_of(torch.arange(grid[0] * grid[1]), grid, side), expected)
    corners = corner_plan(grid, side).nonzero().flatten()
    assert torch.equal(patch_of(corners, grid, side), patches.flatten())


def test_a_model_without_base_has_no_patches() -> None:
    with pytest.raises(InputError, match="position_scale is 1"):
        cells_per_patch_side(DCDiT.named("tiny", sample_size=8))
    with pytest.raises(InputError, match="Distillation"):
        _ = Distillation(tokdyn.upcycle(small_base(), "dc"), None).teacher


def test_a_plan_replaces_the_choice_of_the_router_sample_by_sample() -> None:
    student = tokdyn.upcycle(small_base(), "dc").eval()
    x, steps, labels = inputs()
    plan = corner_plan((8, 8), 2)
    plans = torch.tensor([True, False, True])[:, None] & plan
    with torch.no_grad():
        natural = student(x, steps, labels).routing
        planned = student(x, steps, labels, plan=plans).routing
        dropped = student(x, steps, labels, plan=plans, tail_drop=0.5).routing
    assert torch.equal(planned.keep[0], plan)
    assert torch.equal(planned.keep[2], plan)
    assert torch.equal(planned.keep[1], natural.keep[1])
    assert torch.equal(planned.probability, natural.probability)  # the router computes it either way
    assert dropped.kept[0] == 8
    assert not (dropped.keep & ~planned.keep).any()


def test_the_router_learns_from_the_plan() -> None:
    """The straight-through term raises the probability of kept tokens and lowers that of others, whoever decided."""
    student = tokdyn.upcycle(small_base(), "dc")
    module = student.chunking
    torch.manual_seed(0)
    tokens, plan = torch.randn(1, 64, 32), corner_plan((8, 8), 2)[None]
    logits = torch.randn(1, 64, requires_grad=True)
    module.logits = lambda *_: logits
    module.config = module.config.model_copy(update={"sigma": None})  # smoothing depends on the probability too
    routing = module.route(tokens, (8, 8), torch.tensor([500]), 0.0, plan)
    _, packing = module.chunk(tokens, routing)
    out = module.dechunk(torch.ones(packing.total, 32), tokens, routing, packing)
    out.sum().backward()
    assert routing.natural_keep.logical_xor(plan).any()
    assert (logits.grad[plan] > 0).all()
    assert (logits.grad[~plan] < 0).all()


def test_the_error_is_normalised() -> None:
    torch.manual_seed(0)
    target = 3.0 * torch.randn(64, 8) + 5.0
    assert normalised_mse(target.mean(dim=0).expand(64, 8), target).item() == pytest.approx(1.0, rel=1e-5)
    noise = torch.randn(64, 8)
    errors = [normalised_mse(scale * (target + noise), scale * target) for scale in (1.0, 7.0)]
    assert errors[0].item() == pytest.approx(errors[1].item(), rel=1e-5)
    assert errors[0].item() == pytest.approx(error_over_variance(target + noise, target), rel=1e-5)


def test_a_constant_teacher_is_divided_by_the_smallest_variance() -> None:
    """The variance is clamped to 1e-12; the gradient is 2 (s - t) over the number of elements and that variance."""
    student = torch.full((64, 8), 1.5, requires_grad=True)
    loss = normalised_mse(student, torch.ones(64, 8))
    loss.backward()
    assert loss.item() == pytest.approx(0.25 / 1e-12, rel=1e-5)
    torch.testing.assert_close(student.grad, torch.full((64, 8), 2 * 0.5 / (64 * 8) / 1e-12), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    ("patch", "settings"),
    [(2, {}), (4, {"target": 16}), (4, {"target": 2.0}), (4, {"patch_size": 1}), (8, {"target": 4})],
)
@pytest.mark.parametrize("size", [(16, 16), (16, 32)])
def test_losses_on_the_fixed_plan_have_their_known_values(
    patch: int, settings: dict[str, float], size: tuple[int, int]
) -> None:
    """On the fixed plan, the student's tokens in raster order are the teacher's; fp32 against fp64."""
    base = small_base(patch)
    student = tokdyn.upcycle(base, "dc", **settings).eval()
    _, steps, labels = inputs()
    x = torch.randn(3, 3, *size)
    result, _, losses = Distillation(student, base)(LossTerms(blocks=True, output=True), ALL, x, steps, labels)
    patches = size[0] * size[1] // patch**2
    assert result.routing.kept.tolist() == [patches] * 3
    cell = student.config.patch_size
    plan = corner_plan((size[0] // cell, size[1] // cell), patch // cell).expand(3, -1)
    with torch.no_grad():
        ours, own = block_outputs(student, x, steps, labels, plan=plan)
        theirs, target = block_outputs(base, x, steps, labels)
    errors = [mean_error(a.reshape(3, patches, -1), b) for a, b in zip(ours, theirs, strict=True)]
    assert losses["teacher"].item() == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    predictions = (image.movedim(1, -1).flatten(1, 2) for image in (own.sample, target.sample))
    assert losses["output"].item() == pytest.approx(mean_error(*predictions), rel=1e-4)


def test_models_of_one_block_are_compared_by_it() -> None:
    base = small_base(depth=1)
    x, steps, labels = inputs()
    for method, plan in (("dc", ALL), ("dydit", ~ALL)):
        student = tokdyn.upcycle(base, method).eval()
        _, _, losses = Distillation(student, base)(LossTerms(blocks=True), plan, x, steps, labels)
        with torch.no_grad():
            (theirs,), _ = block_outputs(base, x, steps, labels)
            if method == "dydit":
                (ours,), _ = block_outputs(student, x, steps, labels)
            else:
                (ours,), _ = block_outputs(student, x, steps, labels, plan=corner_plan((8, 8), 2).expand(3, -1))
        assert losses["teacher"].item() == pytest.approx(mean_error(ours.reshape_as(theirs), theirs), rel=1e-4)


def test_a_copy_of_the_teacher_is_compared_token_by_token_and_has_the_losses_of_its_methods() -> None:
    base = small_base()
    student = tokdyn.upcycle(base, "dydit", width_target=0.5)
    with torch.no_grad():
        for parameter in student.blocks.parameters():
            parameter.mul_(1.1)
    x, steps, labels = inputs()
    torch.manual_seed(4)
    _, complete, losses = Distillation(student, base)(LossTerms(blocks=True, output=True), ~ALL, x, steps, labels)
    torch.manual_seed(4)
    ours, own = block_outputs(student, x, steps, labels)
    expected = tokdyn.losses(student)
    with torch.no_grad():
        theirs, target = block_outputs(base, x, steps, labels)
    errors = [mean_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert set(losses) == {"DynamicWidth", "teacher", "output"}
    assert losses["DynamicWidth"].item() == pytest.approx(expected["DynamicWidth"].item(), rel=1e-5)
    assert losses["teacher"].item() == pytest.approx(sum(errors) / 2, rel=1e-4)
    predictions = (image.movedim(1, -1).flatten(1, 2) for image in (own.sample, target.sample))
    assert losses["output"].item() == pytest.approx(mean_error(*predictions), rel=1e-4)
    assert complete is None


def test_terms_are_computed_if_asked_for_and_do_not_change() -> None:
    base = small_base()
    terms: Any = LossTerms()
    seen: list[nn.Module] = []
    base.register_forward_hook(lambda module, *_: seen.append(module))
    result, complete, losses = Distillation(tokdyn.upcycle(base, "dc"), base)(terms, ALL, *inputs())
    assert result.sample.shape[0] == 3
    assert (complete, losses, seen) == (None, {}, [])
    with pytest.raises(AttributeError):
        terms.blocks = True


def test_learned_tokens_are_compared_with_the_patch_that_they_lie_in() -> None:
    """Off the plan and on a grid that is not square: every kept cell has the teacher's token of its patch as target."""
    base = small_base()
    student = tokdyn.upcycle(base, "dc").eval()
    _, steps, labels = inputs()
    x = torch.randn(3, 3, 16, 24)
    *_, losses = Distillation(student, base)(LossTerms(blocks=True), ~ALL, x, steps, labels)
    with torch.no_grad():
        ours, result = block_outputs(student, x, steps, labels)
        theirs, _ = block_outputs(base, x, steps, labels)
    patches = torch.arange(24).reshape(4, 6).repeat_interleave(2, dim=0).repeat_interleave(2, dim=1).flatten()
    kept = [int(count) for count in result.routing.kept]
    assert len(set(kept)) > 1  # every image counts alike, however many tokens it keeps
    errors = []
    for own, output in zip(ours, theirs, strict=True):
        targets = [whole[patches][keep] for whole, keep in zip(output, result.routing.keep, strict=True)]
        errors.append(mean_error(own.split(kept), output, targets))
    assert losses["teacher"].item() == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_blocks_that_get_the_tokens_of_the_teacher_make_no_error() -> None:
    base = small_base().eval()
    student = tokdyn.upcycle(base, "dc").eval()
    x, steps, labels = inputs()
    tokens = base.x_embedder(x).flatten(2).transpose(1, 2)
    plan = corner_plan((8, 8), 2)

    def encoded(*_: object) -> Tensor:
        dense = torch.zeros(3, 64, 32)
        dense[:, plan] = tokens
        return dense

    distillation = Distillation(student, base)
    *_, losses = distillation(LossTerms(blocks=True), ALL, x, steps, labels)
    assert losses["teacher"] > 0.1
    student.encoder.register_forward_hook(encoded)
    *_, losses = distillation(LossTerms(blocks=True), ALL, x, steps, labels)
    assert losses["teacher"].item() < 1e-9  # fp32
    assert set(losses) == {"teacher"}
    assert distillation(LossTerms(), ALL, x, steps, labels)[2] == {}


def test_gradients_reach_the_student_alone() -> None:
    base = small_base()
    student = tokdyn.upcycle(base, "dc")
    x, steps, labels = inputs()
    distillation = Distillation(student, base)
    assert not base.training
    assert not any(parameter.requires_grad for parameter in base.parameters())
    names = {name for name, _ in distillation.named_parameters()}
    assert names == {f"student.{name}" for name, _ in student.named_parameters()}
    *_, losses = distillation(LossTerms(blocks=True), ALL, x, steps, labels)
    losses["teacher"].backward()
    assert all(parameter.grad is None for parameter in base.parameters())
    assert student.encoder.norm.weight.grad.abs().sum() > 0
    assert student.final_layer.linear.weight.grad is None  # it lies behind the blocks that are compared


def test_gradient_checkpointing_does_not_change_the_gradients() -> None:
    base = small_base()
    students = [tokdyn.upcycle(base, "dc") for _ in range(2)]
    students[1].load_state_dict(students[0].state_dict())
    students[1].enable_gradient_checkpointing()
    x, steps, labels = inputs()
    for student in students:
        Distillation(student, base)(LossTerms(blocks=True), ALL, x, steps, labels)[2]["teacher"].backward()
    for plain, recomputed in zip(*(student.parameters() for student in students), strict=True):
        assert (plain.grad is None) == (recomputed.grad is None)
        assert plain.grad is None or torch.allclose(plain.grad, recomputed.grad, atol=1e-7)


def test_the_tail_drop_reaches_the_student() -> None:
    base = small_base()
    student = tokdyn.upcycle(base, "dc").eval()
    x, steps, labels = inputs()
    drops = torch.tensor([0.0, 0.5, 0.75])
    result, _, _ = Distillation(student, base)(LossTerms(), ALL, x, steps, labels, drops)
    assert result.routing.kept.tolist() == [16, 8, 4]


def test_the_complete_prediction_is_the_one_without_methods() -> None:
    base = small_base().eval()
    student = tokdyn.wrap(copy.deepcopy(base), [TokenMerge(ratio=0.5)])
    x, steps, labels = inputs()
    result, complete, _ = Distillation(student, None)(LossTerms(complete=True), ~ALL, x, steps, labels)
    expected = base(x, steps, labels).sample
    assert torch.equal(complete, expected)
    assert not torch.allclose(result.sample, expected)


def test_losses_of_methods_are_returned_while_they_train() -> None:
    student = tokdyn.upcycle(small_base(), "dydit", width_target=0.5)
    x, steps, labels = inputs()
    distillation = Distillation(student, None)
    assert set(distillation(LossTerms(), ~ALL, x, steps, labels)[2]) == {"DynamicWidth"}
    with torch.no_grad():  # nothing to differentiate
        assert distillation(LossTerms(), ~ALL, x, steps, labels)[2] == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_of_half_precision_are_computed_in_fp32(dtype: torch.dtype) -> None:
    student, teacher = torch.randn(64, 8).to(dtype), (torch.randn(64, 8) + 5.0).to(dtype)
    found = normalised_mse(student, teacher)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(error_over_variance(student, teacher), rel=1e-5)


def test_the_complete_prediction_keeps_the_plan_and_the_tail_drop() -> None:
    student = tokdyn.upcycle(small_base(), ["dc", "dydit"], width_target=0.5).eval()
    torch.nn.init.normal_(student.final_layer.linear.weight)  # a new head predicts zeros
    (gates,) = (module for module in student.tokdyn.modules() if isinstance(module, WidthGates))
    for layer in (gates.heads, gates.channels):
        torch.nn.init.constant_(layer.bias, -1.0)  # half of the heads and channels are off
    x, steps, labels = inputs()
    plan = ALL[:, None] & corner_plan((8, 8), 2)
    result, complete, _ = Distillation(student, None)(LossTerms(complete=True), ALL, x, steps, labels, 0.5)
    with torch.no_grad(), tokdyn.disabled(student):
        expected = student(x, steps, labels, plan=plan, tail_drop=0.5)
    assert expected.routing.kept.tolist() == [8] * 3
    torch.testing.assert_close(
        complete, expected.sample, rtol=1e-4, atol=1e-4
    )  # forms without gradients round otherwise
    assert not torch.allclose(result.sample, complete)


def test_losses_of_frozen_methods_are_left_out() -> None:
    student = tokdyn.upcycle(small_base(), "dydit", width_target=0.5, width_tokens=False)
    x, steps, labels = inputs()
    assert set(Distillation(student, None)(LossTerms(), ~ALL, x, steps, labels)[2]) == {"DynamicWidth"}
    student.tokdyn.requires_grad_(False)
    assert Distillation(student, None)(LossTerms(), ~ALL, x, steps, labels)[2] == {}


def test_no_hook_stays_behind() -> None:
    base = small_base()
    student = tokdyn.upcycle(base, "dc")
    distillation = Distillation(student, base)
    distillation(LossTerms(blocks=True), ALL, *inputs())
    with pytest.raises(InputError):
        distillation(LossTerms(blocks=True), ALL, torch.randn(3, 5, 16, 16), *inputs()[1:])
    assert not any(has_hooks(block) for model in (base, student) for block in model.blocks)
