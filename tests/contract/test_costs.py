"""What wrapped models cost beside the law that computed equals counted: parts, cached steps, budgets, meta device."""

import math
from itertools import cycle, product

import pytest
import torch

import tokdyn
from tests.contract.coverage_arranged import ARRANGED
from tests.contract.foreign import INFERRED, undeclared
from tests.contract.models import TINY, latents, of_diffusers, sample, works
from tests.contract.siblings import TWINS
from tests.contract.stacks import ACTIVE, acting, at_levels
from tests.contract.test_chunking import twice
from tokdyn import Chunking, CompositionError, DepthSkip, DynamicWidth, FeatureCache, InputError, TokenDrop, TokenMerge
from tokdyn.adapters import adapter_for
from tokdyn.cost.blocks import PARTS

MODELS = sorted(TINY)


def wrapped(name, methods):
    model = acting(tokdyn.wrap(TINY[name].build(), methods))
    return model.train() if any(isinstance(each, TokenDrop) for each in methods) else model


@pytest.mark.parametrize("name", MODELS)
def test_plain_models(name):
    model, inputs = TINY[name].build(), TINY[name].inputs(3)
    kind = type(model)
    found = tokdyn.flops(model, **inputs)
    assert found.total == found.counted == sum(found.counted_parts.values())
    assert type(model) is kind  # nothing is left behind
    assert not hasattr(model, "tokdyn")
    if name in ("DiT", "DCDiT"):
        return
    assert found.dense == found.total
    assert found.batch == 3
    assert {"projections", "attention", "mlp"} <= set(found.parts)


ROUTERS = ("spatial_predictability", "cosine", "random")
CHUNKED = [name for name in MODELS if works(name, [Chunking()])]


@pytest.mark.parametrize(
    ("name", "router"),
    sorted({*zip(CHUNKED, cycle(ROUTERS), strict=False), *product(("DiT", "WanTransformer3DModel"), ROUTERS)}),
)
def test_routers_and_budgets(name, router):
    """Samples of different length are computed apart; in 3-D the de-chunking is a product on CPU too."""
    model = wrapped(name, [Chunking(target=2, router=router)])
    tokdyn.set_tail_drop(model, torch.tensor([0.0, 0.4, 0.9]))
    found = tokdyn.flops(model, **TINY[name].inputs(3))
    assert found.total == found.counted
    assert ("Chunking de-chunk" in found.parts) == (len(adapter_for(model).grid(model, TINY[name].inputs(3))) == 3)


@pytest.mark.parametrize("name", [name for name in MODELS if works(name, [FeatureCache()])])
@torch.no_grad()
def test_cached_steps_and_no_trace(name):
    """A step that is repeated costs its indicator and what lies outside of the blocks; counting changes nothing."""
    model, tiny = wrapped(name, [FeatureCache(threshold=float("inf")), DepthSkip(blocks=(2,))]), TINY[name]
    first = tokdyn.flops(model, **{**tiny.inputs(2), **tiny.at(2, 0.9)})
    assert first.total == first.counted
    assert tokdyn.stats(model).calls == ()
    sample(model(**{**tiny.inputs(2), **tiny.at(2, 0.9)}))
    for _ in range(2):
        second = tokdyn.flops(model, **{**tiny.inputs(2), **tiny.at(2, 0.8)})
        assert second.total == second.counted < first.total
        assert not {"projections", "attention", "mlp"} & set(second.parts)
    (call,) = tokdyn.stats(model).calls
    outside = first.total - call.flops
    model(**{**tiny.inputs(2), **tiny.at(2, 0.8)})
    cached = tokdyn.stats(model).calls[-1]
    assert cached.cached
    if name != "DCDiT":  # whose chunking around the blocks is left out too
        assert second.total - outside == cached.flops == cached.method_flops


@pytest.mark.parametrize("name", ["DiT", "FluxTransformer2DModel", "WanTransformer3DModel"])
@torch.no_grad()
def test_the_filter_of_seacache_is_counted(name):
    """Two transforms of N real values in each of D channels, 2.5 N log2 N operations each."""
    model, tiny = wrapped(name, [FeatureCache(rule="seacache", threshold=float("inf"))]), TINY[name]
    sample(model(**{**tiny.inputs(2), **tiny.at(2, 0.9)}))
    found = tokdyn.flops(model, **{**tiny.inputs(2), **tiny.at(2, 0.8)})
    cells = math.prod(adapter_for(model).image_tokens(model, tiny.inputs(2)).grid)
    width = adapter_for(model).width(model)
    assert found.parts["FeatureCache filter"] == pytest.approx(2 * 5 * width * cells * math.log2(cells), rel=0.01)
    assert found.total == found.counted
    sample(model(**{**tiny.inputs(2), **tiny.at(2, 0.8)}))
    call = tokdyn.stats(model).calls[-1]
    assert call.cached
    assert call.methods["FeatureCache filter"] == found.parts["FeatureCache filter"]


@pytest.mark.parametrize("size", [(8,), (6, 10), (1, 1)])
def test_fourier_transforms_are_counted_in_any_form(size):
    class Both(torch.nn.Module):
        def forward(self, x):
            dims = tuple(range(1, x.dim()))
            spectrum = torch.fft.rfftn(x, dim=dims)
            return torch.fft.irfftn(spectrum, s=x.shape[1:], dim=dims), torch.fft.fftn(x, dim=dims)

    values = math.prod(size)
    expected = 3 * (2.5 + 2.5 + 5) * values * math.log2(values)
    assert tokdyn.cost.count(Both(), torch.randn(3, *size))[0] == pytest.approx(expected, rel=0.02)


SIBLINGS = {
    "plain": [],
    "chunk": [Chunking(target=2), TokenMerge(ratio=0.3)],
    "merge": [FeatureCache(threshold=0.5), TokenMerge(ratio=0.4, where="both"), DepthSkip(blocks=(2,))],
}


@pytest.mark.parametrize("name", sorted(TWINS))
@pytest.mark.parametrize("methods", SIBLINGS)
def test_classes_of_another_name(name, methods):
    model, inputs = TWINS[name].build(), TWINS[name].inputs(2)
    if SIBLINGS[methods]:
        tokdyn.wrap(model, SIBLINGS[methods])
    found = tokdyn.flops(model, **inputs)
    assert found.total == found.counted
    assert found.dense is not None


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:In CPU autocast")  # diffusers' own
@pytest.mark.parametrize("name", sorted(INFERRED))
@pytest.mark.usefixtures("nothing_declared")
@torch.no_grad()
def test_models_that_no_adapter_knows_are_counted(name, monkeypatch):
    """Nobody said what their blocks multiply: statistics say so, and FLOPs are what was counted."""
    undeclared(monkeypatch)
    model, inputs = INFERRED[name].tiny.build(), INFERRED[name].tiny.inputs(2)
    plain = tokdyn.flops(model, **inputs)
    found = tokdyn.flops(tokdyn.wrap(model, [DepthSkip(blocks=(1,))]), **inputs)
    assert found.total == found.counted < plain.counted
    assert found.dense == plain.counted
    assert not found.computed
    model(**inputs)
    run = tokdyn.stats(model)
    assert run.flops is None
    assert run.share is None
    assert "FLOPs are not known" in str(run)


EACH = {
    "Chunking": Chunking(target=2),
    "TokenMerge": TokenMerge(ratio=0.5, where="both"),
    "TokenDrop": TokenDrop(rate=0.5, blocks=(0, 3)),
    "DepthSkip": DepthSkip(blocks=(0, 2)),
    "gates": DepthSkip(learned=True),
    "FeatureCache": FeatureCache(threshold=0.5),
    "DynamicWidth": DynamicWidth(),
}


@pytest.mark.parametrize("pair", [(a, b) for a, b in product(EACH, EACH) if a != b], ids=" x ".join)
def test_every_allowed_pair(pair):
    for name in ("DiT", "FluxTransformer2DModel", "WanTransformer3DModel"):
        try:
            model = wrapped(name, [EACH[each] for each in pair])
        except CompositionError:
            return
        found = tokdyn.flops(model, **TINY[name].inputs(2))
        assert found.total == found.counted


@pytest.mark.parametrize(
    "pair",
    [("DepthSkip", "TokenMerge"), ("Chunking", "DepthSkip"), ("TokenDrop", "DepthSkip"), ("Chunking", "TokenMerge")],
    ids=" x ".join,
)
@pytest.mark.parametrize("name", ["DiT", "PixArtTransformer2DModel"])
def test_costs_of_two_methods_multiply(name, pair):
    """The share of each part is the product: of linear layers and, squared in the tokens, of attention.

    It is exact because the blocks of these models are alike, see no text, and halve 24 tokens without a rest. How many
    of the kept tokens find one to merge with depends on where they lie, so there the share is what happened.
    """

    def parts(*methods):
        return tokdyn.flops(wrapped(name, [EACH[each] for each in methods]), **TINY[name].inputs(2)).parts

    dense = tokdyn.flops(wrapped(name, [DepthSkip()]), **TINY[name].inputs(2)).parts
    together = parts(*pair)
    shares = [
        {part: found[part] / dense[part] for part in ("projections", "attention", "mlp")} for found in map(parts, pair)
    ]
    if pair == ("Chunking", "TokenMerge"):
        model = wrapped(name, [EACH[each] for each in pair])
        sample(model(**TINY[name].inputs(2)))
        ((_, left),) = tokdyn.traces(model)[-1].blocks[0].attention
        assert {call.tokens for call in tokdyn.traces(model)[-1].blocks} == {12}
        assert left < 12
        shares[1] = {"projections": left / 12, "attention": (left / 12) ** 2, "mlp": left / 12}
    for part in shares[0]:
        assert together[part] / dense[part] == pytest.approx(shares[0][part] * shares[1][part], rel=1e-12), part


@pytest.mark.parametrize("name", [name for name in MODELS if works(name, [Chunking()]) or name == "DCDiT"])
@torch.no_grad()
def test_guidance_with_a_budget_for_each_branch(name):
    """Lite-CFG: each branch costs what a call with its budget alone costs."""
    methods = [] if name == "DCDiT" else [Chunking(target=2)]
    model, inputs = wrapped(name, [*methods, DepthSkip(blocks=(1,))]), TINY[name].inputs(2)
    alone = {}
    for branch, drop in (("cond", 0.0), ("uncond", 0.9)):
        tokdyn.set_tail_drop(model, drop)
        found = tokdyn.flops(model, **inputs)
        assert found.total == found.counted
        tokdyn.reset(model)
        model(**inputs)
        (alone[branch],) = tokdyn.stats(model).calls
    tokdyn.reset(model)
    tokdyn.set_tail_drop(model, {"cond": 0.0, "uncond": 0.9})
    if adapter_for(model).guidance == "calls":
        model(**inputs)
        model(**inputs)
    else:
        inputs = twice(inputs)
        found = tokdyn.flops(model, **inputs)
        assert found.total == found.counted
        model(**inputs)
    run = tokdyn.stats(model)
    assert len(run.steps) == 1
    assert {call.branch for call in run.calls} == {"cond", "uncond"}
    for call in run.calls:
        assert call.parts == alone[call.branch].parts
        assert call.methods == alone[call.branch].methods
        assert call.kept == alone[call.branch].kept
    assert run.dense_flops == 2 * alone["cond"].dense_flops
    assert alone["uncond"].block_flops < alone["cond"].block_flops


@pytest.mark.parametrize("name", MODELS)
def test_bf16_checkpointing_and_training(name):
    methods = [each for each in (Chunking(target=2), TokenMerge(), DepthSkip(blocks=(2,))) if works(name, [each])]
    model, inputs = wrapped(name, methods), TINY[name].inputs(3)
    model.train()
    model.set_grad_checkpointing() if name == "VisionTransformer" else model.enable_gradient_checkpointing()
    clean = torch.is_grad_enabled()
    found = tokdyn.flops(model, **inputs)
    assert found.total == found.counted
    assert torch.is_grad_enabled() == clean
    assert tokdyn.losses(model) == {}
    sample(model(**inputs)).square().mean().backward()  # blocks are computed again, and counted once
    assert tokdyn.stats(model).calls[-1].block_flops == sum(found.parts.get(part, 0) for part in PARTS)
    model.eval().to(torch.bfloat16)
    half = {key: cast(value) for key, value in inputs.items()}
    found = tokdyn.flops(model, **half)
    assert found.total == found.counted


def cast(value):
    """Latents and embeddings as bf16; positions and times stay."""
    if isinstance(value, list) and isinstance(value[0], torch.Tensor):
        return [cast(each) for each in value]
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1 and value.shape[-1] != 3:
        return value.to(torch.bfloat16)
    return value


ON_META = [name for name in MODELS if name not in ("DCDiT", "Lumina2Transformer2DModel")]


@pytest.mark.pairwise("laws", cost=10)
@pytest.mark.parametrize(
    ("name", "methods"),
    [pair for pair in product(ON_META, ("merge", "curves", "cache")) if works(pair[0], ACTIVE[pair[1]])],
)
def test_on_the_meta_device(name, methods):
    """Costs of models too large to build: only what the decisions depend on is read."""
    inputs = at_levels(name)
    real = tokdyn.flops(wrapped(name, ACTIVE[methods]), **inputs)
    found = tokdyn.flops(wrapped(name, ACTIVE[methods]).to("meta"), **inputs)
    assert found.parts == real.parts
    assert found.counted == found.total


def test_decisions_by_data_need_data():
    model = tokdyn.wrap(TINY["DiT"].build(), [Chunking(target=2)]).to("meta")
    with pytest.raises(InputError, match="meta device"):
        tokdyn.flops(model, **TINY["DiT"].inputs(2))
    with pytest.raises(InputError, match=r"tokdyn\.flops\(model, \*inputs\)"):
        tokdyn.flops(model)


LORA = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "proj_mlp", "norm1.linear"]


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel"])
@pytest.mark.parametrize("first", ["wrap", "adapter"])
def test_lora(name, first):
    peft = pytest.importorskip("peft")
    model, inputs = TINY[name].build(), TINY[name].inputs(2)
    bare = tokdyn.flops(tokdyn.wrap(TINY[name].build(), [TokenMerge()]), **inputs)
    adapter = peft.LoraConfig(r=4, target_modules=LORA)
    steps = [lambda: tokdyn.wrap(model, [TokenMerge()]), lambda: model.add_adapter(adapter)]
    for step in steps if first == "wrap" else reversed(steps):
        step()
    for change, costs_more in ((model.enable_adapters, True), (model.disable_adapters, False)):
        change()
        found = tokdyn.flops(model, **inputs)
        assert found.total == found.counted
        assert (found.total > bare.total) == costs_more
    model.enable_adapters()
    model.fuse_lora()
    assert tokdyn.flops(model, **inputs).total == bare.total


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "QwenImageTransformer2DModel", "PixArtTransformer2DModel"])
def test_fused_projections(name):
    model, inputs = TINY[name].build(), TINY[name].inputs(2)
    before = tokdyn.flops(model, **inputs)
    model.fuse_qkv_projections()
    found = tokdyn.flops(model, **inputs)
    assert found.parts == before.parts
    assert found.counted == before.counted


def test_video_from_an_image():
    """Wan's encoder tokens are those of a picture and 512 of text, with keys and values of their own."""
    model = of_diffusers(
        "WanTransformer3DModel",
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=12,
        freq_dim=32, ffn_dim=48, num_layers=2, cross_attn_norm=True, image_dim=20, added_kv_proj_dim=32,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    tokdyn.wrap(model, [TokenMerge(where="both")])
    inputs = {
        "hidden_states": latents(2, 4, 2, 8, 6),
        "encoder_hidden_states": latents(2, 512, 12),
        "encoder_hidden_states_image": latents(2, 5, 20),
        "timestep": torch.full((2,), 500),
    }
    found = tokdyn.flops(model, **inputs)
    assert found.total == found.counted
    for block in model.blocks:
        block.attn1.fuse_projections()
        block.attn2.fuse_projections()
    assert tokdyn.flops(model, **inputs).counted == found.total


def test_the_report_is_tidy():
    text = str(tokdyn.flops(wrapped("DiT", [Chunking(target=2)]), **TINY["DiT"].inputs(2)))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["t_embedder", "x_embedder"]
    assert any(line.startswith("Chunking router") for line in lines)
    assert "GFLOPs (multiply-add = 2, batch of 2)" in text
    assert lines[-1].startswith("dense")
    assert "% of it" in lines[-1]
    assert len({line.index("GFLOPs") for line in lines}) == 1


def block_flops(tokens, text, width, hidden, queries, keys):
    """FLOPs by hand of a block that attends to itself and to text; a multiply-add is 2.

    Self-attention multiplies all of its padded queries and keys, whatever its mask leaves out.
    """
    projections = 2 * (4 + 2) * tokens * width**2 + 2 * 2 * text * width**2
    attention = 4 * width * (queries * keys + tokens * text)
    return projections + attention + 4 * tokens * width * hidden


@pytest.mark.slow  # flex attention without a compiler
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(
    ("name", "expected"),
    [  # 18 tokens of three frames, padded to 128, and 12 of the driving video, too; text is padded to 6 tokens
        ("WanAnimate2Transformer3DModel", block_flops(18, 6, 32, 48, 128, 128 + 128)),
        # 16 tokens, padded to 128; as many are added to 16 keys of their own and 16 of the cached frame
        ("AnyFlowFARTransformer3DModel", block_flops(16, 6, 32, 32, 128, 128 + 16)),
    ],
)
def test_flex_attention_costs_what_is_counted_by_hand(name, expected):
    model = tokdyn.wrap(ARRANGED[name].build(), [DepthSkip(blocks=(1,))])
    found = tokdyn.flops(model, **ARRANGED[name].inputs(1))
    assert not found.computed
    assert found.dense - found.total == expected
    assert found.total == found.counted
