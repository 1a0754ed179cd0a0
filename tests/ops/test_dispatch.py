"""The seam between plain functions and CPU forms: the switch, and code in which only plain functions run."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.ops.test_attention import packing_of
from tokdyn import ops
from tokdyn.ops import attention, dispatch, layers, torch_private


@pytest.mark.parametrize("name", ["forward_mode", "tracing_state", "transforms_active"])
def test_where_a_transform_could_not_be_noticed_no_form_runs(name, monkeypatch):
    assert dispatch.may_replace(torch.zeros(2))
    monkeypatch.setattr(torch_private, name, None)
    assert not dispatch.may_replace(torch.zeros(2))


def test_a_missing_name_is_none():
    assert torch_private.find("ops.mkldnn._no_such_operator") is None
    assert torch_private.find("_C._no_such_function.of_this") is None
    assert torch_private.find("nn.functional.gelu") is F.gelu


PACKING = packing_of([200, 260])


def runs_a_form() -> bool:
    qkv = torch.randn(460, 48, requires_grad=True)
    return isinstance(attention.packed_attention(qkv, 2, PACKING).grad_fn, BackwardCFunction)


def test_plain_turns_forms_off():
    assert runs_a_form()
    with ops.plain():
        assert not runs_a_form()
        with ops.plain():
            pass
        assert not runs_a_form()
    assert runs_a_form()


@pytest.mark.parametrize(("value", "replaces"), [("1", False), ("0", True), ("", True)])
def test_an_environment_variable_turns_forms_off(value, replaces, monkeypatch):
    """It is read when the module is loaded, here once more under another name."""
    monkeypatch.setenv("TOKDYN_PLAIN_OPS", value)
    spec = importlib.util.spec_from_file_location("dispatch_again", dispatch.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.may_replace(torch.zeros(2)) is replaces


@pytest.fixture
def every_layer() -> Callable[[Tensor], Tensor]:
    """A function that calls layers and attention on (460, 16) packed rows."""
    torch.manual_seed(0)
    qkv, norm, weight = nn.Linear(16, 48).double(), nn.GroupNorm(4, 16).double(), torch.ones(16).double()
    qkv.requires_grad_(False)
    norm.requires_grad_(False)
    shift, scale, gate = torch.randn(3, 2, 16).double().unbind(0)

    def call(x: Tensor) -> Tensor:
        x = layers.modulated_norm(x, shift, scale, PACKING)
        mixed = attention.packed_attention(layers.linear(x, qkv, gelu=True), 2, PACKING)
        x = layers.gated_add(x, gate, mixed, PACKING)
        return layers.rms_norm(layers.group_norm_silu(x[..., None], norm)[..., 0], weight, 1e-5)

    return call


def test_compiled_code_takes_the_plain_functions(every_layer):
    x = torch.randn(460, 16).double()
    with ops.plain():
        wanted = every_layer(x)
    compiled = torch.compile(every_layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(every_layer(x), wanted, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore")
def test_traced_code_takes_the_plain_functions(every_layer):
    x = torch.randn(460, 16).double()
    with torch.no_grad():
        traced = torch.jit.trace(every_layer, x)
        torch.testing.assert_close(traced(x), every_layer(x), rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("transform", ["grad", "vmap", "forward mode"])
def test_transformed_code_takes_the_plain_functions(every_layer, transform):
    x = torch.randn(460, 16).double()
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
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6 * wanted.abs().max().item())


def test_subclasses_of_tensors_take_the_plain_functions():
    class Marked(Tensor):
        pass

    assert not dispatch.may_replace(torch.zeros(2).as_subclass(Marked))
    assert dispatch.may_replace(nn.Parameter(torch.zeros(2)))


def test_arguments_may_be_given_by_name():
    x, shift = torch.randn(460, 8), torch.randn(2, 8)
    named = layers.modulated_norm(packing=PACKING, scale=shift, shift=shift, x=x)
    assert torch.equal(named, layers.modulated_norm(x, shift, shift, PACKING))
