"""The format of preset files: settings of methods, the models they are for, and where their numbers come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PositiveInt, model_validator

from tokdyn.methods import FeatureCache, Method
from tokdyn.methods.registry import from_settings

TIERS = ("quality", "balanced", "fast", "fastest")
"""The names of settings, from the closest to the images without a method to the fastest. Those of a further rule for
the same model have its name in front, such as "magcache-fast"."""


def _to_methods(value: Any) -> Any:
    """Build methods from a list of their settings, or from one for each denoiser."""
    if isinstance(value, Mapping):
        return {name: _to_methods(each) for name, each in value.items()}
    if not isinstance(value, list) or not value:
        raise ValueError("give a list of methods, such as [{method: FeatureCache}], or one for each denoiser")
    return [each if isinstance(each, Method) else from_settings(each) for each in value]


def _to_lists(value: Any) -> Any:
    """Turn methods into dictionaries of their settings, without those that have their defaults."""
    if isinstance(value, Mapping):
        return {name: _to_lists(each) for name, each in value.items()}
    return [{"method": type(each).__name__, **given(each)} for each in value]


def given(method: Method) -> dict[str, Any]:
    """Return the settings of a method, as JSON data, that differ from their defaults or decide what it does."""
    settings = method.model_dump(mode="json")
    kept = set(method.model_dump(exclude_defaults=True))
    if isinstance(method, FeatureCache) and method.steps is None:
        kept |= {"rule", "threshold"} | ({"indicator"} if method.rule == "teacache" else set())
    return {name: value for name, value in settings.items() if name in kept}


Stack = Annotated[list[Method] | dict[str, list[Method]], BeforeValidator(_to_methods), PlainSerializer(_to_lists)]
"""A list of methods, or one for each denoiser by the name of its component."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Source(_Section):
    """Where numbers come from.

    Attributes:
        project: owner/name of a repository.
        commit: the commit that was read.
        file: the file, with the line.
        pull_request: the number of the pull request or issue, if they are written there.
        licence: SPDX identifier of the project's licence.
        arxiv: id of the paper.
    """

    project: str
    commit: str | None = None
    file: str | None = None
    pull_request: int | None = None
    licence: str | None = None
    arxiv: str | None = None

    def __str__(self) -> str:
        place = f" #{self.pull_request}" if self.pull_request else f"@{self.commit}" if self.commit else ""
        return f"{self.project}{place}" + (f", arXiv {self.arxiv}" if self.arxiv else "")


class Published(_Section):
    """What the authors, or others as named, have measured.

    Attributes:
        speedup: time without the methods over time with them.
        hardware: on what, and the times.
        quality: against the images without methods.
    """

    speedup: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    hardware: str | None = None
    quality: str | None = None


class Calibration(_Section):
    """How `tokdyn calibrate` found settings.

    Attributes:
        tokdyn: its version.
        prompts: number of prompts or classes that images were drawn for.
        prompts_sha256: hash of their texts.
        seeds: of the noise of each image.
        scheduler: class or name of the sampler.
        guidance: guidance scale; None is the default of the pipeline.
        fingerprints: of the model and the sampler, by the name of the denoiser.
        spread: how much the measurements differ from image to image, by the name of the denoiser.
        computed: share of computed steps, or of the FLOPs for DepthSkip, by the name of the denoiser.
    """

    tokdyn: str
    prompts: PositiveInt
    prompts_sha256: str
    seeds: list[int]
    scheduler: str
    guidance: float | None = None
    fingerprints: dict[str, str]
    spread: dict[str, dict[str, float]]
    computed: dict[str, float]


class Setting(_Section):
    """One setting of a model.

    Attributes:
        methods: a list, or one for each denoiser.
        steps: number of steps of the sampler that it was calibrated at; None if that was not published.
        published: what others have measured with it.
        source: where its numbers come from.
        calibration: how `tokdyn calibrate` found it.
        measured: what this project has measured with the real weights; None is nothing.
        note: what one should know before using it.
    """

    methods: Stack
    steps: PositiveInt | None = None
    published: Published = Published()
    source: Source | None = None
    calibration: Calibration | None = None
    measured: Published | None = None
    note: str | None = None


class Entry(_Section):
    """A model, how to recognise it, and its settings.

    Attributes:
        name: of the model.
        hub: ids on the hub.
        kind: the class of its denoisers; "class" in files.
        config: values in their configuration that tell it apart from other models of the class.
        pipelines: classes of the pipelines that it is for, if other models have the same configuration; empty is any.
        denoisers: names of the components of a pipeline that it has.
        named: whether nothing but its name tells it from other models of the same configuration.
        instead: why a cache gains nothing, or why there are no settings, and what to use; a clause for a message.
        settings: by name; empty if there are none.
    """

    name: str
    hub: list[str] = []
    kind: str = Field(alias="class")
    config: dict[str, bool | int | float | str | None] = {}
    pipelines: list[str] = []
    denoisers: list[str] = ["transformer"]
    named: bool = False
    instead: str | None = None
    settings: dict[str, Setting] = {}

    @property
    def names(self) -> list[str]:
        """Names by which it can be asked for."""
        return [self.name, *self.hub, *(each.rpartition("/")[2] for each in self.hub)]

    @property
    def fingerprint(self) -> str:
        """The part of a fingerprint that is known without the weights: the class and values in the configuration."""
        return f"{self.kind}:{','.join(f'{name}={value}' for name, value in self.config.items())}"

    @model_validator(mode="after")
    def _settings_are_for_its_denoisers(self) -> Entry:
        for name, setting in self.settings.items():
            if name != name.casefold():
                raise ValueError(f"write the name of the setting {name!r} in lower case")
            unknown = set(setting.methods) - set(self.denoisers) if isinstance(setting.methods, dict) else ()
            if unknown:
                raise ValueError(f"{name} has methods for {', '.join(unknown)}, which is none of the denoisers")
        if not self.settings and not self.instead:
            raise ValueError(f"{self.name} has neither settings nor instead")
        return self


class Family(_Section):
    """A preset file: the models of a family.

    Attributes:
        family: its name.
        models: its models.
    """

    family: str
    models: Annotated[list[Entry], Field(min_length=1)]
