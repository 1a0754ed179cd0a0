"""Entry point of the `tokdyn` command."""

from __future__ import annotations


def main() -> int:
    """Run the command line and return the exit code."""
    import tokdyn

    print(tokdyn.__version__)
    return 0
