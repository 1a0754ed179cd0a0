"""Every CPU form computes what its plain function computes: values, gradients and second derivatives.

`CASES` holds arguments for each registered pair; a form without a case fails `test_every_form_has_a_case`.
"""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.ops.test_attention import packing_of
from tokdyn import ops
from tokdyn.ops import attention, dispatch, layers, merging, nearest, torch_private
from tokdyn.ops.dechunk import plug_back, smooth
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


def linear_case(bias=True, gelu=False, shape=(3, 70, 24), wrap=None, **kwargs):
    def build(dtype):
        layer = nn.Linear(24, 400, bias).to(FLOAT if kwargs.get("autocast") else dtype)
        return torch.randn(shape).to(dtype), layer if wrap is None else wrap(layer), gelu

    return Case(build, **kwargs)


def watched(layer: nn.Linear) -> nn.Linear:
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


def norm_case(layout: torch.memory_format, turned: bool = False, weights: torch.dtype | None = None, **kwargs):
    def build(dtype):
        norm = nn.GroupNorm(4, 12).to(weights or dtype)
        nn.init.normal_(norm.weight)
        x = (3 + torch.randn(5, 12, 5, 6)).to(dtype).contiguous(memory_format=layout)
        return x.transpose(2, 3) if turned else x, norm

    return Case(build, **kwargs)


def modulated(packed: bool, eps: float = 1e-6):
    def build(dtype):
        rows = (460, 24) if packed else (2, 230, 24)
        shift, scale = torch.randn(2, 24).to(dtype), torch.randn(2, 24).to(dtype)
        return torch.randn(rows).to(dtype), shift, scale, packing_of([200, 260]) if packed else None, eps

    return build


def gated(packed: bool):
    def build(dtype):
        rows = (460, 24) if packed else (2, 230, 24)
        x, gate, y = (torch.randn(shape).to(dtype) for shape in (rows, (2, 24), rows))
        return x, gate, y, packing_of([200, 260]) if packed else None

    return build


def attended(lengths: list[int], biased: bool = False, heads: int = 2):
    def build(dtype):
        qkv = torch.randn(sum(lengths), 3 * 8 * heads).to(dtype)
        return qkv, heads, packing_of(lengths), torch.randn(sum(lengths)).to(dtype) if biased else None

    return build


def spread(gated: bool, residual: bool):
    def build(dtype):
        index = torch.randint(20, (2, 50))
        gate = torch.rand(2, 50).to(dtype) if gated else None
        return torch.randn(20, 6).to(dtype), index, gate, torch.randn(2, 50, 6).to(dtype) if residual else None, dtype

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
    layers.gelu_tanh: {
        "large": Case(lambda dtype: (3 * randn(70, 1000)(dtype),), (FLOAT, DOUBLE, HALF)),
        "odd": Case(lambda dtype: (3 * randn(5, 7, 2001)(dtype),), (FLOAT, DOUBLE, HALF)),
        "transposed": Case(lambda dtype: (randn(400, 300)(dtype).t(),)),
        "no gradients": Case(lambda dtype: (3 * randn(70, 1000)(dtype),), (FLOAT, DOUBLE, HALF), learns=False),
    },
    layers.linear: {
        "gelu": linear_case(gelu=True),
        "gelu, no gradients": linear_case(gelu=True, learns=False),
        "gelu of a hooked layer": linear_case(gelu=True, wrap=watched),
        "gelu of another module": linear_case(gelu=True, wrap=nn.Sequential),
        "bf16": linear_case(dtypes=(HALF,), marks=(BF16,)),
        "bf16, rows": linear_case(dtypes=(HALF,), shape=(333, 24), marks=(BF16,)),
        "bf16, no bias": linear_case(bias=False, dtypes=(HALF,), marks=(BF16,)),
        "bf16, gelu": linear_case(gelu=True, dtypes=(HALF,), marks=(BF16,)),
        "bf16, no gradients": linear_case(dtypes=(HALF,), learns=False, marks=(BF16,)),
        "bf16, gelu, no gradients": linear_case(gelu=True, dtypes=(HALF,), learns=False, marks=(BF16,)),
        "autocast": linear_case(dtypes=(FLOAT, HALF), autocast=True, marks=(BF16,)),
        "autocast, gelu": linear_case(gelu=True, dtypes=(FLOAT, HALF), autocast=True, marks=(BF16,)),
        "autocast, gelu of a hooked layer": linear_case(gelu=True, dtypes=(FLOAT,), autocast=True, wrap=watched),
        "autocast, no bias, no gradients": linear_case(
            bias=False, dtypes=(FLOAT, HALF), autocast=True, learns=False, marks=(BF16,)
        ),
    },
    layers.rms_norm: {
        "maps": Case(lambda dtype: (randn(2, 700, 24)(dtype), randn(24)(dtype), 1e-5), (FLOAT, DOUBLE, HALF)),
        "turned": Case(lambda dtype: (randn(6, 4, 8)(dtype).permute(1, 2, 0), randn(6)(dtype), 1e-5)),
        "fp32 weights": Case(lambda dtype: (randn(3, 5, 7, 8)(dtype), randn(8)(FLOAT), 1e-5), (HALF,)),
        "no rows": Case(lambda dtype: (randn(0, 6)(dtype), randn(6)(dtype), 1e-5)),
        "no gradients": Case(lambda dtype: (randn(2, 9, 24)(dtype), randn(24)(dtype), 1e-5), learns=False),
    },
    layers.group_norm_silu: {
        "contiguous": norm_case(torch.contiguous_format),
        "channels-last": norm_case(torch.channels_last, dtypes=(FLOAT, DOUBLE, HALF)),
        "turned": norm_case(torch.channels_last, turned=True, dtypes=(FLOAT, DOUBLE)),
        "fp32 weights": norm_case(torch.channels_last, weights=FLOAT, dtypes=(HALF,)),
    },
    layers.convolution_layout: {
        "narrow": Case(lambda dtype: (randn(2, 8, 4, 4)(dtype), 8), (HALF,)),
    },
    layers.modulated_norm: {
        "packed": Case(modulated(True), (FLOAT, DOUBLE, HALF)),
        "packed, no gradients": Case(modulated(True), (FLOAT, DOUBLE, HALF), learns=False),
        "dense, no gradients": Case(modulated(False, eps=1e-5), learns=False),
    },
    layers.gated_add: {
        "packed": Case(gated(True), (FLOAT, DOUBLE, HALF)),
        "packed, no gradients": Case(gated(True), (FLOAT, DOUBLE, HALF), learns=False),
        "dense, no gradients": Case(gated(False), learns=False),
    },
    attention.dense_attention: {
        "plain": Case(lambda dtype: (randn(2, 9, 3 * 16)(dtype), 2)),
        "bf16, short": Case(lambda dtype: (randn(2, 9, 3 * 16)(dtype), 2), (HALF,)),
        "bf16, long": Case(lambda dtype: (randn(1, 520, 3 * 16)(dtype), 2), (HALF,), learns=False),
        "biased": Case(lambda dtype: (randn(2, 9, 3 * 16)(dtype), 2, randn(2, 9)(dtype)), (FLOAT, DOUBLE, HALF)),
        "frozen bias": Case(
            lambda dtype: (randn(2, 9, 3 * 16)(dtype), 2, randn(2, 9)(dtype)), (FLOAT, DOUBLE, HALF), frozen=(2,)
        ),
        "bf16, long, training": Case(lambda dtype: (randn(1, 520, 3 * 16)(dtype), 2), (HALF,)),
        "strided": Case(lambda dtype: (randn(2, 3 * 16, 9)(dtype).transpose(1, 2), 2)),
        "biased, no gradients": Case(
            lambda dtype: (randn(2, 9, 3 * 16)(dtype), 2, randn(2, 9)(dtype)), (FLOAT, HALF), learns=False
        ),
    },
    attention.packed_attention: {
        "split": Case(attended([200, 30, 111])),
        "padded": Case(attended([9, 12, 3]), learns=False),
        "bf16, padded": Case(attended([40, 33, 38], heads=3), (HALF,)),
        "bf16, split": Case(attended([40] * 60 + [200] * 4), (HALF,)),
        "bf16, no gradients": Case(attended([40, 33, 300]), (HALF,), learns=False),
        "biased": Case(attended([40, 33, 38], biased=True), (FLOAT, HALF)),
        "frozen bias": Case(attended([40, 33, 38], biased=True), (FLOAT, HALF), frozen=(3,)),
        "frozen bias, split": Case(attended([4, 3, 300], biased=True), (FLOAT, HALF), frozen=(3,)),
        "biased, no gradients": Case(attended([40, 33, 38], biased=True), (FLOAT, HALF), learns=False),
    },
    attention.pairs_of: {
        "equal": Case(lambda dtype: (torch.empty(0, dtype=dtype), (16, 16), 8, True, False), (FLOAT,), learns=False),
    },
    plug_back: {
        "gated": Case(spread(True, True)),
        "gated, no residual": Case(spread(True, False)),
        "residual, no gradients": Case(spread(False, True), (FLOAT, DOUBLE, HALF), learns=False),
    },
    smooth: {
        "line": Case(smoothed((40,), 1.0)),
        "plane": Case(smoothed((9, 11), 1.5)),
        "wide": Case(smoothed((3, 150), 2.0), (DOUBLE,)),
    },
    nearest.along_axis: {
        "plane": Case(lambda _: (torch.randint(7 * 7 * 63, (2, 7, 9)), 1, 63), (FLOAT,), learns=False),
    },
    merging.largest: {
        "many": Case(lambda dtype: (randn(3, 5, 1024)(dtype),), (FLOAT, HALF), learns=False),
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
            assert mine == theirs or isinstance(mine, torch.memory_format)
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


STATE = ("forward_mode", "tracing_state", "transforms_active")
NOT_KERNELS = {"annotations", "cpu_capabilities", "find", "has_hooks", "nn", "runs_plainly", "torch", *STATE}
KERNELS = sorted(name for name in vars(torch_private) if name.islower() and name[0] != "_" and name not in NOT_KERNELS)


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


@pytest.mark.parametrize("name", STATE)
def test_where_a_transform_could_not_be_noticed_no_form_runs(name, monkeypatch):
    assert dispatch.may_replace(torch.zeros(2))
    monkeypatch.setattr(torch_private, name, None)
    assert not dispatch.may_replace(torch.zeros(2))


def test_a_missing_name_is_none():
    assert torch_private.find("ops.mkldnn._no_such_operator") is None
    assert torch_private.find("_C._no_such_function.of_this") is None
    assert torch_private.find("nn.functional.gelu") is F.gelu


def runs_a_form() -> bool:
    x = torch.randn(4, 8, requires_grad=True)
    return "_RMSNorm" in type(layers.rms_norm(x, torch.ones(8), 1e-5).grad_fn).__name__


def test_plain_turns_forms_off():
    assert runs_a_form()
    with ops.plain():
        assert not runs_a_form()
        with ops.plain():
            pass
        assert not runs_a_form()
    assert runs_a_form()


@pytest.mark.parametrize(("value", "expected"), [("1", "False"), ("0", "True"), ("", "True")])
def test_an_environment_variable_turns_forms_off(value, expected):
    code = "import torch; from tokdyn.ops.dispatch import may_replace; print(may_replace(torch.zeros(2)))"
    env = {**os.environ, "TOKDYN_PLAIN_OPS": value}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == expected


@pytest.fixture
def every_layer() -> Callable[[Tensor], Tensor]:
    """A function that calls every layer on (2, 230, 16) rows."""
    torch.manual_seed(0)
    qkv, norm, weight = nn.Linear(16, 48).double(), nn.GroupNorm(4, 16).double(), torch.ones(16).double()
    qkv.requires_grad_(False)
    norm.requires_grad_(False)
    shift, scale, gate = torch.randn(3, 2, 16).double().unbind(0)

    def call(x: Tensor) -> Tensor:
        x = layers.modulated_norm(x, shift, scale)
        x = layers.gated_add(x, gate, attention.dense_attention(layers.linear(x, qkv), 2))
        x = layers.group_norm_silu(x.transpose(1, 2), norm).transpose(1, 2)
        return layers.gelu_tanh(layers.rms_norm(x, weight, 1e-5))

    return call


def test_compiled_code_takes_the_plain_functions(every_layer):
    x = torch.randn(2, 230, 16).double()
    with ops.plain():
        wanted = every_layer(x)
    compiled = torch.compile(every_layer, fullgraph=True, backend="eager")
    assert_near([compiled(x), every_layer(x)], [wanted, wanted], 1e-10)


@pytest.mark.filterwarnings("ignore")
def test_traced_code_takes_the_plain_functions(every_layer):
    x = torch.randn(2, 230, 16).double()
    with torch.no_grad():
        traced = torch.jit.trace(every_layer, x)
        assert_near([traced(x)], [every_layer(x)], 1e-10)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("transform", ["grad", "vmap", "forward mode"])
def test_transformed_code_takes_the_plain_functions(every_layer, transform):
    x = torch.randn(2, 230, 16).double()
    with sdpa_kernel(SDPBackend.MATH):
        if transform == "grad":
            leaf = x.clone().requires_grad_()
            (wanted,) = torch.autograd.grad(every_layer(leaf).sum(), leaf)
            found = torch.func.grad(lambda x: every_layer(x).sum())(x)
        elif transform == "vmap":
            wanted, found = every_layer(x), torch.func.vmap(every_layer)(x[None])[0]
        else:
            along = torch.randn_like(x)
            wanted = (every_layer(x + 1e-5 * along) - every_layer(x - 1e-5 * along)) / 2e-5
            with forward_ad.dual_level():
                found = forward_ad.unpack_dual(every_layer(forward_ad.make_dual(x, along))).tangent
    assert_near([found], [wanted], 1e-6)


def test_subclasses_of_tensors_take_the_plain_functions():
    class Marked(Tensor):
        pass

    assert not dispatch.may_replace(torch.zeros(2).as_subclass(Marked))
    assert dispatch.may_replace(nn.Parameter(torch.zeros(2)))


def test_arguments_may_be_given_by_name():
    x = torch.randn(300, 300)
    assert torch.equal(
        layers.rms_norm(eps=1e-5, weight=torch.ones(300), x=x), layers.rms_norm(x, torch.ones(300), 1e-5)
    )
