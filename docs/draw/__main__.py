"""Draw the pictures of the pages: concepts and cards, results from their numbers, or with --run the map of a router."""

from __future__ import annotations

import argparse
from pathlib import Path

PICTURES = Path(__file__).parents[1] / "pictures"


def main(words: list[str] | None = None) -> None:
    """Draw what is named, on the command line by default."""
    parser = argparse.ArgumentParser(prog="python -m docs.draw", description=__doc__)
    parser.add_argument(
        "what", nargs="*", metavar="WHAT", help="concepts, cards, results or maps; the first two by default"
    )
    parser.add_argument("--run", type=Path, help="training run of a DC-DiT on procedural shapes, for maps")
    parser.add_argument("--out", type=Path, help="folder of the pictures; of results, docs/results by default")
    given = parser.parse_args(words)
    what, out = given.what or ["concepts", "cards"], given.out or PICTURES
    if unknown := set(what) - {"concepts", "cards", "results", "maps"}:
        parser.error(f"there is no {sorted(unknown)[0]} to draw; name concepts, cards, results or maps")
    if "maps" in what and given.run is None:
        parser.error("maps need --run, the folder of a training run such as `tokdyn train demo out=runs/demo` makes")
    if "concepts" in what:
        from docs.draw import concepts

        for draw in concepts.ALL:
            print(draw(out))
        from docs.draw import tutorials

        for draw in tutorials.ALL:
            print(draw(out))
    if "cards" in what:
        from docs.draw import cards

        for draw in cards.ALL:
            print(draw(out))
    if "results" in what:
        from docs.draw import results

        for draw in results.ALL:
            print(draw(given.out or results.FOLDER))
    if "maps" in what:
        from docs.draw.maps import keep_map

        print(keep_map(out, given.run))


if __name__ == "__main__":
    main()
