"""Draw prompts with a pipeline of diffusers and the methods in a folder, and write pictures, times and costs."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokdyn import __version__
from tokdyn.attach import CONFIG, WEIGHTS, is_one_file, read_settings
from tokdyn.errors import InputError, OutputError, RecipeError
from tokdyn.files import json_object, replacing, require_folder
from tokdyn.host import describe, open_device, settle_memory
from tokdyn.pipelines import load, set_tail_drop, stats
from tokdyn.pipelines.drawing import call_arguments, draw
from tokdyn.pipelines.opening import open_pipeline
from tokdyn.presets import is_file, read
from tokdyn.progress import progress
from tokdyn.prompts import images_of, title_of
from tokdyn.report.grids import image_grid, on_cells
from tokdyn.report.pixels import write_png
from tokdyn.sample.config import PipelineSampleConfig
from tokdyn.team import ALONE, Team

RESULT, GRID = "sample.json", "grid.png"
_MILLISECONDS = 80  # a frame of a video is shown


@dataclass(frozen=True)
class Drawn:
    """What was drawn for one prompt.

    Attributes:
        prompt: the text, or the arguments as JSON.
        seed: of the noise.
        file: a PNG file, or an animated WebP file of a video.
        seconds: time of the whole call.
        denoiser_seconds: time of the calls of the transformer in it; None without methods.
        cached: calls of the transformer that were reused from the step before.
        share: FLOPs of blocks and methods over those without methods; None where that is not known.
        images: SHA-256 of the images that the prompt names; None without any.
    """

    prompt: str
    seed: int
    file: str
    seconds: float
    denoiser_seconds: float | None = None
    cached: int | None = None
    share: float | None = None
    images: str | None = None


@dataclass(frozen=True)
class PipelineSamples:
    """The result of `tokdyn sample` for a pipeline.

    Attributes:
        folder: holds the pictures, grid.png and sample.json.
        drawn: one entry for each prompt.
        titles: the beginning of each prompt.
        table: the statistics of the last call, to be printed; None without methods or if nothing was missing.
    """

    folder: Path
    drawn: tuple[Drawn, ...]
    titles: tuple[str, ...]
    table: str | None


def sample_pipeline(config: PipelineSampleConfig, team: Team = ALONE) -> PipelineSamples:
    """Draw every prompt that has no picture in the folder yet.

    Args:
        config: the settings.
        team: processes that call this function with the same settings, each of which draws a share of the prompts.

    Raises:
        TokdynError: the pipeline or the methods cannot be read, a setting does not fit, or the folder holds pictures
            that were drawn with other settings, or is in use.
    """
    settle_memory()
    open_device(config.device)  # refused before anything is read
    out = config.out or Path("samples") / Path(config.model).name
    require_folder(out)
    facts = config.model_dump(mode="json", exclude={"out", "device", "prompts"})
    facts["methods"] = None if config.methods is None else _content(config.methods)
    wanted = [(_text(each), config.seed + place, _images(each)) for place, each in enumerate(config.prompts)]
    team.agree("methods, prompts or other settings", [facts, str(config.out), [list(each) for each in wanted]])
    with team.owning(out):
        known = _earlier(out, facts) if team.first else {}
        missing = [
            place
            for place, which in enumerate(wanted)
            if (before := known.get(place)) is None
            or (before.prompt, before.seed, before.images) != which
            or not (out / before.file).is_file()
        ]
        missing = team.from_first(missing)
        table = _draw_missing(config, team, out, facts, wanted, missing, known) if missing else None
        drawn = [asdict(known[place]) for place in range(len(wanted))] if team.first else []
        titles = tuple(map(title_of, config.prompts))
        result = PipelineSamples(out, tuple(Drawn(**each) for each in team.from_first(drawn)), titles, table)
        if team.first:
            _overview(out, result.drawn, titles)
    return result


def _draw_missing(
    config: PipelineSampleConfig,
    team: Team,
    out: Path,
    facts: dict[str, Any],
    wanted: Sequence[tuple[str, int, str | None]],
    missing: Sequence[int],
    known: dict[int, Drawn],
) -> str | None:
    """Draw the missing pictures, and return the statistics of the last call; None without methods.

    Args:
        config: the settings.
        team: the processes; in each round, each of them draws one picture.
        out: the folder to write to.
        facts: the settings that decide about pictures, to be written.
        wanted: text, seed and hash of the images of each prompt.
        missing: places of the prompts to draw.
        known: gets what was drawn, by the place of its prompt.
    """
    table, device = None, open_device(config.device)
    with team.after_first():
        pipe = open_pipeline(config.model, device, config.precision)
    if config.methods is not None:
        load(pipe, config.methods)
    if config.tail_drop is not None:
        set_tail_drop(pipe, config.tail_drop)
    calls = call_arguments(pipe, config)
    with progress("pictures", len(team.share(missing))) as advance:
        for number, place in enumerate(team.rounds(missing)):
            drawn = None
            if place is not None:
                start = time.perf_counter()
                pixels = draw(pipe, calls[place], config.seed + place)
                seconds = time.perf_counter() - start
                file = _write(out / _file_name(place, config.prompts[place]), pixels)
                prompt, seed, images = wanted[place]
                drawn = Drawn(prompt, seed, file, seconds, images=images)
                if config.methods is not None:
                    found = stats(pipe)
                    drawn = replace(drawn, denoiser_seconds=found.seconds, cached=found.cached, share=found.share)
                    table = str(found)
                advance(1)
            told = team.exchange(None if drawn is None else asdict(drawn))
            known.update(
                {at: Drawn(**each) for at, each in zip(missing[number * team.count :], told, strict=False) if each}
            )
            if team.first:
                _save(out, facts, known, describe(device))
    return table


def _content(folder: Path) -> dict[str, Any]:
    """Return what decides about the methods in a file, a folder, or one for each denoiser: settings and weights."""
    if is_file(folder):
        return {"preset": read(folder).model_dump(mode="json", exclude_defaults=True)}
    if is_one_file(folder):
        settings, file = read_settings(folder)
        return {"": {"methods": settings.get("methods"), "weights": hashlib.sha256(file.read_bytes()).hexdigest()}}
    found = {}
    for path in sorted([*folder.glob(CONFIG), *folder.glob(f"*/{CONFIG}")]):
        weights = path.with_name(WEIGHTS)
        digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None
        name = "" if path.parent == folder else path.parent.name
        found[name] = {"methods": json_object(path).get("methods"), "weights": digest}
    if not found:
        raise RecipeError(f"{folder} holds no methods; give a folder that tokdyn calibrate or tokdyn.save has written.")
    return found


def _text(prompt: str | dict[str, Any]) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def _images(prompt: str | dict[str, Any]) -> str | None:
    """Hash the images that a prompt names, which may have been changed since they were drawn from."""
    digest, paths = hashlib.sha256(), images_of(prompt)
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path} cannot be read as an image: there is no such file.")
        digest.update(path.read_bytes())
    return digest.hexdigest() if paths else None


def _earlier(out: Path, facts: dict[str, Any]) -> dict[int, Drawn]:
    """Return what an earlier run with the same settings has drawn, by the place of the prompt."""
    if not (out / RESULT).is_file():
        return {}
    before = json_object(out / RESULT)
    settings, drawn = before.get("settings"), before.get("drawn")
    if not isinstance(settings, dict) or not isinstance(drawn, dict):
        raise RecipeError(f"{out / RESULT} was not written by tokdyn sample; choose another out, or remove the file.")
    changed = sorted(name for name in facts.keys() | settings.keys() if facts.get(name) != settings.get(name))
    if changed:
        raise RecipeError(
            f"{out} holds pictures that were drawn with other settings ({', '.join(changed)}); choose another out, or "
            "set these back."
        )
    try:
        return {int(place): Drawn(**entry) for place, entry in drawn.items()}
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"{out / RESULT} is damaged ({error}); choose another out, or remove it to draw all again."
        ) from error


def _save(out: Path, facts: dict[str, Any], known: dict[int, Drawn], machine: Any) -> None:
    content = {
        "tokdyn": __version__,
        "settings": facts,
        "drawn": {place: asdict(known[place]) for place in sorted(known)},
        "machine": machine,
    }
    with replacing(out / RESULT) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _file_name(place: int, prompt: str | dict[str, Any]) -> str:
    """Name the picture of a prompt by its place and first words."""
    words = re.findall(r"[a-z0-9]+", title_of(prompt).lower())[:6]
    return "-".join([f"{place:03d}", *words])


def _write(path: Path, pixels: NDArray[np.uint8]) -> str:
    """Write a picture as PNG and several as animated WebP; return the name of the file."""
    if len(pixels) == 1:
        return write_png(pixels[0], path.with_name(f"{path.name}.png")).name
    where = path.with_name(f"{path.name}.webp")
    first, *others = (Image.fromarray(frame) for frame in pixels)
    with replacing(where) as half:
        first.save(
            half, format="WEBP", save_all=True, append_images=others, duration=_MILLISECONDS, loop=0, lossless=True
        )
    return where.name


def _overview(out: Path, drawn: tuple[Drawn, ...], titles: Sequence[str]) -> None:
    """Draw all pictures, the first frames of videos, in one grid; smaller ones have white margins."""
    images = []
    for each in drawn:
        try:
            with Image.open(out / each.file) as image:
                images.append(np.asarray(image.convert("RGB")))
        except (OSError, SyntaxError, ValueError) as error:
            what = f"{out / each.file} cannot be read as an image ({error})"
            raise OutputError(f"{what}; remove it, and repeat the command to draw it again.") from error
    write_png(image_grid(on_cells(images), captions=titles), out / GRID)
