"""The installed package holds every package and data file of the repository, under the right names."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def packages_in(folder: Path, name: str) -> set[str]:
    """Return the names of the package in `folder` and of every package below it."""
    inits = folder.rglob("__init__.py")
    return {".".join([name, *init.parent.relative_to(folder).parts]) for init in inits}


def test_every_package_is_listed() -> None:
    found = packages_in(ROOT / "tokdyn", "tokdyn")
    for name, folder in SETUPTOOLS["package-dir"].items():
        found |= packages_in(ROOT / folder, name)
    assert set(SETUPTOOLS["packages"]) == found


def test_every_folder_with_code_is_a_package() -> None:
    for top in ("tokdyn", "cli", "recipes"):
        for module in (ROOT / top).rglob("*.py"):
            assert (module.parent / "__init__.py").exists(), (
                f"{module.parent} has no __init__.py and would not be installed"
            )


@pytest.mark.parametrize("name", SETUPTOOLS["packages"])
def test_every_package_is_found(name: str) -> None:
    assert importlib.util.find_spec(name) is not None


def test_installed_version_is_that_of_the_package() -> None:
    import tokdyn

    assert importlib.metadata.version("tokdyn") == tokdyn.__version__


def test_command_is_installed() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="tokdyn")
    assert callable(script.load())


def test_readme_and_license_exist() -> None:
    assert (ROOT / PROJECT["project"]["readme"]).read_text().startswith("# tokdyn")
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_every_data_file_is_shipped() -> None:
    """The wheel leaves out data files that match no package-data pattern."""
    folders = {
        name: ROOT / SETUPTOOLS["package-dir"].get(name, name.replace(".", "/")) for name in SETUPTOOLS["packages"]
    }
    for name, folder in folders.items():
        shipped = {p for pattern in SETUPTOOLS["package-data"].get(name, []) for p in folder.glob(pattern)}
        packages = {init.parent for init in folder.rglob("__init__.py")} - {folder}
        for path in folder.rglob("*"):
            if packages.intersection(path.parents) or "__pycache__" in path.parts:
                continue  # of a package of its own
            if path.is_file() and path.suffix != ".py":
                assert path in shipped, f"{path} is in no package-data pattern of {name}"
