"""Fresh weights: every kind of parameter starts as the official constructors make it."""

import json
import re
from pathlib import Path

import pytest
import torch

from config.model import ModelConfig
from config.schema import FEED_FORWARDS
from models.build import build_model
from published.configs import official_config
from published.weights import to_official

FACTS = Path(__file__).parents[1] / "golden/initialisation.json"
FAMILIES = json.loads(FACTS.read_text())["families"]
UNRECORDED = {"jitmoe": {"blocks.N.mlp.gate.weight"}}
"""Memory that the official code leaves as it was."""


def fresh(family: dict) -> dict[str, torch.Tensor]:
    """Values of each kind of parameter of a new model, pooled over blocks and experts."""
    torch.manual_seed(0)
    model = build_model(official_config(family["family"], family["ctor"]))
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    pools: dict[str, list[torch.Tensor]] = {}
    for name, tensor in to_official(model, parameters).items():
        kind = re.sub(r"(?<=blocks\.|xperts\.)\d+", "N", name)
        pools.setdefault(kind, []).append(tensor.flatten())
    return {kind: torch.cat(parts).double() for kind, parts in pools.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_parameter_starts_as_published(name):
    recorded, found = FAMILIES[name]["parameters"], fresh(FAMILIES[name])
    assert found.keys() - UNRECORDED.get(name, set()) == recorded.keys()
    for kind, facts in recorded.items():
        values, n, spread = found[kind], facts["n"], facts["std"]
        assert len(values) == n, kind
        # Both are draws: five standard errors of their difference, and the digits of the record.
        assert abs(values.mean() - facts["mean"]) <= 7.1 * spread / n**0.5 + 1e-6, kind
        assert abs(values.std() - spread) <= 5 * spread / n**0.5 + 1e-6, kind
        if facts["absmax"] < 1.75 * spread or spread == 0:  # uniform, or constant
            assert abs(values.abs().max() - facts["absmax"]) <= 30 / n * facts["absmax"] + 1e-6, (
                kind
            )
        else:
            assert values.abs().max() > 2.5 * spread, kind


def test_the_facts_are_345_kinds():
    assert sum(len(family["parameters"]) for family in FAMILIES.values()) == 345


def router_weight(name: str, hidden_size: int, **options) -> torch.Tensor:
    torch.manual_seed(0)
    layer = FEED_FORWARDS[name](num_experts=32, **options)
    shape = {"hidden_size": hidden_size, "depth": 2, "num_heads": 4, "input_size": 16}
    model = build_model(ModelConfig(**shape, feed_forward=layer))
    router = model.blocks[1].feed_forward.router
    for part in ("weight", "prototypes"):
        if hasattr(router, part):
            return getattr(router, part).detach()
    return router.affinity.weight.detach()


@pytest.mark.parametrize("width", [64, 768])
def test_routers_at_other_widths(width):
    for name in ("diffmoe", "expert_choice"):
        assert router_weight(name, width).std() == pytest.approx(0.006, rel=0.06)
    assert router_weight("promoe", width).std() == pytest.approx(0.02, rel=0.06)
    bound = width**-0.5
    assert 0.98 * bound < router_weight("token_choice", width).abs().max() <= bound
    assert router_weight("deepseek", width).std() == pytest.approx((2 / width) ** 0.5, rel=0.06)


@pytest.mark.parametrize("name", ["token_choice", "expert_choice", "diffmoe", "deepseek", "promoe"])
def test_the_former_start_of_routers_is_an_option(name):
    bound = (6 / (768 + 32)) ** 0.5
    weight = router_weight(name, 768, router_init="xavier")
    assert 0.98 * bound < weight.abs().max() <= bound


def test_shared_keys_and_values_start_each_for_themselves():
    torch.manual_seed(0)
    model = build_model(ModelConfig(hidden_size=384, depth=2, num_heads=6, num_kv_heads=2))
    q, k, v = model.blocks[0].attn.qkv.weight.detach().split([384, 128, 128])
    assert q.abs().max() == pytest.approx((6 / 768) ** 0.5, rel=1e-3)
    for part in (k, v):
        assert part.abs().max() == pytest.approx((6 / 512) ** 0.5, rel=1e-3)
