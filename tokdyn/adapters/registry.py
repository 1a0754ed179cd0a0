"""Choose the adapter of a model: one the user registered, one of the package, or one inferred from its structure."""

from __future__ import annotations

import copyreg
from typing import Any

from torch import nn

from tokdyn.adapters.anyflow_far import ANYFLOW_FAR
from tokdyn.adapters.audio import ACE_STEP, LONGCAT_AUDIO, MINIMAX_MUSIC3, STABLE_AUDIO, STABLE_AUDIO3
from tokdyn.adapters.base import ModelAdapter
from tokdyn.adapters.bria import BRIA, FIBO, FIBO2
from tokdyn.adapters.cosmos3 import COSMOS3
from tokdyn.adapters.facebook import DC_DIT, FACEBOOK, SIT
from tokdyn.adapters.flux import CHROMA, FLUX, FLUX2
from tokdyn.adapters.hidream import HIDREAM
from tokdyn.adapters.image_only import DIT, PIXART, SANA
from tokdyn.adapters.image_stream import HUNYUAN_DIT, LUMINA_NEXT, NUCLEUS, PRX
from tokdyn.adapters.infer import infer
from tokdyn.adapters.joyimage import JOYIMAGE, JOYIMAGE_PLUS
from tokdyn.adapters.latte import LATTE
from tokdyn.adapters.mmdit import AURAFLOW, COGVIEW3, COGVIEW4, QWEN, SD3
from tokdyn.adapters.one_stream import ERNIE_IMAGE, IDEOGRAM4, KREA2, OMNIGEN
from tokdyn.adapters.qwen21 import QWEN21
from tokdyn.adapters.single_stream import LUMINA2, ZIMAGE
from tokdyn.adapters.timm_vit import TIMM_VIT
from tokdyn.adapters.two_streams import FLUX3, GLM_IMAGE, HUNYUAN_IMAGE
from tokdyn.adapters.video import COGVIDEOX, HUNYUAN, LTX, SKYREELS, WAN
from tokdyn.adapters.video_audio import KANDINSKY6, LTX2, MINIMAX_H3
from tokdyn.adapters.video_cross import ALLEGRO, COSMOS, COSMOS2, KANDINSKY5, KANDINSKY6_SR, SANA_VIDEO, SANA_WM
from tokdyn.adapters.video_joint import CONSISID, EASYANIMATE, EASYANIMATE_SHARED, FRAMEPACK, HUNYUAN15, MOCHI, MOTIF
from tokdyn.adapters.video_wan import ANYFLOW, HELIOS, WAN_ANIMATE, WAN_VACE
from tokdyn.adapters.wan_animate2 import WAN_ANIMATE2
from tokdyn.errors import InputError, UnsupportedModelError

ADAPTERS: tuple[ModelAdapter, ...] = (
    FACEBOOK, SIT, DC_DIT, DIT, PIXART, SD3, FLUX, ZIMAGE, WAN, LTX, SANA,
    QWEN, FLUX2, HUNYUAN, COGVIDEOX, LUMINA2, AURAFLOW, CHROMA, SKYREELS, COGVIEW4, COGVIEW3,
    BRIA, FIBO, HUNYUAN_IMAGE, FLUX3, KREA2, IDEOGRAM4, PRX,
    GLM_IMAGE, JOYIMAGE, JOYIMAGE_PLUS, LUMINA_NEXT, NUCLEUS, OMNIGEN, QWEN21, ERNIE_IMAGE, FIBO2, HIDREAM, HUNYUAN_DIT,
    WAN_VACE, HUNYUAN15, FRAMEPACK, MOCHI, EASYANIMATE, EASYANIMATE_SHARED, CONSISID, ALLEGRO, COSMOS, COSMOS2,
    KANDINSKY5, STABLE_AUDIO, STABLE_AUDIO3, ACE_STEP, LONGCAT_AUDIO, MINIMAX_MUSIC3, LTX2, KANDINSKY6, MINIMAX_H3,
    KANDINSKY6_SR, SANA_VIDEO, SANA_WM, MOTIF, WAN_ANIMATE, ANYFLOW, HELIOS,
    LATTE, COSMOS3, WAN_ANIMATE2, ANYFLOW_FAR,
    TIMM_VIT,
)  # fmt: skip
_STORES = (
    "its blocks store keys and values for later calls, so that none may be skipped, and find tokens by their places"
)
REFUSED: dict[str, str] = {
    "SanaWMLTX2RefinerTransformer3DModel": f"{_STORES}; wrap the SanaWMTransformer3DModel that it refines",
}
"""Classes for which inference would find a wrong adapter, each with the reason for the refusal."""
REGISTERED: list[ModelAdapter] = []
"""Adapters that the user registered, in that order."""


def register_adapter(adapter: ModelAdapter) -> ModelAdapter:
    """Register an adapter for `wrap` and `load`, for the lifetime of this process.

    Adapters registered later take precedence over earlier ones, and all of them over those of the package.

    Args:
        adapter: the declaration; registering the same object again changes nothing.

    Returns:
        The same object.

    Raises:
        InputError: the argument is not a ModelAdapter, or another adapter has its name.
    """
    if not isinstance(adapter, ModelAdapter):
        raise InputError(f"register_adapter got a {type(adapter).__name__}; give it a tokdyn.adapters.ModelAdapter.")
    for other in (*REGISTERED, *ADAPTERS):
        if other.name == adapter.name and other is not adapter:
            raise InputError(f"another adapter is already called {adapter.name!r}; give this one a name of its own.")
    if adapter not in ADAPTERS and all(adapter is not other for other in REGISTERED):
        REGISTERED.append(adapter)
    return adapter


def known_adapters() -> tuple[ModelAdapter, ...]:
    """Return all declared adapters, in order of precedence."""
    return (*reversed(REGISTERED), *ADAPTERS)


def declared_adapter(model: nn.Module) -> ModelAdapter | None:
    """Return the adapter declared for the model's class or for its nearest base class; None if there is none."""
    for base in type(model).__mro__:
        for adapter in known_adapters():
            if base.__name__ in adapter.classes and (adapter.fits is None or adapter.fits(model)):
                return adapter
    return None


def adapter_for(model: nn.Module) -> ModelAdapter:
    """Return the adapter of a model, inferred from its structure if none is declared.

    Raises:
        UnsupportedModelError: the class is refused, the model is a container around a known model, or nothing can be
            inferred.
    """
    adapter = declared_adapter(model)
    if adapter is not None:
        return adapter
    refusal = _refusal(model)
    if refusal is not None:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be wrapped: {refusal}.")
    half = sum(parameter.numel() for parameter in model.parameters()) / 2
    for path, part in model.named_modules():
        size = sum(parameter.numel() for parameter in part.parameters())
        if path and declared_adapter(part) is not None and size > half:
            raise UnsupportedModelError(
                f"this {type(model).__name__} holds a {type(part).__name__} in its {path!r}; call tokdyn.wrap on the "
                f"{type(part).__name__} before it is put into another module."
            )
    inferred = infer(model)
    if isinstance(inferred, ModelAdapter):
        return inferred
    raise UnsupportedModelError(
        f"{type(model).__name__} has no adapter; docs/adapters.md shows how to write one. Inferring one failed: "
        f"{inferred}. Known classes are {', '.join(name for one in known_adapters() for name in one.classes)}."
    )


def _refusal(model: nn.Module) -> str | None:
    """Return why a model of this class is refused; None if it is not."""
    names = [base.__name__ for base in type(model).__mro__]
    if any("ControlNet" in name for name in names):
        return "the output of each block of a ControlNet is used by another model; wrap that model instead"
    return next((REFUSED[name] for name in names if name in REFUSED), None)


def _reduce(adapter: ModelAdapter) -> tuple[Any, ...]:
    """Let copy and pickle store an adapter of the package by its name, because its functions cannot be pickled."""
    if any(adapter is own for own in ADAPTERS):
        return _by_name, (adapter.name,)
    return object.__reduce_ex__(adapter, 4)  # type: ignore[return-value]


def _by_name(name: str) -> ModelAdapter:
    return next(adapter for adapter in ADAPTERS if adapter.name == name)


copyreg.pickle(ModelAdapter, _reduce)
