"""The names of the tensors: wrapper prefixes, and maps between tokdyn's names and those of other code.

tokdyn's DiT has facebook's names (arXiv 2212.09748). Every map is a list of (foreign prefix, own prefix) pairs that
is read in both directions, so that writing is the inverse of reading by construction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tokdyn.errors import CheckpointError

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module"})
"""Names that DataParallel, torch.compile and FSDP put into a path, at its start or within."""

OFFICIAL = (
    ("hnet.encoder.rmsnorm.", "encoder.norm."),
    ("hnet.encoder.", "encoder."),
    ("hnet.decoder.rmsnorm.", "decoder.norm."),
    ("hnet.decoder.", "decoder."),
    ("hnet.routing_module.context_predictor.", "chunking.router.context."),
    ("hnet.routing_module.residual_scorer.", "chunking.router.score."),
    ("hnet.routing_module.", "chunking.router."),
    ("hnet.residual_proj.", "chunking.residual."),
    ("hnet.main_network.main_network.rmsnorm.", "norm."),
    ("hnet.main_network.main_network.layers.", "blocks."),
)
"""Official DC-DiT (AMD-AGI/DynamicChunkingDiT) to DCDiT. The embedders and the final layer have the same names."""

_BLOCK = (
    ("norm1.linear.", "adaLN_modulation.1."),
    ("attn1.to_out.0.", "attn.proj."),
    ("ff.net.0.proj.", "mlp.fc1."),
    ("ff.net.2.", "mlp.fc2."),
)
_OUTER = (
    ("pos_embed.proj.", "x_embedder.proj."),
    ("proj_out_1.", "final_layer.adaLN_modulation.1."),
    ("proj_out_2.", "final_layer.linear."),
)
_EMBEDDERS = (
    ("timestep_embedder.linear_1.", "t_embedder.mlp.0."),
    ("timestep_embedder.linear_2.", "t_embedder.mlp.2."),
    ("class_embedder.embedding_table.", "y_embedder.embedding_table."),
)


def unwrapped(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Names without the parts that wrappers add, in any nesting.

    Raises:
        CheckpointError: two names become one.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if short in plain:
            raise CheckpointError(f"{origin} holds {short!r} twice, with and without a wrapper's prefix.")
        plain[short] = tensor
    return plain


def renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """The name with the first matching prefix replaced."""
    for old, new in pairs:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def reverse(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same map in the other direction, longer prefixes first."""
    return sorted(((own, foreign) for foreign, own in pairs), key=lambda pair: -len(pair[0]))


def from_diffusers(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Tensors of a DiTTransformer2DModel under facebook's names.

    diffusers repeats the timestep and class embedders in every block and keeps q, k and v apart. A stored position
    table is left out: it is the fixed one.

    Raises:
        CheckpointError: the embedders of two blocks differ, so one set cannot stand for all.
    """
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block, _, rest = name.removeprefix("transformer_blocks.").partition(".")
        if name == "pos_embed.pos_embed":
            continue
        if not name.startswith("transformer_blocks."):
            own[renamed(name, _OUTER)] = tensor
        elif rest.startswith("norm1.emb."):
            shared = renamed(rest.removeprefix("norm1.emb."), _EMBEDDERS)
            if shared in own and not torch.equal(own[shared], tensor):
                raise CheckpointError(
                    f"{origin} has different embedders in its blocks ({name} is not that of an earlier block); "
                    "tokdyn's DiT has one for all, so these weights cannot be read."
                )
            own[shared] = tensor
        elif not rest.startswith(("attn1.to_q.", "attn1.to_k.", "attn1.to_v.")):
            own[f"blocks.{block}.{renamed(rest, _BLOCK)}"] = tensor
        elif rest.startswith("attn1.to_q."):
            parts = [tensors.get(name.replace("to_q", f"to_{part}")) for part in "qkv"]
            whole = [part for part in parts if part is not None]
            if len(whole) < 3:
                raise CheckpointError(f"{origin} has {name} without its to_k or to_v.")
            own[f"blocks.{block}.attn.qkv.{rest.rpartition('.')[2]}"] = torch.cat(whole)
    return own


def as_diffusers(tensors: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The inverse of `from_diffusers`, without the position table."""
    foreign: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block, _, rest = name.removeprefix("blocks.").partition(".")
        if name == "pos_embed":
            continue
        if name.startswith(("t_embedder.", "y_embedder.")):
            shared = renamed(name, reverse(_EMBEDDERS))
            foreign |= {f"transformer_blocks.{i}.norm1.emb.{shared}": tensor.clone() for i in range(depth)}
        elif not name.startswith("blocks."):
            foreign[renamed(name, reverse(_OUTER))] = tensor.clone()
        elif rest.startswith("attn.qkv."):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                foreign[f"transformer_blocks.{block}.attn1.to_{part}.{rest.rpartition('.')[2]}"] = rows.clone()
        else:
            foreign[f"transformer_blocks.{block}.{renamed(rest, reverse(_BLOCK))}"] = tensor.clone()
    return foreign
