"""Label image files by the class folders that they lie in. Training and evaluation both follow this rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LARGEST = 2**31 - 1  # a larger number in a folder's name is a date or a checksum, not the number of a class


@dataclass(frozen=True)
class ClassFolders:
    """The class folders of N image files.

    Attributes:
        names: folder name of each class, in the order of the labels.
        labels: (N,) int64, label of each file.
        numbers: folder name of each class as a number; None unless all names are different numbers.
    """

    names: tuple[str, ...]
    labels: NDArray[np.int64]
    numbers: tuple[int, ...] | None


def class_folders(files: Sequence[str]) -> ClassFolders:
    """Label files by the first folder of their path.

    The folders get the labels 0, 1, ... in alphabetical order, or in numerical order (2 before 10) if all names are
    numbers. Folders named 0 to n - 1, with or without leading zeros, therefore get their own numbers as labels.

    Args:
        files: N paths with forward slashes, each with at least one folder.
    """
    folders = [file.split("/", 1)[0] for file in files]
    names = sorted(set(folders))
    numbers = None
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
        values = [int(name) for name in names]
        numbers = tuple(values) if len(set(values)) == len(values) and max(values, default=0) <= _LARGEST else None
    label_of = {name: label for label, name in enumerate(names)}
    return ClassFolders(tuple(names), np.array([label_of[folder] for folder in folders], dtype=np.int64), numbers)
