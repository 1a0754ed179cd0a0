"""Add to the site what is no Markdown file in docs/: the API reference, notebooks, CONTRIBUTING and CHANGELOG.

mkdocs calls the functions that begin with `on_` (mkdocs.yml). The reference has a page for every package and an entry
for every name of tests/public_names.txt, the list that a test compares with the code. Its texts are docstrings, which
mkdocstrings reads without importing anything, so that building the site needs neither torch nor diffusers.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?://|#)([^)#]+)(#[^)]*)?\)")


def public_names(lines: Sequence[str] | None = None) -> dict[str, dict[str, str | None]]:
    """Return the public names of each package; a name that is another one's alias has that one as its value."""
    if lines is None:
        lines = (ROOT / "tests/public_names.txt").read_text(encoding="utf-8").splitlines()
    packages: dict[str, dict[str, str | None]] = {}
    for line in lines:
        found = re.match(r"(tokdyn)(?:\.(\w+))?\.(\w+)(?: is (\S+)$|[(:]| = | -> |$)", line)
        if found and (found[2] is None or _is_package(found[2])):
            package = found[1] if found[2] is None else f"tokdyn.{found[2]}"
            packages.setdefault(package, {}).setdefault(found[3], found[4])
    return packages


def _is_package(name: str) -> bool:
    return (ROOT / "tokdyn" / name).is_dir() or (ROOT / "tokdyn" / f"{name}.py").is_file()


def reference(packages: Mapping[str, Mapping[str, str | None]] | None = None) -> dict[str, str]:
    """Return the Markdown of the pages of the API reference, by their paths in the site."""
    packages = public_names() if packages is None else packages
    pages, rows = {}, []
    for package, names in packages.items():
        text = [f"# {package}\n\n{summary(package)}\n"]
        for name, same in names.items():
            path = f"{package}.{name}"
            text.append(
                f"::: {path}\n" if same is None else f"## `{path}` {{#{path}}}\n\nThe same as [`{same}`][{same}].\n"
            )
        pages[f"reference/{package}.md"] = "\n".join(text)
        rows.append(f"| [{package}]({package}.md) | {len(names)} | {summary(package)} |")
    head = (
        "# API reference\n\nEvery public name, by package. Most programs need no more than those of `tokdyn` itself.\n"
    )
    pages["reference/index.md"] = "\n".join([head, "| package | names | what it is for |", "|---|---|---|", *rows, ""])
    return pages


def summary(package: str) -> str:
    """Return the first line of a package's docstring."""
    path = ROOT.joinpath(*package.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file.read_text(encoding="utf-8").split('"""')[1].split("\n")[0]


def from_root(name: str) -> str:
    """Return a page of the repository's root, with its links as they must be in the site."""

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        if target.startswith("docs/"):
            return f"[{text}]({target.removeprefix('docs/')}{anchor})"
        return f"{text} (`{target}`)" if text != target else f"`{target}`"

    return _LINK.sub(link, (ROOT / name).read_text(encoding="utf-8"))


def from_notebook(path: Path) -> str:
    """Return the Markdown of a notebook: its texts, its code, and what its cells printed or drew."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![drawn by the cell above](data:image/png;base64,{''.join(data['image/png']).strip()})")
            elif printed := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                parts.append(f"```text\n{printed}\n```")
    return "\n\n".join([*parts, f'<a href="{path.name}">This page as a notebook</a>']) + "\n"


def version() -> str:
    """Return the version of the package."""
    found = re.search(r'^__version__ = "([^"]+)"', (ROOT / "tokdyn/__init__.py").read_text(encoding="utf-8"), re.M)
    assert found is not None
    return found[1]


def on_config(config: Any) -> Any:
    """Build into a folder named by the version, and list the pages of the reference in the navigation."""
    pages = sorted(
        reference(), key=lambda path: (path.count("."), path.removesuffix("index.md"))
    )  # tokdyn itself first
    config.nav = [{"Reference": pages} if "Reference" in item else item for item in config.nav]
    config.site_dir = str(Path(config.site_dir) / version())
    config.site_name = f"tokdyn {version()}"
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made here."""
    from mkdocs.structure.files import File

    pages = reference() | {"contributing.md": from_root("CONTRIBUTING.md"), "changelog.md": from_root("CHANGELOG.md")}
    for path in (ROOT / "docs").rglob("*.ipynb"):
        pages[path.relative_to(ROOT / "docs").with_suffix(".md").as_posix()] = from_notebook(path)
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links to notebooks and to pages of the root, which lead somewhere in the repository, lead to their pages."""
    markdown = re.sub(r"(\]\([^)#\s]+)\.ipynb([)#])", r"\1.md\2", markdown)
    root = re.compile(r"\]\(\.\./((?:\.\./)*)(CONTRIBUTING|CHANGELOG)\.md")
    return root.sub(lambda found: f"]({found[1]}{found[2].lower()}.md", markdown)


def on_post_build(config: Any) -> None:
    """Check that the reference is complete, list the versions beside this one, and lead to the newest."""
    from mkdocs.exceptions import PluginError

    folder = Path(config.site_dir)
    _, body = (folder / "objects.inv").read_bytes().split(b"zlib.\n", 1)
    documented = {line.split(" ", 1)[0] for line in zlib.decompress(body).decode().splitlines()}
    missing = [
        f"{package}.{name}"
        for package, names in public_names().items()
        for name, same in names.items()
        if same is None and f"{package}.{name}" not in documented
    ]
    if missing:
        raise PluginError(f"The API reference lacks {', '.join(missing)}.")
    built = (path.parent.name for path in folder.parent.glob("*/objects.inv"))
    versions = sorted(built, key=lambda name: [int(number) for number in re.findall(r"\d+", name)], reverse=True)
    listed = [{"version": name, "title": name, "aliases": []} for name in versions]
    (folder.parent / "versions.json").write_text(json.dumps(listed), encoding="utf-8")
    newest = f"{versions[0]}/index.html"
    page = f'<!doctype html><meta http-equiv="refresh" content="0; url={newest}"><a href="{newest}">tokdyn</a>\n'
    (folder.parent / "index.html").write_text(page, encoding="utf-8")
