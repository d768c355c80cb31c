"""TF32 by flag, exact float32 where it matters, and what bf16 autocast leaves alone."""

import pytest
import torch

from config.model import ModelConfig
from config.protocol import known_protocols, load_protocol
from config.schema import FEED_FORWARDS
from core.precision import exact_float32, set_tf32
from data.vae import VAE
from models.build import build_model
from models.moe.capacity import CapacityPredictor


def flags() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def _restore():
    before = flags()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_exact_float32_holds_within_its_block_only():
    set_tf32(True)
    with exact_float32():
        assert flags() == (False, False)
    assert flags() == (True, True)


@pytest.mark.parametrize("allowed", [True, False])
def test_the_vae_encodes_exactly_whatever_the_process_allows(vae_folder, monkeypatch, allowed):
    vae, seen = VAE(str(vae_folder)), []
    encode = vae.model.encode
    monkeypatch.setattr(vae.model, "encode", lambda x: (seen.append(flags()), encode(x))[1])
    set_tf32(allowed)
    vae.encode_moments(torch.zeros(1, 3, 16, 16))
    assert seen == [(False, False)]
    assert flags() == (allowed, allowed)


def test_every_protocol_states_tf32_as_its_published_sampler_has_it():
    for name in known_protocols():
        assert load_protocol(name).tf32 is not name.startswith("promoe"), name


def fresh(name: str):
    torch.manual_seed(0)
    layer = FEED_FORWARDS[name](**({} if name == "dense" else {"num_experts": 4}))
    model = build_model(
        ModelConfig(input_size=8, hidden_size=32, depth=2, num_heads=2, feed_forward=layer)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_the_condition_is_computed_in_float32_under_autocast(name):
    model, got = fresh(name), {}
    for key, module in model.named_modules():
        if key.endswith("modulation") or key == "time_embed":
            module.register_forward_hook(
                lambda m, i, output, key=key: got.setdefault(key, []).append(output)
            )
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.arange(2)
    model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        model(x, t, y)
    assert len(got) == 4
    for plain, under_autocast in got.values():
        plain, under_autocast = (
            [o] if isinstance(o, torch.Tensor) else o for o in (plain, under_autocast)
        )
        for a, b in zip(plain, under_autocast, strict=True):
            assert a.dtype == b.dtype == torch.float32
            assert torch.equal(a, b)


def test_predictions_keep_their_order_under_autocast():
    torch.manual_seed(0)
    predictor, tokens = CapacityPredictor(64, 4, 0.95), torch.randn(2048, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = predictor(tokens)
    assert logits.dtype == torch.float32
    for expert in logits.T:  # the last product in bf16 leaves about a thousand
        assert len(expert.unique()) > 2000
