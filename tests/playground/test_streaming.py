"""Work in a thread: what it sends is yielded, errors arrive, closing cancels, one piece of work waits for another."""

from __future__ import annotations

import threading

import pytest
import torch

from tokdyn.errors import InputError
from tokdyn.playground.streaming import Clock, streamed

PATIENCE = 60.0  # s; a machine may be busy


def test_everything_that_is_sent_is_yielded_in_order():
    def work(send):
        for number in range(5):
            send(number)
            send(None)

    assert list(streamed(work, threading.Lock())) == list(range(5))


def test_an_error_arrives_after_what_was_sent_before():
    def work(send):
        send(1)
        raise InputError("no such class")

    values = streamed(work, threading.Lock())
    assert next(values) == 1
    with pytest.raises(InputError, match="no such class"):
        next(values)


def test_closing_ends_the_work_when_it_next_sends_and_frees_the_lock():
    alone, closed, sent, tidied = threading.Lock(), threading.Event(), [], []

    def work(send):
        try:
            send("first")
            assert closed.wait(PATIENCE)
            send(None)
            sent.append("more")
        except Exception:
            sent.append("taken for an error")
        finally:
            tidied.append(True)

    values = streamed(work, alone)
    assert next(values) == "first"
    values.close()
    closed.set()
    assert alone.acquire(timeout=PATIENCE)
    assert tidied == [True]
    assert sent == []


def test_work_waits_for_the_work_before_even_if_that_is_cancelled():
    alone, go, order = threading.Lock(), threading.Event(), []

    def first(send):
        try:
            send("begun")
            assert go.wait(PATIENCE)
            send(None)
        finally:
            order.append("first ends")

    def second(send):
        order.append("second begins")
        send("done")

    cancelled = streamed(first, alone)
    next(cancelled)
    cancelled.close()
    waiting = streamed(second, alone)
    results: list[str] = []
    reader = threading.Thread(target=lambda: results.extend(waiting))
    reader.start()
    go.set()
    reader.join(PATIENCE)
    assert order == ["first ends", "second begins"]
    assert results == ["done"]


def test_a_clock_does_not_count_pauses(monkeypatch):
    now = iter([0.0, 1.0, 101.0, 103.0, 203.0, 207.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock(torch.device("cpu"))
    for _ in range(2):
        with clock.paused():
            pass
    assert clock.stop() == 1.0 + 2.0 + 4.0
