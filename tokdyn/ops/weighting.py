"""Size-weighted attention: a merged token counts as many times as it stands for tokens.

Source: ToMe (arXiv 2210.09461), eq. 1: softmax(q k^T / sqrt(d) + log s). Keys that are there s times get the same
share of the attention as one key with log s added to its logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def size_weighted_attention(
    query: Tensor, key: Tensor, value: Tensor, size: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Attention in which every key counts as often as its size says.

    Args:
        query: (B, H, L, d).
        key: (B, H, S, d).
        value: (B, H, S, d).
        size: (B, S), positive.
        mask: broadcast to (B, H, L, S); bool, true where a key is seen, or added to the logits.

    Returns:
        (B, H, L, d).
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=with_key_bias(mask, size.log(), query.dtype))


def size_bias(size: Tensor, text: int = 0, image: str = "last") -> Tensor:
    """What is added to the logits of keys, from what they stand for.

    Args:
        size: (B, M) of the image tokens.
        text: tokens beside them, which stand for themselves.
        image: whether the image tokens come "first" or "last".

    Returns:
        (B, M + text).
    """
    bias = size.log()
    if not text:
        return bias
    return F.pad(bias, (0, text) if image == "first" else (text, 0))


def with_key_bias(mask: Tensor | None, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of attention, bool or additive or none, together with a bias (B, S) of the keys, as one to be added."""
    bias = bias.to(dtype)[:, None, None]
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -torch.inf)
    return (mask + bias).to(dtype)


class KeyBias(TorchFunctionMode):
    """Within this context, self-attention over as many tokens as the bias is long gets the bias on its keys.

    It changes the calls of `torch.nn.functional.scaled_dot_product_attention` in code that takes no bias; what has no
    such call is left as it was, and `met` says so.

    Attributes:
        bias: (B, S), added to the logits.
        calls: that it was added in.
    """

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = bias
        self.calls = 0

    @property
    def met(self) -> bool:
        """Whether there was such a call."""
        return self.calls > 0

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """A call of any function of torch."""
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
        return query.dim() == 4 and query.shape[0] == batch and query.shape[2] == key.shape[2] == rows


_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
