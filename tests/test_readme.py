"""What the README says is so: its example runs, its files and flags exist."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from config.schema import OBJECTIVES, Config, ModelConfig
from models.moe.experts import Experts
from models.moe.layer import MoEFeedForward

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_the_example_layer_runs():
    block = re.search(r"```python\n(# models/moe/hash_router.py\n.*?)```", TEXT, re.DOTALL).group(1)
    names = {}
    exec(block, names)
    layer = MoEFeedForward(names["HashRouter"](4), Experts(4, 8, 16))
    x = torch.randn(2, 6, 8)
    y, record = layer(x)
    h = torch.nn.functional.gelu(x[1, 3] @ layer.experts.w1[1], approximate="tanh")
    torch.testing.assert_close(y[1, 3], h @ layer.experts.w2[1])  # token 9 goes to expert 1
    assert record.counts.tolist() == [[2, 2, 1, 1], [1, 1, 2, 2]]


def test_the_table_of_configs_is_complete():
    table = TEXT.split("## Configs")[1].split("## ")[0]
    named = set()
    for pattern in re.findall(r"`([\w{},]+)`", "\n".join(re.findall(r"^\| .*", table, re.M))):
        stems = [""]
        for part in re.split(r"({[^}]*})", pattern):
            options = part[1:-1].split(",") if part.startswith("{") else [part]
            stems = [stem + option for stem in stems for option in options]
        named |= set(stems)
    shipped = {path.stem for path in (ROOT / "config").glob("*.yaml")}
    assert named == {stem for stem in shipped if not stem.startswith("imagenet256")}


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
