"""Whether a module may be passed over for a faster form of what it computes."""

from __future__ import annotations

import torch
from torch import nn

_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")


def is_watched(module: nn.Module) -> bool:
    """Whether somebody waits for calls of it: hooks, or a forward put in its place, as offloading does."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    everywhere = (getattr(torch.nn.modules.module, name, None) for name in _GLOBAL)
    return "forward" in vars(module) or any(hooks) or any(everywhere)
