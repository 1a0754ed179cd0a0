"""Remove the prefixes of wrappers from tensor names, and translate names between tokdyn and other projects.

tokdyn's DiT has the names of facebook's (arXiv 2212.09748). A map is a list of pairs (prefix of the other project,
tokdyn's prefix). Reading and writing use the same map in opposite directions, so that one inverts the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tokdyn.errors import CheckpointError

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module"})
"""Parts that DataParallel, torch.compile and FSDP insert into the names of tensors, at the start or inside."""

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
"""From official DC-DiT (AMD-AGI/DynamicChunkingDiT) to `DCDiT`; the embedders and the final layer keep their names."""

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


def without_wrappers(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Remove the parts that wrappers insert from all names.

    Args:
        tensors: tensors by name.
        origin: name of the checkpoint, for error messages.

    Raises:
        CheckpointError: two tensors have the same name then.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if short in plain:
            raise CheckpointError(f"{origin} holds {short!r} twice, with and without the prefix of a wrapper.")
        plain[short] = tensor
    return plain


def rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Replace the prefix of a name by the first pair (old, new) that matches; other names are returned unchanged."""
    for old, new in pairs:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def reverse(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return a map in the opposite direction, with longer prefixes first so that the most specific one matches."""
    return sorted(((own, foreign) for foreign, own in pairs), key=lambda pair: -len(pair[0]))


def from_diffusers(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Translate the tensors of diffusers' DiTTransformer2DModel to facebook's names.

    diffusers has timestep and class embedders in every block, of which one is taken, and separate q, k and v, which are
    joined. A stored position table is left out, because it is always the same.

    Args:
        tensors: tensors by diffusers' names.
        origin: name of the checkpoint, for error messages.

    Raises:
        CheckpointError: the embedders differ between blocks, which tokdyn's DiT cannot represent, or q, k and v are
            incomplete.
    """
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block, _, rest = name.removeprefix("transformer_blocks.").partition(".")
        if name == "pos_embed.pos_embed":
            continue
        if not name.startswith("transformer_blocks."):
            own[rename(name, _OUTER)] = tensor
        elif rest.startswith("norm1.emb."):
            shared = rename(rest.removeprefix("norm1.emb."), _EMBEDDERS)
            if shared in own and not torch.equal(own[shared], tensor):
                raise CheckpointError(
                    f"{origin} has different embedders in its blocks ({name} differs from that of an earlier block); "
                    "tokdyn's DiT shares one embedder among all blocks, so these weights cannot be read."
                )
            own[shared] = tensor
        elif not rest.startswith(("attn1.to_q.", "attn1.to_k.", "attn1.to_v.")):
            own[f"blocks.{block}.{rename(rest, _BLOCK)}"] = tensor
        elif rest.startswith("attn1.to_q."):
            qkv = [tensors.get(name.replace("to_q", f"to_{part}")) for part in "qkv"]
            present = [part for part in qkv if part is not None]
            if len(present) < 3:
                raise CheckpointError(f"{origin} has {name} without its to_k or to_v.")
            try:
                joined = torch.cat(present)
            except (RuntimeError, TypeError) as error:
                shapes = ", ".join(str(tuple(part.shape)) for part in present)
                raise CheckpointError(
                    f"{origin} has q, k and v of {name} with shapes {shapes} that do not go together."
                ) from error
            own[f"blocks.{block}.attn.qkv.{rest.rpartition('.')[2]}"] = joined
    return own


def as_diffusers(tensors: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Translate the tensors of a DiT with `depth` blocks to diffusers' names, without the position table."""
    foreign: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block, _, rest = name.removeprefix("blocks.").partition(".")
        if name == "pos_embed":
            continue
        if name.startswith(("t_embedder.", "y_embedder.")):
            shared = rename(name, reverse(_EMBEDDERS))
            foreign |= {f"transformer_blocks.{i}.norm1.emb.{shared}": tensor.clone() for i in range(depth)}
        elif not name.startswith("blocks."):
            foreign[rename(name, reverse(_OUTER))] = tensor.clone()
        elif rest.startswith("attn.qkv."):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                foreign[f"transformer_blocks.{block}.attn1.to_{part}.{rest.rpartition('.')[2]}"] = rows.clone()
        else:
            foreign[f"transformer_blocks.{block}.{rename(rest, reverse(_BLOCK))}"] = tensor.clone()
    return foreign
