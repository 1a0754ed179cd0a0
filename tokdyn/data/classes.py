"""Labels of image files by the class folders they lie in, one rule for training and for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LARGEST = 2**31 - 1  # a folder with a longer name is a date or a checksum, and no class number


@dataclass(frozen=True)
class ClassFolders:
    """Class folders of a set of image files.

    Attributes:
        names: folder name of each label.
        labels: (N,) int64, label of each file.
        numbers: number that each folder is named by, in the order of the labels; None unless all names are numbers and
            no two of them are equal.
    """

    names: tuple[str, ...]
    labels: NDArray[np.int64]
    numbers: tuple[int, ...] | None


def class_folders(files: Sequence[str]) -> ClassFolders:
    """Label files by the first folder of their path.

    Folders are labelled from 0 in the order of their names, which is the order of their values if all names are
    numbers: 2 comes before 10. Folders 0 to n - 1 are therefore labelled by their own numbers, padded or not.

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
