"""DiT and DC-DiT refuse inputs and settings that cannot be meant, in words."""

import math

import pytest
import torch

from tests.models.test_models import SMALL
from tokdyn.errors import InputError
from tokdyn.models import DCDiT


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m(torch.zeros(1, 3, 8, 8), 1), r"\(1, 3, 8, 8\).*\(B, 4, rows, columns\)"),
        (lambda m: m(torch.zeros(1, 4, 8, 7), 1), "8x7.* 2"),
        (lambda m: m(torch.zeros(1, 4, 8, 8)), "timestep"),
        (lambda m: m(torch.zeros(2, 4, 8, 8), torch.zeros(3)), "timestep has 3 .* 1 or 2"),
        (lambda m: m(torch.zeros(2, 4, 8, 8), 1, torch.zeros(3).long()), "class_labels has 3 "),
        (lambda m: m(torch.zeros(2, 4, 8, 8), 1, tail_drop=2.0), "tail_drop is 2.0"),
        (lambda m: m(torch.zeros(0, 4, 8, 8), 1), r"\(0, 4, 8, 8\)"),
        (lambda m: m(torch.zeros(2, 4, 8, 8), 1, torch.tensor([0, 11])), "class_labels .*11.* 0 to 10"),
        (lambda m: m(torch.zeros(2, 4, 8, 8), 1, torch.tensor([0, -1])), "class_labels .*-1"),
        (lambda m: m(torch.zeros(2, 4, 8, 8), 1, torch.zeros(2)), "class_labels .*torch.float32"),
        (lambda m: m.calibrate_router(torch.zeros(2, 4, 8, 8), 1, None, target=1.0), "target is 1.0"),
        (lambda m: m.calibrate_router(torch.full((2, 4, 8, 8), math.nan), 1, None), "NaN"),
        (lambda m: m(None, 1), "NoneType"),
        (lambda m: m(torch.zeros(2, 4, 8, 8).int(), 1), "torch.int32"),
        (lambda m: m(torch.zeros(2, 4, 8, 8).half(), 1), "torch.float16 .*torch.float32"),
        (lambda m: m(torch.zeros(2, 4, 8, 8).double(), 1), "torch.float64 .*torch.float32"),
        (lambda m: m(torch.zeros(2, 4, 8, 8), math.nan), "timestep is nan"),
        (lambda m: m(torch.zeros(2, 4, 8, 8).to_sparse(), 1), "torch.sparse_coo"),
        (lambda m: m(torch.zeros(2, 4, 8, 8), "late"), "timestep is 'late'"),
        (lambda m: m(torch.zeros(2, 4, 8, 8), 1, ["cat", "dog"]), "class_labels is .*cat"),
        (lambda m: m(torch.zeros(2, 4, 8, 8), -1), "timestep is -1"),
        (lambda m: m(torch.zeros(2, 4, 8, 8), torch.tensor([1.0, math.inf])), "timestep is .*inf"),
        (lambda m: m(torch.zeros(2, 4, 8, 8), [1, -7]), "timestep is .*-7"),
        (lambda m: m(torch.zeros(2, 4, 8, 8), 1, plan=torch.ones(2, 5).bool()), r"plan .*\(2, 5\).*\(2, 16\)"),
        (lambda m: m(torch.zeros(2, 4, 8, 8), 1, plan=torch.ones(2, 16)), "plan .*torch.float32"),
    ],
)
def test_wrong_input_raises(call, words):
    with pytest.raises(InputError, match=words):
        call(DCDiT(**SMALL, patch_size=2))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"router": "oracle"}, "router.*'spatial_predictability', 'cosine' or 'random'.*'oracle'"),
        ({"target": 1.0}, "target is 1.0"),
        ({"sigma": -1.0}, "sigma is -1.0"),
        ({"sigma": 1e-300}, "sigma is 1e-300"),
        ({"sigma": math.inf}, "sigma is inf"),
        ({"target": 1e300}, r"target: .*1e\+300"),
        ({"scaffold_width": 0}, "scaffold_width"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"depth": -1}, "depth is -1"),
        ({"sample_size": (8, 8, 8)}, r"sample_size is \(8, 8, 8\)"),
        ({"sample_size": 8.0}, r"sample_size is 8.0"),
        ({"sample_size": 100_000}, "sample_size is 100000.*TOKDYN_MAX_TOKENS"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"mlp_ratio": math.nan}, "mlp_ratio is nan"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"timestep_shift": 128}, "timestep_shift is 128"),
        ({"target": math.inf}, "target is inf"),
    ],
)
def test_impossible_settings_raise(settings, words):
    with pytest.raises(InputError, match=words):
        DCDiT(**{**SMALL, **settings})
