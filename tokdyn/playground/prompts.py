"""Draw prompts with a pipeline of diffusers."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokdyn.attach import inner_model
from tokdyn.cost import TrajectoryStats
from tokdyn.host import open_device, settle_memory
from tokdyn.pipelines import denoisers, set_tail_drop, stats
from tokdyn.pipelines.drawing import call_arguments, draw
from tokdyn.pipelines.opening import open_pipeline
from tokdyn.playground.kept import watching
from tokdyn.playground.previews import Preview, scales_of
from tokdyn.playground.scene import Drawn, Show, Sketch
from tokdyn.playground.settings import PipelinePlaygroundConfig, Wanted
from tokdyn.playground.stacks import acting
from tokdyn.playground.streaming import Clock
from tokdyn.playground.studio import Offer, cached_steps, chosen_steps

_STEPS, _GUIDANCE = 25, 4.0  # where a pipeline has no default


class PromptStudio:
    """Draws prompts with a pipeline of diffusers; a `Studio`.

    Args:
        config: the settings.

    Raises:
        TokdynError: the pipeline cannot be read, or has no setting of this name.
    """

    def __init__(self, config: PipelinePlaygroundConfig) -> None:
        settle_memory()
        self.alone, self._config = threading.Lock(), config
        self._device = open_device(config.device)
        self._pipe = open_pipeline(config.model, self._device, config.precision)
        self._accepted = inspect.signature(type(self._pipe).__call__).parameters
        call_arguments(self._pipe, config)  # raises where the pipeline has no such setting
        self._guided = "guidance_scale" in self._accepted
        begin = Wanted(
            subject=str(config.prompts[0]),
            seed=config.seed,
            steps=int(self._begin(config.steps, "num_inference_steps", _STEPS)),
            guidance=self._begin(config.guidance, "guidance_scale", _GUIDANCE) if self._guided else 1.0,
            methods=config.methods,
        )
        self.offer = Offer(
            title=config.model,
            what="prompt",
            subjects=tuple(map(str, config.prompts)),
            budgets=False,
            counted="FLOPs of the transformer's blocks and of the methods",
            full="Dense",
            begin=begin,
        )
        with acting(self._pipe, config.methods):
            pass  # raises where they do not fit

    def draw(self, wanted: Wanted, show: Show) -> Drawn:
        """See `Studio`."""
        config, pipe = self._config, self._pipe
        settings = {"prompts": (wanted.subject,), "steps": wanted.steps}
        asked = config.model_copy(update={**settings, "guidance": wanted.guidance if self._guided else None})
        (arguments,) = call_arguments(pipe, asked)
        chosen = chosen_steps(wanted.steps, config.shown)
        keep: NDArray[np.bool_] | None = None
        with ExitStack() as stack:
            stack.enter_context(acting(pipe, wanted.methods))
            if wanted.tail_drop or wanted.uncond_tail_drop:
                uncond = wanted.tail_drop if wanted.uncond_tail_drop is None else wanted.uncond_tail_drop
                set_tail_drop(pipe, {"cond": wanted.tail_drop, "uncond": uncond})
            kept = stack.enter_context(watching(*map(inner_model, denoisers(pipe).values())))
            preview, clock = Preview(pipe, asked.height, asked.width), Clock(self._device)

            def stepped(index: int, latents: Tensor) -> None:
                nonlocal keep
                with clock.paused():
                    found, steps = kept.take(), len(pipe.scheduler.timesteps)
                    if index not in chosen:
                        preview.note(latents)
                        show(None)
                        return
                    keep, scales = found, scales_of(pipe.scheduler, index)
                    level = None if scales is None else scales[1] / sum(scales)
                    show(Sketch(index + 1, steps, level, preview.picture(index, latents), keep))

            pixels = draw(pipe, {**arguments, **self._callback(stepped)}, wanted.seed)
            seconds = clock.stop()
            found = stats(pipe)
        gflops = None if found.flops is None else found.flops / 1e9
        return Drawn(pixels[0], keep, len(found.steps), seconds, gflops, _kept_share(found), cached_steps(found))

    def _begin(self, given: float | None, name: str, otherwise: float) -> float:
        """Return a setting, the default that the pipeline has for it, or another value."""
        default = self._accepted[name].default if name in self._accepted else None
        return given if given is not None else default if isinstance(default, (int, float)) else otherwise

    def _callback(self, stepped: Callable[[int, Tensor], None]) -> dict[str, Any]:
        """Return the argument by which the pipeline tells what it has made after each step; {} if it tells nothing."""

        def at_end(pipe: Any, index: int, timestep: Any, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
            stepped(index, tensors["latents"])
            return tensors

        if "callback_on_step_end" in self._accepted:
            return {"callback_on_step_end": at_end}
        if "callback" in self._accepted:
            return {"callback": lambda index, timestep, latents: stepped(index, latents)}
        return {}


def _kept_share(found: TrajectoryStats) -> float | None:
    """Return the mean share of the tokens that blocks computed; None if they computed all, or if none ran."""
    shares = [count / call.cells for call in found.calls for count in call.kept if count is not None]
    share = fmean(shares) if shares else 1.0
    return None if share == 1.0 else share
