"""Ask whether the Hugging Face hub answers. Its own client tries again for half a minute."""

from __future__ import annotations

import math
import time

from huggingface_hub import constants, get_session

_PATIENCE = 4.0  # seconds that the hub has to answer; its client would try again and again for half a minute
_REMEMBERED = 60.0  # seconds for which it counts as unreachable after that
_asked: dict[str, tuple[bool, float]] = {}  # by address of the hub: whether it answered, and when it was asked


def reachable() -> bool:
    """Return whether the hub answers, after one short try. If it does not, it is asked again after a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    answers, when = _asked.get(constants.ENDPOINT, (False, -math.inf))
    if not answers and time.monotonic() - when > _REMEMBERED:
        try:
            get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
            answers = True
        except Exception:  # of httpx or of requests, whichever the hub's client uses
            answers = False
        _asked[constants.ENDPOINT] = answers, time.monotonic()
    return answers
