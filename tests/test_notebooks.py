"""The notebooks: they run on another run and cache, and what is committed has its pictures."""

import ast
import base64
import re
import socket
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from scripts.notebooks import METADATA, played

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OF_EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

LARGEST = 1_500_000
"""Bytes of a notebook with its pictures."""


def code_of(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in code_of(notebook) for output in cell.outputs]


def texts_of(notebook: NotebookNode) -> list[str]:
    """What its outputs say."""
    outputs = outputs_of(notebook)
    return [out.get("text") or out.get("data", {}).get("text/plain", "") for out in outputs]


def parameters_of(notebook: NotebookNode) -> dict[str, object]:
    """Names and values of the cell that is tagged so."""
    (cell,) = (c for c in code_of(notebook) if "parameters" in c.metadata.get("tags", ()))
    lines = ast.parse(cell.source).body
    return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}


def pictures_of(notebook: NotebookNode) -> list[bytes]:
    """PNG files among the outputs."""
    data = [out.get("data", {}) for out in outputs_of(notebook)]
    return [base64.b64decode(found["image/png"]) for found in data if "image/png" in found]


def check_played(path: Path, parameters: dict[str, object], monkeypatch, tmp_path) -> NotebookNode:
    """Run a notebook on other parameters; it has the pictures of the committed one."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    committed = nbformat.read(path, as_version=4)
    assert parameters.keys() == parameters_of(committed).keys()
    found = played(path, parameters)
    assert not [
        out for cell in code_of(found) for out in cell.outputs if out.output_type == "error"
    ]
    pictures = pictures_of(found)
    assert len(pictures) == len(pictures_of(committed))
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 1000 for picture in pictures)
    return found


@pytest.mark.slow
def test_the_quickstart_runs_on_any_run_of_classes(trained, monkeypatch, tmp_path):
    parameters = {"RUN": str(trained), "SEED": 3, "PER_CLASS": 2}
    path = ROOT / "notebooks" / "quickstart.ipynb"
    found = check_played(path, parameters, monkeypatch, tmp_path)
    texts = [
        out["data"]["text/plain"] for c in code_of(found) for out in c.outputs if "data" in out
    ]
    assert "'diffmoe, step 4'" in texts


@pytest.mark.slow
def test_a_router_of_a_cell_is_trained_and_leaves_the_repository_alone(
    tiny_config, monkeypatch, tmp_path
):
    runs = tmp_path / "runs"
    parameters = {"CONFIG": str(tiny_config), "RUNS": str(runs), "STEPS": 3, "SEED": 0}
    before = {path: path.read_bytes() for path in (ROOT / "config" / "schema.py", NOTEBOOKS[0])}
    check_played(ROOT / "notebooks" / "new_router.ipynb", parameters, monkeypatch, tmp_path)
    assert all(path.read_bytes() == text for path, text in before.items())
    for name in ("diffmoe", "top_p"):
        (checkpoint,) = (runs / name / "checkpoints").glob("step_0000003")
        assert f"name: {name}" in (checkpoint / "config.yaml").read_text()
    last = (runs / "top_p" / "metrics.jsonl").read_text().splitlines()[-1]
    assert all(f'"loss/{loss}"' in last for loss in ("mse", "balance", "entropy"))


@OF_EACH
def test_what_is_committed_was_run_from_the_first_cell_to_the_last(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code_of(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert len(pictures_of(notebook)) >= 6
    assert path.stat().st_size < LARGEST
    assert not [out for out in outputs_of(notebook) if out.output_type == "error"]


@OF_EACH
def test_what_is_committed_says_nothing_of_the_machine_or_the_hour(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata == METADATA
    assert all(cell.metadata.keys() <= {"tags"} for cell in notebook.cells)
    for text in [*texts_of(notebook), *(cell.source for cell in notebook.cells)]:
        assert not re.search(r"(?<![\w.:/*])/\w[\w.-]*/|[A-Z]:\\", text), text
    for text in texts_of(notebook):
        assert socket.gethostname() not in re.split(r"[^\w.-]+", text), text


@OF_EACH
def test_the_first_cell_says_what_must_be_there(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].cell_type == "markdown"
    text = notebook.cells[0].source
    assert "bash scripts/quickstart.sh" in text
    assert f"jupyter lab notebooks/{path.name}" in text
    extra = re.search(r'pip install -e "\.\[(\w+)\]"', text)[1]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra in project["optional-dependencies"]
    for cell in notebook.cells:
        for link in re.findall(r"\]\(([^)#\s]+)\)", cell.source):
            assert "://" in link or (path.parent / link).is_file(), link
