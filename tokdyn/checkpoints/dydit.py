"""Read DyDiT (arXiv 2410.03456), a DiT with gates in its blocks, as a `DiT` wrapped with `DynamicWidth`.

A gate decides whether an attention head, a group of MLP channels or a token is computed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.attach import attached, wrap
from tokdyn.checkpoints.fill import first_few
from tokdyn.errors import CheckpointError
from tokdyn.methods import DynamicWidth, WidthGates
from tokdyn.models import DiT
from tokdyn.ops.width import group_sizes

_GATE = re.compile(r"blocks\.(\d+)\.(attn_rate|mlp_rate|token_selection)\.")
_LEVEL = {"heads": "attn_rate.router", "channels": "mlp_rate.router"}
_TOKENS = "token_selection.mlp_head"


def split_gates(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the tensors of a DyDiT into those of the DiT and those of the gates, each by DyDiT's names."""
    gates = {name: tensor for name, tensor in tensors.items() if _GATE.match(name)}
    return {name: tensor for name, tensor in tensors.items() if name not in gates}, gates


def wrap_with_gates(model: DiT, gates: Mapping[str, Tensor], target: Any, origin: str) -> DiT:
    """Wrap a DiT with the gates of a DyDiT, in place, so that in evaluation mode it has the outputs of the DyDiT.

    The heads, channels and tokens that the gates close are not computed. DyDiT's gates of heads and channels read the
    model's timestep embedding; here they get a copy of it, so that training the model does not change them. Its gates
    of tokens read the tokens before norm and modulation.

    Args:
        model: the DiT.
        gates: tensors of the gates by DyDiT's names.
        target: share of the FLOPs that the gates were trained to use, between 0 and 1.
        origin: name of the checkpoint, for error messages.

    Returns:
        The same model, in evaluation mode.

    Raises:
        CheckpointError: tensors of the gates are missing, unknown or of another shape, the MLP channels do not divide
            into equal groups, or the target is out of range.
    """
    config = model.config
    width, heads, depth = config.hidden_size, config.num_heads, config.depth
    _check(gates, _shapes(width, heads, depth), origin)
    hidden = len(model.state_dict()["blocks.0.mlp.fc1.bias"])
    if hidden % heads or len(set(group_sizes(hidden, heads))) > 1:
        raise CheckpointError(
            f"{origin} cannot be read: its {hidden} MLP channels do not divide into {heads} equal groups as DyDiT's do "
            f"(tokdyn's groups would have {', '.join(map(str, group_sizes(hidden, heads)))} channels)."
        )
    if not isinstance(target, (int, float)) or not 0.0 < target < 1.0:
        raise CheckpointError(
            f"target={target!r} for {origin} must be the share of the FLOPs that it was trained to use, in (0, 1)."
        )
    wrap(model, [DynamicWidth(target=target, token_input="stream", embedding=width)])
    part: Any = attached(model).parts["0"]
    _fill(part, model, {name: tensor.detach().float() for name, tensor in gates.items()}, depth)
    model.eval()
    return model


@torch.no_grad()
def _fill(part: WidthGates, model: DiT, gates: Mapping[str, Tensor], depth: int) -> None:
    """Copy the model's timestep embedding and the gates into `part`, the module of `DynamicWidth`."""
    embedding: Any = part.embedding
    for layer in ("0", "2"):
        embedding[int(layer)].load_state_dict(model.t_embedder.mlp.get_submodule(layer).state_dict())
    for kind, place in _LEVEL.items():
        layer_of: nn.Module = getattr(part, kind)
        for name, own in layer_of.named_parameters():
            own.copy_(torch.cat([gates[f"blocks.{block}.{place}.{name}"] for block in range(depth)]))
    tokens: Any = part.tokens
    for block in range(depth):
        for name, own in tokens[block].named_parameters():
            own.copy_(gates[f"blocks.{block}.{_TOKENS}.{name}"])


def _shapes(width: int, heads: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Return the expected shape of each tensor of the gates by DyDiT's names."""
    inner = width // WidthGates.SQUEEZE
    block: dict[str, tuple[int, ...]] = {
        f"{_TOKENS}.0.weight": (inner, width),
        f"{_TOKENS}.0.bias": (inner,),
        f"{_TOKENS}.2.weight": (1, inner),
        f"{_TOKENS}.2.bias": (1,),
    }
    for place in _LEVEL.values():
        block |= {f"{place}.weight": (heads - 1, width), f"{place}.bias": (heads - 1,)}
    return {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}


def _check(gates: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], origin: str) -> None:
    """Raise a CheckpointError unless the gates are exactly the tensors of these names and shapes."""
    wrong = [
        f"{name} {tuple(gates[name].shape)} for {shape}"
        for name, shape in shapes.items()
        if name in gates and tuple(gates[name].shape) != shape
    ]
    problems = (
        ("missing", sorted(set(shapes) - set(gates))),
        ("left over", sorted(set(gates) - set(shapes))),
        ("of another shape", wrong),
    )
    report = "; ".join(f"{len(names)} {problem}: {first_few(names)}" for problem, names in problems if names)
    if report:
        raise CheckpointError(f"{origin} does not hold the gates of a DyDiT: {report}. Nothing was loaded.")
