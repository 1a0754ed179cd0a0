"""Check a model whose adapter was inferred, and learn in its first call what its blocks return.

`tokdyn.adapters.infer` guesses an adapter from the structure of a model. Here the tensors that the blocks get and
return are compared with that guess; class names do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.adapters.base import Blocks
from tokdyn.attach.sites import Site, Sites
from tokdyn.errors import UnsupportedModelError

_CURE = "register an adapter for it (docs/adapters.md)"


def learn(blocks: Blocks, named: Mapping[str, Any], out: Any) -> Blocks | str:
    """Learn what a block returns, from the shapes of its arguments and results.

    Args:
        blocks: a declaration whose `returns` is unknown.
        named: the arguments of a call of the block, by name.
        out: the result of the call.

    Returns:
        The declaration with `returns` and, if the block returns a second tensor, `streams`, because the model may use
        it after its last block; or the reason, a clause for an error message, why this block cannot be wrapped.
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
        return "its blocks return a tuple of one tensor, not the tensor itself"
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
            f"its blocks return two tensors of the shape {tuple(x.shape)}, which does not show which of them holds the "
            "image tokens; call the model first with a number of text tokens that differs from that of image tokens"
        )
    place, text = ways[0]
    return replace(blocks, streams=(text,), returns=("tokens", text) if place == 0 else (text, "tokens"))


def _versions(value: Any) -> list[Any]:
    """Return what changes if a tensor, or a list or dictionary that may hold tensors, is changed in place."""
    if isinstance(value, Tensor):
        return [] if value.is_inference() else [id(value), value._version]
    parts = list(value.values()) if isinstance(value, Mapping) else value
    return [len(parts), *map(_versions, parts)] if isinstance(parts, (list, tuple)) else []


def flow(before: Tensor, after: Tensor) -> str:
    """Compare the result of one list of blocks with the input of the next list.

    Args:
        before: (B, N, D), the tokens that the last block of the first list returned.
        after: (B, S, D), the tokens that the first block of the next list gets.

    Returns:
        "all" if both are equal; "first" or "last" if `after` is `before` with other tokens behind or ahead of it;
        "changed" if the shapes are equal and the values are not; "none" otherwise.
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
    """Checks one call of a model whose adapter was inferred.

    Attributes:
        model: class name of the model.
        depth: number of blocks.
        batch: samples of the call; None if the arguments do not show it.
        caches: whether a bracket, such as a FeatureCache, spans the blocks, so that tokens must not change between two
            lists of blocks.
        next: index of the block that has to be called next.
        before: path of the list that the previous block is in, and its results by name; None before the first.
        given: the tokens of further streams that the previous block got, by name.
    """

    model: str
    depth: int
    batch: int | None
    caches: bool
    next: int = 0
    before: tuple[str, dict[str, Any]] | None = None
    given: dict[str, Any] = field(default_factory=dict)

    def begin(self, sites: Sites, module: nn.Module, named: Mapping[str, Any], plain: Callable[[], Any]) -> Site:
        """Check a block before it is called.

        The first time, call it once more than the model does, without gradients, to learn what it returns.

        Args:
            sites: the sites of the model; those of the block's list are replaced when something is learned.
            module: the block.
            named: the arguments of the call, by name.
            plain: makes the original call of the block, with these arguments.

        Returns:
            The site of the block, with `blocks.returns` known.

        Raises:
            UnsupportedModelError: the call is not what was inferred.
        """
        site = sites[id(module)]
        if site.block != self.next:
            raise self._refusal(
                f"block {site.block}, of {site.blocks.path!r}, came where block {self.next} was expected, so its "
                "blocks do not run one after the other"
            )
        self.next += 1
        if not site.blocks.returns:
            versions = {name: _versions(value) for name, value in named.items()}
            with torch.no_grad(), torch.random.fork_rng(devices=_devices(named)):
                learned = learn(site.blocks, named, plain())
            changed = next((name for name, value in named.items() if _versions(value) != versions[name]), None)
            if changed is not None:
                learned = f"its blocks change their argument {changed!r} in place, which skipped blocks would not do"
            if isinstance(learned, Blocks) and self.before is not None:
                learned = self._joined(learned, named[learned.tokens])
            if isinstance(learned, str):
                raise self._refusal(learned)
            for key, other in sites.items():
                if other.blocks.path == learned.path:
                    sites[key] = replace(other, blocks=learned)
        x = named[site.blocks.tokens]
        if self.before is not None and self.before[0] == site.blocks.path:
            before = self.before[1]
            if x.shape != before["tokens"].shape:
                raise self._refusal(_changed(before["tokens"], x))
            for name in site.blocks.streams:
                if named[name] is self.given.get(name) is not before[name]:
                    raise self._refusal(
                        f"its blocks return a second tensor of the shape of {name!r}, but each gets this argument as "
                        "the block before got it"
                    )
        self.given = {name: named[name] for name in sites[id(module)].blocks.streams}
        if self.batch not in (None, len(x)):
            raise self._refusal(f"it is called with {self.batch} samples, but its blocks get {_shape(x)}")
        return sites[id(module)]

    def after(self, blocks: Blocks, given: Tensor, out: Any) -> None:
        """Check the result of a block.

        Args:
            blocks: the declaration of the block's list, with `returns` known.
            given: the tokens that the block got.
            out: the result.

        Raises:
            UnsupportedModelError: the number of results, or the shape of the tokens, is not what was learned.
        """
        parts = out if isinstance(out, tuple) else (out,)
        if len(parts) != len(blocks.returns):
            raise self._refusal(
                f"one of its blocks returned {_shape(out)}, but {len(blocks.returns)} tensor(s) in its first call"
            )
        x = parts[blocks.returns.index("tokens")]
        if not isinstance(x, Tensor) or x.shape != given.shape:
            raise self._refusal(_changed(given, x))

    @staticmethod
    def keep(results: dict[str, Any], everything: Mapping[str, Any], groups: Sequence[Sequence[int]]) -> None:
        """Put what a block made of the samples in some groups into its results, in place, if it was called for all.

        Args:
            results: tensors with all samples, or None, by name.
            everything: what the block returned for all samples.
            groups: positions in the batch of the samples that it was wanted for.
        """
        places = [place for group in groups for place in group]
        for name, value in everything.items():
            before, rows = results[name], None if value is None else torch.tensor(places, device=value.device)
            if before is None or value is None:
                results[name] = None if value is None else value.index_select(0, rows)
            else:
                results[name] = before.index_copy(0, rows, value.index_select(0, rows).to(before.dtype))

    def end(self) -> None:
        """Check at the end of the model's call that all blocks were called.

        Raises:
            UnsupportedModelError: some were not.
        """
        if self.next != self.depth:
            raise self._refusal(f"only {self.next} of its {self.depth} blocks were called")

    def _joined(self, blocks: Blocks, x: Tensor) -> Blocks | str:
        """Add to a declaration where the tokens of the previous list lie in x (B, S, D), the tokens of this list.

        Returns:
            The declaration; or the reason, a clause for an error message, why the two lists cannot be wrapped together.
        """
        assert self.before is not None
        before = self.before[1]["tokens"]
        place = flow(before, x)
        if place == "none" or (place == "changed" and self.caches):
            return (
                f"the blocks in {blocks.path!r} get {_shape(x)}, which does not hold the tokens "
                f"({_shape(before)}) that the blocks in {self.before[0]!r} returned"
            )
        return blocks if place in ("all", "changed") else replace(blocks, image=place)  # type: ignore[arg-type]

    def _refusal(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"no adapter is declared for {self.model}, and the one inferred from its structure is wrong: {reason}; "
            f"{_CURE}."
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
    """Return the indices of the CUDA devices that a block's arguments are on, whose random state it may use."""
    found = {value.device for value in named.values() if isinstance(value, Tensor) and value.device.type == "cuda"}
    return sorted(device.index or 0 for device in found)


def samples(arguments: Mapping[str, Any]) -> int | None:
    """Return the number of samples of a call; None if no argument shows it.

    It is the length of the first argument that is a tensor of two or more axes, or a list of tensors.
    """
    for value in arguments.values():
        if isinstance(value, Tensor) and value.dim() > 1:
            return len(value)
        if isinstance(value, list) and value and all(isinstance(each, Tensor) for each in value):
            return len(value)
    return None
