"""What must hold on every device: one way of adding up, backends alike, bf16 near float32, resumes.

`device` is the CPU, and a GPU where there is one.
"""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import _dynamo as dynamo

from config.layers import DeepSeekConfig, DiffMoEConfig, ExpertChoiceConfig, TokenChoiceConfig
from config.load import parse_config
from config.model import ModelConfig
from config.race import RaceConfig
from core.distributed import Processes
from core.precision import exact_float32
from core.types import RouterContext, RoutingPlan
from models.build import FEED_FORWARDS, build_model
from models.compiled import compile_blocks
from models.moe.dispatch import places_of
from models.moe.experts import Experts
from models.pretrained import find_checkpoint, read_tensors, weights_path
from training.trainer import train

D = 32
LAYERS = {
    "token_choice": TokenChoiceConfig(num_experts=4, top_k=2),
    "expert_choice": ExpertChoiceConfig(num_experts=4, capacity=2.0),
    "diffmoe": DiffMoEConfig(num_experts=4),
    "deepseek": DeepSeekConfig(num_experts=4, intermediate_size=32),
    "race": RaceConfig(num_experts=4),
}


def made(name, device):
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=D, feed_forward=LAYERS[name])
    layer = FEED_FORWARDS[name](config).train()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return layer.to(device)


def gradients(layer, x, autocast=False):
    """Outputs and all gradients."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y, record = layer(x, RouterContext())
    loss = y.float().square().mean() + sum(record.losses.values())
    inputs = [x, *(p for p in layer.parameters())]
    return [y, *torch.autograd.grad(loss, inputs, allow_unused=True)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_adds_up_in_the_same_order_every_time(name, autocast, device):
    """To the bit, forward and backward: pairs by index would be added in any order on a GPU."""
    layer = made(name, device)
    x = torch.randn(4, 64, D, generator=torch.Generator().manual_seed(1)).to(device)
    x.requires_grad_()
    first = gradients(layer, x, autocast)
    for _ in range(3):
        for one, other in zip(first, gradients(layer, x, autocast), strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("name", LAYERS)
def test_a_device_computes_what_the_cpu_computes(name, device):
    x = torch.randn(4, 64, D, generator=torch.Generator().manual_seed(1))
    with exact_float32():
        found = gradients(made(name, device), x.to(device).requires_grad_())
    wanted = gradients(made(name, torch.device("cpu")), x.requires_grad_())
    for one, other in zip(wanted, found, strict=True):
        assert (
            one is None
            or torch.testing.assert_close(other.cpu(), one, rtol=1e-3, atol=1e-5) is None
        )


@pytest.mark.parametrize("mlp", ["gelu", "swiglu", "swiglu_bias"])
@pytest.mark.parametrize("counts", [[32, 32, 32], [70, 0, 26], [0, 96, 0]])
def test_one_kernel_for_all_experts_is_the_loop(counts, mlp, device):
    torch.manual_seed(0)
    experts = Experts(3, D, 64, mlp).to(device)
    x = torch.randn(96, D, device=device, requires_grad=True)
    plan = RoutingPlan(
        torch.arange(96, device=device),
        torch.ones(96, device=device),
        torch.tensor(counts, device=device),
        counts,
    )
    found = []
    for experts.backend in ("loop", "grouped_mm"):
        with torch.autocast(device.type, torch.bfloat16):
            y = experts(x, plan, places_of(plan, 96))
        found.append(
            [y, *torch.autograd.grad(y.float().square().sum(), [x, *experts.parameters()])]
        )
    for one, other in zip(*found, strict=True):
        most = 0.05 * one.abs().max().item()
        torch.testing.assert_close(other.float(), one.float(), rtol=0.05, atol=most)


@pytest.mark.parametrize("name", LAYERS)
def test_bf16_is_near_float32(name, device):
    x = torch.randn(4, 64, D, generator=torch.Generator().manual_seed(1)).to(device)
    layer = made(name, device).eval()
    exact = layer(x, RouterContext())[0]
    with torch.autocast(device.type, torch.bfloat16):
        rough = layer(x, RouterContext())[0]
    assert (rough.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.slow
def test_steps_of_one_shape_compile_once(device):
    dynamo.reset()
    shape = {"input_size": 4, "patch_size": 1, "hidden_size": D, "depth": 2, "num_heads": 2}
    model = build_model(ModelConfig(**shape, num_classes=3, feed_forward=LAYERS["diffmoe"]))
    model = model.to(device).train()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_blocks(model, varying=False, backend=backend)
    y = torch.tensor([0, 1, 3], device=device)
    for step in range(4):
        x = torch.randn(3, 4, 4, 4, device=device)
        model(x, torch.rand(3, device=device), y, step=step).prediction.sum().backward()
    assert len(graphs) == 2  # a dense block and one with experts
    dynamo.reset()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_run_to_the_bit(precision, device, tiny_config, tmp_path):
    alone = Processes(0, 1, device)

    def run(name, *flags):
        argv = ["--config", tiny_config, "--run_dir", tmp_path / name, "--device", device.type]
        argv += ["--train.precision", precision, "--resume", "auto", *flags]
        train(parse_config([str(a) for a in argv], "train.py"), alone)

    run("whole", "--train.max_steps", "4")
    for steps in ("2", "4"):
        run("parts", "--train.max_steps", steps)
    for kind in ("model", "ema", "optimizer"):
        one, other = (
            read_tensors(weights_path(find_checkpoint(tmp_path / name), kind))
            for name in ("whole", "parts")
        )
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            assert torch.equal(other[key], tensor), f"{kind}: {key}"


@pytest.mark.parametrize(
    ("changes", "most"), [({}, 1), ({"inference": "topk"}, 0), ({"inference": "fixed"}, 1)]
)
def test_inference_looks_at_the_device_once_at_most(changes, most, device, monkeypatch):
    """A look makes the host wait, so that the next layer's work is asked for late."""
    layer = made("diffmoe", device).eval()
    layer.router.config = replace(LAYERS["diffmoe"], **changes)
    layer.router.predictor.thresholds.fill_(0.5)
    x = torch.randn(4, 64, D, generator=torch.Generator().manual_seed(1)).to(device)
    seen = []
    for name in ("tolist", "item", "cpu", "nonzero", "__bool__", "__int__", "__float__"):
        ask = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, ask=ask: seen.append(ask) or ask(self, *a)
        )
    with torch.no_grad(), warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        if device.type == "cuda":
            layer(x, RouterContext())  # what libraries do once
            seen.clear()
            torch.cuda.set_sync_debug_mode("warn")
        try:
            layer(x, RouterContext())
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert len(seen) == most
    assert len([w for w in waits if "synchroniz" in str(w.message)]) <= most
