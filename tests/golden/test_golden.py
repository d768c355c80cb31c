"""Every recorded number of the official code, computed anew; weights through the importer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter import case_of, load_case, recorded, run_case
from safetensors.torch import load_file

from core.precision import exact_float32
from published.weights import from_official, to_official

FOLDER = Path(__file__).parent
FILES = sorted(FOLDER.glob("*.safetensors"))
MODELS = [path for path in FILES if "state.x_embedder.proj.weight" in load_case(path)[0]]
MODELS += [path for path in FILES if path.stem.startswith("jit")]


def limit(key, value):
    """1e-5 of the largest value for outputs, 1e-4 for gradients and scalar losses."""
    loose = key.startswith("grad.") or value.dim() == 0
    return (1e-4 if loose else 1e-5) * value.abs().max().item()


def check(path, device):
    wanted = recorded(load_case(path)[0])
    found = run_case(path, device)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].shape == value.shape, key
        assert found[key].dtype == value.dtype, key
        if value.is_floating_point():
            assert (found[key] - value).abs().max().item() <= limit(key, value), key
        else:
            assert torch.equal(found[key], value), key


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recorded_number(path):
    check(path, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_recorded_number_of_models_on_a_gpu(path):
    with exact_float32():
        check(path, "cuda")


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_official_weights_survive_the_round_trip_bitwise(path):
    case = case_of(*load_case(path))
    back = to_official(from_official(case.family, case.ctor, case.state))
    assert back.keys() == case.state.keys()
    for name, tensor in case.state.items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.slow
def test_two_gloo_processes_route_apart_and_agree_on_thresholds(tmp_path):
    path, root = FOLDER / "diffmoe_ws2.safetensors", FOLDER.parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*command, FOLDER / "two_ranks.py", path, tmp_path],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        check=True,
        timeout=120,
    )
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1)]
    wanted = recorded(load_case(path)[0])
    together = torch.cat([rank["out.model"] for rank in ranks])
    assert (together - wanted["out.model"]).abs().max() <= limit("", wanted["out.model"])
    name = "blocks.1.mlp.expert_threshold"
    assert torch.equal(ranks[0][name], ranks[1][name])
    torch.testing.assert_close(ranks[0][name], wanted[f"after.{name}"], rtol=1e-5, atol=1e-7)
