"""Averages, optimizer state, router state, one step, checkpoints."""

import dataclasses

import pytest
import torch

from config.load import parse_config
from config.schema import Config, DiffMoEConfig, ModelConfig, OptimConfig, TrainConfig
from core.distributed import Processes
from core.errors import UserError
from models.build import build_model
from models.pretrained import find_checkpoint, load_pretrained, load_weights, save_weights
from training import router_state
from training.checkpoint import resume, save_checkpoint
from training.ema import EMA
from training.optim import (
    build_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
)
from training.step import train_step
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
    ema = EMA(made, 0.9, warmup=False)
    return settings, made, ema, build_optimizer(made, settings.optim)


def batches(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(4, 4, 4, 4, generator=g), torch.tensor([0, 1, 2, 0])) for _ in range(count)
    ]


def step(model, optimizer, data, number=0):
    result = train_step(model, model, Flow(), optimizer, iter(data), len(data), number, 0, ALONE)
    router_state.update(model, result.records, ALONE)
    return result


def test_ema_by_hand_and_live_thresholds():
    model = build_model(ModelConfig(hidden_size=16, num_heads=2, depth=2))
    ema = EMA(model, 0.75, warmup=False)
    start = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
        router_state.capacity_predictors(model)[0].thresholds.fill_(0.3)
    ema.update(model, step=0)
    for average, old in zip(ema.model.parameters(), start, strict=True):
        torch.testing.assert_close(average, old + 0.25)
        assert not average.requires_grad
    assert (router_state.capacity_predictors(ema.model)[0].thresholds == 0.3).all()


def test_ema_warmup_starts_short():
    model = torch.nn.Linear(1, 1)
    ema = EMA(model, 0.999, warmup=True)
    with torch.no_grad():
        model.weight.zero_()
        before = ema.model.weight.item()
        ema.update(model, step=0)
        assert ema.model.weight.item() == pytest.approx(0.1 * before)
        ema.update(model, step=1_000_000)
        assert ema.model.weight.item() == pytest.approx(0.1 * before * 0.999)


def test_thresholds_take_one_step_from_the_mean_quantile(tmp_path):
    _, model, _, optimizer = parts(tmp_path)
    result = step(model, optimizer, batches(2))
    quantiles = torch.stack([layers[0].quantiles for layers in result.records])
    assert quantiles.shape == (2, 4)
    predictor = router_state.capacity_predictors(model)[0]
    torch.testing.assert_close(predictor.thresholds, 0.05 * quantiles.mean(0))


def test_accumulation_is_the_mean_of_the_micro_batches(tmp_path):
    """Gradients of two micro-batches in one step, against the two losses added by hand."""
    _, model, _, _ = parts(tmp_path)
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    data = batches(2)
    result = step(model, still, data)
    together = {n: p.grad.clone() for n, p in model.named_parameters()}
    sums, losses = {n: torch.zeros_like(g) for n, g in together.items()}, []
    for slot in range(2):
        group = Processes(slot, 2, torch.device("cpu"))
        alone = train_step(model, model, Flow(), still, iter([data[slot]]), 1, 0, 0, group)
        losses.append(alone.losses["loss"] + alone.losses["capacity"])
        for n, p in model.named_parameters():
            sums[n] += p.grad / 2
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, sums[name])
    total = result.losses["loss"] + result.losses["capacity"]
    torch.testing.assert_close(total, torch.stack(losses).mean())


def test_a_model_learns_a_constant(tmp_path):
    _, model, _, optimizer = parts(tmp_path)
    data = [(torch.full((4, 4, 4, 4), 2.0), torch.tensor([0, 1, 2, 0]))] * 2
    losses = [step(model, optimizer, data, n).losses["loss"].item() for n in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_resumed_run_is_where_it_stopped(tmp_path):
    settings, model, ema, optimizer = parts(tmp_path)
    for number in range(3):
        step(model, optimizer, batches(2, number), number)
        ema.update(model, number)
    save_checkpoint(settings, 3, model, ema, optimizer, LATENTS)
    twin_settings, twin, twin_ema, twin_optimizer = parts(tmp_path)
    twin_settings.resume = "auto"
    assert resume(twin_settings, twin, twin_ema, twin_optimizer) == 3
    for one, other in ((model, twin), (ema.model, twin_ema.model)):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name
    moments = optimizer_tensors(model, optimizer)
    for name, tensor in optimizer_tensors(twin, twin_optimizer).items():
        assert torch.equal(tensor, moments[name]), name
    step(model, optimizer, batches(2, 3), 3)
    step(twin, twin_optimizer, batches(2, 3), 3)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_checkpoints_hold_no_pickle_and_the_newest_is_found(tmp_path):
    settings, model, ema, optimizer = parts(tmp_path)
    for number in (9, 10):
        save_checkpoint(settings, number, model, ema, optimizer, LATENTS)
    run = tmp_path / "run"
    unfinished = run / "checkpoints" / "step_0000011"
    unfinished.mkdir()
    folder = find_checkpoint(run)
    assert folder.name == "step_0000010"
    assert find_checkpoint(folder) == folder
    assert {p.suffix for p in folder.iterdir()} == {".yaml", ".json", ".safetensors"}
    loaded = load_pretrained(run)
    assert loaded.state == {"step": 10, "latents": LATENTS}
    assert loaded.config == dataclasses.replace(settings)
    assert not loaded.model.training


def test_a_run_with_checkpoints_is_not_overwritten(tmp_path):
    settings, model, ema, optimizer = parts(tmp_path)
    assert resume(settings, model, ema, optimizer) == 0
    save_checkpoint(settings, 1, model, ema, optimizer, LATENTS)
    with pytest.raises(UserError, match=r"has checkpoints; give --resume auto"):
        resume(settings, model, ema, optimizer)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    settings, model, ema, optimizer = parts(tmp_path)
    save_checkpoint(settings, 1, model, ema, optimizer, LATENTS)
    deeper = parts(tmp_path, depth=4)
    deeper[0].resume = "auto"
    with pytest.raises(UserError, match=r"another architecture: model\.depth is 2 there, 4 here"):
        resume(*deeper)


def test_weights_of_another_architecture_are_named(tmp_path):
    _, model, _, _ = parts(tmp_path)
    save_weights(model, tmp_path / "w.safetensors")
    wider = parts(tmp_path, hidden_size=32)[1]
    wanted = r"is \(16, .*\) in the file, \(32, .*\) in the model.* \(and \d+ more\)"
    with pytest.raises(UserError, match=wanted):
        load_weights(wider, tmp_path / "w.safetensors")
    deeper = parts(tmp_path, depth=4)[1]
    with pytest.raises(UserError, match=r"blocks\.2\.\S+ is missing in the file"):
        load_weights(deeper, tmp_path / "w.safetensors")


def test_damaged_and_missing_checkpoints_are_named(tmp_path):
    settings, model, ema, optimizer = parts(tmp_path)
    with pytest.raises(UserError, match=r"run: no checkpoint here"):
        load_pretrained(tmp_path / "run")
    folder = save_checkpoint(settings, 1, model, ema, optimizer, LATENTS)
    weights = folder / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"ema\.safetensors: not a readable safetensors file"):
        load_pretrained(tmp_path / "run")


@pytest.mark.parametrize("text", ["", "{}", "3", '{"step": 1, "latents": {}}'])
def test_a_damaged_state_is_named(tmp_path, text):
    settings, model, ema, optimizer = parts(tmp_path)
    folder = save_checkpoint(settings, 1, model, ema, optimizer, LATENTS)
    (folder / "state.json").write_text(text)
    with pytest.raises(UserError, match=r"step_0000001/state\.json: (not readable|damaged)"):
        load_pretrained(tmp_path / "run")


def test_optimizer_state_by_name(tmp_path):
    _, model, _, optimizer = parts(tmp_path)
    step(model, optimizer, batches(1))
    tensors = optimizer_tensors(model, optimizer)
    assert "final.linear.weight/exp_avg" in tensors
    fresh = build_optimizer(model, OptimConfig(lr=0.5))
    load_optimizer_tensors(model, fresh, tensors)
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
