"""The recipes of README and docs, followed literally from files and commands to pictures."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from models.pretrained import load_pretrained, read_tensors

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()


def run(folder: Path, *argv: object) -> str:
    """A program of the tree in `folder`."""
    done = subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def follow(tree: Path, text: str, file: str) -> None:
    """Write the file of a recipe, and put its two lines where the recipe says."""
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = next(block for block in blocks if block.startswith(f"# {file}\n"))
    (tree / file).write_text(code)
    lines = blocks[blocks.index(code) + 1].splitlines()
    module = file.removesuffix(".py").replace("/", ".")
    name = re.search(r"class (\w+)", code)[1]
    for place, line in zip(lines[::2], lines[1::2], strict=True):
        target, table = re.match(r"# (\S+), (\w+)", place).groups()
        source = (tree / target).read_text()
        source = re.sub(rf"(\n{table}\b[^\n]*= {{\n)", rf"\1    {line}\n", source, count=1)
        assert line in source
        if f"import {name}" in place:
            imported = f"\nfrom {module} import {name}"
            source = source.replace("\nfrom config", f"{imported}\nfrom config", 1)
        (tree / target).write_text(source)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "file", "layer"),
    [
        (README, "models/moe/hash_router.py", "hash"),
        (ARCHITECTURE, "models/moe/place_router.py", "place"),
    ],
    ids=["readme", "architecture"],
)
def test_a_new_layer_trains_resumes_samples_and_is_drawn(text, file, layer, tiny_config, tmp_path):
    tree, out = tmp_path / "tree", tmp_path / "run"
    hidden = shutil.ignore_patterns(".*", "runs", "tests", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=hidden)
    follow(tree, text, file)
    chosen = ["--config", tiny_config, "--model.feed_forward.name", layer]
    train = ["train.py", *chosen, "--run_dir", out]
    run(tree, *train, "--train.max_steps", 2)
    run(tree, *train, "--resume", "auto")
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [2, 4]
    assert entries[-1]["capacity/moe_layer_0"] == 1.0
    assert 0 < entries[-1]["mfu"] < 1
    sample = ["sample_ddp.py", "--ckpt", out, "--num-fid-samples", 4, "--per-proc-batch-size", 2]
    run(tree, *sample, "--sample-dir", out / "samples", "--capacity")
    (record,) = (out / "samples").glob("*/*/set.json")
    assert json.loads(record.read_text())["capacity_infer"] == 1.0
    report = json.loads(run(tree, "-m", "models.summary", *chosen, "--json"))
    assert report["roles"]["routed experts"] > 0
    assert report["activated"]["C=1"] < report["total"]
    assert "activated parameters" in run(tree, "-m", "evaluations.capacity", record.parent)
    assert len(list((out / "samples").glob("*/*/experts.png"))) == 1
    table = run(tree, "-m", "evaluations.compare", record.parent, "--runs", out, "--out", out)
    assert "| run | 4 |" in table
    assert "--model.feed_forward.name {" in run(tree, "train.py", *chosen, "--help")


def commands(section: str) -> list[list[str]]:
    """The shell lines of the section's first block, as words."""
    block = re.search(r"```bash\n(.*?)```", README.split(f"## {section}")[1], re.DOTALL)[1]
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.slow
def test_own_images_another_number_of_classes_and_resuming(
    image_root, vae_folder, tmp_path, trained, tiny_config
):
    """The commands stand as printed; what follows them only makes everything smaller."""
    cache, train = commands("Your own images")
    assert (cache[:2], train[:2]) == (["python", "main_cache.py"], ["python", "train.py"])
    values = {"DATA": str(image_root), "cache/mine": str(tmp_path / "cache")}
    values["runs/mine"] = str(tmp_path / "mine")
    cache, train = ([values.get(word, word) for word in words[1:]] for words in (cache, train))
    run(ROOT, *cache, "--img_size", 16, "--vae_path", vae_folder, "--num_workers", 0)
    small = yaml.safe_load(Path(tiny_config).read_text())
    shape = small["model"] | {"num_classes": 3}
    layer = shape.pop("feed_forward")
    flags = [w for key, value in shape.items() for w in (f"--model.{key}", value)]
    flags += [w for key, value in layer.items() for w in (f"--model.feed_forward.{key}", value)]
    flags += [w for key, value in small["train"].items() for w in (f"--train.{key}", value)]
    flags += ["--data.vae_path", vae_folder, "--data.image_size", 16, "--data.num_workers", 0]
    said = run(ROOT, *train, *flags)
    assert "next: torchrun sample_ddp.py --ckpt" in said
    # Resuming is the same command.
    again = run(ROOT, *train, *flags, "--resume", "auto", "--train.max_steps", 6)
    assert "step_0000004: going on from there" in again
    assert load_pretrained(tmp_path / "mine").state["step"] == 6
    # Another set of classes, from the averaged weights of a run with three.
    other = tmp_path / "images"
    shutil.copytree(image_root, other)
    shutil.move(other / "class2", other / "class3")
    shutil.copytree(other / "class3", other / "class4")
    source = ["--data.source", "images", "--data.data_path", other]
    start = ["--init_from", trained, "--init_fresh", "labels", "--model.num_classes", 4]
    at = train.index("--data.cached_path")
    online = [*train[:at], *train[at + 2 :]]
    run(ROOT, *online, *flags, *source, *start, "--run_dir", tmp_path / "four", "--optim.lr", 0)
    before = read_tensors(load_pretrained(trained).path / "ema.safetensors")
    after = read_tensors(load_pretrained(tmp_path / "four").path / "model.safetensors")
    assert after["label_embed.table.weight"].shape[0] == 5
    same = [name for name in before if not name.startswith("label_embed")]
    assert same
    for name in same:
        if not name.endswith("thresholds"):
            assert (before[name] == after[name]).all(), name
