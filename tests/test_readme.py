"""What the README says is so: its example runs, its files and flags exist."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from config.files import known_configs
from config.load import parse_config
from config.model import ModelConfig
from config.objective import OBJECTIVES
from config.schema import Config
from core.types import ModelOutput
from models.moe.experts import Experts
from models.moe.layer import MoEFeedForward
from models.summary import comparison

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_the_example_layer_computes():
    block = re.search(r"```python\n(# models/moe/hash_router.py\n.*?)```", TEXT, re.DOTALL).group(1)
    names = {}
    exec(block, names)
    layer = MoEFeedForward(names["HashRouter"](4), Experts(4, 8, 16))
    x = torch.randn(2, 6, 8)
    y, record = layer(x)
    h = torch.nn.functional.gelu(x[1, 3] @ layer.experts.w1[1], approximate="tanh")
    torch.testing.assert_close(y[1, 3], h @ layer.experts.w2[1])  # token 9 goes to expert 1
    assert record.counts.tolist() == [[2, 2, 1, 1], [1, 1, 2, 2]]


def table_of_configs():
    """Names of each row, alternatives in braces spelt out, and its other cells."""
    rows = []
    for line in re.findall(r"^\| `.*", TEXT.split("## Configs")[1].split("\n## ")[0], re.M):
        first, *cells = (cell.strip() for cell in line.strip("| ").split("|"))
        names = []
        for pattern in re.findall(r"`([^`]+)`", first):
            stems = [""]
            for part in re.split(r"({[^}]*})", pattern):
                options = part[1:-1].split(",") if part.startswith("{") else [part]
                stems = [stem + option for stem in stems for option in options]
            names += stems
        rows.append((names, cells))
    return rows


def test_the_table_of_configs_is_complete():
    named = [name for names, _ in table_of_configs() for name in names]
    assert sorted(named) == known_configs()


def test_the_figures_in_the_table_of_configs_are_those_of_the_command():
    chosen = {
        "dit/S_flow",
        "ecdit/S_E16_flow",
        "diffmoe/L_E8_ddpm",
        "dsmoe/S_E48_flow",
        "jit/B16_E16",
        "t2i/diffmoe_E16_flow",
        "promoe/B_flow",
        "ditmoe/S_E8",
        "race/B_4in32_flow",
    }
    checked = 0
    for names, (_, *cells) in table_of_configs():
        for name in chosen.intersection(names):
            row = comparison(name, parse_config(["--config", name], "t", None))
            wanted = [
                f"{row['total (M)']:.0f}",
                f"{row['activated (M)']:.0f}",
                str(row["GFLOPs per image"]),
                str(row["training state (GB)"]),
            ]
            for found, value in zip(cells, wanted, strict=True):
                assert float(found) == pytest.approx(float(value), rel=0.003, abs=0.6), name
            checked += 1
    assert checked == len(chosen)


def test_the_files_that_the_architecture_names_exist():
    text = (ROOT / "docs/architecture.md").read_text()
    named = set(re.findall(r"`([\w/]+\.py)`", text)) | set(re.findall(r"`([\w/]+/)`", text))
    assert len(named) > 30
    for path in named - {"models/moe/place_router.py"}:
        assert (ROOT / path).exists(), path


def test_scripts_and_pictures_exist():
    for path in re.findall(r"bash (scripts/\w+\.sh)", TEXT) + re.findall(r"\]\((\S+\.png)\)", TEXT):
        assert (ROOT / path).is_file(), path


DOCS = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCS], ids=lambda path: path.name)
def test_named_config_keys_and_commands_exist(path):
    text = path.read_text()
    sections = {field.name: field for field in dataclasses.fields(Config)}
    named = re.findall(
        r"\b(data|model|objective|optim|train|parallel|sampling)\.([a-z_.]+)\b", text
    )
    kinds = {"model": [ModelConfig], "objective": OBJECTIVES.values()}
    for section, key in named:
        if key.endswith(("py", "yaml", "md", "slurm")) or section not in sections:
            continue
        first = key.split(".")[0]
        options = kinds.get(section, [type(sections[section].default_factory())])
        known = {f.name for kind in options for f in dataclasses.fields(kind)} | {"name", "size"}
        modules = {p.stem for p in (ROOT / section).glob("*")} if (ROOT / section).is_dir() else ()
        assert first in known or first in modules, f"{section}.{key}"
    for module in re.findall(r"python -m ([a-z_.]+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
    for link in re.findall(r"\]\((docs/\S+?)\)", text) + re.findall(r"`(scripts/\S+?)`", text):
        assert (ROOT / link).exists(), link


def test_the_example_of_inversion_and_trajectories():
    text = (ROOT / "docs/evaluation.md").read_text()
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    latents = torch.randn(2, 4, 4, 4)
    names = {"model": lambda x, t, cond: ModelOutput(0.1 * x), "latents": latents, "cond": None}
    exec(block, names)
    assert names["noise"].shape == latents.shape
    assert names["states"].shape == (26, *latents.shape)
    torch.testing.assert_close(names["states"][0], names["noise"])
    # x = t data + (1 - t) noise and v = data - noise, so noise = x - t v.
    wanted = names["states"][10] - names["grid"][10] * names["velocity"]
    torch.testing.assert_close(names["implied"], wanted)


def test_every_fault_of_the_reliability_page_has_a_test():
    """Each row's last cell names functions, or files, that are there."""
    rows = [
        line.strip("|").split("|")
        for line in (ROOT / "docs" / "reliability.md").read_text().splitlines()
        if line.startswith("| ") and not line.startswith("| fault")
    ]
    assert len(rows) > 40
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for *_, tests in rows:
        names = re.findall(r"::(test_\w+)`", tests) or re.findall(r"(test_\w+\.py)`", tests)
        assert names, tests
        for name in names:
            found = list((ROOT / "tests").rglob(name)) or f"def {name}(" in sources
            assert found, name
