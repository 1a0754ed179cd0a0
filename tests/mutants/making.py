"""Make mistakes in a source file: mutmut's operators and four of our own, one mistake at a time.

mutmut itself leaves decorated functions, class bodies and module level alone; here those are pydantic models, autograd
functions and every operation with a CPU form. Its operators are therefore applied to the whole file.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import libcst as cst
from libcst.metadata import ByteSpanPositionProvider, MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_arg_removal

SWAPPED = {
    name: other
    for pair in (("min", "max"), ("any", "all"), ("amin", "amax"), ("argmin", "argmax"), ("floor", "ceil"))
    for name, other in (pair, pair[::-1])
}
MESSAGES = ("warn", "warn_once", "debug", "info", "warning")
"""Functions whose texts only people read."""
UNSEEN = {
    "device": "needs an accelerator",
    "strict": "of zip: no input reaches it",
    "description": "only people read it",
    "stacklevel": "only people read it",
}
"""Keyword arguments that are left as they are, and why."""


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        path: of the file, from the root of the repository.
        line: where the changed node begins.
        lines: those of the statement, as far as the node; a test that runs one of them reaches the mistake.
        scope: the function or class around it, "" at module level.
        before: the changed lines, stripped and joined.
        after: the lines that replace them.
        source: the whole file with the mistake.
    """

    path: str
    line: int
    lines: range
    scope: str
    before: str
    after: str
    source: str

    @property
    def key(self) -> str:
        """A name that stays while the lines around the mistake change."""
        return hashlib.sha256("\0".join((self.path, self.scope, self.before, self.after)).encode()).hexdigest()[:16]


class _Finder(cst.CSTVisitor):
    """Collect (node, replacement, lines, scope) for every mistake that might matter."""

    METADATA_DEPENDENCIES = (ByteSpanPositionProvider, PositionProvider)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[cst.CSTNode, cst.CSTNode, range, str]] = []
        self._above: list[cst.CSTNode] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if self._cannot_matter(node):
            return False
        if not self._only_passes_through(node):
            scope = ".".join(n.name.value for n in self._above if isinstance(n, cst.FunctionDef | cst.ClassDef))
            for old, new in _mistakes(node):
                self.found.append((old, new, self._lines(node), scope))
        self._above.append(node)
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if self._above and self._above[-1] is original_node:
            self._above.pop()

    def _cannot_matter(self, node: cst.CSTNode) -> bool:
        match node:
            case cst.Import() | cst.ImportFrom() | cst.Assert():
                return True  # assertions narrow types
            case cst.Expr(value=cst.SimpleString() | cst.ConcatenatedString()):
                return True  # docstrings
            case cst.If(test=cst.Name(value="TYPE_CHECKING")):
                return True
            case cst.Assign(targets=[cst.AssignTarget(target=cst.Name(value="__all__"))]):
                return True
            case cst.Arg(keyword=cst.Name(value=name)):
                return name in UNSEEN
            case cst.SimpleString():
                return self._in_message()
        return False

    def _lines(self, node: cst.CSTNode) -> range:
        """Return the lines of the statement around a node; of one with a body, only those before the node's end."""
        kinds = cst.SimpleStatementLine | cst.BaseCompoundStatement
        statement = next(each for each in reversed([*self._above, node]) if isinstance(each, kinds))
        whole = isinstance(statement, cst.SimpleStatementLine)
        first = self.get_metadata(PositionProvider, statement).start.line
        own = self.get_metadata(PositionProvider, node)
        last = self.get_metadata(PositionProvider, statement).end.line if whole else own.end.line
        return range(min(first, own.start.line), last + 1)

    def _only_passes_through(self, node: cst.CSTNode) -> bool:
        """Whether this is a part of an annotation; what is called in one, as pydantic's Field, is code again."""
        for above in reversed([*self._above, node]):
            if isinstance(above, cst.Call | cst.FunctionDef | cst.ClassDef):
                return False
            if isinstance(above, cst.Annotation):
                return True
        return False

    def _in_message(self) -> bool:
        for above in reversed(self._above):
            if isinstance(above, cst.FormattedStringExpression):
                return False  # a value within a message
            if isinstance(above, cst.Raise):
                return True
            if isinstance(above, cst.Call) and _last_name(above.func) in MESSAGES:
                return True
        return False


def _last_name(node: cst.CSTNode) -> str:
    return node.value if isinstance(node, cst.Name) else node.attr.value if isinstance(node, cst.Attribute) else ""


def _may_run(call: cst.Call, changed: cst.Call) -> bool:
    """Whether a call with an argument changed or removed may run: it is a keyword's, or the last was removed.

    Without a positional argument, or with None for it, nearly every call crashes, which tells only that it is reached;
    the other mistakes on the line tell that, too.
    """
    call, changed = (node.with_changes(args=[a for a in node.args if not _unseen(a)]) for node in (call, changed))
    if len(changed.args) < len(call.args):
        pairs = zip(call.args, changed.args, strict=False)
        index = next((i for i, (a, b) in enumerate(pairs) if a is not b), len(changed.args))
        return call.args[index].keyword is not None or index == len(call.args) - 1
    return any(a is not b and a.keyword is not None for a, b in zip(call.args, changed.args, strict=True))


def _unseen(arg: cst.Arg) -> bool:
    return arg.keyword is not None and arg.keyword.value in UNSEEN


def _mistakes(node: cst.CSTNode) -> Iterator[tuple[cst.CSTNode, cst.CSTNode]]:
    """List (old, new) nodes: mutmut's operators, negated conditions, dropped statements and swapped functions."""
    for kind, operator in mutation_operators:
        if isinstance(node, kind):
            news = list(operator(node))
            if isinstance(node, cst.SimpleString):
                news = news[:1]  # three ways to spoil a string tell the same
            if operator is operator_arg_removal:
                news = list(filter(functools.partial(_may_run, node), news))
            yield from ((node, new) for new in news)
    match node:
        case cst.If() | cst.While() | cst.CompIf():
            inside = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
            yield node.test, cst.UnaryOperation(cst.Not(), inside, [cst.LeftParen()], [cst.RightParen()])
        case cst.Expr(value=cst.Call()) | cst.Raise():
            yield node, cst.Pass()
        case cst.Call(func=cst.Name(value=name)) if name in SWAPPED:
            yield node.func, cst.Name(SWAPPED[name])
        case cst.Call(func=cst.Attribute(attr=cst.Name(value=name))) if name in SWAPPED:
            yield node.func.attr, cst.Name(SWAPPED[name])


def make(root: Path, path: str) -> list[Mutant]:
    """Return every mistake in one file, without those that leave its syntax tree as it is or do not parse."""
    text = (root / path).read_text()
    wrapper = MetadataWrapper(cst.parse_module(text))
    finder = _Finder()
    wrapper.visit(finder)
    spans = wrapper.resolve(ByteSpanPositionProvider)
    data, right = text.encode(), ast.dump(ast.parse(text))
    made: dict[str, Mutant] = {}
    seen = {right}
    for old, new, lines, scope in finder.found:
        span = spans[old]
        wrong = data[: span.start] + wrapper.module.code_for_node(new).encode() + data[span.start + span.length :]
        source = wrong.decode()
        try:
            tree = ast.dump(ast.parse(source))
        except SyntaxError:
            continue
        if tree in seen:
            continue
        seen.add(tree)
        before, after = _difference(text, source)
        line = text.count("\n", 0, len(data[: span.start].decode())) + 1
        mutant = Mutant(path, line, lines, scope, before, after, source)
        made.setdefault(mutant.key, mutant)
    return list(made.values())


def _difference(text: str, source: str) -> tuple[str, str]:
    """Return the lines that differ, before and after."""
    rows = list(difflib.unified_diff(text.splitlines(), source.splitlines(), n=0, lineterm=""))[2:]
    before, after = (" ".join(row[1:].strip() for row in rows if row[0] == sign) for sign in "-+")
    return before, after
