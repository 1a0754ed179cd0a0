"""Call the blocks of a wrapped model through its handlers: brackets, gates, groups of samples, kernels.

Dense and packed tokens take the same path; their `TokenView` differs. `frame` is the frame of a call of `module`, whose
site is `site`; `call` or `inner` is its original call, and `named` its arguments. See docs/design.md.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.adapters.base import DEFAULT_PRODUCTS, Blocks
from tokdyn.adapters.tokens import batch_first, call_by_name, join
from tokdyn.attach import class_swap
from tokdyn.attach.context import CallContext, is_offloaded, other_tokens
from tokdyn.attach.handlers.base import BlockCall, Exchange, Frame, Inner, Sublayer
from tokdyn.attach.sites import Site
from tokdyn.attach.view import Part, TokenView
from tokdyn.errors import InputError
from tokdyn.tokens import cells

Call = Callable[..., Any]
Named = dict[str, Any]


def call_module(frame: Frame, module: nn.Module, plain: Call, args: tuple[Any, ...], kwargs: Named) -> Any:
    """Call a module of a wrapped model during a call of the model; `plain(module, ...)` is its original call."""
    site: Site | None = vars(module).get("_tokdyn_site") or frame.sites.get(id(module))
    if site is None:
        return plain(module, *args, **kwargs)
    if site.kind == "block" and frame.remember is None and _passes(frame, module, site):
        return site.unchanged(args, kwargs)
    call = frame.context.residency.around(module, plain) if is_offloaded(module) else partial(plain, module)
    if site.kind == "block":
        return call_block(frame, module, site, call, args, kwargs)
    if site.kind == "layer":
        call = partial(call, **kwargs)
        for kernel in frame.handlers.kernels:
            call = partial(kernel.layer, frame, module, site, call)
        return call(*args)
    return _call_sublayer(frame, site, call, args, kwargs)


def _passes(frame: Frame, module: nn.Module, site: Site) -> bool:
    """Return whether a block is skipped for all samples and nothing else is to be done at it."""
    context = frame.context
    if context.view is None or not context.view.all_idle or context.guard is not None:
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
    context, named = frame.context, {**dict(zip(site.names, args, strict=False)), **kwargs}
    if frame.remember is not None:
        frame.remember(frame, module, site, named)
    if context.guard is not None:
        plain = partial(class_swap.base_class(module).__call__, module, *args, **kwargs)
        site = context.guard.begin(frame.sites, module, named, plain)
    blocks, edge = site.blocks, site.block in frame.handlers.edges
    if blocks.sequence_first:
        named = batch_first(named, blocks)
    view = context.view = _view_of(context, frame, named, blocks)
    if _passes(frame, module, site):
        return site.unchanged(args, kwargs)
    frame, given = frame._replace(view=view), named[blocks.tokens]
    if blocks.full_between:
        named[blocks.tokens] = view.gathered(given, blocks)
    if edge:
        context.see_text(named, blocks, view.room)
        named[blocks.tokens], view = _open(frame, module, site, named)
        frame = frame._replace(view=view)
    as_given = not edge and (
        named[blocks.tokens] is given if blocks.packing is None else view.packing is named[blocks.packing]
    )
    if blocks.packing is not None:
        named[blocks.packing] = view.packing
    if as_given and _nothing_acts(frame, blocks):
        block = context.record(view, site, named)
        if len(frame.handlers.sublayers) == 0:
            return call(*args, **kwargs)
        return class_swap.within(frame._replace(block=block), call, *args, **kwargs)
    inner = partial(call_by_name, call, blocks, site.names[: len(args)], tuple(kwargs))
    results = _compute_groups(frame, module, site, inner, named)
    if edge:
        results["tokens"] = _close(frame, site, results["tokens"])
    if blocks.full_between and context.view is not None:
        results["tokens"] = context.view.scattered(results["tokens"], given, blocks)
    if context.guard is not None:
        context.guard.before = (blocks.path, results["tokens"])
    if blocks.tokens in blocks.sequence_first:
        results["tokens"] = results["tokens"].transpose(0, 1)
    return results["tokens"] if len(blocks.returns) == 1 else tuple(results[name] for name in blocks.returns)


def _view_of(context: CallContext, frame: Frame, named: Named, blocks: Blocks) -> TokenView:
    """Return the view of a block's tokens: the previous block's, or all tokens at the first, which begins the trace."""
    view, tokens, packing = context.view, named[blocks.tokens], None
    batch = tokens.shape[0]  # `len` of a tensor takes a microsecond, in every block
    if blocks.packing is not None:
        packing = named[blocks.packing]
        batch = len(packing.lengths)
    if view is not None and view.batch == batch:
        return view
    samples = frame.view.samples if frame.view.batch == batch else tuple(range(batch))
    if packing is not None:
        view = TokenView(samples, cells(packing.grid), packing.longest, tokens.device, packing=packing)
        if not context.trace.batch:
            context.trace.batch, context.trace.cells, context.trace.kept = batch, view.cells, packing.lengths
        return view
    count = context.trace.cells or _image_tokens(context, frame, tokens, blocks)
    view = TokenView(samples, count, count, tokens.device)
    trace = context.trace
    if not trace.batch:
        trace.batch, trace.cells = batch, count
        trace.text, trace.context = other_tokens(named, blocks, count)
        if context.readings.grid.known:
            context.check_grid(context.grid)
    return view


def _image_tokens(context: CallContext, frame: Frame, tokens: Tensor, blocks: Blocks) -> int:
    """Count the image tokens that the first block gets; all tokens, if the grid is not known and no method needs it."""
    products = blocks.products or DEFAULT_PRODUCTS
    if context.adapter.grid is None:
        context.readings.grid.put((tokens.shape[1],))
    elif blocks.image != "all" and (frame.handlers.separates_text or products.text_sees != "all"):
        try:
            return cells(context.grid)
        except InputError:
            if frame.handlers.counts:
                raise
    return tokens.shape[1]


def _open(frame: Frame, module: nn.Module, site: Site, named: Named) -> tuple[Tensor, TokenView]:
    """Open the brackets that begin with a block; return its tokens and their view afterwards."""
    context, view, tokens = frame.context, frame.view, named[site.blocks.tokens]
    brackets = [bracket for bracket in frame.handlers.brackets if bracket.first == site.block]
    if not brackets:
        return tokens, view
    before = view.packing
    tokens, view = view.padded(tokens)
    text, x = view.split(tokens, site.blocks)
    block = BlockCall(module, site, named)
    for bracket in brackets:
        if not view.all_idle:  # else no block inside of it will run
            x, view = bracket.open(frame, view, x, block)
    tokens = join(text, x, site.blocks.image)
    if before is not None:
        tokens, view = view.packed(tokens, before)
    context.view = view
    return tokens, view


def _close(frame: Frame, site: Site, tokens: Tensor) -> Tensor:
    """Close the brackets that end with a block; return its tokens afterwards."""
    context, view = frame.context, frame.view
    brackets = [bracket for bracket in reversed(frame.handlers.brackets) if bracket.last == site.block]
    if not brackets:
        return tokens
    before = view.packing
    tokens, view = view.padded(tokens)
    text, x = view.split(tokens, site.blocks)
    for bracket in brackets:
        x, view = bracket.close(frame, view, x)
    tokens = join(text, x, site.blocks.image)
    if before is not None:
        tokens, view = view.packed(tokens, before)
    context.view = view
    return tokens


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
    if view.all_idle and not is_offloaded(module):
        return results
    inputs, device = dict(results), named[blocks.tokens].device
    groups = _groups(frame, site.block)
    if groups is not None and not groups and is_offloaded(module):
        context.residency.skipped(module)
    if groups is None:
        results |= _compute(frame, module, site, inner, named, None)
    elif context.guard is not None and groups:  # unknown which arguments have a batch: compute all samples, keep some
        everything = _compute(frame, module, site, inner, named, None)
        rows = torch.tensor([place for places in groups for place in places], device=device)
        for name, value in everything.items():
            before = results[name]
            if before is None or value is None:
                results[name] = None if value is None else value.index_select(0, rows)
            else:
                results[name] = before.index_copy(0, rows, value.index_select(0, rows).to(before.dtype))
    else:
        for places in groups:
            part = view.take(places)
            for name, value in _compute(frame, module, site, inner, named, part).items():
                results[name] = part.scatter(name, results[name], value, blocks)
    for gate in frame.handlers.gates:
        weight = gate.weight(context, view, site.block)
        if weight is not None:
            _scale_change(results, inputs, weight, view)
    return results


def _scale_change(results: Named, inputs: Named, weight: Tensor, view: TokenView) -> None:
    """Replace results by `input + weight * (result - input)`, with a weight (B,) for each sample."""
    packing = view.packing
    factor = weight.view(-1, 1, 1) if packing is None else weight.index_select(0, packing.sample)[:, None]
    for name, value in results.items():
        if value is not None and inputs.get(name) is not None:
            results[name] = torch.lerp(inputs[name].to(value.dtype), value, factor.to(value.dtype))


def _groups(frame: Frame, block: int) -> list[tuple[int, ...]] | None:
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
    arguments = {**arguments, **context.readings.followed.select(named, blocks, view, part)}
    block = context.record(view, site, arguments)
    inside = frame._replace(view=view, block=block, exchange=Exchange(view.samples))
    for kernel in frame.handlers.kernels:
        inner = partial(kernel.run, inside, module, site, inner)
    out = class_swap.within(inside, inner, arguments)
    if context.guard is not None:
        context.guard.after(blocks, arguments[blocks.tokens], out)
    return dict(zip(blocks.returns, out if isinstance(out, tuple) else (out,), strict=False))


def _call_sublayer(frame: Frame, site: Site, call: Call, args: tuple[Any, ...], kwargs: Named) -> Any:
    """Call the attention or MLP of a block through the handlers around it, of which the first is the outermost."""
    if len(frame.handlers.sublayers) == 0:
        return call(*args, **kwargs)
    named = {**dict(zip(site.names, args, strict=False)), **kwargs}

    def inner(**arguments: Any) -> Any:
        return call(*[arguments.pop(name) for name in site.names[: len(args)]], **arguments)

    for sublayer in reversed(frame.handlers.sublayers):
        inner = partial(_call_through, sublayer, frame, site, inner)
    return inner(**named)


def _call_through(sublayer: Sublayer, frame: Frame, site: Site, call: Call, **named: Any) -> Any:
    return sublayer.around(frame, frame.view, site, call, named)
