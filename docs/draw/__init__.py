"""Draw the pictures of the pages: `python -m docs.draw` writes them to docs/pictures."""
