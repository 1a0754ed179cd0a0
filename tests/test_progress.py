"""Progress of long work off a terminal."""

import pytest

import tokdyn.progress
from tokdyn.progress import duration, progress


def test_a_line_is_printed_every_half_minute(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(tokdyn.progress.time, "monotonic", lambda: now[0])
    with progress("images", 50) as advance:
        for _ in range(5):
            now[0] += 10
            advance(10)
    assert capsys.readouterr().err == "images  30/50  ETA 20s\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.6, "5s"), (45, "45s"), (725, "12m05s"), (11_220, "3h07m"), (187_200, "2d04h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
