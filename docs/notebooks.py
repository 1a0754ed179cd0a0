"""Run the notebooks of the tutorials and keep what their cells print and draw: `python docs/notebooks.py [NAME...]`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "tutorials"


def main(names: list[str]) -> None:
    """Run the notebooks of these names, or all."""
    import nbformat
    from nbclient import NotebookClient

    for path in sorted(FOLDER.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        began, notebook = time.perf_counter(), nbformat.read(path, as_version=4)
        NotebookClient(
            notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}, record_timing=False
        ).execute()
        path.write_text(json.dumps(kept(notebook), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path.name}: {time.perf_counter() - began:.0f} s")


def kept(notebook: Any) -> Any:
    """Return a notebook without warnings and times, which differ by machine; what a cell prints is joined."""
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        if cell["cell_type"] == "code":
            outputs: list[Any] = []
            for output in cell["outputs"]:
                if output.get("name") == "stderr" or "text/html" in output.get("data", {}):  # warnings, progress
                    continue
                if outputs and output["output_type"] == outputs[-1]["output_type"] == "stream":
                    outputs[-1]["text"] = "".join([*outputs[-1]["text"], *output["text"]])
                else:
                    outputs.append(output)
            cell["outputs"] = outputs
    notebook["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


if __name__ == "__main__":
    main(sys.argv[1:])
