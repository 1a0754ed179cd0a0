"""DiT and DC-DiT: laws for every router, grid and patch size, and use as diffusers models."""

import copy
import json
import math

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

import tokdyn
from tokdyn import checkpoints
from tokdyn.errors import InputError
from tokdyn.models import DCDiT, DiT
from tokdyn.recipe.model_settings import ModelSettings

ROUTERS = ["spatial_predictability", "cosine", "random"]
SMALL = {"hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 10, "sample_size": 8}


def awake(model):
    """Add random weights everywhere, since adaLN-Zero and the zero head would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "offset" not in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1)
    return model.eval()


def dc_dit(double=True, **settings):
    torch.manual_seed(0)
    model = awake(DCDiT(**{**SMALL, **settings}))
    model = model.double() if double else model
    model.calibrate_router(*arguments(model))
    return model


def arguments(model, batch=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    size = model.config.sample_size
    rows, columns = (size, size) if isinstance(size, int) else size
    x = torch.randn(batch, model.config.in_channels, rows, columns, generator=generator, dtype=model.dtype)
    steps = torch.randint(1000, (batch,), generator=generator)
    return x, steps, torch.randint(11, (batch,), generator=generator)


GEOMETRIES = [
    {"patch_size": 1},
    {"patch_size": 2, "in_channels": 3},
    {"patch_size": 1, "sample_size": (6, 10)},
    {"patch_size": 2, "sample_size": (12, 4), "learn_sigma": False},
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_sample_does_not_depend_on_the_rest_of_its_batch(router, geometry):
    model = dc_dit(router=router, **geometry)
    x, t, y = arguments(model)
    drop = torch.tensor([0.0, 0.3, 0.6, 0.9])
    with torch.no_grad():
        together = model(x, timestep=t, class_labels=y, tail_drop=drop)
        order = torch.tensor([2, 0, 3, 1])
        shuffled = model(x[order], timestep=t[order], class_labels=y[order], tail_drop=drop[order])
        torch.testing.assert_close(shuffled.sample, together.sample[order], rtol=0, atol=1e-12)
        for b in range(4):
            one = model(x[b : b + 1], timestep=t[b], class_labels=y[b : b + 1], tail_drop=float(drop[b]))
            torch.testing.assert_close(one.sample[0], together.sample[b], rtol=0, atol=1e-12)
            assert torch.equal(one.routing.keep[0], together.routing.keep[b])


@pytest.mark.parametrize("backend", ["split", "padded"])
def test_packed_paths_agree(backend):
    model = dc_dit()
    with torch.no_grad():
        expected = model(*arguments(model)).sample
        with tokdyn.ops.attention_backend(backend):
            torch.testing.assert_close(model(*arguments(model)).sample, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("router", ROUTERS)
def test_shapes_counts_and_losses(router, geometry):
    model = dc_dit(router=router, **geometry)
    x, t, y = arguments(model)
    out = model(x, timestep=t, class_labels=y, tail_drop=0.5)
    grid = tuple(size // model.config.patch_size for size in x.shape[-2:])
    routing = out.routing
    assert out.sample.shape == (4, model.config.out_channels, *x.shape[-2:])
    assert routing.grid == grid
    assert routing.probability.shape == routing.keep.shape == routing.natural_keep.shape == (4, math.prod(grid))
    n = routing.natural_kept
    assert torch.equal(routing.kept, n - torch.minimum((n * 0.5).floor().long(), n - 1))
    assert (routing.natural_keep | ~routing.keep).all()
    expected = tokdyn.ops.ratio_loss(routing.probability, routing.natural_keep, 4.0)
    assert torch.equal(routing.losses["ratio"], expected)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("target", [2.0, 4.0, 16.0])
def test_calibration_keeps_one_in_n(router, target):
    model = DCDiT(**{**SMALL, "sample_size": 32, "target": target, "router": router})
    model.eval()
    x, t, y = arguments(model, batch=8)
    model.calibrate_router(x, t, y)
    kept = model(x, timestep=t, class_labels=y).routing.natural_keep.float().mean().item()
    # The learned routers hit the quantile of this very batch; the random one is right in expectation (4 sigma).
    slack = 4 * math.sqrt((1 - 1 / target) / target / 8192) if router == "random" else 0.001
    assert abs(kept - 1 / target) <= slack


@pytest.mark.parametrize("router", ["spatial_predictability", "cosine"])
def test_a_new_model_keeps_about_one_in_n_unless_it_starts_officially(router):
    model = DCDiT(**{**SMALL, "sample_size": 32, "router": router}).eval()
    x, t, y = arguments(model)
    assert 0.1 < model(x, timestep=t, class_labels=y).routing.natural_keep.float().mean() < 0.5
    assert model.chunking.residual.weight.eq(0).all()
    official = DCDiT(**{**SMALL, "official_init": True})
    assert official.chunking.residual.weight.ne(0).all()
    torch.testing.assert_close(official.chunking.router.bias.detach(), torch.tensor([-1.1]))


@pytest.mark.parametrize("regime", ["one token", "none dropped", "all kept", "half dropped"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("sigma", [1.0, None])
def test_gradients_are_finite_and_reach_every_parameter(router, regime, sigma):
    model = dc_dit(router=router, sigma=sigma)
    if regime in ("one token", "all kept"):
        torch.nn.init.constant_(model.chunking.router.bias, -30.0 if regime == "one token" else 30.0)
    x, t, y = arguments(model)
    out = model(x, timestep=t, class_labels=y, tail_drop=0.5 if regime == "half dropped" else 0.0)
    if regime == "one token":
        assert out.routing.kept.eq(1).all()
    if regime == "all kept":
        assert out.routing.keep.all()
    (out.sample.square().mean() + 0.03 * out.routing.losses["ratio"]).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    if regime in ("none dropped", "half dropped") and router != "random":
        assert all(p.grad.abs().sum() > 0 for p in model.chunking.router.parameters())


@pytest.mark.parametrize("kind", ["dit", "dcdit"])
def test_checkpointing_changes_no_gradient_with_two_forwards_before_a_backward(kind):
    def gradients(checkpointing):
        torch.manual_seed(0)
        model = awake(DiT(**SMALL) if kind == "dit" else DCDiT(**SMALL)).double().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        outs = [model(*arguments(model, seed=seed)).sample for seed in (1, 2)]
        (outs[0].square().mean() + outs[1].abs().mean()).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("kind", ["dit", "dcdit"])
def test_other_input_sizes_get_their_own_positions(kind):
    model = awake(DiT(**SMALL, patch_size=2) if kind == "dit" else DCDiT(**SMALL, patch_size=2))
    same = type(model)(**{**SMALL, "patch_size": 2, "sample_size": (4, 12)})
    state = {name: value for name, value in model.state_dict().items() if name != "pos_embed"}
    same.load_state_dict(state, strict=False)
    x = torch.randn(2, 4, 4, 12)
    with torch.no_grad():
        assert torch.equal(model(x, 3).sample, same.eval()(x, 3).sample)


@pytest.mark.parametrize("kind", ["dit", "dcdit"])
def test_save_load_and_copy_are_exact(kind, tmp_path):
    model = awake(DiT(**SMALL) if kind == "dit" else DCDiT(**SMALL, target=3.0, router="cosine"))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    twin = copy.deepcopy(model)
    expected = model(*arguments(model)).sample
    assert loaded.config.depth == 2
    assert torch.equal(loaded(*arguments(model)).sample, expected)
    model.blocks[0].attn.qkv.weight.data.zero_()
    assert torch.equal(twin(*arguments(model)).sample, expected)


@pytest.mark.parametrize(
    ("saved", "sigma"),
    [
        ({"smoothing": True, "smoothing_sigma": 2.0}, 2.0),
        ({"smoothing": False, "smoothing_sigma": 2.0}, None),
        ({"smoothing_sigma": 0.5}, 0.5),
        ({"smoothing": True}, 1.0),
        ({"sigma": 3.0}, 3.0),
        ({"sigma": None}, None),
        ({}, 1.0),
    ],
    ids=str,
)
def test_saved_configurations_of_earlier_versions_load(saved, sigma, tmp_path):
    model = awake(DCDiT(**SMALL, sigma=sigma))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("sigma") == sigma
    (tmp_path / "config.json").write_text(json.dumps(config | saved))
    loaded = DCDiT.from_pretrained(tmp_path)
    assert loaded.config.sigma == loaded.chunking.config.sigma == sigma
    assert "smoothing" not in loaded.config
    assert torch.equal(loaded(*arguments(model)).sample, model(*arguments(model)).sample)
    assert checkpoints.read(tmp_path).config.sigma == sigma
    assert ModelSettings(**saved).overrides.get("sigma", 1.0) == sigma
    assert DCDiT.from_pretrained(tmp_path, smoothing=False).config.sigma is None


@pytest.mark.parametrize("kind", ["dit", "dcdit"])
def test_a_diffusers_pipeline_runs_saves_and_loads_it(kind, tmp_path):
    model = awake(DiT(**SMALL) if kind == "dit" else DCDiT(**SMALL))
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    pipeline = DiTPipeline(transformer=model, vae=vae, scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def images(pipe):
        generator = torch.Generator().manual_seed(3)
        return pipe([1, 7], num_inference_steps=2, generator=generator, output_type="np", guidance_scale=4.0).images

    expected = images(pipeline)
    assert expected.shape == (2, 16, 16, 3)
    pipeline.save_pretrained(tmp_path)
    again = DiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.transformer) is type(model)
    assert (images(again) == expected).all()


def test_half_precision_keeps_the_router_in_fp32(tmp_path):
    model = dc_dit(double=False)
    model.save_pretrained(tmp_path)
    half = DCDiT.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert half.chunking.router.proj.weight.dtype == torch.float32
    x, t, y = arguments(model)
    with torch.no_grad():
        exact, rounded = model(x, t, y), half(x.bfloat16(), t, y)
        cast = copy.deepcopy(model).bfloat16()(x.bfloat16(), t, y)
    for other in (rounded, cast):
        assert other.sample.dtype == torch.bfloat16
        assert other.routing.probability.dtype == torch.float32
        # bf16 has 8 bits: tokens differ by about 1%, and so do decisions near p = 0.5.
        assert (other.routing.keep == exact.routing.keep).float().mean() > 0.9
        assert torch.nn.functional.cosine_similarity(other.sample.float(), exact.sample, dim=1).mean() > 0.95


@pytest.mark.parametrize("kind", [DiT, DCDiT])
def test_layerwise_casting_to_eight_bits(kind):
    """e4m3 keeps 4 bits, so weights are off by up to 6%, and decisions near p = 0.5 change."""
    model = awake(kind(**SMALL))
    x, t, y = arguments(model)
    with torch.no_grad():
        exact = model(x, t, y).sample
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        rounded = model(x, t, y).sample
    assert model.blocks[0].attn.qkv.weight.dtype == torch.float8_e4m3fn
    assert torch.nn.functional.cosine_similarity(rounded, exact, dim=1).mean() > 0.95


def test_the_pipelines_null_class_is_the_last_row():
    model = awake(DiT(**SMALL))
    x, t, _ = arguments(model)
    null, pipeline_null = torch.full((4,), 10), torch.full((4,), 1000)
    with torch.no_grad():
        assert torch.equal(model(x, t, null).sample, model(x, t, pipeline_null).sample)
        assert torch.equal(model(x, t, null).sample, model(x, t).sample)


def test_random_boundaries_repeat_in_evaluation_and_differ_in_training():
    model = dc_dit(router="random")
    keep = lambda: model(*arguments(model)).routing.keep  # noqa: E731
    assert torch.equal(keep(), keep())
    model.train()
    assert not torch.equal(keep(), keep())
    torch.manual_seed(5)
    first = keep()
    torch.manual_seed(5)
    assert torch.equal(first, keep())


@pytest.mark.parametrize("kind", [DiT, DCDiT])
def test_steps_and_labels_may_be_numbers_lists_or_tensors(kind):
    model = awake(kind(**SMALL))
    x = arguments(model)[0]
    with torch.no_grad():
        expected = model(x, timestep=torch.tensor([7] * 4), class_labels=torch.tensor([3] * 4)).sample
        for steps, labels in ((7, 3), (7.0, torch.tensor(3)), ([7] * 4, [3] * 4), (torch.tensor([7]), [3])):
            assert torch.equal(model(x, timestep=steps, class_labels=labels).sample, expected)


@pytest.mark.parametrize("kind", [DiT, DCDiT])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_built_in_another_default_type(kind, dtype):
    torch.set_default_dtype(dtype)
    try:
        model = kind(**SMALL)
        assert model.pos_embed.dtype == model.dtype == dtype
        assert model(torch.randn(2, 4, 8, 8), 3).sample.dtype == dtype
    finally:
        torch.set_default_dtype(torch.float32)


def test_nan_inputs_give_nan_in_their_own_sample_alone():
    model = dc_dit(double=False)
    x, t, y = arguments(model)
    x[1] = math.nan
    out = model(x, timestep=t, class_labels=y)
    out.sample.sum().backward()
    assert out.sample[1].isnan().all()
    assert out.sample[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("router", ROUTERS)
def test_calibration_to_another_target(router):
    model = DCDiT(**{**SMALL, "sample_size": 32, "target": 16.0, "router": router}).eval()
    x, t, y = arguments(model, batch=8)
    for target in (2.0, None):
        model.calibrate_router(x, t, y, target=target)
        kept = model(x, timestep=t, class_labels=y).routing.natural_keep.float().mean().item()
        assert kept == pytest.approx(1 / (target or 16.0), abs=0.03)  # the random router's 8192 draws: 4 sigma


def test_named_models():
    assert DiT.named("tiny/4", num_classes=3).config.patch_size == 4
    assert DCDiT.named("tiny", target=9.0).config.target == 9.0
    for kind, wrong in ((DiT, "XL"), (DCDiT, "M"), (DiT, "S/3")):
        with pytest.raises(InputError, match=f"'{wrong}'"):
            kind.named(wrong)
    with pytest.raises(InputError, match="num_heads = 3"):
        DiT.named("tiny/2", num_heads=3)
