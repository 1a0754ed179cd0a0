"""timm's VisionTransformer in its variants: class, register and distillation tokens, any grid, all ways to call it."""

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock

import tokdyn
from tests.contract.kit import latents
from tests.contract.models import timm_vit
from tokdyn import DepthSkip, InputError, TokenDrop, TokenMerge, UnsupportedModelError

METHODS = {
    "merge": [TokenMerge()],
    "merge-both": [TokenMerge(ratio=0.4, where="both", seed=3)],
    "skip": [DepthSkip(blocks=(1, -1))],
    "stack": [TokenMerge(ratio=0.6), DepthSkip(blocks=(0,))],
}
VARIANTS = {
    "no class token": ({"class_token": False, "reg_tokens": 0, "global_pool": "avg"}, (32, 48)),
    "class token alone": ({"reg_tokens": 0}, (32, 48)),
    "registers alone": ({"class_token": False, "global_pool": "avg"}, (32, 48)),
    "position without class": ({"no_embed_class": True}, (32, 48)),
    "any size": ({"dynamic_img_size": True}, (24, 56)),
    "padded": ({"dynamic_img_size": True, "dynamic_img_pad": True}, (23, 41)),
    "patches that are not square": ({"patch_size": (4, 8)}, (32, 48)),
    "attention pooling": ({"global_pool": "map"}, (32, 48)),
    "norms": ({"qk_norm": True, "pre_norm": True, "init_values": 0.5, "scale_mlp_norm": True}, (32, 48)),
    "norm after": ({"block_fn": ResPostBlock}, (32, 48)),
    "patches dropped in training": ({"patch_drop_rate": 0.5}, (32, 48)),
}


def images(size, batch=2):
    return latents(batch, 3, *size)


@pytest.mark.parametrize("methods", METHODS)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_variants(variant, methods):
    config, size = VARIANTS[variant]
    model, x = timm_vit(**config), images(size, 3)
    plain = model(x)
    tokdyn.wrap(model, METHODS[methods])
    together = model(x)
    assert not torch.equal(together, plain)
    for i in range(3):
        torch.testing.assert_close(model(x[i : i + 1]), together[i : i + 1], rtol=0, atol=2e-5)  # outputs of some 10
    with tokdyn.disabled(model):
        assert torch.equal(model(x), plain)
    assert torch.equal(tokdyn.unwrap(model)(x), plain)


@pytest.mark.parametrize("methods", METHODS)
@torch.no_grad()
def test_features_are_taken_with_the_methods_whatever_is_called(methods):
    model, x = timm_vit(), images((32, 48))
    plain = model.forward_features(x)
    tokdyn.wrap(model, METHODS[methods])
    features = model.forward_features(x)
    assert not torch.equal(features, plain)
    assert torch.equal(model.forward_head(features), model(x))
    assert torch.equal(model.forward_intermediates(x)[0], features)
    assert torch.equal(
        model.get_intermediate_layers(x, n=1, norm=True, return_prefix_tokens=True)[0][0], features[:, 3:]
    )
    assert [call.step for call in tokdyn.stats(model).calls] == [0, 1, 2, 3]  # one for each call
    assert tokdyn.stats(model).calls[0].level is None
    assert str(tokdyn.stats(model)).splitlines()[1].split()[:3] == ["0", "0", "-"]
    with tokdyn.disabled(model):
        assert torch.equal(model.forward_features(x=x), plain)
    assert torch.equal(tokdyn.unwrap(model).forward_features(x), plain)


@torch.no_grad()
def test_a_block_called_by_hand_is_as_it_was():
    """Without a call of the model there is nothing that a method could act in."""
    model, tokens = timm_vit(), latents(2, 99, 16)
    plain = model.blocks[1](tokens)
    assert torch.equal(tokdyn.wrap(model, [TokenMerge(), DepthSkip(blocks=(1,))]).blocks[1](tokens), plain)


@torch.no_grad()
def test_tokens_before_those_of_the_image_never_merge():
    """With the whole grid merged into one token in four, class and register tokens still pass attention as they are."""
    model, seen = timm_vit(), []
    model.blocks[0].attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(images((32, 48)))
    tokdyn.wrap(model, [TokenMerge(ratio=0.75)])
    model(images((32, 48)))
    before, after = seen
    assert after.shape[1] == 3 + 24
    assert torch.equal(before[:, :3], after[:, :3])


@torch.no_grad()
def test_a_distilled_model_keeps_both_tokens():
    torch.manual_seed(0)
    model = VisionTransformerDistilled(img_size=32, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=8)
    model = model.eval()
    plain = model(images((32, 32)))
    tokdyn.wrap(model, [TokenMerge(), DepthSkip(blocks=(1,))])
    assert not torch.equal(model(images((32, 32))), plain)
    assert tokdyn.stats(model).calls[0].cells == 64


@pytest.mark.parametrize("block", [ParallelScalingBlock, ParallelThingsBlock])
@torch.no_grad()
def test_blocks_without_one_attention_can_be_skipped_but_not_merged_in(block):
    model, x = timm_vit(block_fn=block), images((32, 48))
    with pytest.raises(UnsupportedModelError, match=r"TokenMerge.*VisionTransformer.* 0 to 3.*attention"):
        tokdyn.wrap(model, [TokenMerge()])
    skipped = tokdyn.wrap(model, [DepthSkip(blocks=(0, 1, 2, 3))]).forward_features(x)
    tokdyn.unwrap(model).blocks = torch.nn.Sequential()
    assert torch.equal(skipped, model.forward_features(x))


def test_patches_dropped_at_random_are_no_grid():
    model = tokdyn.wrap(timm_vit(patch_drop_rate=0.5), [TokenMerge()]).train()
    with pytest.raises(InputError, match="patch_drop_rate"):
        model(images((32, 48)))
    assert model.eval()(images((32, 48))).isfinite().all()


@pytest.mark.parametrize(("name", "value"), [("attn_mask", torch.ones(99, 99)), ("is_causal", True)])
def test_masks_over_pairs_of_tokens_are_refused(name, value):
    model = tokdyn.wrap(timm_vit(), [TokenMerge()])
    with pytest.raises(InputError, match=f"{name} .*VisionTransformer"):
        model.forward_features(images((32, 48)), **{name: value})


def test_training_with_dropped_tokens():
    model = tokdyn.wrap(timm_vit(), [TokenDrop(rate=0.5, blocks=(1, 2))]).train()
    model(images((32, 48))).square().mean().backward()
    assert tokdyn.stats(model).calls[0].tokens == (96, 48, 48, 96)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_class_of_that_name_with_another_structure_is_not_taken_for_it():
    """torchvision calls its model VisionTransformer, too; its blocks are found in its structure."""
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32).eval()
    torch.nn.init.normal_(model.heads.head.weight)
    with pytest.raises(UnsupportedModelError, match=r"TokenMerge.*VisionTransformer.*docs/adapters\.md"):
        tokdyn.wrap(model, [TokenMerge()])
    with torch.no_grad():
        skipped = tokdyn.wrap(model, [DepthSkip(blocks=(0, 1, 2))])(images((32, 32)))
        tokdyn.unwrap(model).encoder.layers = torch.nn.Sequential()
        assert torch.equal(skipped, model(images((32, 32))))
