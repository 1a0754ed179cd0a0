"""Tokens that are left out: they are image tokens, and the others are computed as if their keys were hidden from them.

This holds a declaration against the model: where image tokens lie, and which arguments follow them.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokdyn
from tests.contract.coverage_images import IMAGES
from tests.contract.kit import moved, one_of
from tests.contract.models import TINY, sample
from tokdyn import Chunking, DepthSkip, TokenDrop, TokenMerge
from tokdyn.adapters import adapter_for
from tokdyn.adapters.base import Blocks
from tokdyn.ops.weighting import KeyBias
from tokdyn.tokens import total

BY_EXPERTS = {"NucleusMoEImageTransformer2DModel"}  # experts choose among the tokens that are there


class Seen:
    """What the blocks of a model get and return in a call, and what the first attention gets, batch first."""

    def __init__(self, model: nn.Module, call: dict[str, Any]) -> None:
        self.given: list[dict[str, Any]] = []
        self.attention: list[Tensor] = []
        adapter = adapter_for(model)
        lists = [(blocks, list(model.get_submodule(blocks.path))) for blocks in adapter.blocks]  # type: ignore[arg-type]
        handles = [module[0].register_forward_pre_hook(self._block, with_kwargs=True) for _, module in lists]
        first, last = lists[0], lists[-1]
        path = next(name for name in first[0].attention)
        attention = first[1][0].get_submodule(path)
        handles.append(
            attention.register_forward_pre_hook(
                lambda _, args, kwargs: self.attention.append([*args, *kwargs.values()][0].detach()), with_kwargs=True
            )
        )
        outputs: list[Any] = []
        handles.append(last[1][-1].register_forward_hook(lambda module, args, out: outputs.append(out)))
        model(**call)  # with gradients, because TokenDrop acts in training
        for handle in handles:
            handle.remove()
        out = outputs[0] if isinstance(outputs[0], tuple) else (outputs[0],)
        tokens = out[last[0].returns.index("tokens")].detach()
        self.result = tokens.transpose(0, 1) if last[0].sequence_first else tokens

    def _block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kind = next(base for base in type(module).__mro__ if "forward" in vars(base))
        self.given.append(dict(inspect.signature(kind.forward).bind(module, *args, **kwargs).arguments))


def others(blocks: Blocks, given: dict[str, Any], cells: int) -> tuple[int, str]:
    """How many tokens beside those of the image attention sees, and on which side of them the image lies."""
    tokens = given[blocks.tokens].transpose(0, 1) if blocks.sequence_first else given[blocks.tokens]
    text = given.get(blocks.text or "")
    beside = tokens.shape[1] - cells
    return beside + (0 if text is None else text.shape[1]), blocks.image if beside else blocks.joint


@pytest.mark.parametrize("name", sorted(IMAGES.keys() - BY_EXPERTS))
def test_tokens_that_are_left_out_are_hidden_image_tokens(name: str) -> None:
    tiny = IMAGES[name]
    call = tiny.inputs(2)
    model = tiny.build().train()
    adapter = adapter_for(model)
    cells = total(adapter.image_tokens(model, call))
    dense, other = Seen(model, call), Seen(model, {**call, **moved(call)})
    image = (dense.attention[0] != other.attention[0]).any(dim=-1)  # (B, S) rows that depend on the latents
    assert image.sum(dim=1).tolist() == [cells, cells]
    torch.manual_seed(0)
    dropped = Seen(tokdyn.wrap(tiny.build().train(), [TokenDrop(rate=0.5, blocks=(0, -1))]), call)
    rows = (dense.attention[0][:, :, None] == dropped.attention[0][:, None]).all(dim=-1)  # (B, S, those that are left)
    kept = rows.any(dim=2)
    assert bool((kept | image).all())
    assert kept[image].view(2, cells).sum(dim=1).tolist() == [cells - cells // 2] * 2
    hidden = torch.zeros(2, cells).masked_fill(~kept[image].view(2, cells), -torch.inf)
    with ExitStack() as stack:
        for blocks, given in zip(adapter.blocks, dense.given, strict=True):
            text, place = others(blocks, given, cells)
            stack.enter_context(KeyBias(F.pad(hidden, (0, text) if place == "first" else (text, 0)), text))
        expected = Seen(model, call).result
    first = adapter.blocks[-1]
    beside = expected.shape[1] - cells
    places = F.pad(kept[image].view(2, cells), (0, beside) if first.image == "first" else (beside, 0), value=True)
    torch.testing.assert_close(
        dropped.result.flatten(0, 1), expected[places], rtol=0, atol=2e-5, msg=lambda text: f"{name}: {text}"
    )


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "BriaFiboTransformer2DModel"])
@pytest.mark.parametrize("pairs", [False, True], ids=["keys", "pairs"])
@torch.no_grad()
def test_a_mask_among_the_attention_arguments_follows_the_tokens(name: str, pairs: bool) -> None:
    """Padding of a prompt changes nothing, and a sample does not depend on others, whichever tokens are left."""
    tiny = {**TINY, **IMAGES}[name]
    call, text = {**tiny.inputs(2), **tiny.at(2, 0.8)}, 6
    call[tiny.clock[0]] = call[tiny.clock[0]] * torch.tensor([1.0, 0.5])  # one of the samples skips a block
    mask = torch.ones(2, text + 20, dtype=torch.bool)
    mask[0, 4:text] = False
    mask = mask[:, None, None].expand(-1, -1, text + 20 if pairs else 1, -1)
    other = {**call, "encoder_hidden_states": call["encoder_hidden_states"].clone()}
    other["encoder_hidden_states"][0, 4:] += 1.0
    methods = [TokenMerge(ratio=0.5), Chunking(target=2), DepthSkip(blocks=(1,), levels=(0.6, 1.0))]
    model = tokdyn.wrap(tiny.build(), methods)
    out = sample(model(**call, joint_attention_kwargs={"attention_mask": mask}))
    torch.testing.assert_close(
        sample(model(**other, joint_attention_kwargs={"attention_mask": mask})), out, rtol=0, atol=2e-6
    )
    layers = call.pop("text_encoder_layers", None)
    for i in range(2):
        more = {} if layers is None else {"text_encoder_layers": [layer[i : i + 1] for layer in layers]}
        alone = model(**one_of(call, i), **more, joint_attention_kwargs={"attention_mask": mask[i : i + 1]})
        torch.testing.assert_close(sample(alone), out[i : i + 1], rtol=0, atol=5e-6)
