"""What the page about the demo says can be done, done; the animation; the benchmark."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from tiny_pipelines import made

from benchmarks import demo as benchmark
from config.layers import DenseConfig, DiffMoEConfig
from demo import gif

ROOT = Path(__file__).parents[2]


def test_the_python_of_the_page(trained, tmp_path, monkeypatch):
    text = (ROOT / "docs/demo.md").read_text()
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    block = block.replace("runs/quickstart/train", str(trained))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    assert names["result"].routing.numbers().shape == (30, 3, 16)
    assert names["wide"].routing.spent().mean() == pytest.approx(2.0)
    (last,) = [names["step"]]
    assert last.images.shape == (3, 16, 16, 3)
    for name in ("maps", "capacity", "classes"):
        assert Image.open(f"{name}.png").width > 100


def test_an_animation_has_a_picture_of_each_step(trained, tmp_path):
    out = tmp_path / "a.gif"
    gif.main([str(trained), "--out", str(out), "--classes", "0,2", "--steps", "5", "--side", "32"])
    with Image.open(out) as animation:
        assert animation.n_frames == 5
        assert animation.width == 3 * 8 + 2 * 32


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--classes", "a"], "--classes: 'a' is no list such as 3,8"),
        (["--classes", "7"], "class: 7 is not allowed; allowed: 0 ... 2"),
        (["--steps", "0"], "--steps: 0 is too small"),
    ],
)
def test_animations_that_cannot_be(flags, wanted, trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gif.main([str(trained), "--out", str(tmp_path / "a.gif"), *flags])
    assert wanted in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_dense_model_has_nothing_to_watch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gif, "load", lambda path: made(DenseConfig()))
    with pytest.raises(SystemExit):
        gif.main(["dense", "--out", str(tmp_path / "a.gif"), "--classes", "1"])
    assert "dense: has no experts" in capsys.readouterr().err


def test_a_table_of_ways_to_watch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "load", lambda path: made(DiffMoEConfig(num_experts=4)))
    out = tmp_path / "demo.json"
    benchmark.main(["--steps", "3", "--repeats", "1", "--num-images", "2", "--out", str(out)])
    rows = {row["way"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["sampling alone", "stream", "pieces", "page"]
    assert [row["steps"] for row in rows.values()] == [3, 3, 3, 3]
    assert "steps/s" in capsys.readouterr().out
