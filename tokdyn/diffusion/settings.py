"""Define the settings of sampling. They load no tensor code, so that `--help` can list them at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from tokdyn.section import Section

if TYPE_CHECKING:
    from tokdyn.ops.schedules import Curve

BetaSchedule = Literal["linear", "squaredcos_cap_v2", "scaled_linear"]
SchedulerName = Literal["ddpm", "ddim", "dpm", "euler"]
GuidanceChannels = Literal["all", "three"]


def _ordered(interval: tuple[float, float]) -> tuple[float, float]:
    """Return an interval of noise levels; raise a ValueError unless it is ascending and in [0, 1]."""
    if not 0.0 <= interval[0] <= interval[1] <= 1.0:
        raise ValueError("expected two noise levels between 0 and 1, the lower one first")
    return interval


Steps = Annotated[int, Field(ge=1, le=100_000)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _shares(curve: Curve) -> Curve:
    """Return points (noise level, share); raise an error unless the levels ascend and the shares are in [0, 1]."""
    from tokdyn.ops.schedules import check_curve

    check_curve(curve, 0.0, 1.0)
    return curve


Points = Annotated[tuple[tuple[float, float], ...], AfterValidator(_shares)]
"""Points (noise level, share), between which the share is interpolated linearly."""
Drop = Share | Points
"""A tail drop: a share of the kept tokens, constant or depending on the noise level."""
GuidanceScale = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Interval = Annotated[tuple[float, float], AfterValidator(_ordered)]


class Sampler(Section):
    """The settings of sampling.

    Attributes:
        scheduler: ``ddpm``, ``ddim`` or ``dpm`` for a noise objective, ``euler`` for a flow; None takes ddpm or euler.
        steps: sampling steps per image.
        guidance: scale of classifier-free guidance; 1 turns it off, and the unconditional branch is not computed.
        guidance_channels: guide ``all`` channels of the prediction, or the first ``three`` as the public DiT code does.
        guidance_interval: lowest and highest noise level (see ``tokdyn.diffusion.objective``) at which guidance acts
            (arXiv 2404.07724); at other levels the unconditional branch is not computed.
        tail_drop: share of the kept tokens to drop, the least probable first; or points (noise level, share) with
            ascending levels, between which it is interpolated linearly. Level 1 is pure noise.
        uncond_tail_drop: tail drop of the unconditional branch (Lite-CFG, arXiv 2603.06351); None takes `tail_drop`.
        clip: clamp each prediction of the clean image to [-1, 1]: right for pixels, wrong for latents.
    """

    scheduler: SchedulerName | None = None
    steps: Steps = 250
    guidance: GuidanceScale = 1.0
    guidance_channels: GuidanceChannels = "all"
    guidance_interval: Interval = (0.0, 1.0)
    tail_drop: Drop = 0.0
    uncond_tail_drop: Drop | None = None
    clip: bool = False

    def guided_at(self, level: float) -> bool:
        """Return whether guidance acts at a noise level."""
        return self.guidance != 1.0 and self.guidance_interval[0] <= level <= self.guidance_interval[1]
