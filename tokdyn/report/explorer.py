"""Show what chunking sees: a slider over noise levels, with noisy images, the keep map over them and the kept share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokdyn.report.charts import Line, chart
from tokdyn.report.html import Html, data, image_uri, tag
from tokdyn.report.maps import shade
from tokdyn.report.pixels import Pixels

_SWATCH = 32  # pixels of a swatch in the legend


@dataclass(frozen=True)
class NoiseFrame:
    """The same n images at one noise level.

    Attributes:
        level: noise level in [0, 1].
        pictures: (n, H, W, 3) uint8, the noisy images.
        keep: (n, R, C) bool, True for tokens that the conditional branch keeps.
    """

    level: float
    pictures: Pixels
    keep: NDArray[np.bool_]


def explorer(frames: Sequence[NoiseFrame], names: Sequence[str], identifier: str) -> Html:
    """Return the slider with its pictures and the kept share over noise levels.

    Args:
        frames: at least one, in the order of sampling, from noise to the image.
        names: names of the n images.
        identifier: id of the element, unique on the page.
    """
    rows, columns = frames[0].keep.shape[1:]
    height, width = frames[0].pictures.shape[1:3]
    shares = [frame.keep.mean(axis=(1, 2)) for frame in frames]
    content = {
        "grid": [rows, columns],
        "size": [height, width],
        "names": list(names),
        "frames": [
            {
                "level": round(frame.level, 4),
                "strip": image_uri(np.concatenate(list(frame.pictures), axis=1)),
                "keep": [np.packbits(mask.ravel()).tobytes().hex() for mask in frame.keep],
                "kept": [round(float(each), 4) for each in share],
            }
            for frame, share in zip(frames, shares, strict=True)
        ],
    }
    start = len(frames) // 2
    slider = tag(
        "input", type="range", min=0, max=len(frames) - 1, step=1, value=start, class_="slider",
        aria_label="Noise level, from pure noise on the left to the image on the right",
    )  # fmt: skip
    controls = tag(
        "div",
        tag("label", "Noise", slider, "Image", class_="level"),
        tag("button", "Play", type="button", class_="play"),
        tag("label", tag("input", type="checkbox", checked=True, class_="map"), " Keep map"),
        class_="controls",
    )
    tiles = [
        tag(
            "figure",
            tag("canvas", width=width, height=height, role="img", aria_label=name),
            tag("figcaption", name, " ", tag("span", class_="kept")),
            class_="tile",
        )
        for name in names
    ]
    levels, means = [frame.level for frame in frames], [float(share.mean()) for share in shares]
    return tag(
        "div",
        controls,
        tag("output", f"Noise level {levels[start]:.2f}: {means[start]:.1%} of the tokens kept", aria_live="polite"),
        tag("div", *tiles, class_="tiles"),
        legend(),
        tag("div", _shares(levels, shares), class_="charts"),
        tag("noscript", tag("p", "The slider needs JavaScript; tokdyn plot draws the same maps as files.")),
        data(content, identifier),
        class_="explorer",
        data_frames=identifier,
    )


def legend() -> Html:
    """Return what kept and dropped cells look like, on a bright, a coloured and a dark image."""
    swatches = []
    for colour in ((245, 245, 245), (214, 72, 40), (16, 18, 24)):
        image = np.full((_SWATCH, 2 * _SWATCH, 3), colour, dtype=np.uint8)
        swatches.append(shade(image, np.array([[True, False]])))
    shown = image_uri(np.concatenate(swatches, axis=1))
    item = tag(
        "li",
        tag("img", src=shown, alt="Swatches: each left half is kept, each right half dropped"),
        "Of each swatch the left half is kept and the right half dropped: kept cells show the image and are outlined, "
        "dropped cells are grey and hatched.",
    )
    return tag("ul", item, class_="legend")


def _shares(levels: Sequence[float], shares: Sequence[NDArray[np.float64]]) -> Html:
    """Return the mean kept share over noise levels, with the range over the images."""
    named = (("mean", np.mean), ("most", np.max), ("least", np.min))
    lines = [
        Line(name, levels, [100.0 * float(of(share)) for share in shares])
        for name, of in (named if len(shares[0]) > 1 else named[:1])
    ]
    return chart(
        lines, "Tokens kept at each noise level", "noise level (1 is pure noise)", "tokens kept, %", backwards=True
    )
