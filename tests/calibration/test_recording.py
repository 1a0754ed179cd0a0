"""`tokdyn.recording` keeps calls that can be repeated, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

import tokdyn
from tests.calibration.trajectories import trajectory
from tests.contract.models import TINY, sample


def tensors(value):
    """List all tensors of an argument."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", sorted(TINY))
@torch.no_grad()
def test_repeated_calls_have_equal_outputs(name, wrapped):
    model = TINY[name].build()
    attributes = set(vars(model))
    if wrapped:
        tokdyn.wrap(model, [tokdyn.DepthSkip(blocks=(1,))])
    with tokdyn.recording(model) as calls:
        outputs = [sample(model(**call)) for call in trajectory(name, (0.9, 0.4))]
    assert len(calls) == 4
    for call, output in zip(calls, outputs, strict=True):
        assert torch.equal(sample(model(**call)), output)
    assert len(calls) == 4  # recording has ended
    assert "forward" not in vars(model)
    if wrapped:
        tokdyn.unwrap(model)
    assert set(vars(model)) == attributes


def test_positional_arguments_get_names_and_tensors_are_copied():
    model = TINY["DiT"].build()
    x, t, y = TINY["DiT"].inputs(2).values()
    before = x.clone()
    with torch.inference_mode(), tokdyn.recording(model, host=True) as calls:
        model(x, t, class_labels=y)
        x.add_(1.0)
        model(x, t, class_labels=y)
    assert list(calls[0]) == ["hidden_states", "timestep", "class_labels"]
    assert torch.equal(calls[0]["hidden_states"], before)
    assert torch.equal(calls[1]["hidden_states"], before + 1)
    assert calls[0]["class_labels"] is calls[1]["class_labels"]  # stored once
    assert not any(tensor.is_inference() for call in calls for tensor in tensors(call))


def test_failing_call_is_recorded_and_ends_the_recording():
    model, inputs, calls = TINY["DiT"].build(), TINY["DiT"].inputs(1), []

    def draw():
        with tokdyn.recording(model) as recorded:
            calls.append(recorded)
            model(**inputs)
            model()

    with pytest.raises(TypeError, match="missing"):
        draw()
    assert len(calls[0]) == 2  # including the call that failed
    assert "forward" not in vars(model)


@torch.no_grad()
def test_direct_calls_of_forward_and_replaced_forwards_are_recorded():
    from accelerate import cpu_offload

    inputs = TINY["DiT"].inputs(1)
    model = TINY["DiT"].build()
    with tokdyn.recording(model) as calls:
        model.forward(**inputs)  # like forward_with_cfg of the public DiT
        model(**inputs)
    assert [list(call) for call in calls] == [list(inputs)] * 2
    plain = sample(model(**inputs))
    cpu_offload(model, execution_device="cpu")
    replaced = vars(model)["forward"]
    with tokdyn.recording(model) as calls:
        assert torch.equal(sample(model(**inputs)), plain)
    assert len(calls) == 1
    assert vars(model)["forward"] is replaced
    method = tokdyn.calibrate(model, calls, tokdyn.DepthSkip(), flops=0.7)
    assert any(blocks for _, _, blocks in method.table)


def test_recorded_pipeline_can_be_calibrated():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        latent_channels=4, norm_num_groups=4, sample_size=8,
    )  # fmt: skip
    pipe = DiTPipeline(TINY["DiTTransformer2DModel"].build(), vae, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def draw():
        seed = torch.Generator().manual_seed(3)
        return pipe(class_labels=[1, 2], num_inference_steps=6, generator=seed, output_type="np").images

    with tokdyn.recording(pipe.transformer) as calls:
        plain = draw()
    assert len(calls) == 6
    method = tokdyn.calibrate(pipe.transformer, calls, tokdyn.FeatureCache(), steps=0.5)
    assert (draw() == plain).all()
    tokdyn.wrap(pipe.transformer, [method])
    assert not (draw() == plain).all()


def test_objects_without_calls_are_refused():
    with pytest.raises(tokdyn.InputError, match=r"str .*pipeline"), tokdyn.recording("pipe"):
        pass
