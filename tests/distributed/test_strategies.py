"""DDP, FSDP, hybrid sharding and recomputation are ways to compute the same training."""

import json

import pytest
import torch
from launch import on_two_processes
from strategies import JITMOE, NUCLEUS, PROMOE, RACE, SPREAD, STEPS, flags

from config.load import parse_config
from core.distributed import Processes
from models.pretrained import find_checkpoint, load_pretrained, read_tensors, weights_path
from published.convert_weights import gather_shards
from training.trainer import train

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(make_cache, tmp_path_factory, vae_folder):
    folder = tmp_path_factory.mktemp("caches")
    caches = [make_cache(folder / name) for name in ("train", "val")]
    return [str(path) for path in (*caches, vae_folder)]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("strategies")
    stderr = on_two_processes("strategies.py", out, *data)
    assert "Warning" not in stderr, stderr[-3000:]
    return out


def entries(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in lines if "loss/loss" in entry]


def weights(run, name="ema"):
    return read_tensors(weights_path(find_checkpoint(run), name))


NAMES = ["fsdp", "ddp_logging", "hybrid", "ddp_recomputing", "fsdp_recomputing", "changing"]
NAMES += ["zero1", "zero1_recomputing", "fsdp_prefetched"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_same_losses_gradients_and_routing(runs, name):
    wanted, found = entries(runs / "ddp"), entries(runs / name)
    assert [entry["step"] for entry in found] == list(range(1, STEPS + 1))
    for one, other in zip(wanted, found, strict=True):
        for key in ("loss/loss", "loss/capacity", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-5), key
        for key in ("capacity/moe_layer_0", "mean_threshold/moe_layer_0", "max_load/moe_layer_0"):
            assert other[key] == pytest.approx(one[key], rel=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["model", "ema", "ema_0.5", "optimizer"])
def test_the_same_weights_averages_and_moments(runs, name, kind):
    wanted, found = weights(runs / "ddp", kind), weights(runs / name, kind)
    assert wanted.keys() == found.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-5, msg=key)


@pytest.fixture(scope="module")
def jitmoe_alone(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "jitmoe"
    train(parse_config(flags(run, *data, **JITMOE), "train.py"), ALONE)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jitmoe", "jitmoe_fsdp", "jitmoe_fsdp_recomputing"])
def test_biases_follow_the_loads_of_all_processes(runs, jitmoe_alone, name):
    """Once for each step, whatever the number of processes and micro-batches."""
    wanted, found = weights(jitmoe_alone, "model"), weights(runs / name, "model")
    biases = [key for key in wanted if key.endswith("correction_bias")]
    assert len(biases) == 2
    for key in biases:
        assert torch.equal(found[key], wanted[key]), key
        assert found[key].abs().max() > 0
    for one, other in zip(entries(jitmoe_alone), entries(runs / name), strict=True):
        for key in ("loss/loss", "grad_norm", "max_load/moe_layer_0", "bias_range/moe_layer_1"):
            assert other[key] == pytest.approx(one[key], rel=1e-5), key


@pytest.fixture(scope="module")
def promoe_alone(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "promoe"
    train(parse_config(flags(run, *data, **PROMOE), "train.py"), ALONE)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["promoe_recomputing", "promoe_fsdp", "promoe_fsdp_recomputing"])
def test_prototypes_learn_alike_on_one_process_and_on_two(runs, promoe_alone, name):
    for one, other in zip(entries(promoe_alone), entries(runs / name), strict=True):
        for key in ("loss/loss", "loss/contrastive", "loss/balance", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-5), key
    wanted, found = weights(promoe_alone, "model"), weights(runs / name, "model")
    for key, tensor in wanted.items():
        if not key.endswith("k_norm.bias"):  # no score feels it: its gradient is rounding alone
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-5, msg=key)


def assert_alike(one, other):
    """But for a bias of the keys, which changes no attention: its gradient is rounding alone."""
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        ways = [
            t.unflatten(0, (3, -1))[[0, 2]] if "qkv.bias" in key and t.dim() else t
            for t in (other[key], tensor)
        ]
        torch.testing.assert_close(*ways, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer"), [("race", RACE), ("nucleus", NUCLEUS)])
def test_further_layers_train_alike_on_any_number_of_processes(runs, data, tmp_path, name, layer):
    """Losses, gradients, loads and what the routers keep."""
    train(parse_config(flags(tmp_path / name, *data, **layer), "train.py"), ALONE)
    keys = {
        "race": ("loss/similarity", "loss/plr", "mean_threshold/moe_layer_0"),
        "nucleus": ("capacity/moe_layer_1",),
    }[name]
    for run in (name, f"{name}_fsdp_recomputing"):
        for one, other in zip(entries(tmp_path / name), entries(runs / run), strict=True):
            for key in ("loss/loss", "grad_norm", "max_load/moe_layer_0", *keys):
                assert other[key] == pytest.approx(one[key], rel=1e-4), key
    one, other = (weights(runs / run, "model") for run in (name, f"{name}_fsdp_recomputing"))
    assert_alike(one, other)


@pytest.fixture(scope="module")
def spread_alone(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    for name, layer in SPREAD.items():
        argv = flags(out / name, *data, **layer, train__val_every=3)
        train(parse_config(argv, "train.py"), ALONE)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [*(f"{name}_spread" for name in SPREAD), "deepseek_spread_zero1", "deepseek_changing"],
)
def test_experts_on_two_processes_are_those_of_one(runs, spread_alone, name):
    """Tokens travel to them; losses, gradients, loads, weights and moments are the same."""
    layer = next(layer for layer in SPREAD if name.startswith(layer))
    one, other = spread_alone / layer, runs / name
    wanted, found = entries(one), entries(other)
    assert [entry["step"] for entry in found] == list(range(1, STEPS + 1))
    for first, second in zip(wanted, found, strict=True):
        for key in ("loss/loss", "grad_norm", "max_load/moe_layer_0"):
            assert second[key] == pytest.approx(first[key], rel=1e-5), key
    for kind in ("model", "ema", "optimizer"):
        assert_alike(weights(one, kind), weights(other, kind))
    if name.endswith("_spread"):
        wanted, found = (validations(run) for run in (one, other))
        assert wanted == pytest.approx(found, rel=1e-4)
        assert wanted.keys() == {3, 6}


def validations(run):
    """Loss of each by its step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {entry["step"]: entry["val/loss"] for entry in lines if "val/loss" in entry}


@pytest.mark.slow
def test_shards_are_gathered_into_single_files(runs, tmp_path):
    gather_shards(runs / "fsdp", tmp_path / "whole")
    for name in ("model", "ema", "ema_0.5"):
        one = load_pretrained(runs / "fsdp", name).model.state_dict()
        other = load_pretrained(tmp_path / "whole", name).model.state_dict()
        for key, tensor in one.items():
            assert torch.equal(other[key], tensor), key
    assert (tmp_path / "whole" / "ema.safetensors").is_file()
    assert (find_checkpoint(runs / "fsdp") / "ema").is_dir()


@pytest.mark.slow
def test_shards_go_on_with_another_number_of_processes(runs, data, tmp_path):
    """A sharded run of two processes is continued by one, which trains on as both would."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    middle = runs / "fsdp" / "checkpoints" / "step_0000004"
    (run / "checkpoints" / middle.name).symlink_to(middle)
    argv = flags(run, *data, resume="auto")
    train(parse_config(argv, "train.py"), ALONE)
    for key, tensor in weights(runs / "ddp").items():
        torch.testing.assert_close(weights(run)[key], tensor, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.slow
def test_validation_and_grids_of_a_sharded_model(runs):
    """The second validation too, whose averages are others."""
    found = {}
    for name in ("fsdp", "zero1", "ddp_logging"):
        lines = (runs / name / "metrics.jsonl").read_text().splitlines()
        entries = map(json.loads, lines)
        found[name] = {entry["step"]: entry for entry in entries if "val/loss" in entry}
    wanted = found.pop("ddp_logging")
    assert wanted.keys() == found["zero1"].keys() == {3, 6}
    for name, validations in found.items():
        for step, entry in validations.items():
            assert entry.keys() == wanted[step].keys()
            assert len(entry) > 5
            for key, value in entry.items():
                assert value == pytest.approx(wanted[step][key], rel=1e-4), key
        assert (runs / name / "samples" / "step_0000006.png").is_file()


@pytest.mark.slow
def test_bf16_trains_float32_weights(runs):
    wanted, found = entries(runs / "ddp"), entries(runs / "bf16")
    losses = [
        (one["loss/loss"], other["loss/loss"]) for one, other in zip(wanted, found, strict=True)
    ]
    assert all(other == pytest.approx(one, rel=0.05) for one, other in losses)
    assert any(one != other for one, other in losses)
    assert {tensor.dtype for tensor in weights(runs / "bf16", "model").values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp_bf16_gathered", "zero1_bf16_gathered"])
def test_weights_that_travel_in_bf16_change_no_bit(runs, name):
    """They would be rounded where they are used; what must be float32 travels so."""
    for one, other in zip(entries(runs / "fsdp_bf16"), entries(runs / name), strict=True):
        for key in ("loss/loss", "loss/capacity", "grad_norm", "mean_threshold/moe_layer_0"):
            assert other[key] == one[key], key
    for kind in ("model", "ema", "optimizer"):
        wanted, found = weights(runs / "fsdp_bf16", kind), weights(runs / name, kind)
        for key, tensor in wanted.items():
            assert torch.equal(found[key], tensor), f"{kind}: {key}"


@pytest.mark.slow
@pytest.mark.parametrize(("exact", "name"), [("ddp_whole", "fsdp_reduced"), ("ddp", "ddp_reduced")])
def test_gradients_added_up_in_bf16_are_rounded(runs, exact, name):
    wanted, found = entries(runs / exact), entries(runs / name)
    exact, rounded = wanted[0]["grad_norm"], found[0]["grad_norm"]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=2**-8)
    assert found[0]["loss/loss"] == pytest.approx(wanted[0]["loss/loss"], rel=1e-5)
    assert found[-1]["loss/loss"] == pytest.approx(wanted[-1]["loss/loss"], rel=0.02)
