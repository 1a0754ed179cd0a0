"""Draw the figures that open the tutorials."""

from __future__ import annotations

from pathlib import Path

from docs.draw.shapes import colours, picture
from docs.draw.svg import DROPPED, INK, KEPT, LINE, MUTED, PAPER, SECOND, THIRD, Drawing


def adapter(folder: Path) -> Path:
    """Draw the call of a block, with what an adapter says about each argument."""
    drawing = Drawing(760, 190, "What an adapter says about a model")
    drawing.text(20, 38, "block(x, text, condition, angles)  ->  x, text", 16, INK, "start", bold=True)
    rows = (
        ("x", 'tokens="x"', "image tokens (B, N, D): may be left out or merged", KEPT),
        ("text", 'text="text"', "text tokens (B, L, D): always whole", THIRD),
        ("angles", 'follow=(Follow("angles"),)', "one row per image token: follows the tokens", SECOND),
        ("condition", "(nothing to say)", "one row per sample", MUTED),
    )
    for row, (name, declared, meaning, colour) in enumerate(rows):
        y = 58 + 31 * row
        drawing.box(20, y, 90, 24, colour, colour)
        drawing.text(65, y + 17, name, 13, "#ffffff", bold=True)
        drawing.text(126, y + 17, declared, 13, INK, "start")
        drawing.text(376, y + 17, meaning, 13, MUTED, "start")
    return drawing.save(folder / "adapter.svg")


def method(folder: Path) -> Path:
    """Draw the two files of a method and who reads them."""
    drawing = Drawing(760, 176, "A method is two files")
    for x, name, what in ((30, "settings", "an immutable configuration"), (290, "handler", "acts in a wrapped model")):
        drawing.box(x, 46, 190, 78, "#ffffff", KEPT)
        drawing.text(x + 95, 80, name, 16, INK, bold=True)
        drawing.text(x + 95, 104, what, 12, MUTED)
    drawing.arrow(222, 85, 286, 85)
    drawing.text(125, 32, "attention_reuse.py", 12, MUTED)
    drawing.text(385, 32, "attention_reuse_handler.py", 12, MUTED)
    drawing.text(125, 146, "traits: stage, what it owns", 12, INK)
    drawing.text(385, 146, "gets a Frame and a TokenView", 12, INK)
    for row, reader in enumerate(("wrap, unwrap, disabled", "composition", "files and command line", "stats, flops")):
        drawing.box(556, 22 + 34 * row, 184, 26, PAPER, LINE, 13)
        drawing.text(648, 39 + 34 * row, reader, 11.5)
    drawing.arrow(482, 85, 550, 85)
    return drawing.save(folder / "method.svg")


def own_images(folder: Path) -> Path:
    """Draw the way from a folder of photos to a folder of samples."""
    drawing = Drawing(760, 150, "From photos to samples")
    places = (
        ("photos/cats/*.jpg", "one folder per class"),
        ("mine.yaml", "the recipe"),
        ("runs/mine", "weights, log, previews"),
    )
    for column, (name, what) in enumerate(places):
        x = 20 + 190 * column
        drawing.box(x, 40, 150, 60, "#ffffff", KEPT)
        drawing.text(x + 75, 68, name, 13, INK, bold=True)
        drawing.text(x + 75, 88, what, 11, MUTED)
        drawing.arrow(x + 152, 70, x + 186, 70)
    for index in range(6):
        drawing.cells(592 + 52 * (index % 3), 20 + 52 * (index // 3), 3, colours(picture(index), 16))
    for column, command in enumerate(("recipes copy", "train", "sample")):
        drawing.text(189 + 190 * column, 124, command, 12, SECOND, bold=True)
    return drawing.save(folder / "own-images.svg")


def upcycle(folder: Path) -> Path:
    """Draw what a DC-DiT takes from a DiT."""
    drawing = Drawing(760, 216, "What a student takes from the base")
    drawing.text(14, 56, "base: DiT", 13, INK, "start", bold=True)
    drawing.text(14, 160, "student: DC-DiT", 13, INK, "start", bold=True)
    base = (("patches", 150, 92, DROPPED), ("blocks", 330, 190, KEPT), ("head", 596, 92, DROPPED))
    student = (
        ("encoder", 150, 92, SECOND),
        ("router", 256, 60, SECOND),
        ("blocks", 330, 190, KEPT),
        ("decoder, head", 596, 118, SECOND),
    )
    for y, parts in ((30, base), (134, student)):
        for name, x, width, colour in parts:
            drawing.box(x, y, width, 40, colour, LINE if colour == DROPPED else colour)
            drawing.text(x + width / 2, y + 25, name, 13, INK if colour == DROPPED else "#ffffff", bold=True)
    drawing.arrow(425, 72, 425, 131)
    drawing.text(436, 106, "copied", 12, MUTED, "start")
    drawing.arrow(196, 72, 196, 131)
    drawing.text(207, 106, "starts as the patch embedding", 12, MUTED, "start")
    for x, colour, what in ((150, KEPT, "from the base"), (330, SECOND, "new, trained"), (510, DROPPED, "not copied")):
        drawing.box(x, 190, 14, 14, colour, LINE)
        drawing.text(x + 20, 202, what, 12, MUTED, "start")
    return drawing.save(folder / "upcycle.svg")


def devices(folder: Path) -> Path:
    """Draw data-parallel replicas and context parallelism."""
    drawing = Drawing(760, 186, "Training on replicas, sampling with split tokens")
    drawing.text(180, 28, "training: replicas", 14, bold=True)
    drawing.text(570, 28, "sampling: tokens split over devices", 14, bold=True)
    for device in range(3):
        x = 30 + 104 * device
        drawing.box(x, 44, 92, 74, "#ffffff", KEPT)
        drawing.text(x + 46, 66, f"GPU {device}", 12, MUTED)
        drawing.box(x + 10, 76, 72, 30, KEPT, KEPT)
        drawing.text(x + 46, 96, "model", 12, "#ffffff", bold=True)
    drawing.arrow(60, 134, 320, 134)
    drawing.arrow(300, 134, 40, 134)
    drawing.text(180, 160, "gradients are averaged", 12, MUTED)
    for device in range(2):
        x = 420 + 156 * device
        drawing.box(x, 44, 144, 74, "#ffffff", KEPT)
        drawing.text(x + 72, 66, f"GPU {device}", 12, MUTED)
        drawing.cells(x + 40, 74, 4, colours(picture(3), 16)[8 * device : 8 * device + 8])
    drawing.arrow(560, 134, 590, 134)
    drawing.arrow(580, 134, 550, 134)
    drawing.text(570, 160, "one decision of the cache for all", 12, MUTED)
    return drawing.save(folder / "devices.svg")


ALL = (adapter, method, own_images, upcycle, devices)
