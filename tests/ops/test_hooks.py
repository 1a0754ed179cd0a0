"""What makes calling a module more than the forward of its class."""

import pytest
from torch import nn
from torch.nn.modules import module as everywhere

from tokdyn.ops.torch_private import has_hooks


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_of_a_module_are_seen_while_they_are_there(register):
    layer = nn.Linear(2, 2)
    assert not has_hooks(layer)
    handle = getattr(layer, register)(lambda *_: None)
    assert has_hooks(layer)
    assert not has_hooks(nn.Linear(2, 2))
    handle.remove()
    assert not has_hooks(layer)


@pytest.mark.parametrize(
    "register",
    [
        everywhere.register_module_forward_hook,
        everywhere.register_module_forward_pre_hook,
        everywhere.register_module_full_backward_hook,
        everywhere.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_of_all_modules_are_seen_while_they_are_there(register):
    layer = nn.Linear(2, 2)
    handle = register(lambda *_: None)
    try:
        assert has_hooks(layer)
    finally:
        handle.remove()
    assert not has_hooks(layer)


def test_a_replaced_forward_is_seen():
    """Offloading replaces the forward of a module."""
    layer = nn.Linear(2, 2)
    layer.forward = layer.forward
    assert has_hooks(layer)
    del layer.forward
    assert not has_hooks(layer)
