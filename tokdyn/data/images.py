"""Read images from a folder or zip with one folder per class, as a data set."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokdyn.data.base import Dataset, to_signed
from tokdyn.data.classes import ClassFolders, class_folders
from tokdyn.data.decode import decode, quiet
from tokdyn.data.preload import decode_all
from tokdyn.data.sources import EXTENSIONS, Labelled, ReadsAhead, Source
from tokdyn.errors import DataError

_NAMED = 5  # number of files or classes that a message lists


class ImageDataset(Dataset):
    """Images of a folder or zip, resized and centre-cropped, labelled by the first folder of their path.

    `tokdyn.data.classes` numbers the folders; if no image is in a folder, all form one class "all". Small sets are
    decoded at the start and held in memory as bytes; with on_error "skip", unreadable images are then left out. Larger
    sets are decoded on demand; with "skip", the next readable image is then read in place of an unreadable one, so that
    the length of an epoch does not depend on what has been read so far.
    """

    def __init__(
        self,
        source: Source,
        size: tuple[int, int],
        channels: int = 3,
        num_classes: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        in_memory: bool | None = None,
        memory_limit: int = 2 * 1024**3,
    ) -> None:
        """List the files and decode them if they fit into memory.

        Args:
            source: folder or zip of images.
            size: (rows, columns) in pixels.
            channels: 1 (grey), 3 (RGB) or 4 (RGBA).
            num_classes: expected number of classes; 1 puts all images into one class "all".
            on_error: "raise" the error of an unreadable image, or "skip" the image with a warning.
            in_memory: hold decoded images in memory; None does so if they take at most `memory_limit` bytes.
            memory_limit: bytes that decoded images may take if `in_memory` is None.

        Raises:
            DataError: there are no images, only some of them are in class folders, the number of classes is not the
                expected one, or an image cannot be read.
        """
        self.source = source
        self.shape = (channels, *size)
        self.on_error = on_error
        self.names = source.names()
        self.class_names, self.labels = _classes(source, self.names, num_classes)
        self._broken: dict[str, str] = {}
        self._identity: dict[str, object] | None = None
        self._pixels: Tensor | None = None
        if in_memory is None:
            in_memory = len(self.names) * int(np.prod(self.shape)) <= memory_limit
        if in_memory:
            self._load()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.names)

    def fetch(self, indices: Sequence[int], flips: Sequence[bool] | None = None) -> tuple[Tensor, Tensor, list[int]]:
        """Read images; see `Dataset.fetch`."""
        wanted = self._checked(indices, len(self))
        if self._pixels is not None:
            used, pixels = wanted.tolist(), self._pixels[torch.from_numpy(wanted)]
        else:
            if isinstance(self.source, ReadsAhead):
                self.source.bring([self.names[index] for index in wanted.tolist()])
            used, pixels = [], torch.empty(len(wanted), *self.shape, dtype=torch.uint8)
            with quiet():
                for place, index in enumerate(wanted.tolist()):
                    index, image = self._next_readable(index)
                    used.append(index)
                    pixels[place] = torch.from_numpy(image)
        return to_signed(pixels, flips), torch.from_numpy(self.labels[used]), used

    def read_ahead(
        self, upcoming: Callable[[], tuple[Sequence[int], Sequence[bool] | None]], share: float = 0.0
    ) -> None:
        """Begin to read images of a later batch, if they are remote and not in memory; see `Dataset.read_ahead`."""
        if self._pixels is None and isinstance(self.source, ReadsAhead):
            self.source.read_ahead(lambda: [self.names[index] for index in upcoming()[0]], share)

    def identity(self) -> dict[str, object]:
        """Return a description of the content: names, labels, sizes and CRC-32 of the files, and the shape of images.

        It is computed once. See `Dataset.identity`.
        """
        if self._identity is None:
            listing = "\n".join(f"{label} {name}" for label, name in zip(self.labels, self.names, strict=True))
            files = sha256(listing.encode(errors="surrogateescape"))  # names need not be valid UTF-8
            content = sha256(self.source.digests(self.names).astype("<i8").tobytes())
            self._identity = {
                "kind": "images", "shape": list(self.shape), "files": files.hexdigest(), "content": content.hexdigest(),
            }  # fmt: skip
        return self._identity

    def _decode(self, index: int) -> NDArray[np.uint8]:
        """Return one image (C, H, W)."""
        name = self.names[index]
        return decode(self.source.read(name), f"{name} in {self.source.path}", self.shape[1:], self.shape[0])

    def _next_readable(self, index: int) -> tuple[int, NDArray[np.uint8]]:
        """Return an image (C, H, W) and its index; with on_error "skip", the first readable image from `index` on."""
        for place in range(index, index + len(self)):
            place %= len(self)
            if self.names[place] in self._broken:
                continue
            try:
                return place, self._decode(place)
            except DataError as error:
                if self.on_error == "raise":
                    raise
                self._broken[self.names[place]] = str(error)
                warnings.warn(
                    f"{len(self._broken)} unreadable image(s) skipped so far, the last: {error}", stacklevel=2
                )
        raise DataError(f"None of the {len(self)} images in {self.source.path} can be read.")

    def _load(self) -> None:
        """Decode all images into memory; with on_error "skip" leave out unreadable ones, otherwise raise an error."""
        with quiet():
            title, stop = f"Decoding {self.source.path.name}", self.on_error == "raise"
            pixels, broken = decode_all(self._decode, len(self.names), self.shape, title, stop)
        if broken and stop:
            raise next(iter(broken.values()))
        if broken:
            self._leave_out(broken)
            pixels = pixels[[index for index in range(len(pixels)) if index not in broken]]
        self._pixels = pixels

    def _leave_out(self, broken: dict[int, DataError]) -> None:
        """Remove unreadable images from the list, with a warning. The labels of the others do not change."""
        if len(broken) == len(self.names):
            raise DataError(f"None of the {len(self)} images in {self.source.path} can be read: {broken[0]}")
        names = [self.names[index] for index in broken]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        warnings.warn(
            f"{len(names)} of {len(self.names)} images in {self.source.path} cannot be read and are left out: "
            f"{', '.join(names[:_NAMED])}{more}.",
            stacklevel=4,
        )
        self._broken = {self.names[index]: str(error) for index, error in broken.items()}
        self.labels = np.delete(self.labels, list(broken))
        self.names = [name for index, name in enumerate(self.names) if index not in broken]


def _classes(source: Source, names: list[str], num_classes: int | None) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the class names and the labels (N,) of N files.

    Raises:
        DataError: there are no files, only some of them are in class folders, or the number of classes is not
            `num_classes`.
    """
    if not names:
        extensions = " ".join(sorted(EXTENSIONS))
        raise DataError(f"{source.path} holds no images: give files ending in one of {extensions}, in class folders.")
    at_root = [name for name in names if "/" not in name]
    if isinstance(source, Labelled):
        classes = source.classes(num_classes)
    elif num_classes == 1 or len(at_root) == len(names):
        classes = ClassFolders(("all",), np.zeros(len(names), dtype=np.int64), None)
    elif at_root:
        raise DataError(
            f"{source.path} holds {len(at_root)} image(s) beside its class folders, such as {at_root[0]}: move them "
            "into a class folder, remove them, or set num_classes=1 to put all images into one class."
        )
    else:
        classes = class_folders(names)
    count = len(classes.names)
    if num_classes is not None and num_classes != count:
        shown = ", ".join(classes.names[:_NAMED]) + (", ..." if count > _NAMED else "")
        kind = "class(es)" if isinstance(source, Labelled) else "class folder(s)"
        raise DataError(
            f"{source.path} holds {count} {kind} ({shown}), but num_classes={num_classes} is expected: set "
            f"num_classes={count} (data.num_classes={count} for a recipe), or 1 to put all images into one class."
        )
    nested = {name.split("/", 2)[1] for name in names if name.count("/") >= 2}
    if (
        not isinstance(source, Labelled)
        and num_classes != 1
        and count == 1
        and len(nested) > 1
        and all(name.count("/") >= 2 for name in names)
    ):
        warnings.warn(
            f"All images in {source.path} lie below the one folder {classes.names[0]}, which makes one class. If its "
            f"{len(nested)} folders are the classes, set path={source.path / classes.names[0]}.",
            stacklevel=3,
        )
    return classes.names, classes.labels
