"""Every CPU form computes what its plain function computes: values, gradients and second derivatives.

`CASES` holds arguments for each registered pair; a form without a case fails `test_every_form_has_a_case`.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.ops.test_attention import packing_of
from tokdyn import ops
from tokdyn.ops import attention, dispatch, layers, torch_private
from tokdyn.ops.dechunk import smooth
from tokdyn.ops.precision import cpu_multiplies

FLOAT, DOUBLE, HALF = torch.float32, torch.float64, torch.bfloat16
NEAR = {FLOAT: 1e-4, DOUBLE: 1e-10, HALF: 0.04}
BF16 = pytest.mark.skipif(not cpu_multiplies(HALF), reason="the processor has no instructions for bf16")


@dataclass
class Case:
    """Arguments of a function.

    Attributes:
        build: arguments of the function for a type; a module's parameters count as arguments.
        dtypes: types to try.
        learns: gradients are wanted.
        frozen: indices of arguments that require none.
        autocast: call it in autocast to bf16.
        marks: of pytest.
    """

    build: Callable[[torch.dtype], tuple[Any, ...]]
    dtypes: tuple[torch.dtype, ...] = (FLOAT, DOUBLE)
    learns: bool = True
    frozen: tuple[int, ...] = ()
    autocast: bool = False
    marks: tuple[Any, ...] = field(default=())


def randn(*shape: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.randn(*shape).to(dtype)


def group_norm(groups: int, width: int) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, width)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def linear_case(bias=True, gelu=False, shape=(3, 70, 24), **kwargs):
    def build(dtype):
        layer = nn.Linear(24, 400, bias).to(FLOAT if kwargs.get("autocast") else dtype)
        return torch.randn(shape).to(dtype), layer.requires_grad_(False), gelu

    return Case(build, learns=False, marks=(BF16,), **kwargs)


def modulated(packed: bool):
    def build(dtype):
        rows = (460, 24) if packed else (2, 230, 24)
        shift, scale = torch.randn(2, 24).to(dtype), torch.randn(2, 24).to(dtype)
        return torch.randn(rows).to(dtype), shift, scale, packing_of([200, 260]) if packed else None, 1e-5

    return build


def attended(lengths: list[int], biased: bool = False, heads: int = 2):
    def build(dtype):
        qkv = torch.randn(sum(lengths), 3 * 8 * heads).to(dtype)
        return qkv, heads, packing_of(lengths), torch.randn(sum(lengths)).to(dtype) if biased else None

    return build


def smoothed(grid: tuple[int, ...], sigma: float):
    def build(dtype):
        keep = torch.rand(2, torch.Size(grid).numel()) < 0.3
        keep[:, 0] = True
        packing = ops.pack(keep, grid)
        return (
            torch.randn(packing.total, 5).to(dtype),
            (0.1 + 0.8 * torch.rand(packing.total)).to(dtype),
            packing,
            sigma,
        )

    return build


CASES: dict[Callable[..., Any], dict[str, Case]] = {
    layers.linear: {
        "bf16": linear_case(dtypes=(HALF,)),
        "rows": linear_case(dtypes=(HALF,), shape=(333, 24)),
        "no bias": linear_case(bias=False, dtypes=(HALF,)),
        "gelu": linear_case(gelu=True, dtypes=(HALF,)),
        "autocast": linear_case(dtypes=(FLOAT, HALF), autocast=True),
        "autocast, gelu, no bias": linear_case(bias=False, gelu=True, dtypes=(FLOAT, HALF), autocast=True),
    },
    layers.modulated_norm: {
        "packed": Case(modulated(True), (FLOAT, DOUBLE, HALF)),
        "packed, no gradients": Case(modulated(True), (FLOAT, DOUBLE, HALF), learns=False),
        "dense, no gradients": Case(modulated(False), (FLOAT, DOUBLE, HALF), learns=False),
    },
    layers.group_norm_silu: {
        "small map": Case(lambda dtype: (randn(3, 16, 5, 7)(dtype), group_norm(8, 16)), (HALF,)),
        "no gradients": Case(lambda dtype: (randn(3, 6, 4, 4)(dtype), group_norm(2, 6)), (HALF,), learns=False),
    },
    attention.dense_attention: {
        "plain": Case(lambda dtype: (randn(2, 9, 3 * 16)(dtype), 2), (HALF,)),
        "biased": Case(lambda dtype: (randn(2, 9, 3 * 16)(dtype), 2, randn(2, 9)(dtype)), (HALF,)),
        "frozen bias": Case(lambda dtype: (randn(2, 9, 3 * 16)(dtype), 2, randn(2, 9)(dtype)), (HALF,), frozen=(2,)),
        "strided": Case(lambda dtype: (randn(2, 3 * 16, 9)(dtype).transpose(1, 2), 2), (HALF,)),
    },
    attention.packed_attention: {
        "split": Case(attended([200, 30, 111])),
        "padded": Case(attended([9, 12, 3]), learns=False),
        "bf16, padded": Case(attended([40, 33, 38], heads=3), (HALF,)),
        "bf16, split": Case(attended([40] * 60 + [200] * 4), (HALF,)),
        "bf16, no gradients": Case(attended([40, 33, 300]), (HALF,), learns=False),
        "biased": Case(attended([40, 33, 38], biased=True), (HALF,)),
        "frozen bias": Case(attended([40, 33, 38], biased=True), (HALF,), frozen=(3,)),
        "frozen bias, split": Case(attended([4, 3, 300], biased=True), (HALF,), frozen=(3,)),
        "biased, no gradients": Case(attended([40, 33, 38], biased=True), (FLOAT, HALF), learns=False),
    },
    attention.pairs_of: {
        "split": Case(lambda dtype: (torch.empty(0, dtype=dtype), (9, 300), 8, True, False), (FLOAT,), learns=False),
    },
    smooth: {
        "line": Case(smoothed((40,), 1.0)),
        "plane": Case(smoothed((9, 11), 1.5)),
        "wide": Case(smoothed((3, 150), 2.0), (DOUBLE,)),
    },
}

PAIRS = [
    pytest.param(function, case, dtype, id=f"{function.__name__}-{name}-{str(dtype)[6:]}", marks=case.marks)
    for function, cases in CASES.items()
    for name, case in cases.items()
    for dtype in case.dtypes
]


def test_every_form_has_a_case():
    assert set(dispatch.cpu_forms()) == set(CASES)


def test_only_ops_imports_the_forms():
    package = Path(ops.__file__).parents[1]
    found = set()
    for path in package.rglob("*.py"):
        if path.parent.name != "cpu" and re.search(
            r"^\s*(from|import) .*\bops(\.| import )cpu\b", path.read_text(), re.M
        ):
            found.add(path.relative_to(package).as_posix())
    assert found == {"ops/__init__.py"}


def build(case: Case, dtype: torch.dtype) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Return the arguments of a case and those tensors among them that gradients are wanted for."""
    torch.manual_seed(0)
    arguments, leaves = case.build(dtype), []
    for place, argument in enumerate(arguments):
        if place in case.frozen:
            continue
        if isinstance(argument, nn.Module):
            leaves += argument.parameters()
        elif isinstance(argument, Tensor) and argument.is_floating_point():
            leaves.append(argument.requires_grad_(case.learns))
    return arguments, leaves if case.learns else []


def outcome(function: Callable[..., Any], arguments: tuple[Any, ...], case: Case) -> tuple[Any, ...]:
    with torch.set_grad_enabled(case.learns), torch.autocast("cpu", HALF, enabled=case.autocast):
        out = function(*arguments)
    return out if isinstance(out, tuple) else (out,)


def gradients(out: Tensor, leaves: list[Tensor], **how: Any) -> list[Tensor]:
    upper = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    found = torch.autograd.grad(out, leaves, upper, allow_unused=True, **how)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def second(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    first = gradients(out, leaves, create_graph=True)
    total = sum((g.double() * torch.linspace(-1, 1, g.numel()).view(g.shape)).sum() for g in first)
    if not total.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def assert_near(found: list[Any], wanted: list[Any], near: float) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        if not isinstance(mine, Tensor):
            assert mine == theirs
            continue
        assert mine.dtype == theirs.dtype
        scale = theirs.abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=near, atol=near * max(1e-6, scale))


@pytest.mark.parametrize(("function", "case", "dtype"), PAIRS)
def test_a_form_equals_its_plain_function(function, case, dtype):
    arguments, leaves = build(case, dtype)
    before = [x.detach().clone() if isinstance(x, Tensor) else x for x in arguments]
    near = NEAR[HALF if case.autocast else dtype]

    def plain(*given: Any) -> Any:
        with dispatch.plain(), sdpa_kernel(SDPBackend.MATH):
            return function(*given)

    def fast(*given: Any) -> Any:
        out = dispatch.cpu_forms()[function](*given)
        assert out is not None, "the form left this case to the plain function"
        return out

    found, wanted = outcome(fast, arguments, case), outcome(plain, arguments, case)
    assert_near(found, wanted, near)
    if leaves and isinstance(found[0], Tensor):
        assert_near(gradients(found[0], leaves), gradients(wanted[0], leaves), near)
        found, wanted = outcome(fast, arguments, case), outcome(plain, arguments, case)
        assert_near(second(found[0], leaves), second(wanted[0], leaves), 2 * near)
    for x, old in zip(arguments, before, strict=True):
        assert not isinstance(x, Tensor) or torch.equal(x, old), "an argument was written over"


NOT_KERNELS = {"annotations", "find", "has_hooks", "nn", "runs_plainly", "torch"}
STATE = {"cpu_capabilities", "forward_mode", "tracing_state", "transforms_active"}
KERNELS = sorted(
    name for name in vars(torch_private) if name.islower() and name[0] != "_" and name not in NOT_KERNELS | STATE
)


def functions_that_use(name: str) -> list[Callable[..., Any]]:
    """Return the functions whose CPU form is in a module that asks for a private name."""
    forms = dispatch.cpu_forms().items()
    return [
        function for function, form in forms if f"torch_private.{name}" in inspect.getsource(inspect.getmodule(form))
    ]


@pytest.mark.parametrize("name", KERNELS)
def test_without_a_private_kernel_the_results_are_the_same(name, monkeypatch):
    monkeypatch.setattr(torch_private, name, None)
    functions = functions_that_use(name)
    assert functions
    for function in functions:
        for case in CASES[function].values():
            dtype = case.dtypes[-1]
            arguments, leaves = build(case, dtype)
            with dispatch.plain():
                wanted = outcome(function, arguments, case)
            found, near = outcome(function, arguments, case), NEAR[HALF if case.autocast else dtype]
            assert_near(found, wanted, near)
            if leaves and isinstance(found[0], Tensor):
                assert_near(gradients(found[0], leaves), gradients(wanted[0], leaves), near)
