"""Draw classes with a class-conditional model."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from tokdyn.attach import attachment_of, reset
from tokdyn.cost import stats
from tokdyn.diffusion.guidance import tail_drop_error, takes_tail_drop
from tokdyn.diffusion.records import StepState
from tokdyn.host import settle_memory
from tokdyn.pipelines import set_tail_drop
from tokdyn.playground.kept import KeptCells, watching
from tokdyn.playground.scene import Drawn, Show, Sketch
from tokdyn.playground.settings import PlaygroundConfig, Wanted
from tokdyn.playground.stacks import acting
from tokdyn.playground.streaming import Clock
from tokdyn.playground.studio import Offer, cached_steps, chosen_steps
from tokdyn.recipe.explain import explain
from tokdyn.sample.config import SampleConfig
from tokdyn.sample.costs import mean_kept, step_costs
from tokdyn.sample.drawing import draw
from tokdyn.sample.job import Job, prepare
from tokdyn.sample.labels import NO_CLASS, class_name, class_numbers

_SHARED = ("model", "vae", "ema", "precision", "device", "steps", "seed")
_WARM_UP = 2  # steps that are drawn before times count


class ClassStudio:
    """Draws classes with a class-conditional model; a `Studio`.

    Args:
        config: the settings.

    Raises:
        TokdynError: the model cannot be read, or a setting does not fit it.
    """

    def __init__(self, config: PlaygroundConfig) -> None:
        settle_memory()
        self.alone, self._shown = threading.Lock(), config.shown
        given = {name: getattr(config, name) for name in _SHARED}
        job = prepare(SampleConfig(**given, scheduler=config.scheduler, count=1))
        if config.scheduler is None and job.scheduler == "ddpm":  # needs many steps
            job = prepare(SampleConfig(**given, scheduler="ddim", count=1))
        self._job: Job = job
        own, routes = attachment_of(job.model), takes_tail_drop(job.model)
        names = [class_name(label, job.info, job.model) for label in range(job.model.config.num_classes)]
        self.offer = Offer(
            title=job.info.name,
            what="class",
            subjects=(*dict.fromkeys(names), NO_CLASS),
            budgets=routes or (own is not None and own.takes("tail_drop")),
            counted="FLOPs of the whole model",
            full="Full budget" if routes or own is not None else "Dense",
            begin=Wanted(
                subject=names[0], seed=config.seed, steps=config.steps, guidance=config.guidance,
                tail_drop=config.tail_drop, methods=config.methods,
            ),
        )  # fmt: skip
        self.draw(self.offer.begin.model_copy(update={"steps": min(_WARM_UP, config.steps)}), lambda sketch: None)

    def draw(self, wanted: Wanted, show: Show) -> Drawn:
        """See `Studio`."""
        job = self._asked(wanted)
        model, chosen = job.model, chosen_steps(wanted.steps, self._shown)
        keep: NDArray[np.bool_] | None = None
        with ExitStack() as stack:
            stack.enter_context(acting(model, wanted.methods))
            stack.callback(_settle, model)
            if not takes_tail_drop(model):
                _set_budget(model, wanted)
            kept = stack.enter_context(watching(model))
            clock = Clock(job.device)

            def callback(step: StepState) -> None:
                nonlocal keep
                with clock.paused():
                    found = _kept(step, kept)
                    if step.index not in chosen:
                        show(None)
                        return
                    keep = found
                    show(Sketch(step.index + 1, wanted.steps, step.level, job.decoder(step.x0()[:1])[0], keep))

            pixels, records = draw(job, job.config.sampler(job.config.tail_drop[0], job.clip), [0], callback)
            seconds = clock.stop()
            costs = step_costs(model, records, 1)
            cached = cached_steps(stats(model)) if attachment_of(model) is not None else 0
        gflops = [cost.gflops for cost in costs if cost.gflops is not None]
        total = sum(gflops) if len(gflops) == len(costs) else None
        return Drawn(pixels[0], keep, len(costs), seconds, total, mean_kept(costs), cached)

    def _asked(self, wanted: Wanted) -> Job:
        """Return the job of one picture.

        Raises:
            RecipeError: there is no such class, or a setting is wrong.
        """
        job, settings = self._job, {"seed": wanted.seed, "steps": wanted.steps, "guidance": wanted.guidance}
        labels = class_numbers((wanted.subject,), job.info, job.model)
        budget: dict[str, Any] = {}
        if takes_tail_drop(job.model):
            lite = wanted.uncond_tail_drop if wanted.guidance != 1.0 else None
            budget = {"tail_drop": (wanted.tail_drop,), "uncond_tail_drop": lite}
        try:
            config = SampleConfig.model_validate({**job.config.model_dump(), **settings, **budget})
        except ValidationError as error:
            raise explain(SampleConfig, error, "settings") from error
        return replace(job, config=config, classes=labels)


def _set_budget(model: Any, wanted: Wanted) -> None:
    """Set the tail drop of a wrapped model.

    Raises:
        UnsupportedModelError: it has no Chunking, so that it keeps every token.
    """
    if wanted.tail_drop or wanted.uncond_tail_drop:
        attachment = attachment_of(model)
        if attachment is None or not attachment.takes("tail_drop"):
            raise tail_drop_error(model)
        uncond = wanted.tail_drop if wanted.uncond_tail_drop is None else wanted.uncond_tail_drop
        guided = wanted.guidance != 1.0
        set_tail_drop(model, {"cond": wanted.tail_drop, "uncond": uncond} if guided else wanted.tail_drop)


def _settle(model: Any) -> None:
    """Forget the trajectory and the budget of a picture, which may have been cancelled in the middle."""
    attachment = attachment_of(model)
    if attachment is not None:
        attachment.set(tail_drop=None)
        reset(model)


def _kept(step: StepState, kept: KeptCells) -> NDArray[np.bool_] | None:
    """Return the tokens that were computed by themselves in a step, (R, C), as the router and methods decided."""
    watched, routed = kept.take(), step.keep()
    if routed is None:
        return watched
    own: NDArray[np.bool_] = routed[0].view(step.routing.grid).cpu().numpy()
    return own if watched is None or watched.shape != own.shape else own & watched
