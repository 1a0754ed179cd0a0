"""Small models without an adapter on which what is inferred does not hold, or cannot: they are refused, in words."""

import pytest
import torch
from torch import nn

import tokdyn
from tests.contract.test_inferred_own import Block, D, Long, Model, UShaped, Words, build, inputs
from tokdyn import DepthSkip, FeatureCache, TokenMerge, UnsupportedModelError
from tokdyn.attach import wrap


class Twice(Model):
    def run(self, x, c):
        return super().run(super().run(x, c), c)


class Half(Model):
    def run(self, x, c):
        for block in list(self.blocks)[:2]:
            x = block(x, c)
        return x


class Smaller(Model):
    """Neighbouring tokens are joined on the way."""

    def run(self, x, c):
        for block in self.blocks:
            x = block(x, c)[:, ::2]
        return x.repeat_interleave(16, dim=1)[:, :24]


class Three(Block):
    def forward(self, x, c):
        return x, c, super().forward(x, c)


class Many(Model):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Three() for _ in range(4)])

    def run(self, x, c):
        for block in self.blocks:
            x = block(x, c)[2]
        return x


class Maps(Block):
    def forward(self, x):
        return super().forward(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])


class OnMaps(Model):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Maps() for _ in range(4)])

    def run(self, x, c):
        x = x.mT.unflatten(2, (4, 6))
        for block in self.blocks:
            x = block(x)
        return x.flatten(2).mT


class Other(Block):
    """Text blocks under a name that does not tell: their tokens do not go into the image blocks."""


class Hidden(Model):
    def __init__(self):
        super().__init__()
        blocks = self.blocks
        del self.blocks
        self.words = nn.Parameter(torch.randn(1, 5, D))
        self.more, self.blocks = nn.ModuleList([Other() for _ in range(2)]), blocks

    def run(self, x, c):
        words = self.words.expand(len(x), -1, -1)
        for block in self.more:
            words = block(words)
        return super().run(x + words.mean(dim=1, keepdim=True), c)


class Aside(Block):
    def forward(self, x, context):
        x = super().forward(torch.cat([context, x], dim=1))
        return x[:, context.shape[1] :], x[:, : context.shape[1]]


class Unused(Model):
    """Its blocks return a second tensor of the shape of their text, which nobody takes for the text."""

    def __init__(self):
        super().__init__()
        self.words, self.blocks = nn.Parameter(torch.randn(1, 5, D)), nn.ModuleList([Aside() for _ in range(4)])

    def run(self, x, c):
        words = self.words.expand(len(x), -1, -1)
        for block in self.blocks:
            x, _ = block(x, words)
        return x


class Notes(Block):
    def forward(self, x, notes):
        notes += x.mean(dim=1)
        return super().forward(x)


class InPlace(Model):
    """Its blocks write down something that is used after the last of them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Notes() for _ in range(4)])

    def run(self, x, c):
        notes = torch.zeros(len(x), D)
        for block in self.blocks:
            x = block(x, notes)
        return x + notes[:, None]


BAD = {
    Unused: "shape of 'context'",
    InPlace: "'notes' in place",
    Twice: "block 0.*'blocks'.*block 4",
    Half: "2 of its 4 blocks",
    Smaller: r"\(2, 24, 16\).*\(2, 12, 16\)",
    Many: "tuple of 3",
    OnMaps: r"\(2, 16, 4, 6\).*'x'",
    Hidden: r"'blocks'.*\(2, 24, 16\).*\(2, 5, 16\)",
}


@pytest.mark.parametrize("method", [DepthSkip(blocks=(1,)), FeatureCache()], ids=["skip", "cache"])
@pytest.mark.parametrize("kind", BAD)
@torch.no_grad()
def test_what_does_not_hold_is_refused(kind, method):
    model = build(kind)
    plain = model(*inputs())
    wrap(model, [method])
    with pytest.raises(UnsupportedModelError, match=f"{kind.__name__}.*({BAD[kind]}).*docs/adapters"):
        model(*inputs())
    assert torch.equal(tokdyn.unwrap(model)(*inputs()), plain)


class Late(Model):
    """The timestep has a name that says nothing."""

    def forward(self, x, step):
        return super().forward(x, step)


def test_without_a_known_name_for_the_noise_level_what_needs_it_is_refused():
    for method in (FeatureCache(), DepthSkip(blocks=(0,), levels=(0.5, 1.0)), DepthSkip(learned=True)):
        with pytest.raises(UnsupportedModelError, match="timestep, timesteps, t, time"):
            wrap(build(Late), [method])
    wrap(build(Late), [DepthSkip(blocks=(0,))])(*inputs())


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(2, 2), r"Linear.*nn\.ModuleList"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), r"Sequential.*nn\.ModuleList"),
        (nn.ModuleList([Block(), Long()]), r"ModuleList.*nn\.ModuleList"),
        ("a name", r"str.*torch\.nn\.Module"),
    ],
    ids=["layer", "layers", "different blocks", "string"],
)
def test_what_is_no_transformer_is_refused(model, words):
    with pytest.raises(UnsupportedModelError, match=words):
        wrap(model, [])


def test_what_holds_a_known_model_is_not_taken_for_one():
    inner = tokdyn.DiT(sample_size=8, patch_size=2, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    with pytest.raises(UnsupportedModelError, match=r"Wrapper.*DiT.*'module'"):
        wrap(Wrapper(inner), [])
    pipeline = type("Pipeline", (), {"transformer": inner})()
    with pytest.raises(UnsupportedModelError, match=r"Pipeline.*pipe\.transformer"):
        wrap(pipeline, [])


@torch.no_grad()
def test_a_cache_over_lists_with_something_between_is_refused():
    model = wrap(build(UShaped), [FeatureCache()])
    with pytest.raises(UnsupportedModelError, match="'out_blocks'"):
        model(*inputs())


@torch.no_grad()
def test_equal_numbers_of_words_and_patches_cannot_be_told_apart():
    model = wrap(build(Words, words=24), [DepthSkip(blocks=(0,))])
    with pytest.raises(UnsupportedModelError, match=r"\(2, 24, 16\)"):
        model(*inputs())
    skipped = wrap(build(Words, words=23), [DepthSkip(blocks=(0,))])
    skipped(*inputs())
    assert tokdyn.stats(skipped).calls[0].blocks == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("ratio", [0.5, 0.0])
def test_merging_names_the_way_out(ratio):
    with pytest.raises(UnsupportedModelError, match=r"TokenMerge .*Model: .*docs/adapters\.md"):
        wrap(build(Model), [TokenMerge(ratio=ratio)])
