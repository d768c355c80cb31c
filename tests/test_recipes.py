"""The recipes of README and docs, followed literally from files and commands to pictures."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from documents import blocks, commands

from models.pretrained import load_pretrained, read_tensors

ROOT = Path(__file__).parents[1]
HOW = ROOT / "docs" / "how"
ROUTER, OBJECTIVE, OWN_DATA = (
    HOW / name for name in ("own_router.md", "own_objective.md", "own_data.md")
)


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


def shell_lines(page: Path) -> list[list[str]]:
    """The commands of a page's first block of them."""
    return commands(blocks(page, "bash")[0].text)


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


def copy_of_the_tree(folder: Path) -> Path:
    """The project, to be changed."""
    hidden = shutil.ignore_patterns(".*", "runs", "tests", "__pycache__", "*.egg-info")
    return shutil.copytree(ROOT, folder / "tree", ignore=hidden)


def follow_changes(tree: Path, block: str) -> None:
    """Replace the lines with - by those with + below them, in the file that --- names."""
    for part in block.split("--- ")[1:]:
        file, _, lines = part.partition("\n")
        source = (tree / file).read_text()
        for old, new in re.findall(r"^-(.*)\n((?:^\+.*\n)+)", lines, re.M):
            assert source.count(f"\n{old}\n") == 1, old
            source = source.replace(f"\n{old}\n", "\n" + re.sub(r"(?m)^\+", "", new))
        (tree / file).write_text(source)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "layer"),
    [("models/moe/hash_router.py", "hash"), ("models/moe/place_router.py", "place")],
)
def test_a_new_layer_trains_resumes_samples_and_is_drawn(file, layer, tiny_config, tmp_path):
    tree, out = copy_of_the_tree(tmp_path), tmp_path / "run"
    follow(tree, ROUTER.read_text(), file)
    if layer == "hash":  # the page's own command is read
        words = shell_lines(ROUTER)[0]
        assert "feed_forward:\n    name: hash" in run(tree, *words[1:], "--print_config")
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


EDM = """
import json, sys, torch
from config.objective import EDMConfig, SamplingConfig
from core.conditions import Condition
from core.types import ModelOutput
from diffusion.edm import EDM

edm = EDM(EDMConfig(sigma_data=0.7))
cond, shape = Condition.of_labels([0] * 400), (400, 3, 4, 4)
noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
nothing = lambda x, t, cond: ModelOutput(torch.zeros_like(x))
for sampler in edm.samplers:
    settings = SamplingConfig(sampler=sampler, num_steps=200)
    data = edm.sample(nothing, noise, cond, settings, None)
    print(sampler, float(data.std()), float((data / noise).std()))
terms = edm.training_losses(nothing, 0.7 * noise, cond, torch.Generator().manual_seed(1))
print("loss", float(terms.per_sample.mean()))

import train, sample_ddp
trained, sampled = map(json.loads, sys.argv[1:3])
few = ["--num-fid-samples", "4", "--num-sampling-steps", "2", "--sample-dir", sys.argv[3]]
sys.argv = trained[1:]
train.main()
sys.argv = [*sampled[1:], *few]
sample_ddp.main()
"""


@pytest.mark.slow
def test_a_new_objective_samples_gaussian_data_exactly_trains_and_samples(tiny_config, tmp_path):
    """Of N(0, s^2) its model is zero: targets have variance 1, samples the deviation s."""
    tree = copy_of_the_tree(tmp_path)
    text = OBJECTIVE.read_text()
    code, options = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tree / "diffusion/edm.py").write_text(code)
    file = tree / "config/objective.py"
    below = "\nObjectiveConfig ="
    options = options.removeprefix("# config/objective.py\n")
    file.write_text(file.read_text().replace(below, f"\n{options}\n{below}", 1))
    follow_changes(tree, re.search(r"```diff\n(.*?)```", text, re.DOTALL)[1])
    out = tmp_path / "run"
    trained, sampled = shell_lines(OBJECTIVE)
    folders = {"runs/edm": str(out), "quickstart": str(tiny_config)}
    mine = [[folders.get(word, word) for word in line] for line in (trained, sampled)]
    given = [json.dumps(line) for line in mine]
    words = run(tree, "-c", EDM, *given, tmp_path / "samples").split()
    for sampler in ("heun", "euler"):
        at = words.index(sampler)
        assert float(words[at + 1]) == pytest.approx(0.7, rel=0.03)
        assert float(words[at + 2]) == pytest.approx(0, abs=1e-5)  # every number scaled alike
    assert float(words[words.index("loss") + 1]) == pytest.approx(1, abs=0.05)
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [2, 4]
    assert 0 < entries[-1]["loss/mse"] < 10
    (record,) = (tmp_path / "samples").glob("*/*/set.json")
    found = json.loads(record.read_text())
    assert (found["objective"], found["sampler"], found["num_samples"]) == ("edm", "heun", 4)


@pytest.mark.slow
def test_own_images_another_number_of_classes_and_resuming(
    image_root, vae_folder, tmp_path, trained, tiny_config
):
    """The commands stand as printed; what follows them only makes everything smaller."""
    cache, train = shell_lines(OWN_DATA)
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
