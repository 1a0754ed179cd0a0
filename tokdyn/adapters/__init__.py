"""What is known of the models that methods can be attached to: one declaration for each family."""

from __future__ import annotations

from torch import nn

from tokdyn.adapters.base import Follow, ModelAdapter, Stack
from tokdyn.adapters.facebook import DC_DIT, FACEBOOK
from tokdyn.adapters.mmdit import AURAFLOW, FLUX, FLUX2, QWEN, SD3
from tokdyn.adapters.sana import SANA
from tokdyn.adapters.sincos import DIT, PIXART
from tokdyn.adapters.single_stream import LUMINA2, ZIMAGE
from tokdyn.adapters.video import COGVIDEOX, HUNYUAN, LTX, WAN
from tokdyn.adapters.width import Cut, Width
from tokdyn.errors import UnsupportedModelError

ADAPTERS: tuple[ModelAdapter, ...] = (
    FACEBOOK, DC_DIT, DIT, PIXART, SD3, FLUX, ZIMAGE, WAN, LTX, SANA,
    QWEN, FLUX2, HUNYUAN, COGVIDEOX, LUMINA2, AURAFLOW,
)  # fmt: skip

__all__ = ["ADAPTERS", "Cut", "Follow", "ModelAdapter", "Stack", "Width", "adapter_for"]


def adapter_for(model: nn.Module) -> ModelAdapter:
    """The adapter of a model, by the name of its class or of one that it derives from.

    Raises:
        UnsupportedModelError: there is none.
    """
    names = [base.__name__ for base in type(model).__mro__]
    for name in names:
        for adapter in ADAPTERS:
            if name in adapter.classes and (adapter.fits is None or adapter.fits(model)):
                return adapter
    raise UnsupportedModelError(
        f"no adapter knows {names[0]}; docs/adapters.md shows how to write one. Known are "
        f"{', '.join(name for adapter in ADAPTERS for name in adapter.classes)}."
    )
