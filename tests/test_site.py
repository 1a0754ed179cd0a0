"""The site is complete, and its pages quote the code: sentences of errors, versions, notebooks, commands, pictures."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import tomllib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

import tokdyn

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


@cache
def hooks() -> ModuleType:
    """What mkdocs calls while it builds the site."""
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_an_entry_for_every_public_name() -> None:
    pages = hooks().reference()
    for package in ("tokdyn", *(f"tokdyn.{name}" for name in dir(tokdyn) if not name.startswith("_"))):
        try:
            names = getattr(importlib.import_module(package), "__all__", ())
        except ImportError:  # a function or a class
            continue
        entries = set(
            re.findall(rf"^(?:::: |## `)({re.escape(package)}\.\w+)", pages.get(f"reference/{package}.md", ""), re.M)
        )
        assert entries == {f"{package}.{name}" for name in names}


def test_an_alias_leads_to_the_entry_that_it_is_another_name_of() -> None:
    lines = ["tokdyn.DiT(Transformer)", "tokdyn.DiT.named(cls) -> DiT", "tokdyn.models.DiT is tokdyn.DiT"]
    pages = hooks().reference(hooks().public_names(lines))
    assert "::: tokdyn.DiT\n" in pages["reference/tokdyn.md"]
    assert "[`tokdyn.DiT`][tokdyn.DiT]" in pages["reference/tokdyn.models.md"]
    assert "named" not in pages["reference/tokdyn.md"]


@cache
def sentences() -> tuple[str, ...]:
    """Every text in the code, with `…` where a value is put in."""
    found = []
    for file in (*(ROOT / "tokdyn").rglob("*.py"), *(ROOT / "cli").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def printed(message: str) -> bool:
    """Whether one text of the code has the fixed parts of a message, in order."""
    parts = [re.escape(part.strip()) for part in message.split("…") if part.strip(" .")]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    return any(pattern.search(text) for text in sentences())


def test_troubleshooting_quotes_sentences_of_the_code() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 25
    assert [row for row in rows if not printed(row)] == []
    assert not printed("this … is wrapped twice; …")


def test_the_page_on_versions_shows_the_oldest_ones() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = dict(re.fullmatch(r"([\w.-]+)>=([\d.]+)", each).groups() for each in project["dependencies"])  # type: ignore[union-attr]
    oldest["python"] = project["requires-python"].removeprefix(">=")
    shown = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", (DOCS / "versions.md").read_text(), re.MULTILINE)
    assert {name.lower(): version for name, version in shown} == oldest
    readme = (ROOT / "README.md").read_text()
    assert f"| {oldest['python']} and newer | {oldest['torch']} and newer | {oldest['diffusers']} and newer |" in readme


def test_the_table_of_what_goes_together_is_what_wrap_does() -> None:
    lines = re.findall(r"^\|\s*(?:\*\*)?(\w*)(?:\*\*)?\s*\|(.*)\|$", (DOCS / "choosing.md").read_text(), re.MULTILINE)
    names, *rows = [
        (name, [cell.strip() for cell in cells.split("|")]) for name, cells in lines if cells.count("|") == 5
    ]
    model = tokdyn.bases.open_base("shapes")
    assert {name for name, _ in rows} < set(names[1])
    for name, cells in rows:
        for other, cell in zip(names[1], cells, strict=True):
            stack = [getattr(tokdyn, each).examples()[0] for each in (name, other)]
            if cell.startswith("no"):
                with pytest.raises(tokdyn.CompositionError):
                    tokdyn.wrap(model, stack)
            elif cell.startswith("yes"):
                tokdyn.unwrap(tokdyn.wrap(model, stack))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_repository_exist(page: Path) -> None:
    """Shell lines that start no `tokdyn` name a target of the Makefile, a module or a file."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    lines = [line for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
    for line in [*lines, *re.findall(r"`(make [^`]+|python -m [^`]+)`", text)]:
        words = line.split("#")[0].split()
        if words[:1] == ["make"]:
            assert [
                word for word in words[1:] if "=" not in word and word.isidentifier() and word not in targets
            ] == [], line
        elif words[:2] == ["python", "-m"] and words[2] != "pip":
            assert any(ROOT.joinpath(*words[2].split(".")).with_suffix(end).exists() for end in (".py", "")), line
        elif words[:1] == ["bash"]:
            assert (ROOT / words[1]).is_file(), line


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_hold_what_their_cells_gave(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code)
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])
    page = hooks().from_notebook(path)
    assert page.count("```python\n") == len(code)
    assert "data:image/png;base64," in page
    assert path.stat().st_size < 500_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)


def test_concepts_are_drawn_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module("docs.draw.__main__").main
    main(["concepts", "--out", str(tmp_path)])
    drawn = {path.name: elements(path) for path in tmp_path.iterdir()}
    assert drawn == {name: elements(DOCS / "pictures" / name) for name in drawn}
    assert {"tokens.svg", "stages.svg", "budgets.svg", "trajectory.svg"} <= set(drawn)
    with pytest.raises(SystemExit) as refused:
        main(["nothing"])
    assert refused.value.code == 2
    assert "nothing" in capsys.readouterr().err


@pytest.mark.slow
def test_figures_of_results_are_drawn_from_their_numbers(tmp_path: Path) -> None:
    """As wide as a column: 3.5 inches of 160 pixels."""
    results = importlib.import_module("docs.draw.results")
    drawn = [draw(tmp_path) for draw in results.ALL]
    assert {path.name for path in drawn} <= {path.name for path in results.FOLDER.iterdir()}
    for path in drawn:
        with Image.open(path) as image, Image.open(results.FOLDER / path.name) as committed:
            assert max(image.width, committed.width) <= 3.7 * 160
            assert image.height == pytest.approx(committed.height, rel=0.1)


def elements(path: Path) -> list[str]:
    """The kinds of the elements of an SVG, whose colours may differ in the last bit from machine to machine."""
    return [element.tag for element in ElementTree.parse(path).iter()]
