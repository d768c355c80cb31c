"""The wheel: it holds every package and config and no tests, and trains in another folder."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from documents import ROOT, blocks, commands, launched

from config.files import known_configs

FILES = tomllib.loads((ROOT / "pyproject.toml").read_text())


def call(folder: Path, *words: object, path: str = "") -> str:
    """Stdout and stderr of a command in a folder; `path` is all that Python finds besides."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        list(map(str, words)), cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left beside the source."""
    folder = tmp_path_factory.mktemp("wheel")
    hidden = shutil.ignore_patterns(".*", "runs", "site", "build", "__pycache__", "*.egg-info")
    tree = shutil.copytree(ROOT, folder / "tree", ignore=hidden)
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder]
    call(tree, *build)
    (found,) = folder.glob("*.whl")
    return found


def test_it_has_every_package_and_config_and_no_tests(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = file.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    folders = {name.split("/")[0] for name in names if not name.startswith("diffmoe-")}
    tools = FILES["tool"]["setuptools"]
    tops = {package.split(".")[0] for package in tools["packages"]}
    assert folders == tops | {f"{module}.py" for module in tools["py-modules"]}
    for top in tops:
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".py", ".yaml"):
                assert path.relative_to(ROOT).as_posix() in names, path
    version = FILES["project"]["version"]
    assert wheel.name == f"diffmoe-{version}-py3-none-any.whl"
    assert re.search(rf"^Version: {re.escape(version)}$", metadata, re.M)


@pytest.mark.slow
def test_it_trains_and_samples_by_the_commands_of_the_start_page(wheel, image_root, tmp_path):
    """docs/start.md, with everything made smaller; nothing is found but the installed files."""
    target, here = tmp_path / "installed", tmp_path / "here"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    call(tmp_path, *pip, "--target", target, wheel)
    shutil.copytree(image_root, here / "runs" / "quickstart" / "images" / "train")
    block = next(b for b in blocks(ROOT / "docs/start.md", "bash") if "test_wheel" in b.comment)
    digits, train, sample = map(launched, commands(block.text))
    assert digits[0] == "data.digits"  # makes the folder that image_root stands for
    assert train[1][:2] == ["--config", "quickstart_jitmoe"]
    small = ["--train.max_steps", 2, "--train.global_batch_size", 4, "--train.micro_batch_size", 4]
    small += ["--train.log_every", 1, "--train.sample_every", 0, "--model.num_classes", 3]
    python = [sys.executable, "-P", "-m"]
    said = call(here, *python, train[0], *train[1], *small, path=target)
    assert str(ROOT) not in said
    assert (here / "runs/quickstart_jitmoe/train/checkpoints/step_0000002").is_dir()
    few = ["--num-fid-samples", 2, "--per-proc-batch-size", 2, "--num-sampling-steps", 2]
    call(here, *python, sample[0], *sample[1], *few, path=target)
    assert len(list((here / "samples").glob("*/*/samples.npz"))) == 1
    find = "import config.files as f; print(f.__file__, *f.known_configs())"
    found = call(here, sys.executable, "-P", "-c", find, path=target).split()
    assert found == [str(target / "config/files.py"), *known_configs()]
