"""Rules of the house that code can check: import direction, one set of packages, registries."""

import ast
import tomllib
import typing
from pathlib import Path

import pytest
import yaml

from config import objective, schema
from models.build import FEED_FORWARDS
from sampling.objectives import OBJECTIVES, build_objective

ROOT = Path(__file__).parents[1]
FOLDERS = [
    "core",
    "config",
    "data",
    "models",
    "diffusion",
    "transport",
    "sampling",
    "published",
    "evaluations",
    "training",
    "demo",
]


def imported_folders(path: Path) -> set[str]:
    """Top-level names that a file imports, those for type checking included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_never_run_upward(folder):
    above = FOLDERS[: FOLDERS.index(folder) + 1]
    if folder == "transport":
        above.remove("diffusion")
    forbidden = set(FOLDERS) - set(above) | {"train", "sample_ddp", "main_cache"}
    for path in (ROOT / folder).rglob("*.py"):
        assert not imported_folders(path) & forbidden, path


def test_every_package_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = [
        ".".join(p.parent.relative_to(ROOT).parts)
        for folder in FOLDERS
        for p in (ROOT / folder).rglob("__init__.py")
    ]
    assert sorted(listed) == sorted(found)


def test_conda_environment_has_the_same_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = yaml.safe_load((ROOT / "environment.yaml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in conda if isinstance(entry, dict))
    assert sorted(pip) == sorted(project["dependencies"])
    assert f"python{project['requires-python']}" in conda


def test_names_of_the_schema_are_those_of_the_registries():
    assert FEED_FORWARDS.keys() == schema.FEED_FORWARDS.keys()
    assert OBJECTIVES.keys() == objective.OBJECTIVES.keys() == objective.SAMPLERS.keys()
    for table in schema.CHOICES.values():
        for name, kind in table.items():
            assert typing.get_args(typing.get_type_hints(kind)["name"]) == (name,)
            assert kind().name == name
    for name, kind in objective.OBJECTIVES.items():
        assert build_objective(kind()).samplers == objective.SAMPLERS[name]
