"""Define on what a training is worked out, in settings that are read before torch is loaded."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tokdyn.section import Positive, Section

Share = Annotated[float, Field(gt=0.0, le=1.0)]


class ScalingSettings(Section):
    """On what a training is worked out, with --dry-run.

    Attributes:
        gpus: GPUs that train together, over all nodes.
        gpu: The kind of GPU; docs/scaling.md lists what is taken from its data sheet.
        utilisation: Share of the published FLOPs per second that training reaches while it computes; an assumption.
        link_utilisation: Share of the published bandwidth that collectives reach; an assumption.
        sharding: What each GPU holds of weights, gradients and moments: all of them (none), or a shard (full); null
            takes what the recipe says.
    """

    gpus: Positive
    gpu: Literal["h100", "h200", "a100"] = "h100"
    utilisation: Share = 0.35
    link_utilisation: Share = 0.7
    sharding: Literal["none", "full"] | None = None
