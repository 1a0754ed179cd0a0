"""Draw the pictures of the pages: concepts and cards, or with --run the map of a router."""

from __future__ import annotations

import argparse
from pathlib import Path

PICTURES = Path(__file__).parents[1] / "pictures"


def main(words: list[str] | None = None) -> None:
    """Draw what is named, on the command line by default."""
    parser = argparse.ArgumentParser(prog="python -m docs.draw", description=__doc__)
    parser.add_argument("what", nargs="*", metavar="WHAT", help="concepts, cards or maps; the first two by default")
    parser.add_argument("--run", type=Path, help="training run of a DC-DiT on procedural shapes, for maps")
    parser.add_argument("--out", type=Path, default=PICTURES, help="folder of the pictures")
    given = parser.parse_args(words)
    what = given.what or ["concepts", "cards"]
    if unknown := set(what) - {"concepts", "cards", "maps"}:
        parser.error(f"there is no {sorted(unknown)[0]} to draw; name concepts, cards or maps")
    if "maps" in what and given.run is None:
        parser.error("maps need --run, the folder of a training run such as `tokdyn train demo out=runs/demo` makes")
    if "concepts" in what:
        from docs.draw import concepts

        for draw in concepts.ALL:
            print(draw(given.out))
        from docs.draw import tutorials

        for draw in tutorials.ALL:
            print(draw(given.out))
    if "cards" in what:
        from docs.draw import cards

        for draw in cards.ALL:
            print(draw(given.out))
    if "maps" in what:
        from docs.draw.maps import keep_map

        print(keep_map(given.out, given.run))


if __name__ == "__main__":
    main()
