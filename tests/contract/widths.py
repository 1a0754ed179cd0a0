"""Gates of dynamic width that open and shut, for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import tokdyn
from tests.contract.kit import Tiny, latents, of_diffusers, randomized
from tests.contract.models import TINY
from tests.contract.siblings import TWINS
from tokdyn import DynamicWidth
from tokdyn.adapters import adapter_for
from tokdyn.adapters.counting import text_stream
from tokdyn.attach.width.layout import Layout, layouts_of
from tokdyn.trace.calls import BlockTrace


@torch.no_grad()
def random_gates(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give the gates of a wrapped model parameters by chance: about half of them are open, at other levels others."""
    generator = torch.Generator().manual_seed(seed)

    def noise(parameter: nn.Parameter, scale: float) -> None:
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))

    for gates in widths_of(model):
        for by_level in (gates.heads, gates.channels):
            if by_level is not None:
                noise(by_level.weight, 0.3)
                by_level.bias.zero_()
        for by_token in gates.tokens or ():
            noise(by_token[0].weight, 0.5)
            by_token[0].bias.zero_()
            noise(by_token[2].weight, 1.0)
            by_token[2].weight.abs_()
            by_token[2].bias.fill_(-0.1)
    return model


def widths_of(model: Any) -> list[Any]:
    """The gates of a wrapped model; a width of which all is on has none."""
    return [part for method, part in tokdyn.parts(model) if isinstance(method, DynamicWidth) and part is not None]


def layouts_on(model: nn.Module) -> tuple[Layout, ...]:
    """What belongs to heads and channels in the layers of each block."""
    return layouts_of(model, adapter_for(model), [method for method, _ in tokdyn.parts(model)])


def decided_flops(model: nn.Module, call: BlockTrace) -> tuple[int, int]:
    """FLOPs of attention and of the MLP of one sample that gates decide about, in a block that was computed."""
    blocks = [each for each in adapter_for(model).blocks for _ in model.get_submodule(each.path).children()]
    stream = text_stream(call, blocks[call.block])
    return layouts_on(model)[call.block].flops(call.tokens, call.text, stream)


def in_double(value: Any) -> Any:
    """The arguments of a model in fp64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: in_double(each) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(in_double(each) for each in value)
    return value


def more_heads() -> dict[str, Tiny]:
    """Models with four heads, keys and values shared by two of them, or as many channels as no head divides."""

    def like(name: str, **config: Any) -> Tiny:
        return replace(TINY[name], build=lambda: of_diffusers(name, **config))

    flux = {
        "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 4, "joint_attention_dim": 12,
    }  # fmt: skip
    return {
        "shared-keys": like(
            "Lumina2Transformer2DModel",
            sample_size=8, patch_size=2, in_channels=4, hidden_size=64, num_layers=4, num_refiner_layers=1,
            num_attention_heads=4, num_kv_heads=2, multiple_of=16, axes_dim_rope=(8, 4, 4), axes_lens=(64, 32, 32),
            cap_feat_dim=12,
        ),
        "norm-over-heads": like(
            "WanTransformer3DModel",
            patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4,
            text_dim=12, freq_dim=32, ffn_dim=50, num_layers=4, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        ),
        "rotary-over-heads": like(
            "LTXVideoTransformer3DModel",
            in_channels=4, out_channels=4, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=16,
            cross_attention_dim=64, num_layers=4, caption_channels=12,
        ),
        "linear-with-norm": like(
            "SanaTransformer2DModel",
            in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=4,
            num_cross_attention_heads=2, cross_attention_head_dim=32, cross_attention_dim=64, caption_channels=12,
            sample_size=4, patch_size=1, mlp_ratio=2.5, qk_norm="rms_norm_across_heads",
        ),
        "parallel": like(
            "FluxTransformer2DModel", **flux, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(2, 2, 4)
        ),
        "fused": like("Flux2Transformer2DModel", **flux, timestep_guidance_channels=32, axes_dims_rope=(2, 2, 2, 2)),
        "public": Tiny(
            PublicDiT.build, lambda b: {"x": latents(b, 4, 8, 8), "t": torch.full((b,), 500.0)}, ("t", 1e3, 0.0)
        ),
    }  # fmt: skip


class PublicBlock(nn.Module):
    """A block of the public layout, with attention and MLP of timm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        from timm.layers import Mlp
        from timm.models.vision_transformer import Attention

        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads=heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PublicDiT(nn.Module):
    """A model of the public layout; wrapping goes by the name of its class."""

    def __init__(self) -> None:
        super().__init__()
        from timm.layers import PatchEmbed

        self.x_embedder = PatchEmbed(8, 2, 4, 32)
        self.t_embedder = nn.Linear(1, 32)
        self.blocks = nn.ModuleList(PublicBlock(32, 4) for _ in range(4))
        self.final_layer = nn.Linear(32, 16)

    @staticmethod
    def build() -> nn.Module:
        torch.manual_seed(0)
        kind = type("DiT", (PublicDiT,), {})
        return randomized(kind())

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
        condition = self.t_embedder(t[:, None] / 1000)
        x = self.x_embedder(x)
        for block in self.blocks:
            x = block(x, condition)
        return (self.final_layer(x),)


ALL = {**TINY, **TWINS, **more_heads()}
_HEADS, _TOKENS = {"channels": False, "tokens": False}, {"heads": False, "channels": False}
ONLY: dict[str, dict[str, bool]] = {
    "SanaTransformer2DModel": _HEADS,
    "linear-with-norm": _HEADS,
    "VisionTransformer": _TOKENS,
    "CogView4Transformer2DModel": {"tokens": False},
}
"""Models that take some settings only."""
NAMES = sorted(ALL)
WITH_HEADS = [name for name in NAMES if ONLY.get(name) != _TOKENS]
WITH_CHANNELS = [name for name in WITH_HEADS if ONLY.get(name) != _HEADS]
WITH_TOKENS = [name for name in NAMES if ONLY.get(name, _TOKENS) == _TOKENS]


def method(name: str, **settings: Any) -> DynamicWidth:
    """Settings that the model takes."""
    return DynamicWidth(**{**settings, **ONLY.get(name, {})})


def wrapped(name: str, model: nn.Module | None = None, **settings: Any) -> nn.Module:
    """A model whose gates are half open."""
    return random_gates(tokdyn.wrap(ALL[name].build() if model is None else model, [method(name, **settings)]))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """In the order in which they run."""
    return [block for stack in adapter_for(model).blocks for block in model.get_submodule(stack.path)]


def clock(name: str, *levels: float) -> dict[str, Tensor]:
    """One noise level for each sample."""
    found = [ALL[name].at(1, level) for level in levels]
    return {key: torch.cat([each[key] for each in found]) for key in found[0]}


def calls(model: nn.Module) -> list[Any]:
    """The blocks that ran in the last call."""
    return tokdyn.traces(model)[-1].blocks


def hold(model: nn.Module) -> nn.Module:
    """Hook into every block, so that weights cannot be sliced and masks are used."""
    for block in blocks_of(model):
        block.register_forward_hook(lambda *_: None)
    return model
