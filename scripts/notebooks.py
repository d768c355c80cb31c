"""python scripts/notebooks.py notebooks/*.ipynb

Run notebooks from their first cell, and write them with their outputs; what differs between two
runs of the same code, such as times and versions, is left out.
"""

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from core.command_line import Parser
from core.errors import command

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}

QUIET = {"PYTHONWARNINGS": "ignore:IProgress not found"}
"""Widgets are for who watches."""


def played(path: Path, parameters: dict[str, object] | None = None) -> NotebookNode:
    """The notebook with the outputs of a kernel of its own, which starts in its folder.

    Args:
        path: of the notebook, which stays as it is.
        parameters: values in the place of those of the cell that is tagged `parameters`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell has an error.
    """
    notebook = nbformat.read(path, as_version=4)
    if parameters is not None:
        (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
        cell.source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute(env=os.environ | QUIET)
    notebook.metadata = NotebookNode(METADATA)
    return notebook


@command
def main() -> None:
    """Parse the command line, and run what it names."""
    parser = Parser("scripts/notebooks.py", __doc__)
    parser.add_argument("notebooks", type=Path, nargs="+", help="files, changed in place")
    for path in parser.parse_args().notebooks:
        nbformat.write(played(path), path)


if __name__ == "__main__":
    main()
