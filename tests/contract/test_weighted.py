"""Size-weighted merging (arXiv 2210.09461): merged duplicates are seen as often as they were there, in every family."""

import pytest
import torch

from tests.contract.models import TINY, sample
from tokdyn.adapters import adapter_for
from tokdyn.adapters.tokens import join, select_tokens, split
from tokdyn.attach import argument_names, disabled, wrap
from tokdyn.errors import InputError, UnsupportedModelError
from tokdyn.methods import TokenMerge
from tokdyn.ops.destinations import destinations
from tokdyn.tokens import cells

SOFTMAX = sorted(set(TINY) - {"SanaTransformer2DModel", "DCDiT"})


def first_of_bucket(grid):
    """(N,) for every cell the first one of its bucket of 2x2."""
    cell = torch.arange(cells(grid))
    table = destinations(cell, torch.zeros_like(cell), 1, grid).table[0]
    corner = [torch.arange(size) // 2 for size in grid]
    bucket = torch.zeros(1, dtype=torch.int64)
    for size, axis in zip(grid, corner, strict=True):
        bucket = (bucket[:, None] * -(-size // 2) + axis).flatten()
    return table[bucket]


def repeat_tokens(model, inputs):
    """Let every block see the token of the first cell in all cells of a bucket, with all that belongs to it."""
    adapter = adapter_for(model)
    grid = adapter.grid(model, inputs)
    index, count = first_of_bucket(grid), cells(grid)

    def hook(block, args, kwargs, stack):
        names = argument_names(block)
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        text, x = split(named[stack.tokens], None if stack.image == "all" else count, stack.image)
        rows = index.expand(len(x), -1)
        named[stack.tokens] = join(text, x[:, index], stack.image)
        for argument in stack.follow:
            if named.get(argument.name) is not None:
                named[argument.name] = select_tokens(named[argument.name], argument, stack, rows, count)
        return tuple(named[name] for name in names[: len(args)]), {name: named[name] for name in kwargs}

    for stack in adapter.blocks:
        for block in getattr(model, stack.path):
            block.register_forward_pre_hook(
                lambda block, args, kwargs, stack=stack: hook(block, args, kwargs, stack), with_kwargs=True
            )


@pytest.mark.parametrize("name", SOFTMAX)
@torch.no_grad()
def test_merged_duplicates_count_as_often_as_they_were_there(name):
    inputs = TINY[name].inputs(2)
    outputs = []
    for weighted in (True, False):
        model = wrap(TINY[name].build(), [TokenMerge(ratio=0.5, weighted=weighted)])
        repeat_tokens(model, inputs)
        with disabled(model):
            plain = sample(model(**inputs))
        outputs.append(sample(model(**inputs)))
    torch.testing.assert_close(outputs[0], plain, rtol=1e-5, atol=2e-6)  # fp32, sums in another order
    assert (outputs[1] - plain).abs().max() > 1e-4


@torch.no_grad()
def test_packed_duplicates_count_as_often_as_they_were_there():
    """DC-DiT keeps another number of tokens of every sample; those of a bucket are made equal."""
    inputs = TINY["DCDiT"].inputs(3)
    outputs, lengths = [], set()

    def hook(block, args):
        x, condition, packing = args
        lengths.update(packing.lengths)
        bucket = first_of_bucket(packing.grid)[packing.cell] + packing.sample * cells(packing.grid)
        first = torch.stack([(bucket == own).nonzero()[0, 0] for own in bucket])
        return x[first], condition, packing

    for weighted in (True, False):
        model = wrap(TINY["DCDiT"].build(), [TokenMerge(ratio=0.3, weighted=weighted, reuse=2)])
        for block in model.blocks:
            block.register_forward_pre_hook(hook)
        with disabled(model):
            plain = sample(model(**inputs))
        outputs.append(sample(model(**inputs)))
    assert len(lengths) > 1
    torch.testing.assert_close(outputs[0], plain, rtol=1e-5, atol=2e-6)
    assert (outputs[1] - plain).abs().max() > 1e-4


def test_what_has_no_softmax_is_refused_when_it_is_wrapped():
    model = TINY["SanaTransformer2DModel"].build()
    with pytest.raises(UnsupportedModelError, match="weighted"):
        wrap(model, [TokenMerge(weighted=True)])
    wrap(model, [TokenMerge()])


@torch.no_grad()
def test_attention_that_cannot_be_weighted_is_refused_when_it_is_called():
    from diffusers.models.attention_processor import AttnProcessor  # writes the softmax out

    model = TINY["PixArtTransformer2DModel"].build()
    model.transformer_blocks[2].attn1.set_processor(AttnProcessor())
    wrap(model, [TokenMerge(weighted=True)])
    with pytest.raises(UnsupportedModelError, match=r"block 2 .*scaled_dot_product_attention"):
        model(**TINY["PixArtTransformer2DModel"].inputs(1))


def test_weights_without_attention_are_refused():
    with pytest.raises(InputError, match=r"weighted.*where='mlp'"):
        TokenMerge(where="mlp", weighted=True)
