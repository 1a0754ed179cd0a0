"""Draw the concepts: tokens, stages, budgets and trajectories."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from docs.draw.shapes import colours, picture, ranked_by_detail
from docs.draw.svg import DROPPED, INK, KEPT, LINE, MUTED, PAPER, SECOND, THIRD, Drawing


def tokens(folder: Path) -> Path:
    """Draw how chunking leaves tokens out: image, grid, kept tokens, blocks, and the grid again."""
    drawing = Drawing(760, 236, "From an image to the tokens that the blocks compute, and back")
    image, rank = colours(picture(3), 16), ranked_by_detail(3, 16)
    kept = rank < 64
    side = 8.5
    grids = ((18, "1  grid of cells", None), (196, "2  router", kept), (592, "4  spread over the grid", None))
    for x, head, keep in grids:
        drawing.text(x + 68, 26, head, bold=True)
        drawing.cells(x, 40, side, image, keep)
    drawing.text(86, 198, "256 cells: one token each", 12, MUTED)
    drawing.text(264, 198, "keeps 64 of 256", 12, MUTED)
    drawing.text(462, 26, "3  blocks", bold=True)
    for block in range(3):
        drawing.box(392 + 52 * block, 46, 36, 126, KEPT, KEPT)
        drawing.text(410 + 52 * block, 114, f"{block}", 15, "#ffffff", bold=True)
        if block:
            drawing.arrow(376 + 52 * block, 109, 391 + 52 * block, 109)
    drawing.text(462, 198, "compute 64 tokens", 12, MUTED)
    drawing.text(660, 198, "nearest kept token,", 12, MUTED)
    drawing.text(660, 214, "smoothed by probability", 12, MUTED)
    for x in (160, 340, 552):
        drawing.arrow(x, 109, x + 30, 109)
    return drawing.save(folder / "tokens.svg")


STAGES = (
    ("all blocks", "FeatureCache, and Chunking inside of it"),
    ("a span of blocks", "TokenDrop (in training)"),
    ("one block", "DepthSkip"),
    ("a sublayer: attention or MLP", "TokenMerge"),
    ("the kernel: heads and channels", "DynamicWidth"),
)


def stages(folder: Path) -> Path:
    """Draw the five stages as boxes in boxes, each with the methods that act there."""
    drawing = Drawing(760, 322, "The five stages, from the outside to the inside")
    for depth, (stage, methods) in enumerate(STAGES):
        x, y = 20 + 34 * depth, 16 + 48 * depth
        drawing.box(x, y, 720 - 68 * depth, 290 - 58 * depth, "#ffffff" if depth % 2 else "#eef3f3", KEPT)
        drawing.text(x + 14, y + 30, stage, 13, MUTED, "start")
        drawing.text(x + 706 - 68 * depth, y + 30, methods, 14, INK, "end", bold=True)
    return drawing.save(folder / "stages.svg")


def budgets(folder: Path) -> Path:
    """Draw one model at three budgets: a larger tail drop keeps a part of what a smaller one keeps."""
    drawing = Drawing(760, 226, "One picture at tail drops 0, 0.3 and 0.6")
    image, rank, side = colours(picture(3), 16), ranked_by_detail(3, 16), 8.5
    for column, drop in enumerate((0.0, 0.3, 0.6)):
        x, count = 40 + 180 * column, 64 - int(64 * drop)
        drawing.text(x + 68, 26, f"tail drop {drop:g}", bold=True)
        drawing.cells(x, 40, side, image, rank < count)
        drawing.text(x + 68, 198, f"{count} of 256 tokens", 12, MUTED)
        drawing.box(600, 52 + 44 * column, 128 * count / 64, 26, KEPT, KEPT)
        drawing.text(608, 70 + 44 * column, f"{count}", 12, "#ffffff", "start", bold=True)
    drawing.text(664, 26, "tokens in the blocks", bold=True)
    drawing.text(664, 198, "no retraining between them", 12, MUTED)
    return drawing.save(folder / "budgets.svg")


def trajectory(folder: Path) -> Path:
    """Draw the calls of a trajectory: steps from noise to the image, two guidance branches, cached steps."""
    drawing = Drawing(760, 262, "A trajectory of eight steps with two guidance branches")
    clean, noise = picture(3), np.random.default_rng(0).uniform(0, 1, (32, 32, 3))
    cached = ({2, 4, 6}, {1, 2, 4, 6})
    drawing.text(18, 116, "cond", 13, INK, "start", bold=True)
    drawing.text(18, 158, "uncond", 13, INK, "start", bold=True)
    for step in range(8):
        x, level = 92 + 82 * step, 1 - step / 7
        drawing.cells(x, 14, 8, colours(level * noise + (1 - level) * clean, 8))
        for branch in range(2):
            reuse = step in cached[branch]
            drawing.box(x, 96 + 42 * branch, 64, 30, DROPPED if reuse else KEPT, LINE if reuse else KEPT)
            word, colour = ("cached", INK) if reuse else ("computed", "#ffffff")
            drawing.text(x + 32, 115 + 42 * branch, word, 10.5, colour)
        drawing.text(x + 32, 192, f"step {step}", 11, MUTED)
        if step:
            drawing.arrow(x - 16, 46, x - 2, 46)
    drawing.arrow(92, 214, 730, 214)
    drawing.text(92, 236, "noise level 1: pure noise", 12, MUTED, "start")
    drawing.text(730, 236, "0: the image", 12, MUTED, "end")
    return drawing.save(folder / "trajectory.svg")


def choice(folder: Path) -> Path:
    """Draw the three questions that lead to a method."""
    drawing = Drawing(760, 208, "Three questions that lead to a method")
    rows = (
        ("Can you train?", "yes", "Chunking, DynamicWidth", "hours; the largest saving", SECOND),
        ("20 steps or more?", "yes", "FeatureCache", "a line; neighbouring steps are alike", THIRD),
        ("Many tokens?", "yes", "TokenMerge", "no preparation; attention shrinks", KEPT),
    )
    for row, (question, answer, methods, note, colour) in enumerate(rows):
        y = 16 + 52 * row
        drawing.box(20, y, 190, 36, PAPER, INK, 18)
        drawing.text(115, y + 23, question, 13, INK, bold=True)
        drawing.arrow(212, y + 18, 300, y + 18)
        drawing.text(254, y + 12, answer, 11, MUTED)
        drawing.box(304, y, 196, 36, colour, colour)
        drawing.text(402, y + 23, methods, 13, "#ffffff", bold=True)
        drawing.text(514, y + 23, note, 11, MUTED, "start")
        drawing.arrow(115, y + 37, 115, y + 51)
    drawing.text(115, 190, "otherwise DepthSkip, calibrated", 12, INK)
    return drawing.save(folder / "choice.svg")


ALL = (tokens, stages, budgets, trajectory, choice)
