"""Classes that a declaration is for beside the one that it was written for."""

import pytest
import torch

import tokdyn
from tests.contract.kit import SHARED, of_diffusers, sample
from tests.contract.models import TINY
from tests.contract.siblings import TWINS, WAN, wan_inputs
from tokdyn import Chunking, DepthSkip, TokenDrop, TokenMerge
from tokdyn.testing import check_method

METHODS = {
    "merge": [TokenMerge(ratio=0.4, where="both", seed=3), DepthSkip(blocks=(2,))],
    "chunk": [Chunking(target=2), TokenMerge(ratio=0.3)],
    "drop": [TokenDrop(rate=0.5, blocks=(0, 2)), TokenMerge(ratio=0.3)],
}
every = pytest.mark.parametrize("name", sorted(TWINS))


@every
@pytest.mark.parametrize("methods", METHODS)
@torch.no_grad()
def test_methods_act_and_obey_the_laws(name, methods):
    model, call = TWINS[name].build(), TWINS[name].inputs(2)
    with torch.enable_grad():
        check_method(METHODS[methods], model, call, shared=SHARED, tolerance=1e-5)
    plain = sample(model(**call))
    assert not torch.equal(sample(tokdyn.wrap(model, METHODS[methods]).train(methods == "drop")(**call)), plain)


@torch.no_grad()
def test_models_whose_build_needs_all_tokens_are_refused():
    model = of_diffusers("SkyReelsV2Transformer3DModel", **WAN, num_frame_per_block=2)
    with pytest.raises(tokdyn.UnsupportedModelError, match="num_frame_per_block"):
        tokdyn.wrap(model, [TokenMerge()])
    assert sample(tokdyn.wrap(model, [DepthSkip(blocks=(1,))])(**wan_inputs(1))).isfinite().all()


def test_position_ids_that_form_no_grid_are_refused():
    """The first row of the picture comes twice."""
    tiny = TWINS["LongCatImageTransformer2DModel"]
    model, inputs = tokdyn.wrap(tiny.build(), [TokenMerge()]), tiny.inputs(1)
    inputs["img_ids"] = torch.cat([inputs["img_ids"], inputs["img_ids"][:5]])
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], inputs["hidden_states"][:, :5]], dim=1)
    with pytest.raises(tokdyn.InputError, match="25 image tokens"):
        model(**inputs)


def test_a_grid_that_is_not_that_of_the_tokens_is_refused():
    tiny = TINY["LTXVideoTransformer3DModel"]
    model, inputs = tokdyn.wrap(tiny.build(), [TokenMerge()]), tiny.inputs(1)
    inputs["video_coords"] = torch.rand(1, 3, 24)
    with pytest.raises(tokdyn.InputError, match="video_coords"):
        model(**inputs)
    del inputs["video_coords"]
    inputs["rope_interpolation_scale"] = None
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"]] * 2, dim=1)
    with pytest.raises(tokdyn.InputError, match=r"2 x 3 x 4.* 48 "):
        model(**inputs)
