"""Tests use what users can use: no private name of the package, and of a wrapped model's `tokdyn` no insides."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from torch import nn

ROOT = Path(__file__).parents[1]
OF_DIFFUSERS = {
    "_keep_in_fp32_modules": "a model says with it which of its layers stay in fp32",
    "_reset_stateful_cache": "pipelines call it on a model when they have made their images",
    "_supports_gradient_checkpointing": "a model says with it whether it can",
}
"""Private names that the package shares with diffusers, each with what it is there for."""
BY_NAME = {"delattr", "getattr", "hasattr", "setattr", "setitem"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(tree: ast.AST) -> set[str]:
    """Names that a file defines: functions, classes, variables and attributes."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def private_names() -> set[str]:
    """Private names that the package defines."""
    files = (file for top in ("tokdyn", "cli", "benchmarks") for file in (ROOT / top).rglob("*.py"))
    found = set().union(*(defined(ast.parse(path.read_text(), str(path))) for path in files))
    return {name for name in found if is_private(name)} - set(OF_DIFFUSERS)


MODULE = nn.Module()


def names_used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Attributes that a file reads, writes or patches, by their names or by strings, and names that it imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None)) in BY_NAME:
            texts = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            yield from ((node.lineno, text.rpartition(".")[2]) for text in texts)


def insides_used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Attributes of `model.tokdyn` or `attached(model)` that not every `nn.Module` has."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not hasattr(MODULE, node.attr):
            owner = node.value.func if isinstance(node.value, ast.Call) else node.value
            name = getattr(owner, "attr", getattr(owner, "id", None))
            called = isinstance(node.value, ast.Call)
            if (name == "tokdyn" and isinstance(owner, ast.Attribute) and not called) or (
                name in ("attached", "attachment_of") and called
            ):
                yield node.lineno, node.attr


def test_what_is_looked_for_is_found() -> None:
    tree = ast.parse('a._b\nfrom c import _d\nmonkeypatch.setattr("e._f", 1)\nmonkeypatch.setattr(g, "_h", 1)')
    assert [name for _, name in names_used(tree) if is_private(name)] == ["_d", "_b", "_f", "_h"]
    tree = ast.parse("model.tokdyn.parts\nattached(model).methods\nmodel.tokdyn.parameters()\ntokdyn.parts(model)")
    assert [name for _, name in insides_used(tree)] == ["parts", "methods"]
    assert {"_LAZY", "_call_block", "_frames"} <= private_names()


def test_tests_reach_for_nothing_private() -> None:
    private, found = private_names(), []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        tree = ast.parse(path.read_text(), str(path))
        hidden = private - defined(tree)  # a class of the tests may have an attribute of that name
        used = [each for each in names_used(tree) if each[1] in hidden]
        found += [(str(path.relative_to(ROOT)), *each) for each in [*used, *insides_used(tree)]]
    assert not found
