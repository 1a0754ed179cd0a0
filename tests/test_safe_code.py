"""No code reads pickles, evaluates text, or imports what a file names (SECURITY.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [*(ROOT / "tokdyn").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]
MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "jsonpickle",
    "subprocess",
    "pty",
}
CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
METHODS = {
    "import_module", "spec_from_file_location", "run_path", "run_module", "popen", "unsafe_load",
    "full_load", "load_all", "extractall", "unpack_archive",
}  # fmt: skip
ALLOWED = {
    ("tokdyn/__init__.py", "import_module"): "names of this package, from a table in the file",
    ("tokdyn/lazy.py", "import_module"): "names of this package, from a table in the package's __init__",
    ("tokdyn/attach/handlers/__init__.py", "import_module"): "the modules of this package",
    ("tokdyn/doctor.py", "import_module"): "libraries by a table in the file",
    ("tokdyn/evaluate/networks.py", "jit.load"): "TorchScript extractors, which SECURITY.md calls programs",
}
"""What is found and harmless, and why."""


def names(node: ast.expr) -> str:
    """The dotted name of an expression."""
    if isinstance(node, ast.Attribute):
        return f"{names(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def given(call: ast.Call, name: str) -> object:
    """The constant value of a keyword argument, or its name; None if it is not given."""
    value = next((each.value for each in call.keywords if each.arg == name), None)
    return value.value if isinstance(value, ast.Constant) else names(value) if value is not None else None


def findings(text: str) -> Iterator[str]:
    """What a file should not hold."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").partition(".")[0] in MODULES:
                yield str(node.module)
            yield from (each.name for each in node.names if each.name in METHODS)
        elif isinstance(node, ast.Call):
            name = names(node.func)
            last = name.rpartition(".")[2]
            if name in CALLS or name in ("os.system", "pydoc.locate") or (last in METHODS and "." in name):
                yield last
            elif name == "torch.load" and given(node, "weights_only") is not True:
                yield "torch.load"
            elif name in ("np.load", "numpy.load") and given(node, "allow_pickle") is not False:
                yield "np.load"
            elif name == "yaml.load" and given(node, "Loader") not in ("LimitedLoader", "_Loader"):
                yield "yaml.load"
            elif name.endswith("jit.load"):
                yield "jit.load"
            elif given(node, "trust_remote_code") or given(node, "shell"):
                yield "shell or trust_remote_code"


@pytest.mark.parametrize(
    "text",
    ["import pickle", "from pickle import loads", "import dill as d", "eval('1')", "importlib.import_module(x)",
     "os.system(x)",
     "from importlib import import_module", "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p)",
     "yaml.load(t)",
     "yaml.load(t, Loader=yaml.Loader)", "yaml.unsafe_load(t)", "f(shell=True)", "torch.jit.load(p)", "__import__(x)"],
)  # fmt: skip
def test_what_should_not_be_there_is_found(text: str) -> None:
    assert list(findings(text))


def test_no_code_runs_what_it_reads() -> None:
    found = {(path.relative_to(ROOT).as_posix(), what) for path in SOURCES for what in findings(path.read_text())}
    assert found == set(ALLOWED)
