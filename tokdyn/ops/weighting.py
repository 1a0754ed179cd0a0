"""Size-weighted attention: a merged token counts as many times as it stands for tokens.

Source: ToMe (arXiv 2210.09461), eq. 1, `softmax(q k^T / sqrt(d) + log s)`. One key with log s added to its logits gets
as much attention as s equal keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.overrides import TorchFunctionMode


def size_weighted_attention(
    query: Tensor, key: Tensor, value: Tensor, size: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Compute attention in which each key counts as often as its size says.

    Args:
        query: (B, H, L, d).
        key: (B, H, S, d).
        value: (B, H, S, d).
        size: (B, S), positive.
        mask: broadcast to (B, H, L, S); bool and true where a key is seen, or added to the logits.

    Returns:
        (B, H, L, d).
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=with_key_bias(mask, size.log(), query.dtype))


def size_bias(size: Tensor, text: int = 0, image: str = "last") -> Tensor:
    """Compute the bias of the logits of keys from their sizes.

    Args:
        size: (B, M), how many tokens each image token stands for.
        text: number of text tokens in the sequence, which stand for themselves.
        image: whether image tokens come "first" or "last".

    Returns:
        (B, M + text).
    """
    bias = size.log()
    if not text:
        return bias
    return F.pad(bias, (0, text) if image == "first" else (text, 0))


def with_key_bias(mask: Tensor | None, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Add a bias (B, S) of the keys to an attention mask, which may be bool, additive or None."""
    bias = rearrange(bias.to(dtype), "b s -> b 1 1 s")
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -torch.inf)
    return (mask + bias).to(dtype)


class KeyBias(TorchFunctionMode):
    """Add a bias to the keys of self-attention in code that takes none, within this context.

    It changes calls of `torch.nn.functional.scaled_dot_product_attention` whose batch and number of tokens are those of
    the bias. `met` says whether there was such a call.

    Attributes:
        bias: (B, S), added to the logits of each key.
        text: how many of the keys are text tokens, which may be no queries.
        calls: how many calls it was added in.
    """

    def __init__(self, bias: Tensor, text: int = 0) -> None:
        super().__init__()
        self.bias = bias
        self.text = text
        self.calls = 0

    @property
    def met(self) -> bool:
        """Whether the bias was added in any call."""
        return self.calls > 0

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Add the bias if this is a call of attention that it fits."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
            if self._fits(named["query"], named["key"]) and not named.get("is_causal"):
                self.calls += 1
                named["attn_mask"] = with_key_bias(named.get("attn_mask"), self.bias, named["query"].dtype)
                return func(**named)
        return func(*args, **kwargs)

    def _fits(self, query: Tensor, key: Tensor) -> bool:
        batch, rows = self.bias.shape
        if query.dim() != 4 or query.shape[0] != batch:
            return False
        return key.shape[2] == rows and query.shape[2] in (rows, rows - self.text)


_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
