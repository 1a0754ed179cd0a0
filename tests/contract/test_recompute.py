"""Gradient checkpointing that a model does itself: gradients are those without it, and nothing stays behind."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from timm.models import checkpoint_seq
from torch import nn
from torch.utils.checkpoint import checkpoint

import tokdyn
from tests.contract.kit import latents, randomized
from tests.contract.models import timm_vit
from tests.contract.widths import PublicDiT, random_gates
from tokdyn import Chunking, DepthSkip, DynamicWidth, FeatureCache, InputError, TokenDrop, TokenMerge


class Attention(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.heads, self.num_heads = heads, heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A block of the public DiT layout."""

    def __init__(self, width):
        super().__init__()
        self.attn = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift, scale, gate = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)[:3]
        x = x + gate * self.attn(x * (1 + scale) + shift)
        return x + self.mlp(x)


class Patches(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Conv2d(4, width, 2, stride=2)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class DiT(nn.Module):
    """The public layout, with checkpointing in its forward as forks of it have."""

    def __init__(self, how=None, width=16, depth=4):
        super().__init__()
        self.how = how
        self.x_embedder = Patches(width)
        self.t_embedder = nn.Linear(1, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.final_layer = nn.Linear(width, 16)

    def forward(self, x, t):
        rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
        x, c = self.x_embedder(x), self.t_embedder(t[:, None] / 1000)
        if self.how == "each":
            for block in self.blocks:
                x = checkpoint(self.wrapper(block), x, c, use_reentrant=False)
        elif self.how == "all":
            x = checkpoint(self.through, x, c, use_reentrant=False)
        elif self.how == "reentrant":
            for block in self.blocks:
                x = checkpoint(block, x, c, use_reentrant=True)
        else:
            x = self.through(x, c)
        return (
            self.final_layer(x).view(len(x), rows, columns, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        )

    def through(self, x, c):
        for block in self.blocks:
            x = block(x, c)
        return x

    def wrapper(self, block):
        def forward(*inputs):
            return block(*inputs)

        return forward


METHODS = {
    "nothing": [],
    "merge": [TokenMerge(where="mlp"), TokenMerge(where="attention", seed=1)],
    "drop": [TokenDrop(rate=0.5, blocks=(0, 3)), TokenDrop(rate=0.5, blocks=(1, 2))],
    "skip": [DepthSkip(blocks=(0, 2))],
    "levels": [DepthSkip(table=((0.0, 0.5, (1,)), (0.5, 1.0, (2, 3)))), TokenMerge(ratio=((0.0, 0.2), (1.0, 0.6)))],
    "chunk": [Chunking(target=2), TokenDrop(rate=0.5), DepthSkip(blocks=(1,))],
    "gates": [DepthSkip(learned=True, target=0.5)],
}


def gradients(how, methods, seeds):
    """One backward after as many forwards as there are seeds."""
    torch.manual_seed(0)
    model = DiT(how).train()
    torch.manual_seed(1)
    tokdyn.wrap(model, METHODS[methods])
    loss = 0.0
    for seed in seeds:
        torch.manual_seed(seed)
        output = model(latents(2, 4, 8, 12), torch.tensor([200.0 + seed, 700.0]))
        loss = loss + output.square().mean() * seed + sum(tokdyn.losses(model).values())
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
@pytest.mark.parametrize("methods", METHODS)
@pytest.mark.parametrize("how", ["each", "all"])
def test_gradients_are_those_without_it(how, methods, seeds):
    plain, saved = (gradients(each, methods, seeds) for each in (None, how))
    assert plain.keys() == saved.keys()
    for name, one in plain.items():
        torch.testing.assert_close(saved[name], one, rtol=1e-5, atol=1e-7, msg=name)


class Public(PublicDiT):
    how = None

    def forward(self, x, t):
        condition, x = self.t_embedder(t[:, None] / 1000), self.x_embedder(x)
        for block in self.blocks:
            x = checkpoint(block, x, condition, use_reentrant=False) if self.how else block(x, condition)
        return (self.final_layer(x),)


WIDTHS = {
    "all": [DynamicWidth()],
    "by level": [DynamicWidth(tokens=False)],
    "by token": [DynamicWidth(heads=False, channels=False)],
    "chunk": [Chunking(target=2), DynamicWidth()],
}


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
@pytest.mark.parametrize("methods", WIDTHS)
def test_gradients_of_dynamic_width(methods, seeds):
    found = []
    for how in (None, "each"):
        torch.manual_seed(0)
        model = randomized(type("DiT", (Public,), {"how": how})()).train()
        torch.manual_seed(1)
        random_gates(tokdyn.wrap(model, WIDTHS[methods]))
        loss = 0.0
        for seed in seeds:
            torch.manual_seed(seed)
            (output,) = model(latents(2, 4, 8, 8), torch.tensor([200.0 + seed, 700.0]))
            loss = loss + output.square().mean() * seed + sum(tokdyn.losses(model).values())
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, one in found[0].items():
        torch.testing.assert_close(found[1][name], one, rtol=1e-5, atol=1e-7, msg=name)


def test_several_blocks_at_a_time():
    found = []
    for every in (None, 1, 3):
        model = tokdyn.wrap(timm_vit().train(), [TokenDrop(rate=0.5, blocks=(1, 2)), TokenMerge()])
        torch.manual_seed(3)
        if every is not None:
            blocks = model.blocks
            blocks.forward = lambda x, blocks=blocks, every=every: checkpoint_seq(
                list(blocks.children()), x, every=every, use_reentrant=False
            )
        model(latents(2, 3, 32, 48)).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


def test_what_was_disabled_is_computed_again_without_methods():
    found = []
    for how in (None, "each"):
        torch.manual_seed(0)
        model = tokdyn.wrap(DiT(how).eval(), [TokenMerge(), DepthSkip(blocks=(1,))])
        model(latents(2, 4, 8, 12), torch.full((2,), 500.0))  # leaves nothing that the next call could be taken for
        with tokdyn.disabled(model):
            loss = model(latents(2, 4, 8, 12), torch.full((2,), 500.0)).square().mean()
        loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_statistics_and_losses_count_once():
    model = tokdyn.wrap(DiT("each").train(), [DepthSkip(learned=True, target=0.5)])
    model(latents(2, 4, 8, 12), torch.full((2,), 500.0)).sum().backward()
    before = tokdyn.losses(model)["DepthSkip"]
    (call,) = tokdyn.traces(model)
    assert [block.block for block in call.blocks] == [0, 1, 2, 3]
    assert torch.equal(tokdyn.losses(model)["DepthSkip"], before)


def test_the_reentrant_kind_is_refused():
    model = tokdyn.wrap(DiT("reentrant").train(), [TokenMerge()])
    loss = model(latents(2, 4, 8, 12), torch.full((2,), 500.0)).sum()
    with pytest.raises(InputError, match="use_reentrant=False"):
        loss.backward()


@pytest.mark.parametrize("methods", [*METHODS, "cache"])
def test_nothing_stays_behind(methods):
    """Not the tokens that lead back when the graph is gone, and not the model."""
    stack = [FeatureCache(), DepthSkip(blocks=(0, 1))] if methods == "cache" else METHODS[methods]
    gc.freeze()  # what tests before this one left, such as compiled graphs, takes seconds to search
    model = tokdyn.wrap(DiT("each").train(methods != "cache"), stack)
    tokens = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: tokens.append(weakref.ref(args[0]))) for block in model.blocks
    ]
    loss = model(latents(2, 4, 8, 12), torch.full((2,), 500.0)).sum()
    for hook in hooks:
        hook.remove()
    loss.backward()
    del loss
    with torch.no_grad():
        model.eval()(latents(2, 4, 8, 12), torch.full((2,), 500.0))  # has no losses, which lead to the graph
    model.train(methods != "cache")
    gc.collect()
    assert tokens
    assert all(each() is None for each in tokens)
    model(latents(2, 4, 8, 12), torch.full((2,), 400.0))  # a graph that nobody goes through
    gone = weakref.ref(model)
    del model
    gc.collect()
    gc.unfreeze()
    assert gone() is None
