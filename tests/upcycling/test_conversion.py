"""A DC-DiT from a DiT: what is copied, where tokens lie, and that the base finds its own tokens in it."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DiTPipeline

import tokdyn
from tokdyn import DCDiT, DiT, DynamicWidth
from tokdyn.checkpoints import read, to_official
from tokdyn.errors import CheckpointError, InputError
from tokdyn.ops import sincos_position
from tokdyn.upcycling import Distillation, report
from tokdyn.upcycling.distillation import Asked, corner_plan, normalised_mse, patch_of, stride


def base(patch: int = 4, **settings: object) -> DiT:
    """A DiT with random weights that says something."""
    torch.manual_seed(0)
    shape = {"sample_size": 16, "in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = DiT(**{**shape, "patch_size": patch, **settings})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(model: torch.nn.Module, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 3, 16, 16), torch.tensor([900, 500, 3])[:batch], torch.arange(batch)


def test_blocks_and_embedders_are_copied_and_the_rest_is_new() -> None:
    teacher = base()
    before = copy.deepcopy(teacher.state_dict())
    torch.manual_seed(5)
    student = tokdyn.upcycle(teacher, "dc", target=4)
    assert isinstance(student, DCDiT)
    assert (student.config.patch_size, student.config.target, student.config.position_scale) == (2, 4, 0.5)
    assert student.training
    own = student.state_dict()
    for name, value in before.items():
        assert torch.equal(teacher.state_dict()[name], value)
        if name.startswith(("blocks.", "t_embedder.", "y_embedder.")):
            assert torch.equal(own[name], value)
            assert own[name].data_ptr() != teacher.state_dict()[name].data_ptr()
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    assert frozen == {name for name in own if name.startswith(("t_embedder.", "y_embedder."))} | {"pos_embed"}
    said = report(teacher, student)
    shared = [name for name in before if name.startswith(("blocks.", "t_embedder.", "y_embedder."))]
    assert set(said.copied.names) == set(shared)
    assert said.copied.parameters == sum(before[name].numel() for name in shared)
    assert set(said.new.names) | set(said.copied.names) | {"pos_embed"} == set(own)
    assert said.frozen.parameters == sum(own[name].numel() for name in frozen - {"pos_embed"})
    assert {name.partition(".")[0] for name in said.left_behind.names} == {"x_embedder", "final_layer"}
    assert (said.tokens_before, said.tokens_after) == (16, 16.0)
    assert said.flops_after == tokdyn.cost.flops_per_image(student)
    assert "multiply-add = 2" in str(said)


def test_corners_stand_where_the_patches_stood() -> None:
    student = tokdyn.upcycle(base(), "dc", target=4)
    plan = corner_plan((8, 8), stride(student))
    assert int(plan.sum()) == 16
    assert torch.equal(student._positions((8, 8))[plan], sincos_position((4, 4), 32))
    other = corner_plan((8, 12), 2)
    assert torch.equal(student._positions((8, 12))[other], sincos_position((4, 6), 32))
    cells = plan.nonzero().flatten()
    assert torch.equal(patch_of(cells, (8, 8), 2), torch.arange(16))
    every = patch_of(torch.arange(64), (8, 8), 2)
    assert torch.equal(every.bincount(), torch.full((16,), 4))
    assert every[9] == 0  # row 1, column 1
    assert every[63] == 15


def test_a_planned_sample_keeps_the_plan_and_others_what_the_router_asks_for() -> None:
    student = tokdyn.upcycle(base(), "dc").eval()
    x, steps, labels = inputs(student)
    plan = corner_plan((8, 8), 2)
    mixed = torch.tensor([True, False, True])[:, None] & plan
    with torch.no_grad():
        natural = student(x, steps, labels).routing
        out = student(x, steps, labels, plan=mixed).routing
        dropped = student(x, steps, labels, plan=mixed, tail_drop=0.5).routing
    assert torch.equal(out.keep[0], plan)
    assert torch.equal(out.keep[2], plan)
    assert torch.equal(out.keep[1], natural.keep[1])
    assert torch.equal(out.probability, natural.probability)  # of the router, whoever chooses
    assert dropped.kept[0] == 8
    assert not (dropped.keep & ~out.keep).any()


def test_the_router_learns_from_the_decision_that_was_taken() -> None:
    """The straight-through term raises p where a token is kept and lowers it where none is, whoever decided."""
    student = tokdyn.upcycle(base(), "dc")
    module = student.chunking
    torch.manual_seed(0)
    tokens, plan = torch.randn(1, 64, 32), corner_plan((8, 8), 2)[None]
    logits = torch.randn(1, 64, requires_grad=True)
    module.logits = lambda *_: logits
    module.config = module.config.model_copy(update={"sigma": None})  # nothing else hangs on p then
    routing = module.route(tokens, (8, 8), torch.tensor([500]), 0.0, plan)
    _, packing = module.chunk(tokens, routing)
    out = module.dechunk(torch.ones(packing.total, 32), tokens, routing, packing)
    out.sum().backward()
    assert routing.natural_keep.logical_xor(plan).any()
    assert (logits.grad[plan] > 0).all()
    assert (logits.grad[~plan] < 0).all()


def test_the_base_agrees_with_itself() -> None:
    """A student whose blocks get the very tokens of the base makes no error, and random ones do."""
    teacher = base().eval()
    student = tokdyn.upcycle(teacher, "dc").eval()
    x, steps, labels = inputs(student)
    tokens = teacher.x_embedder(x).flatten(2).transpose(1, 2)
    plan = corner_plan((8, 8), 2)

    def encode(*_: object) -> torch.Tensor:
        dense = torch.zeros(3, 64, 32)
        dense[:, plan] = tokens
        return dense

    both = Distillation(student, teacher)
    planned = torch.ones(3, dtype=torch.bool)
    *_, losses = both(Asked(blocks=True, output=True), planned, x, steps, labels)
    assert losses["teacher"] > 0.1
    assert losses["output"] > 0
    student._encode = encode
    *_, losses = both(Asked(blocks=True), planned, x, steps, labels)
    assert losses["teacher"].item() < 1e-9  # fp32
    assert set(losses) == {"teacher"}
    assert both(Asked(), planned, x, steps, labels)[2] == {}


def test_gradients_reach_the_student_alone() -> None:
    teacher = base()
    student = tokdyn.upcycle(teacher, "dc")
    x, steps, labels = inputs(student)
    both = Distillation(student, teacher)
    assert {name for name, _ in both.named_parameters()} == {
        f"student.{name}" for name, _ in student.named_parameters()
    }
    *_, losses = both(Asked(blocks=True), torch.ones(3, dtype=torch.bool), x, steps, labels)
    losses["teacher"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.encoder.norm.weight.grad.abs().sum() > 0
    assert student.final_layer.linear.weight.grad is None  # the blocks are compared, not what is made of them
    twin = tokdyn.upcycle(teacher, "dc").train()
    twin.load_state_dict(student.state_dict())
    twin.enable_gradient_checkpointing()
    again = Distillation(twin, teacher)(Asked(blocks=True), torch.ones(3, dtype=torch.bool), x, steps, labels)[2]
    again["teacher"].backward()
    for one, other in zip(student.parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.allclose(one.grad, other.grad, atol=1e-7)


def test_the_error_is_normalised() -> None:
    torch.manual_seed(0)
    target = 3.0 * torch.randn(64, 8) + 5.0
    assert normalised_mse(target.mean(dim=0).expand(64, 8), target).item() == pytest.approx(1.0, rel=1e-5)
    noise = torch.randn(64, 8)
    errors = [normalised_mse(scale * (target + noise), scale * target) for scale in (1.0, 7.0)]
    assert errors[0].item() == pytest.approx(errors[1].item(), rel=1e-5)
    assert torch.isfinite(normalised_mse(noise, torch.ones(64, 8)))


@pytest.mark.parametrize(
    ("patch", "settings", "cell"),
    [(2, {}, 1), (4, {"target": 16}, 1), (4, {"target": 2.0}, 2), (4, {"patch_size": 1}, 1), (8, {"target": 4}, 4)],
)
def test_cells_of_any_base(patch: int, settings: dict[str, float], cell: int) -> None:
    student = tokdyn.upcycle(base(patch), "dc", **settings).eval()
    assert student.config.patch_size == cell
    x, steps, labels = inputs(student)
    planned = torch.ones(3, dtype=torch.bool)
    out, _, losses = Distillation(student, base(patch))(Asked(True, True), planned, x, steps, labels)
    assert out.sample.shape == (3, 6, 16, 16)
    assert out.routing.kept.tolist() == [(16 // patch) ** 2] * 3
    assert torch.isfinite(torch.stack(list(losses.values()))).all()


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        (lambda: base(1), {}, "patch_size is 1 and the base has patches of 1"),
        (lambda: base(4), {"patch_size": 3}, "patch_size is 3 and the base has patches of 4"),
        (lambda: base(4), {"depth": 3}, "depth follows from the base, where it is 2"),
        (lambda: base(4), {"position_scale": 2.0}, "position_scale follows from the patch sizes"),
        (lambda: base(4), {"foo": 1}, "foo is no setting of a DC-DiT"),
        (lambda: base(4), {"target": 0}, "target is 0, expected more than 1"),
        (lambda: base(4), {"target": "4"}, "target is '4', expected more than 1"),
        (lambda: base(4), {"method": 3}, "method 3 is unknown"),
        (lambda: base(4), {"method": "dcc"}, "method 'dcc' is unknown; known are dc and dydit"),
        (lambda: base(4), {"method": "cache"}, "'cache' is not trained into a model; call tokdyn.calibrate"),
        (lambda: base(4), {"method": []}, "name at least one"),
        (lambda: base(4), {"width_target": 0.5}, "width_target is a setting of dydit"),
        (lambda: base(4), {"method": "dydit", "target": 4}, "target is a setting of dc"),
        (lambda: tokdyn.upcycle(base(4), "dc"), {}, "a DC-DiT already"),
        (lambda: tokdyn.wrap(base(4), [DynamicWidth()]), {}, "is wrapped; call tokdyn.unwrap"),
    ],
)
def test_what_does_not_fit_is_said(model, arguments: dict[str, object], words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=words):
        tokdyn.upcycle(model(), **arguments)


def test_it_is_saved_and_found_again(tmp_path) -> None:  # type: ignore[no-untyped-def]
    student = tokdyn.upcycle(base(), "dc", target=4).eval()
    student.save_pretrained(tmp_path / "student")
    x, steps, labels = inputs(student)
    with torch.no_grad():
        expected = student(x, steps, labels).sample
        for again in (DCDiT.from_pretrained(tmp_path / "student"), read(tmp_path / "student")):
            assert torch.equal(again.eval()(x, steps, labels).sample, expected)
            assert torch.equal(again(x[:, :, :8], steps, labels).sample, student(x[:, :, :8], steps, labels).sample)
    with pytest.raises(CheckpointError, match="patch_size"):
        to_official(student)
    with pytest.raises(CheckpointError, match=r"position_scale=1\.0 only"):
        to_official(tokdyn.upcycle(base(2), "dc"))


def test_a_pipeline_runs_it(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from diffusers import AutoencoderKL, DDIMScheduler

    student = tokdyn.upcycle(base(in_channels=4), "dc").eval()
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
    DiTPipeline(student, vae, DDIMScheduler()).save_pretrained(tmp_path / "pipe")
    pipe = DiTPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    image = pipe([1, 2], num_inference_steps=2, guidance_scale=1.5, output_type="np").images
    assert image.shape == (2, 16, 16, 3)


def test_the_encoder_starts_as_the_patch_embedding() -> None:
    """Up to the norm at its end: the corner token of every patch points where the base's token points."""
    teacher = base(2, in_channels=4, hidden_size=64)  # 16 pixels to a patch, 16 channels in the scaffold
    student = tokdyn.upcycle(teacher, "dc").eval()
    torch.manual_seed(2)
    x = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        wanted = teacher.x_embedder(x).flatten(2).transpose(1, 2)
        found = student._encode(x, torch.zeros(2, 64))[:, corner_plan((16, 16), 2)]
    cosine = torch.nn.functional.cosine_similarity(found, wanted, dim=-1)
    assert cosine.min() > 1 - 1e-5
    assert found.norm().item() == pytest.approx(wanted.norm().item(), rel=0.1)
    narrow = tokdyn.upcycle(teacher, "dc", scaffold_width=8)  # too narrow for a copy of all pixels
    assert narrow.encoder.layers[-1].conv2.weight.abs().sum() > 0


def test_an_untrained_one_keeps_what_it_aims_at() -> None:
    """The router is calibrated for the encoder that it gets, not for a random one."""
    student = tokdyn.upcycle(base(4, hidden_size=192, sample_size=32), "dc").eval()
    torch.manual_seed(3)
    with torch.no_grad():
        routing = student(torch.randn(8, 3, 32, 32), 500, None).routing
    assert routing.kept.float().mean().item() == pytest.approx(64, rel=0.06)
