"""What every method's configuration shares."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Method(BaseModel):
    """An immutable, strict configuration: one object serves Python, YAML, JSON and the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")
