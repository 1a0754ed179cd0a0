"""Choose few rows of a product so that every pair of values still occurs together.

Most defects need one factor or two: a method that is wrong on one model, a law that is wrong for one method. The
default suite therefore runs a pairwise covering of models x methods x laws, and `make test-all` the whole product.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from itertools import combinations
from zlib import crc32

Row = Sequence[tuple[str, Hashable]]
"""One combination: (factor, value) for each factor."""


def pairs_of(row: Row) -> set[tuple[tuple[str, Hashable], ...]]:
    """Every pair of values that a row brings together; of a row with one factor, that value alone."""
    return set(combinations(row, 2)) if len(row) > 1 else {tuple(row)}


def covering(rows: Sequence[Row], costs: Sequence[float] | None = None) -> list[int]:
    """Return the indices of rows that together hold every pair that occurs in any of them.

    Takes the row with the most pairs that are still missing for its cost, until none is missing. Gains only shrink, so
    a heap with lazy updates finds that row. A checksum decides between equals, which favours no value of a factor.
    """
    pairs = [pairs_of(row) for row in rows]
    costs = [1.0] * len(rows) if costs is None else costs
    missing = set().union(*pairs)
    heap = [(-len(each) / costs[index], crc32(repr(rows[index]).encode()), index) for index, each in enumerate(pairs)]
    heapq.heapify(heap)
    chosen = []
    while missing:
        gain, order, index = heapq.heappop(heap)
        now = -len(pairs[index] & missing) / costs[index]
        if now == gain:
            chosen.append(index)
            missing -= pairs[index]
        elif now:
            heapq.heappush(heap, (now, order, index))
    return sorted(chosen)
