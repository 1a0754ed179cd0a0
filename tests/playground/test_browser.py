"""`tokdyn playground` in a real browser: it draws, the picture and the token map change meanwhile, Stop stops."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.browser import PATIENCE, launched
from tests.sampling import FACTS, tiny
from tokdyn.report.html import image_uri
from tokdyn.report.maps import shade
from tokdyn.sample import SampleConfig, sample
from tokdyn.train.snapshot import save_model

STEPS = 30
WATCH = """() => {
  window.seen = {picture: new Set(), tokens: new Set(), beside: new Set()};
  const look = () => Object.entries(window.seen).forEach(([name, found]) => {
    const image = document.querySelector(`#${name} img`);
    if (image) found.add(image.src);
  });
  new MutationObserver(look).observe(document.body, {subtree: true, childList: true, attributes: true});
}"""
GUARDED = """
import socket, sys

def guard(event, args):
    if event == "socket.connect" and args[0].family != socket.AF_UNIX and args[1][0] not in ("127.0.0.1", "::1"):
        print("Error: asked the network for", args[1], file=sys.stderr, flush=True)

sys.addaudithook(guard)
from tokdyn.cli.main import main
main()
"""
SEEN = "Object.fromEntries(Object.entries(window.seen).map(([name, found]) => [name, found.size]))"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if find_spec("gradio") is None:
        pytest.skip("there is no page: pip install 'tokdyn[playground]'")
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("playground") / "run"
    save_model(
        tiny(0),
        folder,
        {
            **FACTS,
            "name": "<b>run</b>${window.hacked = 2}",
            "class_names": ["apple", "<img src=x onerror='window.hacked = 1'>", "car"],
        },
    )
    return folder


@pytest.fixture(scope="module")
def address(browser: Any, folder: Path) -> Iterator[str]:
    """Serve the playground as a user would, end it by Ctrl-C, and check that it ends well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["playground", str(folder), f"port={port}", f"steps={STEPS}", "tail_drop=0.3", "device=cpu"]
    stack = "{name: cached, methods: [{method: FeatureCache, threshold: 0.5}]}"
    command = [sys.executable, "-c", GUARDED, *words, "--stack", stack]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.match(r"http://127\.0\.0\.1:\d+", line)
    assert found, process.communicate()
    yield found[0]
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=PATIENCE / 1000)
    assert process.returncode == 0, complaints
    assert "Error" not in complaints


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """Open the page, and check afterwards that nothing was complained about and nothing else was asked for."""
    complaints: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request",
        lambda sent: None if sent.url.startswith((address, "data:", "blob:")) else complaints.append(sent.url),
    )
    page.goto(address)
    page.wait_for_selector("#draw")
    yield page
    assert page.evaluate("window.hacked") is None
    context.close()
    assert complaints == []


def choose(page: Any, field: str, option: str) -> None:
    """Choose from a list."""
    page.locator(f"#{field} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def test_a_class_is_drawn_and_the_picture_and_the_map_change_meanwhile(page, folder, tmp_path):
    choose(page, "subject", "car")
    page.locator("#seed input").fill("7")
    page.evaluate(WATCH)
    page.locator("#draw").click()
    page.wait_for_selector("#costs tbody tr:nth-child(2)")
    seen = page.evaluate(SEEN)
    assert seen["picture"] > 3
    assert seen["tokens"] > 3
    assert seen["beside"] > 3
    same = SampleConfig(
        model=str(folder), out=tmp_path / "o", format="npz", count=1, classes=("car",), seed=7, guidance=2.0,
        steps=STEPS, scheduler="ddim", tail_drop=(0.3, 0.0), device="cpu",
    )  # fmt: skip
    budgets = sample(same).budgets
    images = [np.load(tmp_path / f"o/tail_drop_{drop}/samples.npz")["arr_0"][0] for drop in ("0.3", "0")]
    for name, image in zip(("picture", "beside"), images, strict=True):
        assert page.locator(f"#{name} img").get_attribute("src") == image_uri(image)
    assert page.locator("#tokens img").get_attribute("src") != image_uri(shade(images[0], np.ones((6, 8), bool)))
    kept = [row.split("\t")[3] for row in page.locator("#costs tbody").inner_text().splitlines()]
    assert kept == [f"{budget.kept:.1%}" for budget in budgets]


def test_stop_stops_and_the_next_picture_is_drawn(page):
    page.locator("#steps input").fill("1000")
    page.evaluate(WATCH)
    page.locator("#draw").click()
    page.wait_for_function("window.seen.picture.size > 1")
    page.locator("#stop").click()
    page.locator("#steps input").fill("3")
    choose(page, "stack", "cached")
    page.wait_for_function("document.querySelector('#methods textarea').value.includes('FeatureCache')")
    page.locator("#draw").click()
    page.wait_for_function("document.querySelector('#costs')?.innerText.includes('all 3 steps')")
    assert "cached steps" in page.locator("#costs thead").inner_text()


def test_what_cannot_be_drawn_is_said_on_the_page(page):
    page.locator("#methods textarea").fill("[{method: TokenMrge}]")
    page.locator("#draw").click()
    page.get_by_text("did you mean 'TokenMerge'").wait_for()
