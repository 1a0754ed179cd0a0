"""Save and load the methods of models and of whole pipelines."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tokdyn import attach
from tokdyn.adapters.clock import Level
from tokdyn.errors import CheckpointError, InputError
from tokdyn.files import user_path
from tokdyn.pipelines.controls import wrap, wrap_denoisers, wrapped_denoisers
from tokdyn.pipelines.denoisers import denoisers, is_pipeline
from tokdyn.presets import is_file

Target = TypeVar("Target")


def save(target: Any, folder: str | Path) -> Path:
    """Write the methods of a wrapped model or pipeline and their trained parts, without the models' own weights.

    Args:
        target: a wrapped model, or a container such as DistributedDataParallel around one; or a wrapped pipeline, each
            of whose denoisers gets a folder of its own, with its name.
        folder: created if it does not exist; files of an earlier call are replaced. A name that ends in .safetensors
            makes one file, for a model or a pipeline with one wrapped denoiser.

    Returns:
        The folder, or the file.

    Raises:
        InputError: it is not wrapped, the weights of the methods are offloaded, or one file is to hold the methods of
            several denoisers.
        OutputError: the folder cannot be written to.
    """
    where = user_path(folder)
    if not is_pipeline(target):
        return attach.save(target, where)
    wrapped = wrapped_denoisers(target)
    if attach.is_one_file(where):
        if len(wrapped) > 1:
            raise InputError(
                f"{where.name} is one file, and this {type(target).__name__} has methods in {' and '.join(wrapped)}; "
                "give a folder, whose name does not end in .safetensors."
            )
        return attach.save(next(iter(wrapped.values())), where)
    for name, model in wrapped.items():
        attach.save(model, where / name)
    for earlier in {where, *(where / name for name in denoisers(target))} - {where / name for name in wrapped}:
        for file in (attach.CONFIG, attach.WEIGHTS):  # of a call with other denoisers, or with a model
            (earlier / file).unlink(missing_ok=True)
    return where


def load(target: Target, folder: str | Path, level: Level | None = None) -> Target:
    """Wrap a model or pipeline, in place, with the methods that `save` wrote.

    Args:
        target: a model that is not wrapped, of the class that the methods were saved from, or a pipeline around it.
        folder: the folder, or the file, that `save` returned; for a pipeline with one denoiser, also one that was saved
            from a model. Or a preset file of `tokdyn calibrate`.
        level: as in `wrap`, in place of the one that was saved; needed if that is a function, which no file holds.

    Returns:
        The same object, wrapped.

    Raises:
        CheckpointError: a file is missing or damaged, was written for another model class or other sizes, names a
            method that is not registered here, or needs a level.
        CompositionError, UnsupportedModelError, InputError: as in `wrap`; one file is given to a pipeline with several
            denoisers; or the methods have LoRA and peft is not installed.
    """
    where = user_path(folder)
    if is_file(where):
        return wrap(target, where, level)
    if not is_pipeline(target):
        attach.load(target, where, level)  # type: ignore[type-var]
        return target
    models = denoisers(target)
    if attach.is_one_file(where) and len(models) > 1:
        raise InputError(
            f"{where.name} holds the methods of one denoiser, and this {type(target).__name__} has "
            f"{' and '.join(models)}; load it into one of them, as in tokdyn.load(pipe.{next(iter(models))}, file)."
        )
    if len(models) == 1 and (attach.is_one_file(where) or (where / attach.CONFIG).is_file()):
        folders = dict.fromkeys(models, where)
    else:
        folders = {name: where / name for name in models if (where / name / attach.CONFIG).is_file()}
    if not folders:
        raise CheckpointError(
            f"{where} holds no methods for the denoisers of this {type(target).__name__} ({', '.join(models)}); give a "
            "folder that tokdyn.save has written."
        )
    return wrap_denoisers(target, [partial(attach.load, models[name], each, level) for name, each in folders.items()])
