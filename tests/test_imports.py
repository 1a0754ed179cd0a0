"""`import tokdyn` is light, and a module imports only from layers above its own (docs/design.md)."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# From the bottom up. Names on one line do not import each other.
LAYERS = [
    ["errors"],
    ["limits"],
    ["reading"],
    ["image_files", "yaml_loading"],
    ["files", "host", "hub", "lazy", "method_names", "progress", "section", "seeds"],
    ["draws", "ownership", "prompts", "tokens"],
    ["division", "team"],
    ["ops"],
    ["methods"],
    ["presets"],
    ["compose"],
    ["models"],
    ["adapters"],
    ["trace"],
    ["provenance"],
    ["lora", "watching"],
    ["attach"],
    ["recorder"],
    ["checkpoints"],
    ["bases"],
    ["cost"],
    ["scaling"],
    ["pipelines"],
    ["testing"],
    ["diffusion"],
    ["data"],
    ["report"],
    ["upcycling"],
    ["recipe"],
    ["train"],
    ["sample", "evaluate"],
    ["catalog", "doctor", "calibration"],
    ["bench"],
    ["playground", "run_report"],
    ["demo"],
    ["recipes"],
    ["cli"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

HEAVY = {
    "accelerate", "diffusers", "matplotlib", "PIL", "rich", "safetensors", "scipy", "timm", "torch_fidelity",
    "torchvision", "transformers", "typer", "yaml",
}  # fmt: skip


def imported(path: Path) -> Iterator[str]:
    """Absolute names that the file imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules() -> list[tuple[str, Path]]:
    """(layer, file) of every module, the package's own __init__ excepted."""
    files = [p for p in (ROOT / "tokdyn").rglob("*.py") if p != ROOT / "tokdyn/__init__.py"]
    inside = [(p.relative_to(ROOT / "tokdyn").with_suffix("").parts[0], p) for p in files]
    return inside + [(top, p) for top in ("cli", "recipes") for p in (ROOT / top).rglob("*.py")]


def test_every_module_has_a_layer() -> None:
    assert {layer for layer, _ in modules()} <= set(LEVEL)


def test_imports_point_downwards() -> None:
    wrong = []
    for layer, path in modules():
        for name in imported(path):
            package, _, rest = name.partition(".")
            if package in {"cli", "recipes", "tests"}:
                wrong.append(f"{path} imports {name}, which is not installed under that name")
            if package != "tokdyn" or not rest:
                continue
            target = rest.split(".")[0]
            if target == layer or target not in LEVEL:  # own package, or a name that tokdyn/__init__.py defines
                continue
            if LEVEL[target] >= LEVEL[layer]:
                wrong.append(f"{path} ({layer}) imports {name}: {target} lies above {layer}")
    assert not wrong, "\n".join(wrong)


def module_name(path: Path) -> str:
    """Dotted name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "tokdyn" else ("tokdyn", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph() -> dict[str, set[str]]:
    """Modules that each module imports, anywhere in its file: at the top, in functions and for type checkers alone."""
    names = {module_name(path): path for _, path in modules()}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        found = set()
        for target in imported(path):
            while target and target not in names:
                target = target.rpartition(".")[0]
            found.add(target)
        graph[name] = found - {name, ""}
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other (strongly connected components of more than one)."""
    reached = {name: {name} for name in graph}
    for name, seen in reached.items():
        pending = [name]
        while pending:
            for target in graph[pending.pop()] - seen:
                seen.add(target)
                pending.append(target)
    groups = {tuple(sorted(other for other in seen if name in reached[other])) for name, seen in reached.items()}
    return [list(group) for group in groups if len(group) > 1]


def test_a_cycle_is_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_no_modules_import_each_other() -> None:
    assert cycles(import_graph()) == []


def test_other_rooms_know_attach_by_its_facade() -> None:
    for layer, path in modules():
        inside = [name for name in imported(path) if name.startswith("tokdyn.attach.") and layer != "attach"]
        names = {name.split(".")[2] for name in inside}
        files = {each.stem for each in (ROOT / "tokdyn/attach").iterdir()} - {"__init__"}
        assert not names & files, f"{path} imports {', '.join(sorted(names & files))} from inside of tokdyn.attach"


def loaded_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after the statement."""
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted({{n.split('.')[0] for n in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_is_light() -> None:
    assert not loaded_after("import tokdyn; tokdyn.ops; tokdyn.methods") & HEAVY


def test_help_loads_no_model_code() -> None:
    """`tokdyn --help` answers at once because torch is not needed to print it."""
    loaded = loaded_after("import tokdyn.cli.main")
    assert not loaded & {"torch", "diffusers", "matplotlib", "accelerate", "timm", "torch_fidelity"}


MODEL_CODE = {"accelerate", "diffusers", "timm", "torchvision", "transformers"}


def test_recipes_and_names_are_checked_without_torch() -> None:
    """A misspelt recipe, key, size, base or method is refused before anything heavy is loaded."""
    statements = [
        "import tokdyn.recipe, tokdyn.bases.names, tokdyn.method_names",
        "tokdyn.recipe.load('cifar10/dcdit-learned', ['data.path=x', 'model.depth=3'])",
        "tokdyn.bases.names.check_name('shapes')",
        "tokdyn.bases.names.names_pipeline('runs/nowhere/at/all')",
    ]
    assert not loaded_after("; ".join(statements)) & (MODEL_CODE | {"torch", "numpy", "huggingface_hub"})


def test_help_with_the_settings_of_pictures_loads_no_torch() -> None:
    """Settings lie apart from the code that they are for; one interpreter, because each takes a second."""
    shown = {
        "sample": "map_steps",
        "bench flops": "uncond_tail_drop",
        "bench speed": "warmup",
        "bench quality": "timed",
        "calibrate": "protected",
        "eval": "extractor",
        "playground": "shown",
    }
    statements = [
        "from typer.testing import CliRunner",
        "from tokdyn.cli.main import app",
        *(
            f"assert '{setting}' in CliRunner().invoke(app, '{words} --help-all'.split()).output"
            for words, setting in shown.items()
        ),
    ]
    assert not loaded_after("; ".join(statements)) & (MODEL_CODE | {"torch", "matplotlib", "numpy"})


def test_help_with_the_settings_of_a_run_loads_no_torch() -> None:
    statements = [
        "from typer.testing import CliRunner",
        "from tokdyn.cli.main import app",
        "assert 'training.batch_size' in CliRunner().invoke(app, ['train', '--help-all']).output",
    ]
    assert not loaded_after("; ".join(statements)) & (MODEL_CODE | {"torch"})
