"""Call the blocks of a wrapped model through its handlers: brackets, gates, groups of samples, kernels.

Dense and packed tokens take the same path; their `TokenView` differs. `frame` is the frame of a call of `module`, whose
site is `site`; `call` or `inner` is its original call, and `named` its arguments. See docs/design.md.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from tokdyn.adapters.base import Blocks
from tokdyn.adapters.counting import other_tokens
from tokdyn.adapters.coupling import check_groups
from tokdyn.adapters.tokens import (
    apart,
    as_returned,
    batch_first,
    call_by_name,
    gather,
    join,
    rotate,
    scatter,
    together,
)
from tokdyn.attach import class_swap
from tokdyn.attach.arranged import call_arranged
from tokdyn.attach.context import is_offloaded
from tokdyn.attach.handlers.base import BlockCall, Bracket, Exchange, Frame, Inner, Selector, Sublayer, scale_change
from tokdyn.attach.sites import Site
from tokdyn.attach.view import Part, TokenView
from tokdyn.errors import InputError

Call = Callable[..., Any]
Named = dict[str, Any]


def call_module(frame: Frame, module: nn.Module, plain: Call, args: tuple[Any, ...], kwargs: Named) -> Any:
    """Call a module of a wrapped model during a call of the model; `plain(module, ...)` is its original call."""
    site: Site | None = module.__dict__.get("_tokdyn_site") or frame.sites.get(id(module))
    if site is None:
        return plain(module, *args, **kwargs)
    if site.kind == "block" and frame.remember is None and _passes(frame, module, site):
        return site.unchanged(args, kwargs)
    call = frame.context.residency.around(module, plain) if is_offloaded(module) else partial(plain, module)
    if site.kind == "block":
        return call_block(frame, module, site, class_swap.compiled_call(frame, module, site, call), args, kwargs)
    if site.kind == "layer":
        call = partial(call, **kwargs)
        for kernel in frame.handlers.kernels:
            call = partial(kernel.layer, frame, module, site, call)
        return call(*args)
    return _call_sublayer(frame, site, call, args, kwargs)


def _passes(frame: Frame, module: nn.Module, site: Site) -> bool:
    """Return whether a block is skipped for all samples and nothing else is to be done at it."""
    context, view = frame.context, frame.context.view
    if view is None or len(view.idle) < len(view.samples) or context.guard is not None:
        return False
    return site.block not in frame.handlers.edges and not is_offloaded(module)


def call_block(frame: Frame, module: nn.Module, site: Site, call: Call, args: tuple[Any, ...], kwargs: Named) -> Any:
    """Call or skip a block, and add to the trace the FLOPs that were counted meanwhile."""
    counted = frame.context.counted
    if counted is None:
        return _call_block(frame, module, site, call, args, kwargs)
    before = counted()
    out = _call_block(frame, module, site, call, args, kwargs)
    frame.context.trace.counted += counted() - before
    return out


def _call_block(frame: Frame, module: nn.Module, site: Site, call: Call, args: tuple[Any, ...], kwargs: Named) -> Any:
    """Open the brackets at a block, compute the block for the samples that do not skip it, and close the brackets."""
    context, handlers, named = frame.context, frame.handlers, {**dict(zip(site.names, args, strict=False)), **kwargs}
    if frame.remember is not None:
        frame.remember(frame, module, site, named)
    if context.guard is not None:
        plain = partial(class_swap.base_class(module).__call__, module, *args, **kwargs)
        site = context.guard.begin(frame.sites, module, named, plain)
    blocks, edge = site.blocks, site.block in handlers.edges
    if blocks.rearranged:
        named = batch_first(named, blocks, context.readings.images)
    view = context.view = context.view_of(named, blocks, frame.view, handlers.separates_text, handlers.counts)
    if not edge and _passes(frame, module, site):
        return site.unchanged(args, kwargs)
    given = named[blocks.tokens]
    if blocks.full_between:
        named[blocks.tokens] = gather(given, view.cells, view.index, blocks)
    if edge:
        if blocks.packing is None and (blocks.image != "all" or blocks.text):  # text may join after some blocks
            context.trace.text = max(context.trace.text, other_tokens(named, blocks, view.room)[0])
        named[blocks.tokens], view = _open(_seeing(frame, view), module, site, named)
    frame = _seeing(frame, view)
    if rotation := () if blocks.image == "all" else _rotation(frame, blocks):
        named[blocks.tokens] = rotate(named[blocks.tokens], rotation)
    as_given = named[blocks.tokens] is given if blocks.packing is None else view.packing is named[blocks.packing]
    named |= {} if blocks.packing is None else {blocks.packing: view.packing}
    if as_given and not edge and _nothing_acts(frame, blocks):
        block = context.record(view, site, named)
        if len(handlers.sublayers) == 0:
            return call(*args, **kwargs)
        return class_swap.within(frame._replace(block=block), call, *args, **kwargs)
    inner = partial(call_by_name, call, blocks, site.names[: len(args)], tuple(kwargs), context.readings.images)
    results = _compute_groups(frame, module, site, inner, named)
    if rotation:
        results["tokens"] = rotate(results["tokens"], rotation, back=True)
    if edge:
        results["tokens"] = _close(frame, site, results)
    if blocks.full_between and context.view is not None:
        view = context.view
        results["tokens"] = scatter(results["tokens"], given, view.cells, view.index, view.lengths, blocks)
    if context.guard is not None:
        context.guard.before = (blocks.path, results)
    if blocks.rearranged:
        results = as_returned(results, blocks, context.readings.images)
    return results["tokens"] if len(blocks.returns) == 1 else tuple(results[name] for name in blocks.returns)


def _seeing(frame: Frame, view: TokenView) -> Frame:
    """Return the frame with another view. It runs in every cached step, where `_replace` would be felt."""
    return Frame(frame.context, frame.handlers, frame.sites, frame.remember, view, frame.block, frame.exchange)


def _rotation(frame: Frame, blocks: Blocks) -> tuple[int, ...]:
    """Return how sequences are rotated for a block, if what acts in it depends on the places of image tokens."""
    inside = frame.handlers.counts and len(frame.handlers.sublayers) + len(frame.handlers.kernels) > 0
    return frame.context.rotation(blocks) if inside or frame.view.index is not None else ()


def _open(frame: Frame, module: nn.Module, site: Site, named: Named) -> tuple[Tensor, TokenView]:
    """Open the brackets that begin with a block; return its tokens and their view afterwards."""
    brackets = [bracket for bracket in frame.handlers.brackets if bracket.first == site.block]
    tokens = named[site.blocks.tokens]
    return _act(frame, brackets, site, tokens, BlockCall(module, site, named)) if brackets else (tokens, frame.view)


def _close(frame: Frame, site: Site, results: Named) -> Tensor:
    """Close the brackets that end with a block; return its tokens afterwards, and replace those of further streams."""
    brackets = [bracket for bracket in reversed(frame.handlers.brackets) if bracket.last == site.block]
    return _act(frame, brackets, site, results["tokens"], results)[0] if brackets else results["tokens"]


def _act(
    frame: Frame, brackets: Sequence[Bracket], site: Site, tokens: Tensor, call: BlockCall | Named
) -> tuple[Tensor, TokenView]:
    """Open brackets before a call of a block, or close them after its results; return the tokens and their view."""
    context, view, blocks = frame.context, frame.view, site.blocks
    before, rotation = view.packing, () if blocks.image == "all" else context.rotation(blocks)
    others = blocks.streams or blocks.keeps_text or context.guard is not None
    tokens, view = view.padded(rotate(tokens, rotation) if rotation else tokens)
    text, x = view.split(tokens, blocks)
    for bracket in brackets:
        if isinstance(call, dict):
            text = _close_streams(frame, bracket, blocks, text, call) if others else text
            x, view = _act_one(frame, bracket, view, x, None)
        elif not view.all_idle:  # else no block inside of it will run
            x, view = _act_one(frame, bracket, view, x, call)
    tokens = join(text, x, blocks.image)
    tokens = rotate(tokens, rotation, back=True) if rotation else tokens
    if before is not None:
        tokens, view = view.packed(tokens, before)
    context.view = view
    return tokens, view


def _close_streams(
    frame: Frame, bracket: Bracket, blocks: Blocks, text: Tensor | None, results: Named
) -> Tensor | None:
    """Close a bracket around further streams among a block's results, in place, or around text; return that text."""
    streams = [name for name in blocks.streams if results[name] is not None]
    if streams:
        results.update(zip(streams, bracket.close_streams(frame, [results[name] for name in streams]), strict=True))
    elif blocks.keeps_text or frame.context.guard is not None:
        return next(iter(bracket.close_streams(frame, [] if text is None else [text])), None)
    return text


def _act_one(
    frame: Frame, bracket: Bracket, view: TokenView, x: Tensor, block: BlockCall | None
) -> tuple[Tensor, TokenView]:
    """Open a bracket, or close it if the block is None; one that selects tokens gets the generated ones only."""
    context = frame.context
    selects = bracket.is_selector and cast(Selector, bracket).selects(context)
    if (beside := context.beside if selects else (0, 0)) == (0, 0):  # in every cached step, where slices would be felt
        x, inner = bracket.close(frame, view, x) if block is None else bracket.open(frame, view, x, block)
        if not selects and inner.room < view.room and any(context.beside):
            raise InputError(
                f"{type(bracket).__name__} selects among the tokens of reference images too; let it be a Selector, "
                "which gets the generated tokens only."
            )
        return x, inner
    first, x, last = apart(x, beside, view.lengths)
    inner = view.generated(beside)
    x, inner = bracket.close(frame, inner, x) if block is None else bracket.open(frame, inner, x, block)
    return together(first, x, last, inner.lengths), inner.among(beside)


def _nothing_acts(frame: Frame, blocks: Blocks) -> bool:
    """Return whether a block is computed for all samples together and without a change to its call or arguments."""
    view, handlers = frame.view, frame.handlers
    acting = len(handlers.gates) + len(handlers.kernels) + len(view.idle)
    if acting or frame.context.guard is not None or view.lengths is not None:
        return False
    return view.index is None or len(blocks.follow) == 0


def _compute_groups(frame: Frame, module: nn.Module, site: Site, inner: Inner, named: Named) -> Named:
    """Compute a block for the samples that do not skip it, and return "tokens" and "text" of all samples."""
    context, view, blocks = frame.context, frame.view, site.blocks
    results: Named = {"tokens": named[blocks.tokens], "text": named.get(blocks.text or "")}
    results |= {name: named[name] for name in blocks.streams}
    if view.all_idle and not is_offloaded(module):
        return results
    inputs = dict(results)
    groups = _groups(frame, site.block, blocks.alone)
    if groups is not None and not groups and is_offloaded(module):
        context.residency.skipped(module)
    if groups is None:
        results |= _compute(frame, module, site, inner, named, None)
    elif context.guard is not None and groups:  # unknown which arguments have a batch: compute all samples, keep some
        context.guard.keep(results, _compute(frame, module, site, inner, named, None), groups)
    else:
        check_groups(module, site.block, groups, view.batch)
        for places in groups:
            part = view.take(places)
            for name, value in _compute(frame, module, site, inner, named, part).items():
                results[name] = part.scatter(name, results[name], value, blocks)
    for gate in frame.handlers.gates:
        weight = gate.weight(context, view, site.block)
        if weight is not None:
            scale_change(results, inputs, weight, view)
    return results


def _groups(frame: Frame, block: int, alone: bool) -> list[tuple[int, ...]] | None:
    """Group the samples that do not skip a block by length and kernel keys; None if all samples run together."""
    context, view, handlers = frame.context, frame.view, frame.handlers
    gates = [gate for gate in handlers.gates if gate.always(context, block) is not False]
    if view.all_idle or any(gate.always(context, block) for gate in gates):
        return []
    skipped = [False] * view.batch
    for gate in gates:
        skipped = [one or other for one, other in zip(skipped, gate.skips(context, view, block), strict=True)]
    found = (kernel.key(context, view, block) for kernel in handlers.kernels)
    keys: list[Sequence[Hashable]] = [key for key in found if key is not None]
    if view.lengths is not None:
        keys.append(view.lengths)
    if alone and view.index is not None and view.batch > 1:
        keys.append(view.samples)
    if not (any(skipped) or view.idle or keys):
        return None
    groups: dict[Hashable, list[int]] = {}
    for place in range(view.batch):
        if not skipped[place] and place not in view.idle:
            groups.setdefault(tuple(key[place] for key in keys), []).append(place)
    if len(groups) == 1 and len(next(iter(groups.values()))) == view.batch and view.lengths is None:
        return None
    return [tuple(places) for places in groups.values()]


def _compute(frame: Frame, module: nn.Module, site: Site, inner: Inner, named: Named, part: Part | None) -> Named:
    """Compute a block for the samples of a part, or for all if it is None, and return its results by name."""
    context, blocks = frame.context, site.blocks
    view = frame.view if part is None else part.view
    arguments = named if part is None else part.take(named, blocks)
    arguments = {**arguments, **context.readings.followed.select(named, blocks, view, part, _rotation(frame, blocks))}
    block = context.record(view, site, arguments, named)
    inside = frame._replace(view=view, block=block, exchange=Exchange(view.samples))
    for kernel in frame.handlers.kernels:
        inner = partial(kernel.run, inside, module, site, inner)
    out = class_swap.within(inside, inner, arguments)
    if context.guard is not None:
        context.guard.after(blocks, arguments[blocks.tokens], out)
    return dict(zip(blocks.returns, out if isinstance(out, tuple) else (out,), strict=False))


def _call_sublayer(frame: Frame, site: Site, call: Call, args: tuple[Any, ...], kwargs: Named, own: bool = True) -> Any:
    """Call the attention or MLP of a block through the handlers around it, of which the first is the outermost."""
    if len(frame.handlers.sublayers) == 0:
        return call(*args, **kwargs)
    if own and site.blocks.arrangement is not None:
        return call_arranged(_call_sublayer, frame, site, call, args, kwargs)
    named = {**dict(zip(site.names, args, strict=False)), **kwargs}

    def inner(**arguments: Any) -> Any:
        return call(*[arguments.pop(name) for name in site.names[: len(args)]], **arguments)

    for sublayer in reversed(frame.handlers.sublayers):
        inner = partial(_call_through, sublayer, frame, site, inner)
    return inner(**named)


def _call_through(sublayer: Sublayer, frame: Frame, site: Site, call: Call, **named: Any) -> Any:
    return sublayer.around(frame, frame.view, site, call, named)
