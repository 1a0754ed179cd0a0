"""Draw pictures with a pipeline twice, without methods and with them, and compare pictures and times."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap as wrap_text
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from tokdyn.attach import Attachment, attachment_of, inner_model, untraced
from tokdyn.bench.fidelity import WINDOW, psnr, ssim
from tokdyn.cost import TrajectoryStats
from tokdyn.errors import InputError
from tokdyn.files import user_path
from tokdyn.methods import Method
from tokdyn.pipelines import denoisers, disabled, is_pipeline, is_wrapped, stats, unwrap, wrap
from tokdyn.pipelines.drawing import draw
from tokdyn.progress import in_ms, progress
from tokdyn.prompts import check_numbers, title_of
from tokdyn.report.grids import image_grid, on_cells
from tokdyn.report.pixels import Pixels, write_png

_WIDTH = 256  # pixels; narrower pictures are enlarged to about this width
_LINE = 22  # letters of a prompt in a line beside its pair
_ON_PAGE = 8  # pairs
_TALLEST = 16_384  # pixels, of the PNG files that viewers and browsers show
_WARM_UP = 2  # steps of a call before the first one that is timed


@dataclass(frozen=True)
class Pair:
    """What a pipeline makes of one prompt and seed, without methods and with them.

    Attributes:
        prompt: the prompt, shortened; or the number of the call.
        seed: of the noise.
        without: (F, H, W, 3) uint8, the pictures, or the frames of a video.
        acting: the same with methods.
        seconds: time of the whole call without and with methods.
        psnr: peak signal-to-noise ratio in dB, the mean over F; infinite for equal pictures.
        ssim: structural similarity, the mean over F; None for pictures of fewer than 11 pixels a side.
        stats: of the call with methods.
    """

    prompt: str
    seed: int
    without: Pixels
    acting: Pixels
    seconds: tuple[float, float]
    psnr: float
    ssim: float | None
    stats: TrajectoryStats


@dataclass(frozen=True)
class Compared:
    """Pictures of a pipeline without and with methods, from the same noise. Printed, it is a table.

    Attributes:
        pairs: one for each prompt.
        methods: what acted, to be printed.
    """

    pairs: tuple[Pair, ...]
    methods: str

    @property
    def stats(self) -> TrajectoryStats:
        """Those of the last call with methods."""
        return self.pairs[-1].stats

    @property
    def flops_share(self) -> float | None:
        """FLOPs of all calls with methods over those of the same calls without; None where they are not known."""
        found = [pair.stats for pair in self.pairs]
        if any(each.flops is None or each.dense_flops is None for each in found):
            return None
        return sum(each.flops or 0 for each in found) / sum(each.dense_flops or 0 for each in found)

    @property
    def denoiser_seconds(self) -> float | None:
        """Median time in the denoisers of a call with methods; None where it is not known."""
        known = [pair.stats.seconds for pair in self.pairs if pair.stats.seconds is not None]
        return statistics.median(known) if known else None

    @property
    def speedup(self) -> float:
        """Median time of the whole call without methods over that with them."""
        before, now = (statistics.median(pair.seconds[side] for pair in self.pairs) for side in (0, 1))
        return before / now

    @property
    def psnr(self) -> float:
        """Median over the pairs, in dB."""
        return statistics.median(pair.psnr for pair in self.pairs)

    @property
    def ssim(self) -> float | None:
        """Median over the pairs; None where it is not known."""
        known = [pair.ssim for pair in self.pairs if pair.ssim is not None]
        return statistics.median(known) if known else None

    def picture(self) -> Pixels:
        """Draw the pairs side by side, one in each row; of several pictures or frames the middle one.

        Smaller pictures have white margins. Tiny ones are enlarged by a whole factor.
        """
        return self._drawn(self.pairs)

    def pages(self) -> Iterator[Pixels]:
        """Draw the pairs as `picture` does, eight on each page."""
        for first in range(0, len(self.pairs), _ON_PAGE):
            yield self._drawn(self.pairs[first : first + _ON_PAGE])

    def _drawn(self, pairs: Sequence[Pair]) -> Pixels:
        images = [frames[len(frames) // 2] for pair in pairs for frames in (pair.without, pair.acting)]
        captions = [
            text
            for pair in pairs
            for text in (f"{in_ms(pair.seconds[0])} ms", f"{in_ms(pair.seconds[1])} ms, PSNR {pair.psnr:.1f} dB")
        ]
        titles = ["\n".join([*wrap_text(pair.prompt, _LINE), f"seed {pair.seed}"]) for pair in pairs]
        cells, columns = on_cells(images), ["without methods", self.methods]
        scale = max(1, round(_WIDTH / cells.shape[2]))
        return image_grid(cells, 2, captions, row_titles=titles, column_titles=columns, scale=scale)

    def save(self, path: str | Path) -> Path:
        """Write the pairs side by side as a PNG file. One taller than 16,384 pixels is made smaller, to be shown.

        Returns:
            The path.

        Raises:
            OutputError: the file cannot be written.
        """
        pixels = self.picture()
        if (height := len(pixels)) > _TALLEST:
            pixels = np.asarray(Image.fromarray(pixels).resize((pixels.shape[1] * _TALLEST // height, _TALLEST)))
        return write_png(pixels, user_path(path))

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers as a JSON-ready dictionary; infinite ones as None."""

        def finite(value: float | None) -> float | None:
            return value if value is not None and np.isfinite(value) else None

        pairs = [
            {
                "prompt": pair.prompt, "seed": pair.seed, "seconds": list(pair.seconds), "psnr": finite(pair.psnr),
                "ssim": finite(pair.ssim),
            }
            for pair in self.pairs
        ]  # fmt: skip
        sums = {"speedup": self.speedup, "psnr": finite(self.psnr), "ssim": self.ssim, "flops_share": self.flops_share}
        return {"methods": self.methods, **sums, "pairs": pairs}

    def __str__(self) -> str:
        rows = [("prompt", "seed", "ms without", "ms with", "PSNR dB", "SSIM")]
        for pair in self.pairs:
            similar = "-" if pair.ssim is None else f"{pair.ssim:.4f}"
            before, now = map(in_ms, pair.seconds)
            rows.append((pair.prompt, str(pair.seed), before, now, f"{pair.psnr:.2f}", similar))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        text = f"{self.methods}: {self.speedup:.2f} times as fast, PSNR {self.psnr:.2f} dB"
        if self.ssim is not None:
            text += f", SSIM {self.ssim:.4f}"
        if (share := self.flops_share) is not None:
            text += f", {share:.1%} of the FLOPs (multiply-add = 2, blocks and methods)"
        return "\n".join([*lines, text])


def compare(
    pipe: Any,
    methods: Sequence[Method] | Mapping[str, Sequence[Method]] | str | Path | None = None,
    prompts: Iterable[Any] = (),
    *,
    seed: int = 0,
    **call: Any,
) -> Compared:
    """Draw every prompt without methods and with them, from the same noise, and compare pictures and times.

        compared = tokdyn.compare(pipe, [tokdyn.FeatureCache(threshold=0.2)], ["a red cube"], num_inference_steps=28)
        print(compared)
        compared.save("pairs.png")

    Short calls come first, which are not timed. The two calls of a prompt follow each other, in turn with and without
    methods first.

    Args:
        pipe: a pipeline of diffusers. It is left as it was.
        methods: for all of its denoisers, a list for each by name, or a preset such as "fast", as in `tokdyn.wrap`;
            None compares what a wrapped pipeline carries.
        prompts: a call each: the first argument of the pipeline (a text, or a class), or a dictionary of arguments.
        seed: of the noise of the first prompt; each further one has the next number.
        **call: further arguments of every call, such as `num_inference_steps=28`.

    Returns:
        Pictures, times and similarity of every pair.

    Raises:
        InputError: there are no prompts, the pipeline refuses an argument, or it is wrapped although methods are given,
            or not although none are.
        CompositionError, UnsupportedModelError: as in `tokdyn.wrap`.
    """
    given = _calls(pipe, prompts, call)
    if is_wrapped(pipe) != (methods is None):
        raise InputError(
            "this pipeline is wrapped already; leave out methods to compare those, or call tokdyn.unwrap(pipe) first."
            if methods is not None
            else "this pipeline is not wrapped; give methods, such as [tokdyn.FeatureCache(threshold=0.2)]."
        )
    if methods is not None:
        wrap(pipe, methods)
    try:
        with ExitStack() as warming_up:
            for attachment in _attachments(pipe):
                warming_up.enter_context(untraced(attachment))
            _draw(pipe, {**given[0][1], **_short(pipe, given[0][1])}, seed)
            with disabled(pipe):
                _draw(pipe, {**given[0][1], **_short(pipe, given[0][1])}, seed)
        pairs = []
        with progress("pictures", 2 * len(given)) as advance:
            for place, (name, arguments) in enumerate(given):
                drawn: dict[bool, tuple[Pixels, float]] = {}
                for acting in (False, True) if place % 2 == 0 else (True, False):
                    with nullcontext() if acting else disabled(pipe):
                        drawn[acting] = _draw(pipe, arguments, seed + place)
                    if acting:
                        spent = stats(pipe)
                    advance(1)
                pairs.append(_pair(name, seed + place, drawn[False], drawn[True], spent))
        return Compared(tuple(pairs), _named(pipe))
    finally:
        if methods is not None:
            unwrap(pipe)


def _calls(pipe: Any, prompts: Iterable[Any], call: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the name and the arguments of every call."""
    if not is_pipeline(pipe):
        raise InputError(f"{type(pipe).__name__} is not a pipeline; compare takes pipelines of diffusers.")
    given = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
    named_by_user = {*call, *(name for each in given if isinstance(each, Mapping) for name in each)}
    own = [name for name in ("generator", "output_type", "return_dict") if name in named_by_user]
    if own:
        raise InputError(f"compare sets {own[0]} itself; leave it out (seed= chooses the noise).")
    if not given:
        raise InputError("there are no prompts; give some, such as ['a red cube', 'a street in the rain'].")
    first = next(name for name in inspect.signature(type(pipe).__call__).parameters if name != "self")
    result = []
    for place, each in enumerate(given):
        named = dict(each) if isinstance(each, Mapping) else {first: [each] if isinstance(each, int) else each}
        text = named.get("prompt") if isinstance(named.get("prompt"), str) else f"{place + 1}"
        check_numbers({**call, **named})
        result.append((title_of(str(text)), {**call, **named}))
    return result


def _short(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes a call short: few steps, where that can be said."""
    known = inspect.signature(type(pipe).__call__).parameters
    chosen = {"timesteps", "sigmas"} & arguments.keys()
    return {"num_inference_steps": _WARM_UP} if "num_inference_steps" in known and not chosen else {}


def _draw(pipe: Any, arguments: Mapping[str, Any], seed: int) -> tuple[Pixels, float]:
    """Call a pipeline and return its pictures or frames, (F, H, W, 3) uint8, and the seconds of the whole call."""
    start = time.perf_counter()
    pixels = draw(pipe, arguments, seed)
    return pixels, time.perf_counter() - start


def _pair(
    name: str, seed: int, without: tuple[Pixels, float], acting: tuple[Pixels, float], spent: TrajectoryStats
) -> Pair:
    reference, image = (_planes(pixels) for pixels, _ in (without, acting))
    similar = ssim(image, reference).mean().item() if min(image.shape[-2:]) >= WINDOW else None
    ratio = psnr(image, reference).mean().item()
    return Pair(name, seed, without[0], acting[0], (without[1], acting[1]), ratio, similar, spent)


def _planes(pixels: Pixels) -> Tensor:
    return rearrange(torch.from_numpy(pixels), "f h w c -> f c h w")


def _named(pipe: Any) -> str:
    """Name the methods of a wrapped pipeline."""
    names = dict.fromkeys(type(one).__name__ for each in _attachments(pipe) for one in each.methods)
    return ", ".join(names) or "no methods"


def _attachments(pipe: Any) -> list[Attachment]:
    """Return the attachments of the denoisers of a wrapped pipeline."""
    found = (attachment_of(inner_model(each)) for each in denoisers(pipe).values())
    return [each for each in found if each is not None]
