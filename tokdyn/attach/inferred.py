"""Hold a model without a declared adapter to what was inferred of it, and learn in its first call what blocks return.

Everything is judged by what the blocks really get and return, never by the names of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.adapters.base import Blocks
from tokdyn.attach.sites import Site, Sites
from tokdyn.errors import UnsupportedModelError

_CURE = "register an adapter for it (docs/adapters.md)"


def learn(blocks: Blocks, named: Mapping[str, Any], out: Any) -> Blocks | str:
    """Learn what a block returns from the shapes of what it got and returned.

    Args:
        blocks: with `returns` unknown.
        named: arguments of the block by name.
        out: what it returned.

    Returns:
        The blocks with `returns` and, if text comes back too, `text`; or what does not fit.
    """
    x = named.get(blocks.tokens)
    if not isinstance(x, Tensor) or x.dim() != 3:
        return f"its blocks get {_shape(x)} as {blocks.tokens!r}, not tokens (batch, tokens, width)"
    parts = list(out) if isinstance(out, tuple) else [out]
    if len(parts) > 2 or not all(isinstance(part, Tensor) for part in parts):
        return f"its blocks return {_shape(out)}, not tokens or tokens and text"
    if not isinstance(out, tuple):
        return replace(blocks, returns=("tokens",)) if out.shape == x.shape else _changed(x, out)
    if len(parts) == 1:
        return "its blocks return a tuple of one tensor"
    texts = [name for name, value in named.items() if name != blocks.tokens and _tokens(value)]
    ways = [
        (place, name)
        for place in (0, 1)
        for name in texts
        if parts[place].shape == x.shape and parts[1 - place].shape == named[name].shape
    ]
    if not ways:
        return _changed(x, out)
    if len({place for place, _ in ways}) > 1:
        return (
            f"its blocks return two tensors of the shape {tuple(x.shape)}, and it cannot be told which of them holds "
            "the image; call it once with another number of text tokens"
        )
    place, text = ways[0]
    return replace(blocks, text=text, returns=("tokens", "text") if place == 0 else ("text", "tokens"))


def flow(before: Tensor, after: Tensor) -> str:
    """Say how the tokens that one list of blocks left go into the next.

    Args:
        before: (B, N, D), what the last block of a blocks returned.
        after: (B, S, D), what the first block of the next blocks gets.

    Returns:
        "all", or "first" or "last" where they lie beside other tokens, "changed" if only the shape is the same, "none".
    """
    count = before.shape[1]
    if after.shape == before.shape:
        return "all" if torch.equal(before, after) else "changed"
    if after.shape[0] != before.shape[0] or after.shape[2:] != before.shape[2:] or after.shape[1] < count:
        return "none"
    if torch.equal(after[:, -count:], before):
        return "last"
    return "first" if torch.equal(after[:, :count], before) else "none"


@dataclass
class Guard:
    """What is expected of one call of a model whose adapter was inferred.

    Attributes:
        model: name of its class.
        depth: number of blocks.
        batch: samples of the call, as far as its arguments tell.
        caches: whether a cache spans several lists of blocks.
        next: the block that has to come next.
        before: path of the list that the block before is in, and what that block returned.
    """

    model: str
    depth: int
    batch: int | None
    caches: bool
    next: int = 0
    before: tuple[str, Tensor] | None = None

    def begin(self, sites: Sites, module: nn.Module, named: Mapping[str, Any], plain: Callable[[], Any]) -> Site:
        """Check a block before it is called, and learn what it returns the first time.

        Args:
            sites: of the model; updated when something is learned.
            module: the block.
            named: its arguments.
            plain: calls the block as it was.

        Returns:
            Its site, which may know more now.
        """
        site = sites[id(module)]
        if site.block != self.next:
            raise self._refusal(
                f"block {site.block}, of {site.blocks.path!r}, came where block {self.next} was expected, so its "
                "blocks do not run one after the other"
            )
        self.next += 1
        if not site.blocks.returns:
            with torch.no_grad(), torch.random.fork_rng(devices=_devices(named)):
                found = learn(site.blocks, named, plain())
            if isinstance(found, Blocks) and self.before is not None:
                found = self._joined(found, named[found.tokens])
            if isinstance(found, str):
                raise self._refusal(found)
            for key, other in sites.items():
                if other.blocks.path == found.path:
                    sites[key] = replace(other, blocks=found)
        x = named[site.blocks.tokens]
        if self.before is not None and self.before[0] == site.blocks.path and x.shape != self.before[1].shape:
            raise self._refusal(_changed(self.before[1], x))
        if self.batch not in (None, len(x)):
            raise self._refusal(f"it is called with {self.batch} samples, but its blocks get {_shape(x)}")
        return sites[id(module)]

    def after(self, blocks: Blocks, given: Tensor, out: Any) -> None:
        """Check what a block returned."""
        parts = out if isinstance(out, tuple) else (out,)
        if len(parts) != len(blocks.returns):
            raise self._refusal(f"its blocks return now one thing, now another: {_shape(out)}")
        x = parts[blocks.returns.index("tokens")]
        if not isinstance(x, Tensor) or x.shape != given.shape:
            raise self._refusal(_changed(given, x))

    def end(self) -> None:
        """Check that all blocks were called."""
        if self.next != self.depth:
            raise self._refusal(f"{self.next} of its {self.depth} blocks were called")

    def _joined(self, blocks: Blocks, x: Tensor) -> Blocks | str:
        """Learn where the image tokens of the blocks before lie among the tokens of these."""
        assert self.before is not None
        how = flow(self.before[1], x)
        if how == "none" or (how == "changed" and self.caches):
            return (
                f"the blocks in {blocks.path!r} get {_shape(x)}, which are not the tokens {_shape(self.before[1])} "
                f"that those in {self.before[0]!r} left"
            )
        return blocks if how in ("all", "changed") else replace(blocks, image=how)  # type: ignore[arg-type]

    def _refusal(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"no adapter knows {self.model}, and what was read off its structure does not hold: {reason}; {_CURE}."
        )


def _tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3


def _changed(given: Any, out: Any) -> str:
    return f"its blocks turn {_shape(given)} into {_shape(out)}"


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _devices(named: Mapping[str, Any]) -> list[int]:
    """List the accelerators whose random state a block may use."""
    found = {value.device for value in named.values() if isinstance(value, Tensor) and value.device.type == "cuda"}
    return sorted(device.index or 0 for device in found)


def samples(arguments: Mapping[str, Any]) -> int | None:
    """Count the samples of a call by its first argument with an entry a sample: a tensor, or a list of tensors."""
    for value in arguments.values():
        if isinstance(value, Tensor) and value.dim() > 1:
            return len(value)
        if isinstance(value, list) and value and all(isinstance(each, Tensor) for each in value):
            return len(value)
    return None
