"""Heads and MLP channels that depend on the timestep, and MLP tokens that depend on the image.

Source: DyDiT, arXiv 2410.03456.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from tokdyn.errors import InputError
from tokdyn.methods.base import Method, Stage, Traits


class DynamicWidth(Method):
    """Settings of dynamic width; routers are trained with the model, at inference what is off is not computed.

    Attributes:
        target: share of the blocks' FLOPs that training ends up with.
        heads: let the timestep choose attention heads.
        channels: let the timestep choose groups of MLP channels, as many groups as heads.
        tokens: let each token choose whether the MLP sees it.
        temperature: of the sigmoid through which gates get their gradient.
    """

    target: float = Field(default=0.7, gt=0.0, le=1.0)
    heads: bool = True
    channels: bool = True
    tokens: bool = True
    temperature: float = Field(default=5.0, gt=0.0)

    @model_validator(mode="after")
    def _does_something(self) -> DynamicWidth:
        if not (self.heads or self.channels or self.tokens):
            raise InputError("heads, channels and tokens are all off, so DynamicWidth has no effect; set one of them.")
        return self

    def traits(self, depth: int) -> Traits:
        """It owns the masks and learns to meet a FLOPs target."""
        owned = {"attention heads": self.heads, "MLP channels": self.channels, "tokens of the MLP": self.tokens}
        return Traits(
            Stage.KERNEL,
            needs_level=self.heads or self.channels,
            owns={thing: None for thing, chosen in owned.items() if chosen},
            learns="FLOPs",
        )
