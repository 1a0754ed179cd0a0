"""Limit the sizes, counts and depths of everything that is read, so that no file fills the memory or takes for ever.

Each limit is far above what honest files need, is named in its error, and is raised by an environment variable, which
the processes that load data inherit. docs/limits.md lists them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from tokdyn.errors import InputError

_MIB = 2**20


@dataclass(frozen=True)
class Limit:
    """The largest number of something that is accepted.

    Attributes:
        name: name in capitals, from which that of the environment variable is made.
        most: the largest number, unless the variable is set.
        unit: what is counted, in the plural.
        of: where it is counted, for the documentation.
    """

    name: str
    most: int
    unit: str
    of: str

    @property
    def variable(self) -> str:
        """Name of the environment variable that raises, or lowers, the limit."""
        return f"TOKDYN_MAX_{self.name}"

    @property
    def value(self) -> int:
        """The limit as it is set now.

        Raises:
            InputError: the environment variable is no positive whole number.
        """
        text = os.environ.get(self.variable, "")
        if not text:
            return self.most
        if not re.fullmatch(r"[1-9][0-9]{0,17}", text):
            raise InputError(
                f"{self.variable}={text[:40]!r} is no limit; set a whole number of {self.unit}, or unset it."
            )
        return int(text)

    def excess(self, found: int) -> str | None:
        """Return what is too much about a number that was found, for a message; None if it is within the limit."""
        most = self.value
        if found <= most:
            return None
        count = f"{found:,}" if found < 10**18 else "over 10^18"
        return f"{count} {self.unit}, more than the {most:,} that are accepted unless {self.variable} is set higher"


TEXT_BYTES = Limit("TEXT_BYTES", 16 * _MIB, "bytes", "files of prompts and of stacks")
YAML_BYTES = Limit("YAML_BYTES", _MIB // 4, "bytes", "recipes and presets")
YAML_NODES = Limit("YAML_NODES", 5_000, "values", "YAML, where an alias counts as much as what it stands for")
YAML_DEPTH = Limit("YAML_DEPTH", 32, "levels", "YAML: lists and mappings within each other")
EXTENDS = Limit("EXTENDS", 16, "recipes", "a chain of recipes that extend each other")
JSON_BYTES = Limit("JSON_BYTES", 64 * _MIB, "bytes", "JSON files, such as config.json and indices of shards")
JSON_DEPTH = Limit("JSON_DEPTH", 64, "levels", "JSON: lists and objects within each other")
TENSORS = Limit("TENSORS", 100_000, "tensors", "a checkpoint")
UNPACKED = Limit("UNPACKED", 4, "times its size", "what a checkpoint takes in memory, in sizes of its file")
TOKENS = Limit("TOKENS", 2**20, "tokens", "the table of positions that a checkpoint asks for")
DEPTH = Limit("DEPTH", 1_000, "blocks", "a model, of each kind of blocks")
PARAMETERS = Limit("PARAMETERS", 10**12, "parameters", "a model of a recipe or of a checkpoint")
ARRAY_BYTES = Limit("ARRAY_BYTES", 1024 * _MIB, "bytes", "an array of an npz that is read at once, or an image in one")
ARCHIVE_ENTRIES = Limit("ARCHIVE_ENTRIES", 10_000_000, "entries", "a zip, an npz or a set of tar shards")
SHARDS = Limit("SHARDS", 100_000, "files", "a pattern such as {000..010}.tar, or a set of tar shards")
TAR_HEADER_BYTES = Limit("TAR_HEADER_BYTES", _MIB, "bytes", "a header of a tar that says more about its next entry")
IMAGE_BYTES = Limit("IMAGE_BYTES", 512 * _MIB, "bytes", "an image file, in a zip once it is unpacked")
PIXELS = Limit("PIXELS", 2**27, "pixels", "an image, in its file and as data.size asks for it")
BATCH = Limit("BATCH", 10**7, "images", "an optimizer step")
SAMPLES = Limit("SAMPLES", 10**9, "samples", "an epoch of procedural shapes")
STEPS = Limit("STEPS", 10**12, "steps", "a run, and whatever else is counted in steps, images or seconds")
TIMESTEPS = Limit("TIMESTEPS", 10**6, "timesteps", "an objective")
CLASSES = Limit("CLASSES", 10**7, "classes", "a data set or a model")
WORKERS = Limit("WORKERS", 256, "processes", "those that load data")

LIMITS = (
    TEXT_BYTES, YAML_BYTES, YAML_NODES, YAML_DEPTH, EXTENDS, JSON_BYTES, JSON_DEPTH, TENSORS, UNPACKED, TOKENS, DEPTH,
    PARAMETERS, ARRAY_BYTES, ARCHIVE_ENTRIES, SHARDS, TAR_HEADER_BYTES, IMAGE_BYTES, PIXELS, BATCH, SAMPLES, STEPS,
    TIMESTEPS, CLASSES, WORKERS,
)  # fmt: skip
"""All limits, in the order of docs/limits.md."""
