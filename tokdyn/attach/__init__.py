"""Attach methods to models that were built without them.

Other packages import from here and not from the modules inside. docs/design.md follows a call of a wrapped model.
"""

from tokdyn.attach.attachment import Attachment, Meter
from tokdyn.attach.checks import Support, support, unsupported
from tokdyn.attach.class_swap import attach as swap_class
from tokdyn.attach.class_swap import base_class
from tokdyn.attach.class_swap import detach as restore_class
from tokdyn.attach.class_swap import is_attached as is_swapped
from tokdyn.attach.containers import inner_model
from tokdyn.attach.context import CallContext
from tokdyn.attach.controls import (
    accept_methods,
    agree,
    calibrate_router,
    dropping,
    keeping,
    losses,
    parts,
    reset,
    set_tail_drop,
    traces,
    trajectory,
)
from tokdyn.attach.entry import attached, attachment_of, disabled, unwrap, wrap
from tokdyn.attach.handlers.base import (
    BlockCall,
    Bracket,
    Frame,
    Gate,
    Handlers,
    Kernel,
    Plan,
    Selector,
    Sublayer,
    handles,
)
from tokdyn.attach.handlers.feature_cache import CachedBlocks
from tokdyn.attach.measuring import beside_dense, metered, trajectory_apart, untraced
from tokdyn.attach.offload import home
from tokdyn.attach.sidecar import (
    CONFIG,
    WEIGHTS,
    is_one_file,
    load,
    load_trained_tensors,
    read_settings,
    save,
    trained_tensors,
)
from tokdyn.attach.sites import Site, argument_names, blocks_of, find_sites
from tokdyn.attach.view import TokenView
from tokdyn.lora import add_lora, linear_layers, lora_rank, lora_tensors, require_peft
from tokdyn.provenance import different, fingerprint, other_sampler

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "Attachment",
    "BlockCall",
    "Bracket",
    "CachedBlocks",
    "CallContext",
    "Frame",
    "Gate",
    "Handlers",
    "Kernel",
    "Meter",
    "Plan",
    "Selector",
    "Site",
    "Sublayer",
    "Support",
    "TokenView",
    "accept_methods",
    "add_lora",
    "agree",
    "argument_names",
    "attached",
    "attachment_of",
    "base_class",
    "beside_dense",
    "blocks_of",
    "calibrate_router",
    "different",
    "disabled",
    "dropping",
    "find_sites",
    "fingerprint",
    "handles",
    "home",
    "inner_model",
    "is_one_file",
    "is_swapped",
    "keeping",
    "linear_layers",
    "load",
    "load_trained_tensors",
    "lora_rank",
    "lora_tensors",
    "losses",
    "metered",
    "other_sampler",
    "parts",
    "read_settings",
    "require_peft",
    "reset",
    "restore_class",
    "save",
    "set_tail_drop",
    "support",
    "swap_class",
    "traces",
    "trained_tensors",
    "trajectory",
    "trajectory_apart",
    "unsupported",
    "untraced",
    "unwrap",
    "wrap",
]
