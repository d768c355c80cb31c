"""Launch shapes: every config on 1 to 32 processes starts, or says what to type."""

import re
from pathlib import Path

import pytest

from config.files import known_configs
from config.load import parse_config
from config.validate import fitting_micro_batch
from core.errors import ConfigError

ROOT = Path(__file__).parents[2]
PROCESSES = (1, 2, 4, 8, 16, 32)


def parse(path: str, world_size: int, *flags: str):
    return parse_config(["--config", path, *flags], "train.py", world_size)


def parsed(path: str, world_size: int):
    """The config, or why it does not start."""
    try:
        return parse(path, world_size), None
    except ConfigError as error:
        return None, str(error)


@pytest.mark.parametrize("world_size", PROCESSES)
@pytest.mark.parametrize("path", known_configs())
def test_starts_or_names_the_flag_that_makes_it_start(path, world_size):
    config, refusal = parsed(path, world_size)
    if refusal:
        assert re.search("(diffmoe|race) layer's pool", refusal)  # nothing else is refused
        choices = re.findall(r"(?:add|or) (--\S+ \d+)", refusal)
        assert len(choices) == 2
        for flag in choices:
            parse(path, world_size, *flag.split())
        pool = re.search(r"(\d+) images \((\d+) tokens\)", refusal)
        smaller = parse(path, world_size, *choices[0].split())
        side = smaller.model.input_size // smaller.model.patch_size
        assert smaller.train.micro_batch_size == int(pool[1])
        assert int(pool[2]) == int(pool[1]) * side**2
    else:
        micro = fitting_micro_batch(config, world_size)
        assert config.train.global_batch_size % (micro * world_size) == 0
        if config.model.feed_forward.pools_batch():
            assert micro == config.train.micro_batch_size


def test_processes_that_no_micro_batch_serves_are_refused():
    with pytest.raises(ConfigError, match=r"256 images .* 3 processes; add --train\.global_batch"):
        parse("dit/S_flow", 3)
    parse("dit/S_flow", 3, "--train.global_batch_size", "192")


def test_a_batch_that_leaves_tiny_micro_batches_is_refused():
    with pytest.raises(ConfigError, match=r"leave micro-batches of 1, far below .* 64; add "):
        parse("dit/XL_ddpm", 2, "--train.global_batch_size", "254")


@pytest.mark.parametrize("name", ["scripts/train.slurm", "docs/how/cluster.md"])
def test_documented_slurm_jobs_start(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = (ROOT / "scripts/train.slurm").read_text()
    counts = [re.search(rf"--{key}=(\d+)", script)[1] for key in ("nodes", "gpus-per-node")]
    text = (ROOT / name).read_text()
    jobs = re.findall(r"sbatch scripts/train\.slurm (config/\w[^\n`\[]*)", text)
    assert jobs
    for job in jobs:
        parse_config(["--config", *job.split()], "train.py", int(counts[0]) * int(counts[1]))
