"""Building a student: what it copies, how its new parts start, and which settings are rejected."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

import tokdyn
from tests.contract.models import TINY
from tests.upcycling.models import inputs, small_base
from tokdyn import DCDiT, DiT, DynamicWidth
from tokdyn.checkpoints import read, to_official
from tokdyn.errors import CheckpointError, InputError, RecipeError
from tokdyn.methods.registry import short_name
from tokdyn.upcycling.conversion import build_student, dc_settings, to_dc
from tokdyn.upcycling.distillation import corner_plan
from tokdyn.upcycling.settings import UpcycleSettings

COPIED = ("blocks.", "t_embedder.", "y_embedder.")
EMBEDDERS = ("t_embedder.", "y_embedder.")


def test_blocks_and_embedders_are_copied() -> None:
    base = small_base()
    before = copy.deepcopy(base.state_dict())
    student = tokdyn.upcycle(base, "dc", target=4)
    assert isinstance(student, DCDiT)
    assert (student.config.patch_size, student.config.target, student.config.position_scale) == (2, 4, 0.5)
    assert student.config.condition_adaptor
    assert student.training
    tensors = student.state_dict()
    for name, value in before.items():
        assert torch.equal(base.state_dict()[name], value)
        if name.startswith(COPIED):
            assert torch.equal(tensors[name], value)
            assert tensors[name].data_ptr() != base.state_dict()[name].data_ptr()


def test_embedders_are_frozen() -> None:
    student = tokdyn.upcycle(small_base(), "dc")
    frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in student.state_dict() if name.startswith(EMBEDDERS)} | {"pos_embed"}


@pytest.mark.parametrize(
    ("patch", "settings", "cell"),
    [(2, {}, 1), (4, {"target": 16}, 1), (4, {"target": 2.0}, 2), (4, {"patch_size": 1}, 1), (8, {"target": 4}, 4)],
)
def test_cells_keep_as_many_tokens_as_the_base_has(patch: int, settings: dict[str, float], cell: int) -> None:
    assert tokdyn.upcycle(small_base(patch), "dc", **settings).config.patch_size == cell


def test_the_student_has_the_dtype_of_the_base() -> None:
    student = tokdyn.upcycle(small_base().to(torch.bfloat16), "dc")
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("base", "arguments", "named"),
    [
        (lambda: small_base(1), {}, "patch_size is 1"),
        (lambda: small_base(4), {"patch_size": 3}, "patch_size is 3"),
        (lambda: small_base(4), {"depth": 3}, "depth .* 2"),
        (lambda: small_base(4), {"position_scale": 2.0}, "position_scale"),
        (lambda: small_base(4), {"foo": 1}, "foo .* encoder_depth"),
        (lambda: small_base(4), {"target": 0}, "target is 0"),
        (lambda: small_base(4), {"target": "4"}, "target is '4'"),
        (lambda: small_base(4), {"method": 3}, "3.* dc or dydit"),
        (lambda: small_base(4), {"method": "dcc"}, "'dcc'.* dc or dydit"),
        (lambda: small_base(4), {"method": "cache"}, r"'cache'.* tokdyn\.calibrate"),
        (lambda: small_base(4), {"method": []}, r"method is \[\]"),
        (lambda: small_base(4), {"method": ["dc", "dc"]}, r"method is \['dc', 'dc'\]"),
        (lambda: small_base(4), {"width_target": 0.5}, "width_target .* dydit"),
        (lambda: small_base(4), {"method": "dydit", "target": 4}, "target .* dc"),
        (lambda: tokdyn.upcycle(small_base(4), "dc"), {}, "DC-DiT"),
        (lambda: tokdyn.wrap(small_base(4), [DynamicWidth()]), {}, r"tokdyn\.unwrap"),
    ],
)
def test_settings_that_do_not_fit_are_rejected(
    base: Callable[[], torch.nn.Module], arguments: dict[str, object], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        tokdyn.upcycle(base(), **arguments)


def test_width_settings_reach_the_method() -> None:
    student = tokdyn.upcycle(small_base(), ["dc", "dydit"], width_target=0.6, encoder_depth=2)
    assert isinstance(student, DCDiT)
    assert student.config.encoder_depth == 2
    assert [method.target for method, _ in tokdyn.parts(student)] == [0.6]
    copied = tokdyn.upcycle(small_base(), "dydit")
    assert isinstance(copied, DiT)
    assert [method for method, _ in tokdyn.parts(copied)] == [DynamicWidth()]


def test_a_saved_student_computes_the_same(tmp_path: Path) -> None:
    student = tokdyn.upcycle(small_base(), "dc", target=4).eval()
    student.save_pretrained(tmp_path / "student")
    x, steps, labels = inputs()
    with torch.no_grad():
        expected = student(x, steps, labels).sample
        for loaded in (DCDiT.from_pretrained(tmp_path / "student"), read(tmp_path / "student")):
            assert torch.equal(loaded.eval()(x, steps, labels).sample, expected)
            assert torch.equal(loaded(x[:, :, :8], steps, labels).sample, student(x[:, :, :8], steps, labels).sample)


def test_a_student_does_not_fit_the_official_layout() -> None:
    with pytest.raises(CheckpointError, match="patch_size"):
        to_official(tokdyn.upcycle(small_base(), "dc", target=4))
    with pytest.raises(CheckpointError, match="position_scale"):
        to_official(tokdyn.upcycle(small_base(2), "dc"))


def test_a_pipeline_of_diffusers_runs_a_student(tmp_path: Path) -> None:
    student = tokdyn.upcycle(small_base(in_channels=4), "dc").eval()
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
    DiTPipeline(student, vae, DDIMScheduler()).save_pretrained(tmp_path / "pipe")
    pipe = DiTPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    image = pipe([1, 2], num_inference_steps=2, guidance_scale=1.5, output_type="np").images
    assert image.shape == (2, 16, 16, 3)


@pytest.mark.parametrize(("patch", "depth", "bias"), [(2, 2, 0.0), (4, 1, 5.0), (2, 3, 5.0), (4, 2, 0.0)])
def test_the_encoder_starts_as_the_patch_embedding(patch: int, depth: int, bias: float) -> None:
    """The upper left cell of every patch points where the base's token points; its norm is that of white noise."""
    channels = 32 // patch**2  # 32 pixels per patch, and as many channels in the scaffold
    base = small_base(patch, in_channels=channels, hidden_size=64)
    base.x_embedder.proj.weight.data.mul_(3.0)  # far from a norm of 1, which a norm without a weight would have
    base.x_embedder.proj.bias.data.add_(bias)
    student = tokdyn.upcycle(base, "dc", scaffold_width=32, encoder_depth=depth).eval()
    torch.manual_seed(2)
    x = torch.randn(2, channels, 16, 16)
    size = 32 // patch
    with torch.no_grad():
        expected = base.x_embedder(x).flatten(2).transpose(1, 2)
        dense: list[torch.Tensor] = []
        student.encoder.register_forward_pre_hook(lambda _, args: (args[0], torch.zeros_like(args[1])))
        student.encoder.register_forward_hook(lambda _, args, tokens: dense.append(tokens))
        student(x, 500, None)
        encoded = dense[0][:, corner_plan((size, size), 2)]
    cosine = torch.nn.functional.cosine_similarity(encoded, expected, dim=-1)
    assert cosine.min() > 1 - 1e-5  # fp32
    assert encoded.norm().item() == pytest.approx(expected.norm().item(), rel=0.1)  # of random pixels


def test_a_narrow_scaffold_starts_as_in_a_new_model() -> None:
    narrow = tokdyn.upcycle(small_base(2, in_channels=4, hidden_size=64), "dc", scaffold_width=8)  # 16 pixels per patch
    assert narrow.encoder.layers[-1].conv2.weight.abs().sum() > 0


def test_a_new_router_keeps_its_target() -> None:
    """It is calibrated after the encoder got its start; the mean of 8 x 256 cells varies by less than 6%."""
    student = tokdyn.upcycle(small_base(4, hidden_size=192, sample_size=32), "dc").eval()
    torch.manual_seed(3)
    with torch.no_grad():
        routing = student(torch.randn(8, 3, 32, 32), 500, None).routing
    assert routing.kept.float().mean().item() == pytest.approx(64, rel=0.06)


def test_the_student_inherits_what_the_base_was_built_with() -> None:
    """Every value differs from the default of a DC-DiT."""
    own = {
        "sample_size": (16, 24),
        "in_channels": 2,
        "hidden_size": 36,
        "depth": 3,
        "num_heads": 3,
        "mlp_ratio": 2.0,
        "num_classes": 7,
        "learn_sigma": False,
        "timestep_shift": 1,
        "mlp_norm_eps": 1e-5,
    }
    base = small_base(4, **own)
    student = tokdyn.upcycle(base, "dc")
    for name, value in own.items():
        found = student.config[name]
        assert (tuple(found) if isinstance(value, tuple) else found) == value
    assert student.config.target == 4.0
    assert student.config.position_scale == 2 / 4
    assert tuple(student.config.timestep_map) == tuple(base.config.timestep_map)


def test_settings_of_a_dc_dit_reach_it() -> None:
    settings = {"router": "cosine", "decoder_depth": 1, "scaffold_width": 24, "sigma": 2.0, "force_ends": True}
    student = tokdyn.upcycle(small_base(), "dc", **settings, condition_adaptor=False)
    assert {name: student.config[name] for name in settings} == settings
    assert not student.config.condition_adaptor
    assert tokdyn.upcycle(small_base(8), "dc", patch_size=2, target=9.0).config.position_scale == 2 / 8


@pytest.mark.parametrize("target", [1.0, 0.5, float("nan"), None, "4"])
def test_a_target_keeps_less_than_all(target: object) -> None:
    with pytest.raises(InputError, match="target is"):
        tokdyn.upcycle(small_base(), "dc", target=target)
    assert tokdyn.upcycle(small_base(), "dc", target=2).config.target == 2


@pytest.mark.parametrize("patch", [-1, 0, 4, 8])
def test_cells_are_a_proper_part_of_a_patch(patch: int) -> None:
    with pytest.raises(InputError, match=f"patch_size is {patch}.* of 4"):
        tokdyn.upcycle(small_base(4), "dc", patch_size=patch)


@pytest.mark.parametrize("name", ["merge", "skip", "cache", "TokenMerge"])
def test_methods_that_need_no_training_are_attached_by_calls_that_exist(name: str) -> None:
    with pytest.raises(InputError, match=f"'{short_name(name)}'") as refused:
        tokdyn.upcycle(small_base(), name)
    called = re.findall(r"tokdyn\.(\w+)", str(refused.value))
    assert len(called) == 2  # the function and the method
    assert all(hasattr(tokdyn, each) for each in called)
    with pytest.raises(InputError, match=r"dc or dydit.*merge, skip, cache"):
        tokdyn.upcycle(small_base(), "nothing")


def test_a_list_of_methods_names_the_first_wrong_one() -> None:
    with pytest.raises(InputError, match="'nothing'"):
        tokdyn.upcycle(small_base(), ["dc", "nothing", "dydit"])


def test_a_copy_shares_nothing_with_the_base_and_learns() -> None:
    base = small_base().eval()
    for method in ("dc", "dydit"):
        student = tokdyn.upcycle(base, method, **({"width_target": 0.5} if method == "dydit" else {}))
        assert student.training
        assert not base.training
        pointers = {parameter.data_ptr() for parameter in base.parameters()}
        assert pointers.isdisjoint(parameter.data_ptr() for parameter in student.parameters())


def test_skipping_that_no_model_can_reach_is_refused_before_training() -> None:
    """What always runs is everything but the blocks, whose FLOPs are what a model with one more of them adds."""
    base = small_base()
    whole, deeper = (tokdyn.cost.flops_per_image(model) for model in (base, small_base(depth=3)))
    least = 1 - 2 * (deeper - whole) / whole
    assert 0.01 < least < 0.9
    for share, method, fits in (
        (least + 0.01, "skip", True),
        (least - 0.01, "skip", False),
        (least - 0.01, "cache", True),
    ):
        settings = UpcycleSettings(base="x", after=({"method": method, "flops": share},))
        if fits:
            assert isinstance(build_student(settings, base, chunked=False), DiT)
        else:
            with pytest.raises(RecipeError, match=f"{share:g}.*{least:.3g}"):
                build_student(settings, base, chunked=False)


def test_a_base_from_a_file_gives_the_same_student(tmp_path: Path) -> None:
    """JSON has lists where settings have tuples."""
    base = small_base(4, sample_size=(16, 24))
    base.save_pretrained(tmp_path / "base")
    loaded = DiT.from_pretrained(tmp_path / "base")
    students = []
    for each in (base, loaded):
        torch.manual_seed(5)
        students.append(tokdyn.upcycle(each, "dc"))
    assert students[0].config.sample_size == students[1].config.sample_size == (16, 24)
    assert students[0].config.timestep_map == students[1].config.timestep_map
    assert all(torch.equal(a, b) for a, b in zip(*(s.state_dict().values() for s in students), strict=True))


def test_copies_of_models_of_any_family_share_nothing_with_the_base() -> None:
    base = TINY["PixArtTransformer2DModel"].build().eval()
    for student in (
        tokdyn.upcycle(base, ("dc",), target=2),
        tokdyn.upcycle(base, "dydit"),
        build_student(UpcycleSettings(base="x"), small := small_base().eval(), chunked=False),
    ):
        original = small if isinstance(student, DiT) else base
        pointers = {parameter.data_ptr() for parameter in original.parameters()}
        assert pointers.isdisjoint(parameter.data_ptr() for parameter in student.parameters())
        assert student.training
        assert not any(module.training for module in original.modules())


def test_a_recipe_without_methods_builds_what_to_dc_builds() -> None:
    base = small_base()
    for overrides in ({}, {"target": 2.0, "encoder_depth": 3}):
        student = build_student(UpcycleSettings(base="x"), base, chunked=True, **overrides)
        assert dict(student.config) == dict(to_dc(base, **overrides).config)
        assert {name: student.config[name] for name in dc_settings(base, **overrides)}.items() >= overrides.items()
    assert dc_settings(base)["target"] == to_dc(base).config.target == tokdyn.Chunking().target
    assert build_student(UpcycleSettings(base="x"), base, chunked=False, encoder_depth=3).config.depth == 2


def test_a_warm_up_counts_steps_where_a_step_is_a_call() -> None:
    for warmup in (0, 8):
        settings = UpcycleSettings(base="x", methods=({"method": "dydit", "target": 0.6, "warmup": warmup},))
        ((built, _),) = tokdyn.parts(build_student(settings, small_base(), chunked=False))
        assert built == DynamicWidth(target=0.6, warmup=warmup)


def test_settings_that_an_error_offers_are_accepted() -> None:
    defaults = inspect.signature(DCDiT.__init__).parameters
    with pytest.raises(InputError) as refused:
        tokdyn.upcycle(small_base(), "dc", colour=1)
    offered = re.findall(r"\w+", str(refused.value).rpartition("choose from ")[2])
    assert {"target", "router", "encoder_depth"} <= set(offered)
    for name in offered:
        student = tokdyn.upcycle(small_base(), "dc", **{name: defaults[name].default})
        assert isinstance(student, DCDiT)


@pytest.mark.parametrize(
    ("patch", "settings"),
    [
        (4, {"patch_size": 1, "scaffold_width": 64}),  # a patch is four cells wide
        (4, {"scaffold_width": 32}),  # fewer channels than the 48 values of a patch
        (2, {"scaffold_width": 32}),  # as wide as the blocks, so there is no projection
    ],
)
def test_an_encoder_that_cannot_be_the_patch_embedding_starts_as_in_a_new_model(
    patch: int, settings: dict[str, int]
) -> None:
    base = small_base(patch)
    torch.manual_seed(3)
    student = tokdyn.upcycle(base, "dc", official_init=True, **settings)
    torch.manual_seed(3)
    new = DCDiT(**{name: student.config[name] for name in dc_settings(base, official_init=True, **settings)})
    names = [name for name in new.state_dict() if name.startswith(("x_embedder.", "encoder.", "chunking."))]
    assert any("router" in name for name in names)  # which the official code does not calibrate
    assert all(torch.equal(student.state_dict()[name], new.state_dict()[name]) for name in names)


def test_a_student_of_a_model_without_memory_has_none_either() -> None:
    """Costs are computed from such a student before anything is loaded."""
    with torch.device("meta"):
        base = DiT(sample_size=16, patch_size=4, in_channels=3, hidden_size=32, depth=1, num_heads=2, num_classes=5)
        student = tokdyn.upcycle(base, "dc")
    assert all(parameter.is_meta for parameter in student.parameters())
