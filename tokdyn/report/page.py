"""Write pages: one HTML file each, with style, script and images inside, which asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import tokdyn
from tokdyn.files import replacing
from tokdyn.report.html import Html, join, tag

UNITS = "A multiply-add is 2 FLOPs; GFLOPs and ms are per image, all steps and guidance branches included."


@dataclass
class Page:
    """A page that is put together section by section.

    Attributes:
        title: title of the page.
        lead: what the page shows, in a sentence or two.
        foot: text at the end, such as the machine.
        sections: titles and contents of the sections.
    """

    title: str
    lead: str = ""
    foot: str = ""
    sections: list[tuple[str, Html]] = field(default_factory=list)

    def add(self, title: str, *parts: object) -> None:
        """Add a section; a part that is not `Html` is escaped. Nothing is added if all parts are empty."""
        content = join(parts)
        if content:
            self.sections.append((title, content))

    def render(self) -> Html:
        """Return the page."""
        style, script = _asset("page.css"), _asset("page.js")
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        # Only the script of this package may run, and nothing may be loaded from anywhere.
        policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
        head = tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=policy),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("meta", name="generator", content=f"tokdyn {tokdyn.__version__}"),
            tag("title", self.title),
            tag("style", Html(style)),
        )
        links = [tag("a", title, href=f"#section-{number}") for number, (title, _) in enumerate(self.sections)]
        sections = [
            tag("section", tag("h2", title, id=f"section-{number}"), content)
            for number, (title, content) in enumerate(self.sections)
        ]
        theme = tag("button", "Theme: system", type="button", id="theme", hidden=True)
        body = tag(
            "body",
            tag("a", "Skip to the contents", href="#contents", class_="skip"),
            tag("header", tag("div", tag("h1", self.title), theme), tag("p", self.lead), class_="top"),
            tag("nav", *links, aria_label="Sections") if len(links) > 1 else "",
            tag("main", *sections, id="contents"),
            tag("footer", tag("p", UNITS), tag("p", self.foot), tag("p", f"Written by tokdyn {tokdyn.__version__}.")),
            tag("div", id="tip", role="status", hidden=True),
            tag("script", Html(script)),
        )
        return Html(f'<!doctype html>\n<html lang="en">{head}{body}</html>\n')

    def write(self, path: Path) -> Path:
        """Write the page, atomically, and return `path`."""
        with replacing(path) as temporary:
            temporary.write_text(self.render(), encoding="utf-8")
        return path


def described(values: dict[str, object] | dict[str, str | int]) -> str:
    """Return names and values on one line, such as those that describe a machine."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


@lru_cache
def _asset(name: str) -> str:
    """Return a file that lies beside this module."""
    return (Path(__file__).with_name(name)).read_text(encoding="utf-8")
