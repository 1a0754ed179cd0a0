"""Estimate the training of a pipeline's transformer, for `tokdyn upcycle --dry-run`, from its configuration files.

No weights are read: the transformer is built on the meta device, and its step is rehearsed on tensors without values.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokdyn.attach import attached, lora_tensors, require_peft, wrap
from tokdyn.bases.hub import pipeline_index
from tokdyn.bases.table import INDEX
from tokdyn.cost.counter import operator_formulas
from tokdyn.errors import CheckpointError
from tokdyn.files import json_object, user_path
from tokdyn.scaling.plan import Plan, worked_out
from tokdyn.scaling.settings import ScalingSettings
from tokdyn.scaling.work import Work, weights_of
from tokdyn.upcycling.conversion import attached_methods, check_method
from tokdyn.upcycling.distil_settings import DistilSettings
from tokdyn.upcycling.example_calls import check_kind, example_call
from tokdyn.upcycling.memory import rehearse, size_of
from tokdyn.upcycling.pipeline_settings import PipelineConfig
from tokdyn.upcycling.processes import Processes
from tokdyn.upcycling.students import prepare

_SAMPLING_STEPS = 50  # where a pipeline has no default


@dataclass(frozen=True)
class PipelineEstimate:
    """What training the transformer of a pipeline takes.

    Attributes:
        model: class of the transformer.
        kept_as_is: number of its own parameters.
        new: number of parameters of methods and LoRA.
        trained: number of parameters that are trained.
        tokens: shape of the latents or latent tokens of a call.
        flops_call: FLOPs of training on one call: teacher, student and backward pass; a multiply-add is 2.
        work: what a step takes, whatever computes it.
        plan: memory, bytes on the wire and time.
        uncounted: other parts of the pipeline whose memory is not known, because they have no config.json.
    """

    model: str
    kept_as_is: int
    new: int
    trained: int
    tokens: tuple[int, ...]
    flops_call: float
    work: Work
    plan: Plan
    uncounted: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate with what follows from it, for JSON."""
        entries = {**asdict(self), "plan": self.plan.as_dict()}
        del entries["work"]
        return entries

    def lines(self) -> list[tuple[str, str]]:
        """Return the estimate as pairs of a name and a text: the value with its unit."""
        lines = [
            ("kept as is", f"{self.kept_as_is:,} parameters of the {self.model}"),
            ("new", f"{self.new:,} parameters"),
            ("trained", f"{self.trained:,} parameters"),
            ("call", f"{self.flops_call / 1e12:,.2f} TFLOPs with teacher and backward pass, latents {self.tokens}"),
            *self.plan.lines(),
        ]
        return [*lines, ("not counted", ", ".join(self.uncounted))] if self.uncounted else lines


def dry_run(config: PipelineConfig, methods: Sequence[str], cluster: ScalingSettings) -> PipelineEstimate:
    """Estimate what `upcycle_pipeline` takes with these settings, without weights, images or files written.

    The blocks of each list are rehearsed once with one and once with two of them; all further ones are taken to add the
    same. FLOPs are those at the mean of the tail drops, memory is that at the smallest.

    Args:
        config: the settings.
        methods: "dc", "dydit" or both.
        cluster: the GPUs.

    Raises:
        TokdynError: a configuration is missing, the transformer is of a kind whose calls are not known, a setting does
            not fit, or the calls of a step do not divide over the GPUs.
    """
    for name in methods:
        check_method(name)
    if config.trained == "lora":
        require_peft()
    Processes(0, cluster.gpus).check_divides(config.calls)
    settings = config.distillation("dc" in methods)
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    index = _object(config.base, INDEX)
    base, call = _transformer(config, index, dtype)
    whole = _Student(base, methods, config, settings)
    flops, activations = whole.extrapolated(call)
    model, trained = whole.built()
    units, root = weights_of(model, attached(model).blocks(model), trained)
    others, uncounted = _others(config.base, index, dtype)
    teacher = size_of_meta(base) if config.trained == "all" else 0
    parts = [*attached(model).parts.parameters(), *(lora_tensors(model).values() if config.trained == "lora" else ())]
    new = sum(each.numel() for each in parts)
    work = Work(
        of="calls",
        batch=config.calls,
        micro_batch=1,
        accumulation=config.calls // cluster.gpus,
        steps=config.steps,
        precision=config.precision,
        flops=flops,
        units=units,
        root=root,
        averaged=False,
        beside=others + teacher + _calls(config, index, call, cluster.gpus),
        activations=activations,
        passes=2 if config.trained == "all" else 3,
    )
    return PipelineEstimate(
        model=type(base).__name__,
        kept_as_is=sum(each.numel() for each in base.parameters()),
        new=new,
        trained=sum(each.numel() for each in trained),
        tokens=tuple(call["hidden_states"].shape),
        flops_call=flops,
        work=work,
        plan=worked_out(work, cluster),
        uncounted=uncounted,
    )


class _Student:
    """Builds students of a transformer on the meta device, with all of its blocks or with few, and rehearses them.

    Args:
        base: the transformer, which is not changed.
        methods: names of the methods.
        config: the settings.
        settings: those of the training.
    """

    def __init__(
        self, base: nn.Module, methods: Sequence[str], config: PipelineConfig, settings: DistilSettings
    ) -> None:
        self.base, self.methods, self.config, self.settings = base, methods, config, settings
        adapter = attached(wrap(copy.deepcopy(base), [])).adapter
        self.paths = [blocks.path for blocks in adapter.blocks]

    def built(self, counts: Mapping[str, int] | None = None) -> tuple[nn.Module, list[nn.Parameter]]:
        """Return a student and what of it is trained.

        Args:
            counts: number of blocks of some lists, by their paths; None leaves all as they are.
        """
        model = copy.deepcopy(self.base)
        for path, count in (counts or {}).items():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, model.get_submodule(path)[:count])  # type: ignore[index]
        student = wrap(model.train(), attached_methods(self.methods, {"target": self.config.target}))
        teacher = self.base if self.config.trained == "all" else None
        return student, prepare(student, self.settings, teacher)

    def extrapolated(self, call: Mapping[str, Any]) -> tuple[float, int]:
        """Return FLOPs and most bytes alive of training on a call, with all blocks."""
        depths = {path: len(self.base.get_submodule(path)) for path in self.paths}  # type: ignore[arg-type]
        one = dict.fromkeys(depths, 1)
        first = self._rehearsed(one, call)
        totals = list(first)
        for path, depth in depths.items():
            if depth > 1:
                more = self._rehearsed({**one, path: 2}, call)
                totals = [total + (depth - 1) * (b - a) for total, a, b in zip(totals, first, more, strict=True)]
        return float(totals[0]), totals[1]

    def _rehearsed(self, counts: Mapping[str, int], call: Mapping[str, Any]) -> tuple[int, int]:
        """Return FLOPs at the mean tail drop and most bytes alive at the smallest, with a number of blocks."""
        drops = self.settings.tail_drops
        mean, least = (None, None) if drops is None else (sum(drops) / len(drops), min(drops))
        student, trained = self.built(counts)
        teacher = self.built(counts)[0] if self.config.trained == "all" else None
        passes = partial(rehearse, student, teacher, self.settings, trained, call, accumulating=True)
        counter = FlopCounterMode(display=False, custom_mapping=operator_formulas())
        passes(mean, counter=counter)
        return int(counter.get_total_flops()), passes(least)  # apart, since a counter keeps what is recomputed


def size_of_meta(module: nn.Module) -> int:
    """Return the bytes that the parameters and buffers of a module on the meta device stand for."""
    return sum(each.numel() * each.element_size() for each in (*module.parameters(), *module.buffers()))


def _object(base: str, file: str) -> dict[str, Any]:
    """Read a JSON file of a pipeline, from its folder or from the hub.

    Raises:
        CheckpointError: there is none.
    """
    folder = user_path(base)
    path: Path | None = folder / file
    why = "there is no such file"
    if not folder.exists():
        path, why = pipeline_index(base, file)
    if path is None or not path.is_file():
        raise CheckpointError(f"{file} of {base} cannot be read: {why}.")
    return json_object(path)


def _transformer(
    config: PipelineConfig, index: Mapping[str, Any], dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the transformer of a pipeline on the meta device, and a call of it.

    Raises:
        TokdynError: its configuration is missing or wrong, or it is of a kind whose calls are not known.
    """
    import diffusers

    settings = _object(config.base, "transformer/config.json")
    kind = str(settings.get("_class_name", index["transformer"][1]))
    settings = {name: value for name, value in settings.items() if not name.startswith("_")}
    check_kind(kind)
    builder: Any = getattr(diffusers, kind)
    known = inspect.signature(builder.__init__).parameters
    if unknown := sorted(set(settings) - set(known)):
        raise CheckpointError(f"transformer/config.json of {config.base} has {unknown[0]}, which {kind} does not take.")
    try:
        with torch.device("meta"):
            model: Any = builder(**settings)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"transformer/config.json of {config.base} makes no {kind}: {error}") from error
    nn.Module.to(model, dtype)  # without advice to load weights in another way
    return model, example_call(kind, dict(model.config), config, dtype)


def _others(base: str, index: Mapping[str, Any], dtype: torch.dtype) -> tuple[int, tuple[str, ...]]:
    """Return the bytes of the other models of a pipeline, and the names of those that have no config.json."""
    import diffusers
    import transformers

    total, uncounted = 0, []
    libraries = {"diffusers": diffusers, "transformers": transformers}
    for name, entry in index.items():
        library, kind = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        found = getattr(libraries.get(str(library)), str(kind), None)
        if name == "transformer" or not (isinstance(found, type) and issubclass(found, nn.Module)):
            continue
        builder: Any = found
        try:
            settings = _object(base, f"{name}/config.json")
            with torch.device("meta"):
                if library == "diffusers":
                    model = builder.from_config(settings)
                else:
                    model = builder(builder.config_class(**settings))
        except Exception:  # constructors of other projects raise anything
            uncounted.append(name)
        else:
            total += size_of_meta(nn.Module.to(model, dtype))
    return total, tuple(uncounted)


def _calls(config: PipelineConfig, index: Mapping[str, Any], call: Mapping[str, Any], gpus: int) -> int:
    """Return the bytes of the calls that are kept: of all prompts, or of the images that are drawn at a time."""
    import diffusers

    pipeline: Any = getattr(diffusers, str(index.get("_class_name")), None)
    default = None
    if pipeline is not None:
        known = inspect.signature(pipeline.__call__).parameters
        default = known["num_inference_steps"].default if "num_inference_steps" in known else None
    steps = config.sampling_steps or default or _SAMPLING_STEPS
    images = len(config.prompts) if config.steps_per_image is None else config.calls // gpus
    return images * int(steps) * size_of([call])
