"""Which adapter a model gets: one that a user registered, one that comes with the package, or one that is inferred."""

from __future__ import annotations

from torch import nn

from tokdyn.adapters.base import ModelAdapter
from tokdyn.adapters.facebook import DC_DIT, FACEBOOK
from tokdyn.adapters.flux import CHROMA, FLUX, FLUX2
from tokdyn.adapters.image_only import DIT, PIXART, SANA
from tokdyn.adapters.infer import infer
from tokdyn.adapters.mmdit import AURAFLOW, COGVIEW3, COGVIEW4, QWEN, SD3
from tokdyn.adapters.single_stream import LUMINA2, ZIMAGE
from tokdyn.adapters.timm_vit import TIMM_VIT
from tokdyn.adapters.video import COGVIDEOX, HUNYUAN, LTX, SKYREELS, WAN
from tokdyn.errors import InputError, UnsupportedModelError

ADAPTERS: tuple[ModelAdapter, ...] = (
    FACEBOOK, DC_DIT, DIT, PIXART, SD3, FLUX, ZIMAGE, WAN, LTX, SANA,
    QWEN, FLUX2, HUNYUAN, COGVIDEOX, LUMINA2, AURAFLOW, CHROMA, SKYREELS, COGVIEW4, COGVIEW3, TIMM_VIT,
)  # fmt: skip
REFUSED: dict[str, str] = {
    "WanVACETransformer3DModel": "its control blocks have a stream of their own and add to the others in between; use "
    "a WanTransformer3DModel",
}
"""Classes whose structure would be misread, and why they are left alone."""
_REGISTERED: list[ModelAdapter] = []


def register_adapter(adapter: ModelAdapter) -> ModelAdapter:
    """Let `wrap` and `load` know a family of models, for as long as this process runs.

    Adapters that were registered later are asked first, those of the package last.

    Args:
        adapter: the declaration; registering the same object again changes nothing.

    Returns:
        The same object.

    Raises:
        InputError: it is no adapter, or another one has its name.
    """
    if not isinstance(adapter, ModelAdapter):
        raise InputError(f"got a {type(adapter).__name__}; register_adapter takes a tokdyn.adapters.ModelAdapter.")
    for other in (*_REGISTERED, *ADAPTERS):
        if other.name == adapter.name and other is not adapter:
            raise InputError(f"there is an adapter called {adapter.name!r} already; give this one another name.")
    if adapter not in ADAPTERS and all(adapter is not other for other in _REGISTERED):
        _REGISTERED.append(adapter)
    return adapter


def known_adapters() -> tuple[ModelAdapter, ...]:
    """All adapters, in the order in which they are asked."""
    return (*reversed(_REGISTERED), *ADAPTERS)


def declared_adapter(model: nn.Module) -> ModelAdapter | None:
    """The adapter of a model, by the name of its class or of one that it derives from."""
    for base in type(model).__mro__:
        for adapter in known_adapters():
            if base.__name__ in adapter.classes and (adapter.fits is None or adapter.fits(model)):
                return adapter
    return None


def adapter_for(model: nn.Module) -> ModelAdapter:
    """The adapter of a model, inferred from its structure if none is declared for it.

    Raises:
        UnsupportedModelError: there is none, and none can be inferred.
    """
    adapter = declared_adapter(model)
    if adapter is not None:
        return adapter
    refusal = _refusal(model)
    if refusal is not None:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be wrapped: {refusal}.")
    half = sum(parameter.numel() for parameter in model.parameters()) / 2
    for path, part in model.named_modules():
        if path and declared_adapter(part) is not None and sum(each.numel() for each in part.parameters()) > half:
            raise UnsupportedModelError(
                f"this {type(model).__name__} holds a {type(part).__name__} in its {path!r}; wrap that one, before "
                "others wrap it."
            )
    found = infer(model)
    if isinstance(found, ModelAdapter):
        return found
    raise UnsupportedModelError(
        f"no adapter knows {type(model).__name__}; docs/adapters.md shows how to write one. None can be inferred "
        f"either: {found}. Known are {', '.join(name for each in known_adapters() for name in each.classes)}."
    )


def _refusal(model: nn.Module) -> str | None:
    """Why a model is refused without a look at its structure."""
    names = [base.__name__ for base in type(model).__mro__]
    if any("ControlNet" in name for name in names):
        return "a ControlNet hands what each of its blocks returns to another model; wrap that one"
    return next((REFUSED[name] for name in names if name in REFUSED), None)
