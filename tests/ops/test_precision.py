"""Full fp32 convolutions: only for CUDA, and the setting is restored afterwards."""

import pytest
import torch

from tokdyn.ops.precision import full_convolutions


@pytest.mark.parametrize("before", ["tf32", "ieee", "none"])
def test_convolutions_on_cuda_are_not_rounded_to_tf32(before):
    convolution = torch.backends.cudnn.conv
    kept = convolution.fp32_precision
    convolution.fp32_precision = before
    try:
        with full_convolutions(torch.device("cpu")):
            assert convolution.fp32_precision == before
        with full_convolutions(torch.device("cuda")):
            assert convolution.fp32_precision == "ieee"
        assert convolution.fp32_precision == before
    finally:
        convolution.fp32_precision = kept
