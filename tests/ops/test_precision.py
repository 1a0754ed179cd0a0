"""Number types: of products, in autocast, where halves are slow; full fp32 convolutions only for CUDA."""

import pytest
import torch

from tokdyn.ops.precision import (
    autocast_is_slow,
    cpu_multiplies,
    exact,
    full_convolutions,
    halves_multiply_slowly,
    product_dtype,
)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_type_of_products_is_that_of_a_product(dtype, autocast):
    x = torch.ones(2, 2, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert product_dtype(x) == (x @ x).dtype
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        assert product_dtype(x) == (x @ x).dtype
    assert product_dtype(x.to("meta")) == dtype


def test_exact_keeps_fp64_and_widens_the_rest():
    assert exact(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
        assert exact(torch.ones(1, dtype=dtype)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_only_half_types_without_instructions_multiply_slowly(dtype):
    x = torch.ones(1, dtype=dtype)
    assert halves_multiply_slowly(x) == (not cpu_multiplies(dtype))
    assert not halves_multiply_slowly(x.to("meta"))
    assert cpu_multiplies(torch.float32)
    assert cpu_multiplies(torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_is_slow_where_its_type_has_no_instructions(dtype):
    x = torch.ones(1)
    assert not autocast_is_slow(x)
    with torch.autocast("cpu", dtype):
        assert autocast_is_slow(x) == (not cpu_multiplies(dtype))
        assert not autocast_is_slow(x.to("meta"))
