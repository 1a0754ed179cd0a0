"""Open a diffusers scheduler for the process that a model was trained on and for any number of steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokdyn.diffusion.objective import Objective
from tokdyn.diffusion.settings import SchedulerName
from tokdyn.errors import RecipeError

# Half the log signal-to-noise ratio at which the deterministic solvers start. The cosine schedule has lower ones, at
# which predicting an image means dividing by an alpha near 0. diffusers' `lambda_min_clipped` has the same purpose.
_LOWEST_HALF_LOG_SNR = -5.2


def default_scheduler(objective: Objective) -> SchedulerName:
    """Return the scheduler that DiT (noise) or SiT (flow) samples with: "ddpm" or "euler"."""
    return "euler" if objective.kind == "flow" else "ddpm"


def open_scheduler(name: SchedulerName, steps: int, objective: Objective) -> Any:
    """Build a diffusers scheduler with its timesteps set. Its tables are on the CPU, where reading them is free.

    - ``ddpm``: ancestral sampling on timesteps spread evenly from T - 1 to 0, as DiT samples (arXiv 2102.09672).
    - ``ddim``: deterministic DDIM (arXiv 2010.02502), run as the first-order DPM-Solver++, which is the same update
      and, unlike ``DDIMScheduler``, exact when ``steps`` does not divide T.
    - ``dpm``: DPM-Solver++ 2M (arXiv 2211.01095).
    - ``euler``: Euler steps of equal length along a flow.

    Args:
        name: the scheduler.
        steps: sampling steps per image.
        objective: objective that the model was trained with.

    Raises:
        RecipeError: the scheduler cannot sample this objective, or not in so many steps.
    """
    if (name == "euler") != (objective.kind == "flow"):
        fitting = "euler" if objective.kind == "flow" else "ddpm, ddim or dpm"
        raise RecipeError(f"scheduler={name} cannot sample a {objective.kind} objective: use {fitting}.")
    import diffusers

    schedulers: Any = diffusers  # their constructors carry no types
    total = objective.num_train_timesteps
    if name == "euler":
        flow = schedulers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=total)
        flow.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps))
        flow.set_begin_index(0)
        return flow
    tables: dict[str, Any] = {"num_train_timesteps": total, "trained_betas": objective.betas.tolist()}
    if name == "ddpm":
        if not 2 <= steps <= total:
            raise RecipeError(
                f"scheduler=ddpm takes 2 to {total} steps, not {steps}: change steps, or use ddim for a single one."
            )
        variance = "learned_range" if objective.learn_sigma else "fixed_small"
        ancestral = schedulers.DDPMScheduler(**tables, variance_type=variance, clip_sample=False)
        ancestral.set_timesteps(timesteps=_spread(total - 1, steps))
        return ancestral
    solver = schedulers.DPMSolverMultistepScheduler(**tables, solver_order=1 if name == "ddim" else 2)
    solver.set_timesteps(timesteps=_trailing(solver, name, steps))
    solver.set_begin_index(0)
    return solver


def _spread(last: int, steps: int) -> list[int]:
    """Return ``steps`` timesteps spread evenly from ``last`` to 0, both included."""
    timesteps: NDArray[np.float64] = np.linspace(last, 0, steps).round()
    return [int(timestep) for timestep in timesteps]


def _trailing(solver: Any, name: str, steps: int) -> list[int]:
    """Return ``steps`` equally spaced timesteps that end one spacing above the clean image (arXiv 2305.08891).

    Raises:
        RecipeError: there are fewer usable timesteps.
    """
    usable = int((solver.lambda_t >= _LOWEST_HALF_LOG_SNR).sum())
    if not 1 <= steps <= usable:
        raise RecipeError(
            f"scheduler={name} takes 1 to {usable} steps on this noise schedule, not {steps}: change steps."
        )
    return [int(timestep) - 1 for timestep in np.linspace(usable, 0, steps, endpoint=False).round()]
