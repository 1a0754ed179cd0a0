"""The table of docs/reliability.md, from the marks of the tests. `python tests/reliability_page.py` writes it anew.

A test that injects a fault is marked `@pytest.mark.fault(fault, injected=..., happened=..., lost="nothing", times=1)`.
It runs once for each of its parameters, and injects the fault `times` times in each.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"
PART = re.compile(r"(<!-- faults:.*?-->\n)(.*?)(\n+<!-- end)", re.DOTALL)


@dataclass(frozen=True)
class Fault:
    """A row of the table."""

    fault: str
    injected: str
    often: int
    happened: str
    lost: str
    test: str


def _mark(decorator: ast.expr) -> tuple[str, ast.Call] | None:
    """Return the name of a decorator `pytest.mark.NAME(...)`, and its call."""
    if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Attribute):
        of = decorator.func.value
        if isinstance(of, ast.Attribute) and of.attr == "mark":
            return decorator.func.attr, decorator
    return None


def _cases(values: ast.expr, module: ast.Module) -> int:
    """Return how many cases the second argument of parametrize lists: a literal, or a constant of the module."""
    if isinstance(values, ast.Name):
        constants = [each for each in module.body if isinstance(each, ast.Assign)]
        values = next(each.value for each in constants if ast.unparse(each.targets[0]) == values.id)
    if isinstance(values, ast.Starred):
        values = values.value
    if isinstance(values, ast.GeneratorExp):
        return _cases(values.generators[0].iter, module)
    assert isinstance(values, ast.List | ast.Tuple), f"{ast.unparse(values)} cannot be counted"
    return sum(_cases(each, module) if isinstance(each, ast.Starred) else 1 for each in values.elts)


def faults() -> list[Fault]:
    """Return a row for each marked test, by file and place."""
    found = []
    for path in sorted(TESTS.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "mark.fault(" not in text:
            continue
        module = ast.parse(text)
        for test in module.body:
            if not isinstance(test, ast.FunctionDef):
                continue
            marks = dict(filter(None, map(_mark, test.decorator_list)))
            if "fault" not in marks:
                continue
            values = {word.arg: ast.literal_eval(word.value) for word in marks["fault"].keywords}
            often = values.get("times", 1)
            for name, call in filter(None, map(_mark, test.decorator_list)):
                if name == "parametrize":
                    often *= _cases(call.args[1], module)
            found.append(
                Fault(
                    ast.literal_eval(marks["fault"].args[0]),
                    values["injected"],
                    often,
                    values["happened"],
                    values.get("lost", "nothing"),
                    f"{path.relative_to(TESTS.parent).as_posix()}::{test.name}",
                )
            )
    return found


def markdown() -> str:
    """Return the table."""
    rows = ["| fault | how injected | how often | what happens | what is lost | test |", "|---|---|---|---|---|---|"]
    for each in faults():
        file, _, name = each.test.partition("::")
        shown = f"`{Path(file).name}`: `{name}`"
        rows.append(f"| {each.fault} | {each.injected} | {each.often} | {each.happened} | {each.lost} | {shown} |")
    return "\n".join(rows)


if __name__ == "__main__":
    PAGE.write_text(PART.sub(lambda part: part[1] + markdown() + part[3], PAGE.read_text()))
