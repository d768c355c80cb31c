"""What is logged: routing statistics by hand, validation at fixed noise, FLOPs, phases."""

import json

import numpy as np
import pytest
import torch

from config.layers import DiffMoEConfig, TokenChoiceConfig
from config.load import parse_config
from config.model import ModelConfig
from core.distributed import Processes
from core.files import file_hash
from core.types import ModelOutput, RoutingRecord
from data.sources import training_data
from data.vae import VAE, to_uint8
from evaluations.inception import load_inception
from evaluations.metrics import frechet_distance, statistics
from evaluations.statistics import RunningStatistics
from models.build import build_model
from models.pretrained import load_pretrained
from sampling.generate import Sampler
from sampling.labels import random_labels
from sampling.wanted import ByClass
from training.clock import Clock
from training.flops import matmul_rate, training_flops
from training.router_state import keepers
from training.routing_statistics import routing_statistics
from training.scores import SampleScores
from training.trainer import train
from training.validation import BINS, Validation
from transport.objective import Flow

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)


def record(counts, logits=None, targets=None, tokens=2):
    return RoutingRecord(
        torch.tensor(counts), tokens, capacity_logits=logits, capacity_targets=targets
    )


def test_statistics_without_predictor_are_what_was_computed():
    model = build_model(ModelConfig(depth=2, feed_forward=TokenChoiceConfig(num_experts=2)))
    micro = [[record([[2, 0], [1, 3]])], [record([[0, 2], [1, 1]])]]
    levels = [torch.tensor([0.05, 0.95]), torch.tensor([0.07, 1.0])]
    found = routing_statistics(micro, levels, model, ALONE)
    assert found.loads.tolist() == [[4, 6]]
    assert found.capacity[0, 0] == 1.0  # of two samples
    assert found.capacity[0, 9] == 1.5  # (2 + 1) / 2; a level of 1 belongs to the last bin
    assert found.capacity[0, 1:9].isnan().all()
    assert found.mean_capacity.tolist() == [1.25]
    assert found.state is None
    assert found.accuracy is None


def test_statistics_with_predictor_are_those_of_dynamic_inference():
    layer = DiffMoEConfig(num_experts=2)
    model = build_model(ModelConfig(depth=2, feed_forward=layer))
    keepers(model)[0].thresholds.copy_(torch.tensor([0.5, 0.9]))
    logits = torch.tensor([[1.0, 1.0], [-1.0, 5.0], [1.0, 5.0], [1.0, -1.0]])  # 2 samples of 2
    targets = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    micro = [[record([[1, 1], [1, 1]], logits, targets)]]
    found = routing_statistics(micro, [torch.tensor([0.0, 0.35])], model, ALONE)
    assert found.capacity[0, 0] == 2 / 2  # above: (0, 0) and (1, 1)
    assert found.capacity[0, 3] == 3 / 2  # above: (2, 0), (2, 1), (3, 0)
    assert found.accuracy.tolist() == [6 / 8]
    torch.testing.assert_close(found.state, torch.tensor([[0.5, 0.9]]))


def test_a_dense_model_has_no_statistics():
    assert routing_statistics([[]], [torch.zeros(1)], torch.nn.Identity(), ALONE) is None


@pytest.fixture
def val_flags(make_cache, tmp_path, vae_folder):
    cache, held_out = (make_cache(tmp_path / name) for name in ("train", "val"))
    values = {
        "run_dir": tmp_path / "run",
        "device": "cpu",
        "data.cached_path": cache,
        "data.val_cached_path": held_out,
        "data.vae_path": vae_folder,
        "data.image_size": 16,
        "data.num_workers": 0,
        "model.input_size": 8,
        "model.in_channels": 3,
        "model.hidden_size": 16,
        "model.num_heads": 2,
        "model.depth": 2,
        "model.num_classes": 3,
        "model.feed_forward.num_experts": 4,
        "train.max_steps": 4,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 8,
        "train.log_every": 2,
        "train.val_every": 2,
        "train.num_val_samples": 20,
        "train.sample_every": 0,
    }
    return [f"--{key}={value}" for key, value in values.items()]


class Wrong:
    """Predicts the true velocity plus t, so that the loss is t squared."""

    def __init__(self, objective):
        self.objective = objective
        self.calls = []

    def losses_at(self, model, x, cond, t, noise):
        self.calls.append((x, t, noise))

        def model(x_t, times, labels):
            return ModelOutput(x - noise + times[:, None, None, None])

        return self.objective.losses_at(model, x, cond, t, noise)

    def time_of(self, u):
        return self.objective.time_of(u)


@pytest.mark.parametrize("sharded", [False, True])
def test_validation_averages_by_noise_level(val_flags, sharded):
    config = parse_config(val_flags, "train.py")
    validation = Validation(config, Wrong(Flow()), ALONE)
    losses = validation.losses(None, sharded)
    level = (torch.arange(20) + 0.5) / 20  # of the noise; t = 1 - level
    wanted = (1 - level).square().view(BINS, 2).mean(dim=1).double()
    torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-6)
    assert sum(len(t) for _, t, _ in validation.objective.calls) == 20


def test_validation_has_fixed_images_times_and_noise_for_any_number_of_processes(val_flags):
    config = parse_config(val_flags, "train.py")

    class Half(Processes):
        def all_reduce_sum(self, tensor):
            return tensor

        def from_main(self, value):
            return value

    seen = []
    for ranks in ([ALONE], [Half(0, 2, CPU), Half(1, 2, CPU)]):
        calls = []
        for processes in ranks:
            validation = Validation(config, Wrong(Flow()), processes)
            validation.losses(None)
            calls += validation.objective.calls
        seen.append(sorted(calls, key=lambda call: call[1][0].item()))
    assert len(seen[0]) == len(seen[1]) == 3
    for one, other in zip(*seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_run_logs_all_of_it(val_flags, tmp_path):
    train(parse_config(val_flags, "train.py"), ALONE)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged, validated = {}, {}
    for entry in map(json.loads, lines):
        (validated if "val/loss" in entry else logged)[entry.pop("step")] = entry
    assert list(logged) == list(validated) == [2, 4]
    entry = logged[4]
    wanted = {"loss/loss", "loss/capacity", "grad_norm", "lr", "images_per_second", "mfu"}
    wanted |= {"memory_gib", "seconds/data", "seconds/forward_backward", "seconds/optimizer"}
    layer = "moe_layer_0"
    wanted |= {f"{name}/{layer}" for name in ("capacity", "max_load", "predictor_accuracy")}
    assert wanted <= entry.keys()
    assert 0 < entry["mfu"] < 1
    assert entry["memory_gib"] > 0
    assert all(entry[f"seconds/{phase}"] >= 0 for phase in ("data", "forward_backward"))
    assert 0 <= entry[f"predictor_accuracy/{layer}"] <= 1
    assert sum(key.startswith("val/loss_at_noise_") for key in validated[4]) == BINS
    assert validated[2]["val/loss"] != validated[4]["val/loss"]


def test_flops_of_a_dense_model_by_hand():
    D, S, L = 64, 16, 3
    shape = {"input_size": 8, "hidden_size": D, "depth": L, "num_heads": 4}
    config = parse_config(
        ["--model.feed_forward.name=dense", *(f"--model.{k}={v}" for k, v in shape.items())], "t"
    ).model
    tokens = 2 * S * (12 * D * D) + 2 * 2 * S * S * D  # qkv, proj, MLP; scores and sums
    sample = 2 * 6 * D * D  # adaLN
    ends = 2 * S * D * (4 * 4) * 2 + 2 * (256 * D + D * D + 2 * D * D)
    assert training_flops(config) == pytest.approx(3 * (L * (tokens + sample) + ends), rel=1e-6)


def test_a_moe_layer_computes_what_a_dense_one_does_and_the_router():
    def flops(*flags):
        return training_flops(parse_config([*flags, "--model.size=S"], "t").model)

    dense = flops("--model.feed_forward.name=dense")
    for name in ("token_choice", "expert_choice", "diffmoe"):
        assert dense < flops(f"--model.feed_forward.name={name}") < 1.12 * dense
    top2 = flops("--model.feed_forward.name=token_choice", "--model.feed_forward.top_k=2")
    assert top2 > 1.2 * dense


def test_a_machine_computes_something():
    assert matmul_rate(CPU, torch.float32) > 1e8


def test_the_clock_measures_phases():
    clock = Clock(CPU)
    clock.start()
    clock.mark("one")
    clock.mark("two")
    assert list(clock.read()) == ["one", "two"]
    assert all(seconds >= 0 for seconds in clock.read().values())
    clock.start()
    assert clock.read() == {}


def test_scores_while_training_change_nothing_and_are_the_samples(
    val_flags, inception_weights, tmp_path
):
    images = torch.randint(256, (8, 16, 16, 3), generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "ref.npz", arr_0=images.numpy().astype(np.uint8))
    values = {
        "every": 2,
        "reference": tmp_path / "ref.npz",
        "num_samples": 6,
        "batch_size": 4,
        "inception_weights": inception_weights,
        "inception_sha256": file_hash(inception_weights),
    }
    scored = [f"--evaluation.{key}={value}" for key, value in values.items()]
    runs = {}
    for name, more in (("plain", []), ("scored", scored)):
        argv = [*val_flags, f"--run_dir={tmp_path / name}", "--sampling.num_steps=2", *more]
        train(parse_config(argv, "train.py"), ALONE)
        runs[name] = tmp_path / name / "checkpoints" / "step_0000004"
    for file in sorted(runs["plain"].rglob("*.safetensors")):
        assert file.read_bytes() == (runs["scored"] / file.relative_to(runs["plain"])).read_bytes()
    lines = (tmp_path / "scored" / "metrics.jsonl").read_text().splitlines()
    found = [e for e in map(json.loads, lines) if "scores/FID-6" in e]
    assert [entry["step"] for entry in found] == [2, 4]
    loaded = load_pretrained(runs["scored"])
    sampler = Sampler.of(loaded, seed=loaded.config.seed)
    label = random_labels(3, loaded.config.seed)
    vae = VAE(loaded.config.data.vae_path)
    network = load_inception(inception_weights, file_hash(inception_weights))
    parts = []
    for first in (0, 4):
        indices = range(first, first + 4)
        latents, _ = sampler.latents(indices, ByClass(label, 3).condition(indices))
        parts.append(network(to_uint8(vae.decode(latents)))["pool"])
    pool = torch.cat(parts)[:6].numpy()
    reference = statistics(network(images.to(torch.uint8))["pool"].numpy())
    expected = frechet_distance(*reference, *statistics(pool))
    assert found[-1]["scores/FID-6"] == pytest.approx(expected, rel=1e-4)


def test_scores_do_not_depend_on_the_number_of_processes(
    val_flags, inception_weights, vae_folder, tmp_path
):
    np.savez(tmp_path / "ref.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    values = {
        "every": 2,
        "reference": tmp_path / "ref.npz",
        "num_samples": 6,
        "batch_size": 2,
        "inception_weights": inception_weights,
        "inception_sha256": file_hash(inception_weights),
    }
    argv = [*val_flags, *(f"--evaluation.{key}={value}" for key, value in values.items())]
    config = parse_config([*argv, "--sampling.num_steps=2"], "train.py")
    model = build_model(config.model).eval()
    sums = []

    class Half(Processes):
        def barrier(self):
            pass

        def all_reduce_sum(self, tensor):
            sums.append(tensor.clone())
            return tensor

    vae = VAE(str(vae_folder))
    data = training_data(config, ALONE)
    alone = SampleScores(config, Flow(), vae, data, ALONE).score(model)
    for rank in range(2):
        SampleScores(config, Flow(), vae, data, Half(rank, 2, CPU)).score(model)
    joined = RunningStatistics(2048)
    halves = zip(sums[:3], sums[3:], strict=True)
    joined.count, joined.total, joined.products = (one + other for one, other in halves)
    assert joined.count == 6
    scores = SampleScores(config, Flow(), vae, data, ALONE)
    expected = frechet_distance(*scores.reference, *joined.result())
    assert alone["FID-6"] == pytest.approx(expected, rel=1e-9)
