"""Draw a card for each method, from what the method does on a small example."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import tokdyn
from docs.draw.shapes import colours, picture, ranked_by_detail
from docs.draw.svg import DROPPED, INK, KEPT, LINE, MUTED, PAPER, Drawing
from tokdyn.ops.destinations import grid_destinations
from tokdyn.ops.dropping import random_subset
from tokdyn.ops.merging import match

_WIDTH, _HEIGHT = 300, 190
_STAR = 3  # the index of a star among the shapes


def _card(title: str, note: str) -> Drawing:
    drawing = Drawing(_WIDTH, _HEIGHT, title)
    drawing.text(_WIDTH / 2, _HEIGHT - 12, note, 11.5, MUTED)
    return drawing


def chunking(folder: Path) -> Path:
    """Draw the quarter of the cells with the most detail, which a router has to learn."""
    drawing = _card("Chunking", "one cell in four, where the detail is")
    drawing.cells(82, 16, 8.5, colours(picture(_STAR), 16), ranked_by_detail(_STAR, 16) < 64)
    return drawing.save(folder / "card-chunking.svg")


def token_merge(folder: Path) -> Path:
    """Draw the cells of a picture as TokenMerge merges them: those that share a computation share a colour."""
    image = picture(_STAR)
    cells = image.reshape(16, 2, 16, 2, 3).transpose(0, 2, 1, 3, 4).reshape(256, 12)
    plan = match(torch.tensor(cells - cells.mean(0)), [256], grid_destinations(1, (16, 16), torch.device("cpu")), 0.6)
    means = torch.zeros(len(plan.size), 12, dtype=torch.float64).index_add_(0, plan.slot, torch.tensor(cells))
    shared = (means / plan.size.double()[:, None])[plan.slot].numpy()
    drawing = _card("TokenMerge", f"256 tokens share {len(plan.size)} computations")
    drawing.cells(20, 22, 7.5, colours(image, 16))
    drawing.arrow(144, 82, 156, 82)
    drawing.cells(
        160, 22, 7.5, colours(shared.reshape(16, 16, 2, 2, 3).transpose(0, 2, 1, 3, 4).reshape(32, 32, 3), 16)
    )
    slot = plan.slot.view(16, 16).numpy()
    for row in range(16):
        for column in range(16):  # a line between neighbours that do not share
            x, y = 160 + 7.5 * column, 22 + 7.5 * row
            if column < 15 and slot[row, column] != slot[row, column + 1]:
                drawing.line(x + 7.5, y, x + 7.5, y + 7.5, INK, width=0.6)
            if row < 15 and slot[row, column] != slot[row + 1, column]:
                drawing.line(x, y + 7.5, x + 7.5, y + 7.5, INK, width=0.6)
    return drawing.save(folder / "card-token-merge.svg")


def token_drop(folder: Path) -> Path:
    """Draw the tokens that TokenDrop leaves, and their way around a span of blocks."""
    kept = torch.zeros(256, dtype=torch.bool)
    kept[random_subset(1, 256, 0.5, generator=torch.Generator().manual_seed(0))[0]] = True
    drawing = _card("TokenDrop", "in training, half of the tokens bypass blocks 1 to 4")
    drawing.cells(20, 22, 7.5, colours(picture(_STAR), 16), kept.view(16, 16).numpy())
    for block in range(6):
        inside = 1 <= block <= 4
        drawing.box(156 + 23 * block, 62 if inside else 42, 17, 60 if inside else 80, KEPT, KEPT)
    drawing.arrow(170, 50, 271, 50)
    return drawing.save(folder / "card-token-drop.svg")


def _calls() -> list[dict[str, torch.Tensor]]:
    """Return the calls of the shipped DiT on shapes between noise and image."""
    image = torch.tensor(picture(_STAR), dtype=torch.float32).permute(2, 0, 1)[None] * 2 - 1
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    return [
        {
            "hidden_states": np.sqrt(1 - level) * image + np.sqrt(level) * noise,
            "timestep": torch.tensor([int(999 * level)]),
            "class_labels": torch.tensor([_STAR]),
        }
        for level in np.linspace(1, 0, 24)
    ]


def _table(drawing: Drawing, off: NDArray[np.bool_], rows: str) -> None:
    """Draw what is on (filled) and off (hollow), with noise levels from left to right."""
    height, width = 120 / off.shape[0], 240 / off.shape[1]
    for row in range(off.shape[0]):
        for column in range(off.shape[1]):
            hollow = off[row, column]
            x, y = 40 + width * column, 16 + height * row
            drawing.box(x + 1.5, y + 1.5, width - 3, height - 3, PAPER if hollow else KEPT, LINE if hollow else KEPT, 2)
        drawing.text(32, 20 + height * (row + 0.5), f"{row}", 10, MUTED, "end")
    drawing.text(40, 150, "noise", 10.5, MUTED, "start")
    drawing.text(280, 150, "image", 10.5, MUTED, "end")
    drawing.text(160, 150, rows, 10.5, INK)


def depth_skip(folder: Path) -> Path:
    """Draw the blocks that calibration skips in the shipped DiT at 0.7 of its FLOPs."""
    model = tokdyn.bases.open_base("shapes").eval()
    method = tokdyn.calibrate(model, _calls(), tokdyn.DepthSkip(), flops=0.7, levels=6)
    assert isinstance(method, tokdyn.DepthSkip)
    off = np.array([[block in method.skipped(level, 6) for level in np.linspace(0.92, 0.08, 6)] for block in range(6)])
    drawing = _card("DepthSkip", "calibrated: 0.7 of the FLOPs of the shipped DiT")
    _table(drawing, off, "blocks that run")
    return drawing.save(folder / "card-depth-skip.svg")


def dynamic_width(folder: Path) -> Path:
    """Draw, as a sketch, heads that the noise level turns off."""
    drawing = _card("DynamicWidth", "a sketch: the noise level selects heads")
    off = np.add.outer(np.arange(4) * 2, -np.arange(8)[::-1]) > np.array([1, 0, 2, -1])[:, None]
    _table(drawing, off, "heads that run")
    return drawing.save(folder / "card-dynamic-width.svg")


def feature_cache(folder: Path) -> Path:
    """Draw which of 24 steps of the shipped DiT a cache computes."""
    model = tokdyn.wrap(tokdyn.bases.open_base("shapes").eval(), [tokdyn.FeatureCache(threshold=0.25)])
    calls = _calls()
    with torch.no_grad(), tokdyn.trajectory(model, steps=len(calls)) as here:
        for here.step, call in enumerate(calls):
            model(**call)
    reused = [bool(call.cached) for call in tokdyn.stats(model).calls]
    drawing = _card("FeatureCache", f"{len(reused) - sum(reused)} of {len(reused)} steps are computed")
    for step, cached in enumerate(reused):
        x, tall = 28 + 10.2 * step, 30 if cached else 110
        drawing.box(x, 136 - tall, 8, tall, DROPPED if cached else KEPT, LINE if cached else KEPT, 1)
    drawing.text(28, 152, "noise", 10.5, MUTED, "start")
    drawing.text(272, 152, "image", 10.5, MUTED, "end")
    return drawing.save(folder / "card-feature-cache.svg")


ALL = (chunking, token_merge, token_drop, depth_skip, dynamic_width, feature_cache)
