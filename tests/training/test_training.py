"""Averages, optimizer state, router state, one step, checkpoints."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from config.layers import DiffMoEConfig
from config.load import parse_config
from config.model import ModelConfig
from config.schema import Config, OptimConfig, TrainConfig
from core.distributed import Processes
from core.errors import UserError
from models.build import build_model
from models.pretrained import find_checkpoint, load_pretrained, load_weights, save_weights
from models.sealed import seal
from training import router_state
from training.checkpoint import TrainingState, checkpoint_of, resume, save_checkpoint
from training.ema import EMA
from training.optim import (
    build_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
)
from training.saving import CheckpointWriter
from training.step import TrainStep
from transport.objective import Flow

ALONE = Processes(0, 1, torch.device("cpu"))
LATENTS = {
    "vae_path": "vae",
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "latent_channels": 4,
    "class_names": ["a", "b", "c"],
}


def config(tmp_path, **model):
    layer = DiffMoEConfig(num_experts=4)
    shape = {"input_size": 4, "patch_size": 1, "hidden_size": 16, "depth": 2, "num_heads": 2}
    return Config(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(**shape | model, num_classes=3, learn_sigma=False, feed_forward=layer),
        train=TrainConfig(max_steps=10, global_batch_size=8, micro_batch_size=4),
        optim=OptimConfig(lr=1e-2),
    )


def parts(tmp_path, **model):
    torch.manual_seed(0)
    settings = config(tmp_path, **model)
    settings.sampling.sampler = "euler"
    made = build_model(settings.model)
    ema = EMA(copy.deepcopy(made), 0.9, warmup=False)
    optimizer = build_optimizer(made, settings.optim)
    return TrainingState(settings, made, {"ema": ema}, optimizer, LATENTS)


def save(state, step):
    state.step = step
    writer = CheckpointWriter(state.config, ALONE)
    save_checkpoint(state, writer)
    writer.finish()
    return Path(state.config.run_dir) / "checkpoints" / f"step_{step:07d}"


def batches(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(4, 4, 4, 4, generator=g), torch.tensor([0, 1, 2, 0])) for _ in range(count)
    ]


def step(state, data, number=0, optimizer=None, processes=ALONE, **changes):
    """One step on the micro-batches `data`."""
    train = dataclasses.replace(
        state.config.train, global_batch_size=4 * len(data) * processes.world_size, **changes
    )
    settings = dataclasses.replace(state.config, seed=0, train=train)
    optimizer = optimizer or state.optimizer
    make = TrainStep(state.model, state.model, Flow(), optimizer, settings, processes)
    return make(iter(data), number)


def test_ema_by_hand_and_live_thresholds():
    model = build_model(ModelConfig(hidden_size=16, num_heads=2, depth=2))
    ema = EMA(copy.deepcopy(model), 0.75, warmup=False)
    start = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
        router_state.keepers(model)[0].thresholds.fill_(0.3)
    ema.update(model, step=0)
    for average, old in zip(ema.model.parameters(), start, strict=True):
        torch.testing.assert_close(average, old + 0.25)
        assert not average.requires_grad
    assert (router_state.keepers(ema.model)[0].thresholds == 0.3).all()


def test_averages_every_few_steps_have_the_decay_to_that_power():
    """Where the weights stand still between updates, the same as an update at every step."""
    model = torch.nn.Linear(3, 2)
    model.register_buffer("thresholds", torch.zeros(2))
    one, other = (EMA(copy.deepcopy(model), 0.9, warmup=False, every=n) for n in (1, 4))
    before = other.model.weight.clone()
    for step in range(8):
        if step % 4 == 0:
            torch.nn.init.normal_(model.weight)
        model.thresholds += 1
        one.update(model, step)
        other.update(model, step)
        if step == 2:
            assert torch.equal(other.model.weight, before)
        assert torch.equal(other.model.thresholds, model.thresholds)
    torch.testing.assert_close(other.model.weight, one.model.weight)
    assert (one.model.weight - before).abs().max() > 0.1


def test_ema_warmup_starts_short():
    model = torch.nn.Linear(1, 1)
    ema = EMA(copy.deepcopy(model), 0.999, warmup=True)
    with torch.no_grad():
        model.weight.zero_()
        before = ema.model.weight.item()
        ema.update(model, step=0)
        assert ema.model.weight.item() == pytest.approx(0.1 * before)
        ema.update(model, step=1_000_000)
        assert ema.model.weight.item() == pytest.approx(0.1 * before * 0.999)


def test_thresholds_take_one_step_from_the_mean_quantile(tmp_path):
    state = parts(tmp_path)
    result = step(state, batches(2))
    quantiles = torch.stack([layers[0].quantiles for layers in result.records])
    assert quantiles.shape == (2, 4)
    predictor = router_state.keepers(state.model)[0]
    torch.testing.assert_close(predictor.thresholds, 0.05 * quantiles.mean(0))


def test_accumulation_is_the_mean_of_the_micro_batches(tmp_path):
    """Gradients of two micro-batches in one step, against the two losses added by hand."""
    state = parts(tmp_path)
    model = state.model
    still = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    data = batches(2)
    result = step(state, data, optimizer=still)
    together = {n: p.grad.clone() for n, p in model.named_parameters()}
    sums, losses = {n: torch.zeros_like(g) for n, g in together.items()}, []
    for slot in range(2):
        group = Alone(slot, 2, torch.device("cpu"))
        alone = step(state, [data[slot]], optimizer=still, processes=group)
        losses.append(alone.losses["loss"] + alone.losses["capacity"])
        for n, p in model.named_parameters():
            sums[n] += p.grad / 2
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, sums[name])
    total = result.losses["loss"] + result.losses["capacity"]
    torch.testing.assert_close(total, torch.stack(losses).mean())


class Alone(Processes):
    """One of several processes, without the others."""

    def all_reduce_mean(self, tensor):
        return tensor


def test_a_model_learns_a_constant(tmp_path):
    state = parts(tmp_path)
    data = [(torch.full((4, 4, 4, 4), 2.0), torch.tensor([0, 1, 2, 0]))] * 2
    losses = [step(state, data, n).losses["loss"].item() for n in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_resumed_run_is_where_it_stopped(tmp_path):
    state = parts(tmp_path)
    for number in range(3):
        step(state, batches(2, number), number)
        state.emas["ema"].update(state.model, number)
    save(state, 3)
    twin = parts(tmp_path)
    twin.config.resume = "auto"
    resume(twin, checkpoint_of(twin.config, ALONE), ALONE)
    assert twin.step == 3
    for name, module in state.modules().items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, twin.modules()[name].state_dict()[key]), key
    moments = optimizer_tensors(state.model, state.optimizer)
    for name, tensor in optimizer_tensors(twin.model, twin.optimizer).items():
        assert torch.equal(tensor, moments[name]), name
    for one in (state, twin):
        step(one, batches(2, 3), 3)
    for one, other in zip(state.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_checkpoints_hold_no_pickle_and_the_newest_is_found(tmp_path):
    state = parts(tmp_path)
    for number in (9, 10):
        save(state, number)
    run = tmp_path / "run"
    unfinished = run / "checkpoints" / "step_0000011"
    unfinished.mkdir()
    folder = find_checkpoint(run)
    assert folder.name == "step_0000010"
    assert find_checkpoint(folder) == folder
    assert {p.suffix for p in folder.iterdir()} == {".yaml", ".json", ".safetensors"}
    loaded = load_pretrained(run)
    assert (loaded.state["step"], loaded.state["latents"]) == (10, LATENTS)
    assert loaded.config == state.config
    assert not loaded.model.training


def test_a_run_with_checkpoints_is_not_overwritten(tmp_path):
    state = parts(tmp_path)
    assert checkpoint_of(state.config, ALONE) is None
    save(state, 1)
    with pytest.raises(UserError, match=r"has checkpoints; give --resume auto"):
        checkpoint_of(state.config, ALONE)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    save(parts(tmp_path), 1)
    deeper = parts(tmp_path, depth=4)
    deeper.config.resume = "auto"
    with pytest.raises(UserError, match=r"another architecture: model\.depth is 2 there, 4 here"):
        resume(deeper, checkpoint_of(deeper.config, ALONE), ALONE)


def test_weights_of_another_architecture_are_named(tmp_path):
    save_weights(parts(tmp_path).model, tmp_path / "w.safetensors")
    wider = parts(tmp_path, hidden_size=32).model
    wanted = r"is \(16, .*\) in the file, \(32, .*\) in the model.* \(and \d+ more\)"
    with pytest.raises(UserError, match=wanted):
        load_weights(wider, tmp_path / "w.safetensors")
    deeper = parts(tmp_path, depth=4).model
    with pytest.raises(UserError, match=r"blocks\.2\.\S+ is missing in the file"):
        load_weights(deeper, tmp_path / "w.safetensors")


def test_damaged_and_missing_checkpoints_are_named(tmp_path):
    with pytest.raises(UserError, match=r"run: no checkpoint here"):
        load_pretrained(tmp_path / "run")
    folder = save(parts(tmp_path), 1)
    with pytest.raises(UserError, match=r"weights: unknown 'ema_0\.5'; known: ema, model"):
        load_pretrained(tmp_path / "run", "ema_0.5")
    weights = folder / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"ema\.safetensors: \d+ bytes, \d+ were written"):
        load_pretrained(tmp_path / "run")
    assert load_pretrained(tmp_path / "run", "model").state["step"] == 1  # its files are whole
    seal(folder)
    with pytest.raises(UserError, match=r"ema\.safetensors: not a readable safetensors file"):
        load_pretrained(tmp_path / "run")


@pytest.mark.parametrize("text", ["", "{}", "3", '{"step": 1, "latents": {}}'])
def test_a_damaged_state_is_named(tmp_path, text):
    folder = save(parts(tmp_path), 1)
    (folder / "state.json").write_text(text)
    seal(folder)
    with pytest.raises(UserError, match=r"step_0000001/state\.json: (not readable|damaged)"):
        load_pretrained(tmp_path / "run")


def test_optimizer_state_by_name(tmp_path):
    state = parts(tmp_path)
    model = state.model
    step(state, batches(1))
    tensors = optimizer_tensors(model, state.optimizer)
    assert "final.linear.weight/exp_avg" in tensors
    fresh = build_optimizer(model, OptimConfig(lr=0.5))

    def fill(targets):
        assert targets.keys() == tensors.keys()
        for name, target in targets.items():
            target.copy_(tensors[name])

    load_optimizer_tensors(model, fresh, fill)
    assert fresh.param_groups[0]["lr"] == 0.5
    weight = model.final.linear.weight
    assert torch.equal(fresh.state[weight]["exp_avg"], tensors["final.linear.weight/exp_avg"])


def test_learning_rate_is_constant_unless_asked():
    paper = Config()
    assert {learning_rate(paper, step) for step in (0, 1, 699_999)} == {1e-4}
    optim = OptimConfig(lr=2.0, lr_schedule="cosine", warmup_steps=3)
    config = Config(optim=optim, train=TrainConfig(max_steps=13))
    rates = [learning_rate(config, step) for step in range(13)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[8] == pytest.approx(1.0)
    assert rates == sorted(rates[:4]) + sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.1


def test_quickstart_config_is_the_documented_one():
    made = parse_config(["--config", "config/quickstart.yaml"], "train.py", 2)
    assert (made.model.hidden_size, made.model.depth, made.train.max_steps) == (96, 4, 2000)
    assert made.model.feed_forward.num_experts == 8
