"""Define the section `model` of a recipe: a kind, a named size, and arguments of that model's constructor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, cast

from pydantic import ConfigDict, model_validator

from tokdyn.models.arguments import ARGUMENTS, TARGET, checked, require_size
from tokdyn.models.sizes import dc_dit_settings, dit_settings, renamed_settings
from tokdyn.recipe.explain import nearest
from tokdyn.section import Section

BASE = "base"
"""Name of a model that takes its sizes from `upcycle.base`, the pretrained model that it starts from."""
DERIVED = {
    "sample_size": "data.size",
    "in_channels": "data.channels",
    "num_classes": "data.num_classes",
    "learn_sigma": "objective.learn_sigma",
    "out_channels": "objective.learn_sigma",
}
"""Arguments of a model's constructor that other sections set, each with the setting that decides it."""


class ModelSettings(Section):
    """The network to train.

    Any argument of the model's constructor may be added, such as `depth: 6`; it overrides the named size. Image size,
    channels, number of classes and learn_sigma are set by the sections `data` and `objective`.

    Attributes:
        kind: "dcdit" (dynamic chunking) or "dit" (fixed patches).
        name: A named size: "S", "B", "L", "XL" or "tiny", for a "dit" with the patch size, as in "S/2"; or "base",
            which takes the sizes of `upcycle.base`.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: Literal["dit", "dcdit"] = "dcdit"
    name: str = "tiny"

    @property
    def overrides(self) -> dict[str, Any]:
        """The arguments of the constructor that this section sets beside the named size."""
        return dict(self.__pydantic_extra__ or {})

    @property
    def target(self) -> float:
        """N: one of N tokens should be kept; 1.0 for a "dit"."""
        if self.kind == "dit":
            return 1.0
        return float(self.overrides.get("target", TARGET))

    @property
    def parameters(self) -> int:
        """The number of parameters, or a little less; 0 of a model that takes its sizes from a base."""
        return 0 if self.name == BASE else require_size({**self._named_size(), **self.overrides})

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, given: Any) -> Any:
        """Rename settings in recipes that an earlier version of tokdyn saved."""
        if not isinstance(given, Mapping) or given.get("kind", "dcdit") != "dcdit":
            return given
        return renamed_settings(given)

    @model_validator(mode="after")
    def _check_overrides(self) -> Self:
        arguments = ARGUMENTS[self.kind]
        settable = [name for name in arguments if name not in DERIVED]
        for key, value in self.overrides.items():
            if key in DERIVED:
                raise ValueError(f"'{key}' is set by {DERIVED[key]}; set that instead")
            if key not in arguments:
                raise ValueError(f"'{key}' is not an argument of {self.kind}{nearest(key, settable)}")
            cast(dict[str, Any], self.__pydantic_extra__)[key] = checked(self.kind, key, value)
        require_size({**self._named_size(), **self.overrides})
        return self

    def _named_size(self) -> dict[str, Any]:
        """Return the arguments that the name stands for; raise an InputError if there is no size of this name."""
        if self.name == BASE:
            return {}
        return {"dit": dit_settings, "dcdit": dc_dit_settings}[self.kind](self.name)  # an InputError is a ValueError
