"""What stands in the README and the code of the pages, run as it stands there."""

import re

import torch
from documents import ROOT

from core.types import ModelOutput
from models.moe.experts import Experts
from models.moe.layer import MoEFeedForward

TEXT = (ROOT / "README.md").read_text()


def test_the_example_layer_computes():
    text = (ROOT / "docs/how/own_router.md").read_text()
    block = re.search(r"```python\n(# models/moe/hash_router.py\n.*?)```", text, re.DOTALL).group(1)
    names = {}
    exec(block, names)
    layer = MoEFeedForward(names["HashRouter"](4), Experts(4, 8, 16))
    x = torch.randn(2, 6, 8)
    y, record = layer(x)
    h = torch.nn.functional.gelu(x[1, 3] @ layer.experts.w1[1], approximate="tanh")
    torch.testing.assert_close(y[1, 3], h @ layer.experts.w2[1])  # token 9 goes to expert 1
    assert record.counts.tolist() == [[2, 2, 1, 1], [1, 1, 2, 2]]


def test_the_readme_is_short_and_begins_with_the_demo_and_pictures():
    assert TEXT.count("\n") <= 200
    assert TEXT.index("docs/demo.gif") < TEXT.index("scripts/demo.sh") < TEXT.index("## Start")
    for path in re.findall(r"\]\((\S+\.(?:png|gif))\)", TEXT):
        assert (ROOT / path).is_file(), path


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
