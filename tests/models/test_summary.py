"""Parameter counts against those of the published classes, and against the paper's tables."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from config.layers import (
    DenseConfig,
    DiffMoEConfig,
    ExpertChoiceConfig,
    TokenChoiceConfig,
)
from config.load import load_config, parse_config
from config.model import ModelConfig
from config.race import RaceConfig
from config.sizes import SIZES
from models.flops import forward_flops
from models.summary import summarize

ROOT = Path(__file__).parents[2]
CONFIG = "diffmoe/S_E16_ddpm"
COUNTS = json.loads((ROOT / "tests" / "golden" / "counts.json").read_text())
MORE_COUNTS = json.loads((ROOT / "tests" / "golden" / "counts_efficient_moe.json").read_text())
LAYERS = {
    "Dense": lambda experts: DenseConfig(),
    "TC": lambda experts: TokenChoiceConfig(num_experts=experts),
    "EC": lambda experts: ExpertChoiceConfig(num_experts=experts),
    "DiffMoE": lambda experts: DiffMoEConfig(num_experts=experts),
}


def config_of(name):
    """The model of an entry such as `DiffMoE-L-E16 256px (learn_sigma=False)`."""
    learn_sigma = "learn_sigma=False" not in name
    if name.startswith("DiffMoE config"):
        shape = SIZES["S"] | {"num_heads": 16, "input_size": 16}
        return ModelConfig(**shape, learn_sigma=learn_sigma, feed_forward=DiffMoEConfig())
    family, *parts = name.split()[0].replace("/2", "").replace("DiT-", "").split("-")
    experts = int(parts[1][1:]) if len(parts) > 1 else 0
    layer = LAYERS[family](experts)
    return ModelConfig(**SIZES[parts[0]], learn_sigma=learn_sigma, feed_forward=layer)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_the_published_classes(name):
    wanted, found = COUNTS[name], summarize(config_of(name))
    assert (found.total, found.trainable) == (wanted["total"], wanted["trainable"])
    assert found.by_name == wanted["groups"]
    assert found.routed_experts == wanted["routed_experts"]
    if "active" in wanted:
        assert found.activated(1.0) == wanted["active"]


@pytest.mark.parametrize(
    ("experts", "feed_forward", "total"),
    [(2, 314.8, 571.2), (4, 516.3, 772.7), (8, 919.3, 1175.7), (16, 1725.3, 1981.7)],
)
def test_table_9(experts, feed_forward, total):
    layer = DiffMoEConfig(num_experts=experts)
    found = summarize(ModelConfig(**SIZES["L"], learn_sigma=True, feed_forward=layer))
    assert round(found.by_table["FFN"] / 1e6, 1) == feed_forward
    assert int(found.by_table["attention"] / 1e5) / 10 == 100.7
    assert round(found.by_table["adaLN"] / 1e6) == 151
    assert round(found.trainable / 1e6, 1) == total


def test_equation_40():
    """Table 3: 454M at the measured capacity of 0.95; Eq. 40 itself gives 459M at 1."""
    found = summarize(ModelConfig(**SIZES["L"], learn_sigma=True, feed_forward=DiffMoEConfig()))
    assert round(found.activated_by_equation(0.95) / 1e6) == 454
    assert round(found.activated_by_equation(1.0) / 1e6) == 459


@pytest.mark.parametrize(("size", "millions"), [("XL", 675), ("XXL", 951), ("XXXL", 1353)])
def test_sizes_of_table_5(size, millions):
    model = ModelConfig(**SIZES[size], learn_sigma=False, feed_forward=DenseConfig())
    assert round(summarize(model).trainable / 1e6) == millions


def test_table_1_leaves_the_router_out_for_s_and_b():
    """139M and 555M without router and predictor, 1.982B with."""
    for size, printed in (("S", 139), ("B", 555)):
        found = summarize(ModelConfig(**SIZES[size], learn_sigma=True))
        assert round((found.trainable - found.by_name["router"]) / 1e6) == printed
    found = summarize(ModelConfig(**SIZES["L"], learn_sigma=True))
    assert round(found.trainable / 1e9, 3) == 1.982


def test_the_command_prints_json():
    done = subprocess.run(
        [sys.executable, "-m", "models.summary", "--json", "--config", CONFIG],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout)
    assert report["total"] == COUNTS["DiffMoE-S-E16 256px"]["total"]
    assert report["activated"]["C=1"] == COUNTS["DiffMoE-S-E16 256px"]["active"]


PUBLISHED = {
    "dsmoe/S_E16_flow": ("DSMoE/config/000_DSMoE_S_E16_Flow_half_misx2_s1a2_rope2d_l10", 33),
    "dsmoe/S_E48_flow": ("DSMoE/config/000_DSMoE_S_E48_Flow_half_misx0.3_s1a5_rope2d_l12", 30),
    "dsmoe/B_E16_flow": ("DSMoE/config/000_DSMoE_B_E16_Flow_half_misx2_s1a2_rope2d_l10", 132),
    "dsmoe/B_E48_flow": ("DSMoE/config/000_DSMoE_B_E48_Flow_half_misx0.3_s1a5_rope2d_l12", 118),
    "dsmoe/L_E16_flow": ("DSMoE/config/000_DSMoE_L_E16_Flow_half_misx2_s1a2_rope2d_l20", 465),
    "dsmoe/L_E48_flow": ("DSMoE/config/000_DSMoE_L_E48_Flow_half_misx0.4_s1a5_rope2d_l24", 436),
    "dsmoe/3B_E16_flow": ("DSMoE/config/000_DSMoE_3B_E16_Flow_half_misx2.5_s1a2_rope2d_l30", 965),
    "jit/B16": ("JiT-B/16 256px", None),
    "jit/L16": ("JiT-L/16 256px", None),
    "jit/H16": ("JiT-H/16 256px", None),
    "jit/B16_E16": ("JiT-B/16-E16 256px", 133),
    "jit/L16_E16": ("JiT-L/16-E16 256px", None),
    "jit/H16_E16": ("JiT-H/16-E16 256px", None),
}
"""Config, entry of the counts, and the README's activated millions, which are 2^20 each."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_of_the_second_paper_have_the_published_counts(name):
    entry, printed = PUBLISHED[name]
    wanted = MORE_COUNTS[entry]
    found = summarize(load_config(ROOT / "config" / f"{name}.yaml").model)
    assert (found.total, found.trainable) == (wanted["total"], wanted["trainable"])
    assert found.by_name == wanted["groups"]
    assert found.routed_experts == wanted["routed_experts"]
    if "active" in wanted:
        assert found.activated(found.capacity) == wanted["active"]
    if printed is not None:
        assert round(found.activated(found.capacity) / 2**20) == printed


def test_the_printed_figures_of_dense_jit_are_plain_millions():
    for name, printed in (("jit/B16", 131), ("jit/L16", 459)):
        found = summarize(load_config(ROOT / "config" / f"{name}.yaml").model)
        assert round(found.activated(1.0) / 1e6) == printed


@pytest.mark.parametrize("size", ["S_E16", "S_E48", "B_E16", "B_E48", "L_E16", "L_E48", "3B_E16"])
def test_dsmoe_under_ddpm_is_the_same_model(size):
    argv = ["--config", f"dsmoe/{size}_flow"]
    flow, ddpm = (
        parse_config([*argv, "--objective.name", objective], "train.py")
        for objective in ("flow", "ddpm")
    )
    assert flow.model == ddpm.model
    assert (flow.objective.name, ddpm.objective.name) == ("flow", "ddpm")


RACE = {
    "B": (0.531, 0.135, 0.127),
    "M": (1.106, 0.281, 0.265),
    "L": (1.889, 0.479, 0.453),
    "XL": (2.788, 0.707, 0.669),
}
"""Billions of RaceDiT 4-in-32, total and activated, and of its dense counterpart."""


@pytest.mark.parametrize("size", RACE)
def test_sizes_of_expert_race(size):
    """The printed counts are those of the blocks' matrices, the router's first layer among them."""
    found = summarize(load_config(ROOT / "config" / "race" / f"{size}_4in32_flow.yaml").model)
    D, depth = SIZES[size]["hidden_size"], SIZES[size]["depth"]
    beside = found.roles["attention"] + found.roles["adaLN"] - depth * 10 * D  # no biases
    experts = found.roles["routed experts"] - depth * 32 * 2 * D  # nor theirs: 4 D / 4 + D
    printed = [
        (beside + experts + depth * D * D) / 1e9,
        (beside + experts * 4 / 32 + depth * D * D) / 1e9,
        (beside + depth * 8 * D * D) / 1e9,
    ]
    assert printed == pytest.approx(RACE[size], rel=5e-3)
    assert printed[0] == pytest.approx(RACE[size][0], rel=1e-3)
    outputs = 32 + 16
    assert found.roles["router"] == depth * (D * D + D + outputs * D + outputs)
    assert found.activated(4.0) == found.total - found.routed_experts * 28 / 32


@pytest.mark.parametrize(
    ("choice", "billions"), [("1in4", 0.297), ("1in8", 0.524), ("1in16", 0.978)]
)
def test_table_5_of_expert_race(choice, billions):
    top_k, experts = map(int, choice.split("in"))
    layer = RaceConfig(num_experts=experts, top_k=top_k)
    found = summarize(ModelConfig(**SIZES["B"], moe_every=1, feed_forward=layer)).roles
    D = SIZES["B"]["hidden_size"]
    biases = 12 * (10 * D + experts * 5 * D)
    total = found["attention"] + found["adaLN"] + found["routed experts"] - biases
    assert total / 1e9 == pytest.approx(billions, rel=1.5e-3)


@pytest.mark.parametrize("choice", ["2in8", "4in32"])
@pytest.mark.parametrize("size", RACE)
def test_a_race_is_a_dense_model_at_equal_compute_but_for_its_router(size, choice):
    config = load_config(ROOT / "config" / "race" / f"{size}_{choice}_flow.yaml").model
    dense = dataclasses.replace(config, feed_forward=DenseConfig())
    router = (
        2
        * 256
        * sum(
            math.prod(shape) * config.depth
            for shape in (
                (config.hidden_size, config.hidden_size),
                (config.hidden_size, config.feed_forward.num_experts + 16),
            )
        )
    )
    assert forward_flops(config) - forward_flops(dense) == pytest.approx(router, rel=1e-6)
