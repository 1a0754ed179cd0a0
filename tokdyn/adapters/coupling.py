"""Attention that splits a batch into parts and treats them differently, so that its samples cannot be computed apart.

Perturbed-attention guidance (arXiv 2403.17377) replaces the attention of the last third of a batch, or of its last half
where there is no classifier-free guidance, by the identity.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tokdyn.errors import InputError

PARTS = {
    "PAGIdentitySelfAttnProcessor2_0": 2,
    "PAGCFGIdentitySelfAttnProcessor2_0": 3,
    "PAGJointAttnProcessor2_0": 2,
    "PAGCFGJointAttnProcessor2_0": 3,
    "PAGHunyuanAttnProcessor2_0": 2,
    "PAGCFGHunyuanAttnProcessor2_0": 3,
    "PAGIdentitySanaLinearAttnProcessor2_0": 2,
    "PAGCFGSanaLinearAttnProcessor2_0": 3,
}
"""Attention processors by the name of their class, and the number of parts that they split a batch into."""


def coupled_parts(module: nn.Module) -> int:
    """Return the number of parts that attention in a module splits a batch into; 1 if its samples are independent."""
    found = 1
    for each in module.modules():
        processor = getattr(each, "processor", None)
        if processor is not None:
            found = max([found, *(PARTS.get(base.__name__, 1) for base in type(processor).__mro__)])
    return found


def together(decided: Sequence[bool], parts: int) -> list[bool]:
    """Return decisions (B) that hold for an image only where they hold for it in all parts of the batch."""
    if len(decided) % parts:
        return [all(decided)] * len(decided)
    images = len(decided) // parts
    return [all(decided[sample % images :: images]) for sample in range(len(decided))]


def check_groups(block: nn.Module, index: int, groups: Sequence[Sequence[int]], batch: int) -> None:
    """Check that a block can be computed for each group of samples apart.

    Args:
        block: the block.
        index: of the block, for the message.
        groups: positions in the batch.
        batch: B.

    Raises:
        InputError: its attention splits the batch into parts, and a group has a sample without its like in other parts.
    """
    parts = coupled_parts(block)
    if parts == 1:
        return
    images = batch // parts
    if batch % parts or any({(place + images) % batch for place in group} != set(group) for group in groups):
        raise InputError(
            f"the attention of block {index} treats the {parts} parts of a batch differently (perturbed-attention "
            "guidance), so an image must have the same number of tokens and the same settings in all of them; leave "
            "out ragged=True and a tail drop of its own for each guidance branch or sample."
        )
