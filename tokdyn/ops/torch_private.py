"""The private parts of PyTorch that tokdyn relies on, looked up in one place.

A name is None where the installed PyTorch does not have it. Code that needs it then runs the plain function instead, so
another version of PyTorch can make tokdyn slower, but not break it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def find(path: str) -> Any:
    """Return an attribute of torch by its dotted path, or None if it does not exist."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            return None
    return found


# Kernels
linear_pointwise = find("ops.mkldnn._linear_pointwise")
flash_attention = find("ops.aten._scaled_dot_product_flash_attention_for_cpu")
flash_attention_backward = find("ops.aten._scaled_dot_product_flash_attention_for_cpu_backward")
bag_backward = find("ops.aten._embedding_bag_backward")
bag_weights_backward = find("ops.aten._embedding_bag_per_sample_weights_backward")
layer_norm = find("native_layer_norm")
layer_norm_backward = find("ops.aten.native_layer_norm_backward")

# State of the process
transforms_active = find("_C._are_functorch_transforms_active")
tracing_state = find("_C._get_tracing_state")
dispatch_modes = find("_C._len_torch_dispatch_stack")
mkldnn_enabled = find("_C._get_mkldnn_enabled")
forward_mode = find("autograd.forward_ad")
cpu_capabilities = find("cpu.get_capabilities")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


def runs_plainly() -> bool:
    """Whether operators run as they are called: no transform of torch.func, no tracing, no forward-mode derivatives."""
    if transforms_active is None or tracing_state is None or forward_mode is None:
        return False
    return not transforms_active() and tracing_state() is None and getattr(forward_mode, "_current_level", 0) < 0


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than the forward of its class: it has hooks, or its forward was replaced.

    Offloading replaces the forward of a module; counters of FLOPs add hooks to all modules.
    """
    own = vars(module)
    return (
        "forward" in own
        or any(own.get(name, True) for name in _HOOKS)
        or any(getattr(nn.modules.module, name, True) for name in _GLOBAL_HOOKS)
    )
