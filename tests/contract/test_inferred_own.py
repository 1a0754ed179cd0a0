"""Small models as users write them, without an adapter: what is inferred, and that methods act on it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tokdyn
from tests.contract.kit import latents
from tests.contract.test_recompute import Attention
from tokdyn import DepthSkip, FeatureCache
from tokdyn.adapters.infer import GuessedLevel, infer
from tokdyn.attach import wrap
from tokdyn.attach.inferred import flow

D = 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Attention(D), nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x, c=None):
        x = x + self.attn(F.layer_norm(x if c is None else x + c[:, None], (D,)))
        return x + self.mlp(x)


class Model(nn.Module):
    """Embeds (B, 4, R, C), runs its blocks with the timestep, and predicts the noise."""

    def __init__(self, depth=4):
        super().__init__()
        self.embed, self.clock, self.head = nn.Conv2d(4, D, 2, stride=2), nn.Linear(1, D), nn.Linear(D, 16)
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])

    def forward(self, x, t):
        rows = self.run(self.embed(x).flatten(2).mT, self.clock(t[:, None].float() / 1000))
        return F.pixel_shuffle(self.head(rows).mT.unflatten(2, (x.shape[2] // 2, -1)), 2)

    def run(self, x, c):
        for block in self.blocks:
            x = block(x, c)
        return x


class Nested(Model):
    """Blocks in a part of a part, and a list of something else beside them."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict({"trunk": nn.Module()})
        self.backbone["trunk"].layers, self.blocks = self.blocks, nn.ModuleList([nn.Linear(D, D) for _ in range(9)])

    def run(self, x, c):
        for block in self.backbone["trunk"].layers:
            x = block(x, c)
        return x


class Torch(Model):
    """torch's own encoder."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 2, 2 * D, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def run(self, x, c):
        return self.blocks(x + c[:, None])


class Long(Block):
    def __init__(self, skip=True):
        super().__init__()
        self.join = nn.Linear(2 * D, D) if skip else None

    def forward(self, x, skip=None):
        return super().forward(x if self.join is None else self.join(torch.cat([x, skip], dim=-1)))


class UShaped(Model):
    """U-ViT: long skip connections, and one block in the middle that is in neither list."""

    def __init__(self):
        super().__init__()
        del self.blocks
        self.in_blocks, self.mid = nn.ModuleList([Long(False) for _ in range(2)]), Block()
        self.out_blocks = nn.ModuleList([Long() for _ in range(2)])

    def run(self, x, c):
        kept = []
        for block in self.in_blocks:
            x = block(x)
            kept.append(x)
        x = self.mid(x, c)
        for block in self.out_blocks:
            x = block(x, kept.pop())
        return x


class Text(Block):
    """Returns text first."""

    def forward(self, x, context):
        x = super().forward(torch.cat([context, x], dim=1))
        return x[:, : context.shape[1]], x[:, context.shape[1] :]


class Words(Model):
    """A list of text blocks, a list of double blocks, a list of blocks on text and image together."""

    def __init__(self, words=5):
        super().__init__()
        self.context = nn.Parameter(torch.randn(1, words, D))
        self.text_blocks = nn.ModuleList([Block() for _ in range(3)])
        blocks = self.blocks
        del self.blocks
        self.pairs, self.blocks = nn.ModuleList([Text() for _ in range(2)]), blocks

    def run(self, x, c):
        context = self.context.expand(len(x), -1, -1)
        for block in self.text_blocks:
            context = block(context)
        for block in self.pairs:
            context, x = block(x, context)
        return super().run(torch.cat([x, context], dim=1), c)[:, : x.shape[1]]


def build(kind, **config):
    torch.manual_seed(0)
    return kind(**config).eval()


def inputs(level=0.5, batch=2):
    return latents(batch, 4, 8, 12), torch.full((batch,), round(1000 * level))


GOOD = {Model: "blocks", Nested: "backbone.trunk.layers", Torch: "blocks.layers", UShaped: "in_blocks", Words: "pairs"}


@pytest.mark.parametrize("kind", GOOD)
@torch.no_grad()
def test_blocks_are_found_and_skipped(kind):
    model = build(kind)
    assert infer(model).blocks[0].path == GOOD[kind]
    assert infer(model).level.name == "t"
    plain = model(*inputs())
    first = model.get_submodule(GOOD[kind])[0]
    wrap(model, [DepthSkip(blocks=(0,))])
    skipped = model(*inputs())
    tokdyn.unwrap(model)
    given = (lambda x, context: (context, x)) if kind is Words else (lambda x, *args, **kwargs: x)
    first.forward = given
    assert torch.equal(model(*inputs()), skipped)
    assert not torch.equal(skipped, plain)


@pytest.mark.parametrize("kind", [Model, Nested, Torch, Words])
@torch.no_grad()
def test_effects_are_cached(kind):
    model = wrap(build(kind), [FeatureCache(threshold=float("inf"))])
    for level in (0.9, 0.6):
        model(*inputs(level))
    assert [record.cached for record in tokdyn.stats(model).calls] == [False, True]
    assert tokdyn.stats(model).calls[0].cells == 24
    assert tokdyn.stats(model).calls[0].blocks == tuple(range(6 if kind is Words else 4))


class Sound(Block):
    """Video and sound tokens that attend to each other."""

    def forward(self, x, sound):
        both = super().forward(torch.cat([x, sound], dim=1))
        return both[:, : x.shape[1]], both[:, x.shape[1] :]


class WithSound(Model):
    """Predicts the sound, too, from tokens that its blocks change beside those of the video."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Sound() for _ in range(4)])

    def forward(self, x, t):
        tokens, sound = self.embed(x).flatten(2).mT, x.flatten(2)[:, :, :D]
        for block in self.blocks:
            tokens, sound = block(tokens, sound)
        return tokens, sound


@torch.no_grad()
def test_a_cache_restores_a_second_stream_by_its_own_effect():
    model, (x, t) = build(WithSound), inputs(0.5)
    start = model.embed(x).flatten(2).mT, x.flatten(2)[:, :, :D]
    effects = [after - before for after, before in zip(model(x, t), start, strict=True)]
    wrap(model, [FeatureCache(threshold=float("inf"))])
    model(x, t)
    later = x + 0.1 * latents(2, 4, 8, 12).roll(1, 0)
    found = model(later, inputs(0.4)[1])
    assert tokdyn.stats(model).calls[-1].reused == 2
    start = model.embed(later).flatten(2).mT, later.flatten(2)[:, :, :D]
    for one, before, effect in zip(found, start, effects, strict=True):
        torch.testing.assert_close(one, before + effect)


@pytest.mark.parametrize(
    ("name", "calls", "expected"),
    [
        ("timestep", [torch.tensor([900, 0])], [0.9, 0.0]),
        ("timestep", [torch.tensor([900.0, 0.5]), torch.tensor([1.0])], [0.001]),
        ("t", [torch.tensor([0.9, 0.5])], [0.9, 0.5]),
        ("t", [0.25], [0.25]),
        ("t", [500], [0.5]),
        ("sigma", [torch.tensor([0.5])], [0.5]),
        ("sigma", [torch.tensor([3.0]), torch.tensor([1.0])], [0.5]),
    ],
)
def test_the_guess_of_the_noise_level(name, calls, expected):
    level = GuessedLevel(name)
    for value in calls:
        found = level(nn.Identity(), {name: value})
    torch.testing.assert_close(found.reshape(-1), torch.tensor(expected))


def test_how_tokens_flow_from_list_to_list():
    image, text = torch.randn(2, 6, 4), torch.randn(2, 3, 4)
    assert flow(image, image) == "all"
    assert flow(image, image + 1) == "changed"
    assert flow(image, torch.cat([image, text], dim=1)) == "first"
    assert flow(image, torch.cat([text, image], dim=1)) == "last"
    assert flow(image, torch.cat([text, image + 1], dim=1)) == "none"
    assert flow(image, text) == "none"


@torch.no_grad()
def test_a_model_that_ran_once_is_one_graph():
    model = wrap(build(Model), [DepthSkip(blocks=(1,))])
    expected = model(*inputs())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs()), expected)
